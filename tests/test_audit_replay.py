"""Trainings that are run again: targets, checkpoints, the step in which two traces part."""

import json
import re
import subprocess
import sys

import audit_targets
import pytest
import torch

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit.__main__ import main
from churn_kernels.audit.replay import built
from churn_kernels.audit.settings import as_recorded

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

FILE = audit_targets.__file__


def record(path, build, *, steps=4, before=lambda n, model: None):
    training = build("cpu")
    with ck.audit.record(path, training.model, training.optimizer):
        for n in range(1, steps + 1):
            before(n, training.model)
            training.step(n)


def flipped(n, model):
    if n == 3:
        ck.audit.pairs.flip_ulp(model, 0)


# The step in which two traces part ---------------------------------------------------------------


def test_diff_names_the_operator(tmp_path, threads, capsys):
    threads(1)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for path in (a, b):
        record(path, audit_targets.racy)
    assert main(["diff", a, b, "--replay", f"{FILE}:racy"]) == 1
    out = capsys.readouterr().out
    assert "churn_audit.racy_sum.default makes other outputs of the same inputs" in out
    assert "forward, module middle" in out
    assert "audit_targets.py:" in out
    assert main(["diff", a, b, "--replay", f"{FILE}:racy", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["replay"]
    assert found["operation"]["name"] == "churn_audit.racy_sum.default"
    assert found["operation"]["tensors"] == "(float32[32, 32]) -> (float32[])"
    assert found["outputs"][0]["share"] == 1.0
    assert sum(found["outputs"][0]["ulps"].values()) == 1
    assert found["as_recorded"] or found["step"] > 1  # on the way there, replays race too
    assert (found["devices"], found["bound"]) == (["cpu"], None)


RECORDING = """
import sys

import torch
from churn_kernels import audit

torch.set_num_threads(int(sys.argv[3]))
training = audit.load_target(sys.argv[1])("cpu")
with audit.record(sys.argv[2], training.model, training.optimizer):
    for n in range(1, 5):
        training.step(n)
"""


@pytest.mark.parametrize(
    ("target", "counts", "operator"),
    [("racy", (1, 1), "churn_audit.racy_sum"), ("by_threads", (1, 2), "churn_test.sum_by_threads")],
)
def test_two_processes_are_told_apart(tmp_path, capsys, target, counts, operator):
    paths = [str(tmp_path / name) for name in "ab"]
    for path, count in zip(paths, counts, strict=True):
        line = [sys.executable, "-c", RECORDING, f"{FILE}:{target}", path, str(count)]
        subprocess.run(line, check=True)
    assert main(["diff", *paths, "--replay", f"{FILE}:{target}"]) == 1
    assert f"{operator}.default makes other outputs of the same inputs" in capsys.readouterr().out


def test_replays_take_on_the_settings_of_both_runs(tmp_path, threads):
    """The step repeats its bits here; only the recorded numbers of threads part it."""
    for count in (1, 2):
        threads(count)
        record(tmp_path / str(count), audit_targets.by_threads)
    threads(1)
    traces = [ck.audit.Trace.load(tmp_path / str(count)) for count in (1, 2)]
    found = ck.audit.replay(ck.audit.compare(*traces), audit_targets.by_threads, replays=2)
    assert found.finding.operation.name == "churn_test.sum_by_threads.default"
    assert torch.get_num_threads() == 1


def test_runs_that_differ_where_no_replay_does(tmp_path, threads, capsys):
    threads(1)
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    record(a, audit_targets.steady)
    record(b, audit_targets.steady, before=flipped)
    command = ["diff", a, b, "--replay", f"{FILE}:steady", "--replays", "7"]
    assert main(command) == 3
    out = capsys.readouterr().out
    assert "replays of step 3 on cpu: no difference in 7 replays: fewer than 50% of steps" in out
    assert "before the step, parameters and optimizer had the recorded bits" in out
    assert main([*command, "--device", "cpu", "cpu"]) == 3  # two builds that take turns
    assert "replays of step 3 on cpu and cpu: no difference" in capsys.readouterr().out
    assert main(["diff", a, a, "--replay", f"{FILE}:steady"]) == 0


def test_what_cannot_be_replayed(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    record(a, audit_targets.steady)
    record(b, audit_targets.unseeded)
    assert main(["diff", str(a), str(b), "--replay", f"{FILE}:steady"]) == 2
    message = "comparison must have a difference in or after step 1 to replay, got one before it;"
    out, err = capsys.readouterr()
    assert message in err
    assert out.startswith("the runs first differ before the first step: parameters\n")
    assert main(["diff", "--json", str(a), str(b), "--replay", f"{FILE}:steady"]) == 2
    out, err = capsys.readouterr()
    assert (json.loads(out)["first"], json.loads(out)["replay"]) == ("parameters", None)
    assert message in err
    c = tmp_path / "c"
    record(c, audit_targets.steady, before=flipped)
    found = ck.audit.compare(ck.audit.Trace.load(a), ck.audit.Trace.load(c))
    with pytest.raises(ck.audit.ReplayError, match="target must build the model that was recorded"):
        ck.audit.replay(found, audit_targets.two_by_two)
    manifest = found.a.header["manifest"]
    for name, value, wanted in (
        ("threads", "all", "from 1 to 1024, and is str 'all'"),
        ("threads", 0, "from 1 to 1024, and is int 0"),
        ("threads", 10**9, "from 1 to 1024, and is int 1000000000"),
        ("threads", True, "from 1 to 1024, and is bool True"),
        ("mkldnn", "yes", "a bool, and is str 'yes'"),
        ("deterministic_algorithms", None, "a bool, and is missing"),
        ("matmul_precision", 3, "high or highest or medium, and is int 3"),
        ("reduction_mode", [], "exact or fast or invariant or run_to_run, and is a list"),
    ):
        message = f"a must hold settings that can be set, got: {name} must be {wanted}; replay it"
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(manifest, name, value)
            with pytest.raises(ck.audit.ReplayError, match=re.escape(message)):
                ck.audit.replay(found, audit_targets.steady)


def test_settings_come_back(threads):
    threads(2)
    before = ck.audit.manifest()
    other = {
        "threads": 1,
        "mkldnn": False,
        "deterministic_algorithms": False,
        "matmul_precision": "high",
        "reduction_mode": "exact",
    }
    with as_recorded(other):
        inside = ck.audit.manifest()
    assert {name: inside[name] for name in other} == other
    assert ck.audit.manifest() == before


# Checkpoints and targets -------------------------------------------------------------------------


def test_a_replay_begins_at_the_nearest_checkpoint():
    seen = []

    def resume(before):
        seen.append(before)
        return before - 2

    def build(device):
        return audit_targets.training(after_step=lambda model: seen.append("step"), resume=resume)

    built(build, "cpu", before=5)
    assert seen == [5, "step"]
    for done in (-1, 5):
        with pytest.raises(ck.audit.ReplayError, match=rf"resume\(5\) must return .*, got {done};"):
            built(lambda _, done=done: audit_targets.training(resume=lambda n: done), "cpu", 5)


def test_targets(tmp_path):
    assert ck.audit.load_target("audit_targets:steady") is audit_targets.steady
    assert ck.audit.load_target(f"{FILE}:steady") is audit_targets.steady
    planted = ck.audit.load_target("churn_kernels.audit.selftest:planted")("cpu")
    planted.step(1)
    assert planted.predict().shape == (256, 3)
    (tmp_path / "own_target.py").write_text("import beside\nbuild = beside.build\n")
    (tmp_path / "beside.py").write_text("def build(device):\n    return device\n")
    assert ck.audit.load_target(f"{tmp_path}/own_target.py:build")("cpu") == "cpu"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "audit_targets",
            "target must be package.module:function or path/to/file.py:function, got",
        ),
        (
            ":racy",
            "target must be package.module:function or path/to/file.py:function, got ':racy'",
        ),
        ("no.such.module:f", "target must name a module that can be imported from"),
        ("none.py:f", "target must name a file that exists, got none.py; check the path"),
        ("audit_targets:none", "got 'none', which is not there; define none(device)"),
        ("audit_targets:HOSTILE", "got 'HOSTILE', which is str; define HOSTILE(device)"),
    ],
)
def test_what_is_no_target(target, message):
    with pytest.raises(ck.audit.ReplayError, match=re.escape(message)):
        ck.audit.load_target(target)


def test_what_a_target_has_to_return():
    message = "target must return a churn_kernels.audit.Training, got NoneType; return Training("
    with pytest.raises(ck.audit.ReplayError, match=re.escape(message)):
        built(audit_targets.nothing, "cpu")


def test_a_module_that_a_target_misses_is_its_own_error(tmp_path):
    (tmp_path / "needs.py").write_text("import surely_not_there\n")
    for _ in range(2):  # no half of it is left to be taken for all
        with pytest.raises(ModuleNotFoundError, match="surely_not_there"):
            ck.audit.load_target(f"{tmp_path}/needs.py:build")
    assert "needs" not in sys.modules
    assert sys.path.count(str(tmp_path)) == 1


def test_a_file_that_takes_the_name_of_one_that_is_gone(tmp_path):
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / "churn_renamed.py"
        file.write_text(f"def build(device):\n    return {folder!r}\n")
        assert ck.audit.load_target(f"{file}:build")("cpu") == folder
        file.unlink()
