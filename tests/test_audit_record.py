"""Recorded runs: the first step and the first thing in it that differs, whatever was done to it."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

import churn_kernels as ck
from churn_kernels import _ops
from churn_kernels.audit import hashes
from churn_kernels.audit.__main__ import main

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built")

STEPS = 6


def nothing(step, model, optimizer):
    """What the runs below do besides."""


def run(path, *, seed=0, steps=STEPS, after_backward=nothing, before=nothing, resume_at=None):
    """A small training; the two functions are called in each step."""
    torch.manual_seed(seed)
    random.seed(0)
    model = nn.Sequential(nn.Linear(9, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 9, generator=generator)
    y = torch.randint(4, (50,), generator=generator)
    losses = []
    with ck.audit.record(path, model, optimizer, resume_at=resume_at) as recorder:
        for step in range((resume_at or 0) + 1, steps + 1):
            before(step, model, optimizer)
            batch = torch.randperm(50, generator=torch.Generator().manual_seed(step))[:16]
            recorder.observe(batch=batch)
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            recorder.observe(loss=loss)
            loss.backward()
            after_backward(step, model, optimizer)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def flip(x):
    """One unit in the last place of one number."""
    with torch.no_grad():
        x.view(torch.int32).flatten()[0] += 1


def first_difference(tmp_path, **changes):
    for name, options in (("a", {}), ("b", changes)):
        run(tmp_path / name, **options)
    return ck.audit.compare(*(ck.audit.Trace.load(tmp_path / name) for name in "ab"))


def at(wanted, change):
    return lambda step, model, optimizer: change(model, optimizer) if step == wanted else None


CHANGES = {
    "gradients": {"after_backward": at(3, lambda model, _: flip(model[3].weight.grad))},
    "a gradient that is gone": {
        "after_backward": at(3, lambda model, _: setattr(model[3].bias, "grad", None))
    },
    "parameters": {"before": at(3, lambda model, _: model[3].bias.data.mul_(2))},
    "parameters after the loss": {"after_backward": at(3, lambda model, _: flip(model[3].bias))},
    "buffers": {"before": at(3, lambda model, _: flip(model[1].running_mean))},
    "buffers after the loss": {
        "after_backward": at(3, lambda model, _: flip(model[1].running_var))
    },
    "numpy": {"before": at(3, lambda *_: np.random.rand())},  # noqa: NPY002
    "python": {"before": at(3, lambda *_: random.random())},
    "torch": {"before": at(3, lambda *_: torch.rand(()))},
    "learning rate": {
        "after_backward": at(3, lambda _, o: o.param_groups[0].__setitem__("lr", 0.02))
    },
    "state": {
        "after_backward": at(3, lambda model, o: o.state[model[0].weight]["exp_avg_sq"].mul_(2))
    },
    "settings": {"before": at(3, lambda _, o: o.param_groups[0].__setitem__("note", 1))},
}
FIRST = {
    "gradients": "gradients",
    "a gradient that is gone": "gradients",
    "parameters": "parameters before",
    "parameters after the loss": "parameters before",
    "buffers": "buffers before",
    "buffers after the loss": "buffers",
    "numpy": "random state of NumPy before",
    "python": "random state of Python before",
    "torch": "random state of PyTorch before",
    "learning rate": "learning rate before",
    "state": "optimizer before",
    "settings": "note before",
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_first_difference_is_found(name, tmp_path):
    found = first_difference(tmp_path, **CHANGES[name])
    assert found.difference is not None
    assert (found.difference.step, found.difference.first) == (3, FIRST[name])
    assert found.difference.meaning
    assert found.steps == STEPS + 1
    assert found.settings == {}


@pytest.mark.parametrize(
    ("kind", "when", "meaning"),
    [
        ("observed", "before step 2", "changed between the steps, or by a forward pass ahead of"),
        ("closure", "before step 2", "changed between the steps, or by a forward pass ahead of"),
        ("neither", "in step 2", "differ by the forward pass or by a change before it"),
    ],
)
def test_buffers_that_were_changed_between_steps(kind, when, meaning, tmp_path):
    """Where nothing tells what was ahead of the forward pass, it is not blamed."""

    def train(path, change):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x = torch.rand(5, 3)

        def loss():
            optimizer.zero_grad()
            value = model(x).square().sum()
            value.backward()
            return value

        with ck.audit.record(path, model, optimizer) as recorder:
            for step in range(1, 4):
                if step == 2:
                    model[1].running_mean.add_(change)
                if kind == "observed":
                    recorder.observe(x=x)
                optimizer.step(loss) if kind == "closure" else (loss(), optimizer.step())
        return ck.audit.Trace.load(path)

    found = ck.audit.compare(train(tmp_path / "a", 0), train(tmp_path / "b", 1e-3)).difference
    assert (found.when, found.what) == (when, "buffers")
    assert meaning in found.meaning


def test_equal_runs_are_equal(tmp_path):
    assert first_difference(tmp_path).difference is None


def test_another_seed_shows_before_the_first_step(tmp_path):
    found = first_difference(tmp_path, seed=1)
    assert (found.difference.step, found.difference.first) == (0, "parameters")
    (generator,) = found.generators
    assert (generator.name, generator.drawn) == ("random state of PyTorch", None)


def test_a_generator_that_nobody_draws_from_is_a_note(tmp_path, capsys):
    """Processes that seed PyTorch alone begin with other states of NumPy's and Python's."""
    run(tmp_path / "a")
    np.random.rand()  # noqa: NPY002
    run(tmp_path / "b")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"the runs have the same bits in all {STEPS} steps that both have")
    note = "note: random state of NumPy differs from the start; nothing was drawn from it"
    assert note in out


def draw(step, model, optimizer):
    if step == 2:
        np.random.rand()  # noqa: NPY002


def test_what_differs_after_a_generator_is_named_all_the_same(tmp_path, capsys):
    run(tmp_path / "a", before=draw)

    def draw_and_change(step, model, optimizer):
        draw(step, model, optimizer)
        if step == 4:
            optimizer.param_groups[0]["lr"] = 0.02

    run(tmp_path / "b", before=draw_and_change)
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("the runs first differ before step 2: random state of NumPy\n")
    assert "anything else differs before step 4 first: learning rate 0.01 against 0.02\n" in out
    note = "note: random state of NumPy differs from the start; step 2 is the first that was drawn"
    assert note in out
    assert main(["diff", "--json", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["then"] == {"step": 4, "first": "learning rate before"}
    assert data["generators"] == {"random state of NumPy": 2}


def test_recording_changes_nothing(tmp_path):
    class Silent:
        def observe(self, **values):
            pass

    recorded = run(tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ck.audit, "record", lambda *_, **__: nullcontext(Silent()))
        assert run(tmp_path / "b") == recorded
    assert not (tmp_path / "b").exists()


def test_other_settings_are_named(tmp_path, threads):
    threads(1)
    run(tmp_path / "a")
    threads(2)
    run(tmp_path / "b")
    found = ck.audit.compare(*(ck.audit.Trace.load(tmp_path / name) for name in "ab"))
    assert found.settings == {"threads": (1, 2)}
    hashes = {trace.header["manifest_hash"] for trace in (found.a, found.b)}
    assert len(hashes) == 2


def test_an_untouched_state_is_hashed_once_a_step(tmp_path, monkeypatch):
    """Before a step the parameters alone are hashed again."""
    counts = []
    words_of = hashes.words_of
    monkeypatch.setattr(
        hashes, "words_of", lambda tensors: counts.append(len(tensors)) or words_of(tensors)
    )
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with ck.audit.record(tmp_path / "a", model, optimizer):
        for _ in range(3):
            counts.clear()
            model(torch.randn(5, 4)).sum().backward()
            optimizer.step()
    parameters, buffers, gradients, state = 4, 3, 4, 4
    assert counts == [parameters, buffers, gradients, state, parameters]


def test_a_step_is_a_few_hundred_bytes(tmp_path):
    run(tmp_path / "a")
    lines = (tmp_path / "a").read_bytes().splitlines()
    assert max(map(len, lines[2:])) < 500
    assert len(lines[1]) < 1000  # all settings, once
    assert len(lines) == STEPS + 2


# Files that something happened to ----------------------------------------------------------------


def test_torn_and_changed_files(tmp_path):
    path = tmp_path / "a"
    run(path)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(ends[0], len(whole) + 1, 97):
        path.write_bytes(whole[:cut])
        trace = ck.audit.Trace.load(path)
        assert len(trace.steps) == sum(end <= cut for end in ends[1:]) or cut + 1 in ends
        assert bool(trace.damage) == (cut not in ends and cut + 1 not in ends)
    place = whole.index(b'"gradients":"', ends[3]) + 15
    changed = bytearray(whole)
    changed[place] ^= 1
    path.write_bytes(changed)
    trace = ck.audit.Trace.load(path)
    assert [step.number for step in trace.steps] == [0, 1, 2]
    assert trace.damage == (
        "line 5 does not follow from the lines before it; nothing after it counts"
    )
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3] + lines[4:]))  # a line is gone
    assert len(ck.audit.Trace.load(path).steps) == 2


@pytest.mark.parametrize("content", [b"", b"\n", b"\x00\xff", b"{}\n", b"[1]\n", b'{"chain":1}\n'])
def test_what_is_no_trace(content, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(content)
    message = f"{path} is no trace, or its first line is damaged; pass a file that churn_kernels"
    with pytest.raises(ck.audit.TraceError, match=re.escape(message)):
        ck.audit.Trace.load(path)


def test_another_format(tmp_path, monkeypatch):
    monkeypatch.setattr("churn_kernels.audit.trace.FORMAT", 1)
    run(tmp_path / "a")
    monkeypatch.undo()
    message = "was written in format 1, this version reads 2; read it with the version of"
    with pytest.raises(ck.audit.TraceError, match=message):
        ck.audit.Trace.load(tmp_path / "a")


def test_runs_that_cannot_be_compared(tmp_path):
    run(tmp_path / "a")
    model = nn.Linear(2, 2)
    for name, optimizer in (("b", torch.optim.SGD), ("c", torch.optim.Adam)):
        with ck.audit.record(tmp_path / name, model, optimizer(model.parameters(), 0.1)):
            pass
    a, b, c = (ck.audit.Trace.load(tmp_path / name) for name in "abc")
    with pytest.raises(ck.audit.TraceError, match="must hold runs of one model"):
        ck.audit.compare(a, b)
    with pytest.raises(ck.audit.TraceError, match="kind of optimizer, got SGD and Adam; record"):
        ck.audit.compare(b, c)


def test_hashes_of_other_kinds(tmp_path, monkeypatch):
    """A trace of another HASH_SPEC: neither compared nor gone on with."""
    run(tmp_path / "a")
    monkeypatch.setattr(sys.modules["churn_kernels.audit.record"], "HASH_SPEC", 1)
    run(tmp_path / "b")
    a, b = (ck.audit.Trace.load(tmp_path / name) for name in "ab")
    message = "must hold hashes of one HASH_SPEC, got 2 and 1; record both anew"
    with pytest.raises(ck.audit.TraceError, match=message):
        ck.audit.compare(a, b)
    message = "was recorded with other hash_spec than this run's; name another file"
    with pytest.raises(ck.audit.TraceError, match=message):
        run(tmp_path / "a", resume_at=3)


def test_a_run_that_was_killed_before_its_first_step(tmp_path):
    run(tmp_path / "a")
    header, *_ = (tmp_path / "a").read_bytes().splitlines(keepends=True)
    (tmp_path / "b").write_bytes(header + b'{"step":0')
    a, b = (ck.audit.Trace.load(tmp_path / name) for name in "ab")
    message = "b must hold a step, got none; line 2 was cut off; nothing after it counts; record"
    with pytest.raises(ck.audit.TraceError, match=message):
        ck.audit.compare(a, b)
    (tmp_path / "b").write_bytes(header)  # killed between the two lines
    b = ck.audit.Trace.load(tmp_path / "b")
    with pytest.raises(ck.audit.TraceError, match="b must hold a step, got none; record the run"):
        ck.audit.compare(a, b)


def test_an_existing_file_is_left_alone(tmp_path):
    run(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    message = "path must not exist yet, got .*; name another file, or pass resume_at=step"
    with pytest.raises(FileExistsError, match=message):
        run(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before


def test_a_name_that_comes_twice(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with ck.audit.record(tmp_path / "a", model, optimizer) as recorder:
        recorder.observe(batch=[1, 2], texts=["a"])
        for name in ("batch", "gradients"):
            with pytest.raises(ValueError, match=f"new in a step .* got '{name}' twice; give"):
                recorder.observe(**{name: [1]})


def test_a_run_that_was_killed_keeps_its_steps(tmp_path):
    script = textwrap.dedent("""
        import sys, torch, churn_kernels as ck
        model = torch.nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with ck.audit.record(sys.argv[1], model, optimizer):
            while True:
                model(torch.ones(3)).sum().backward()
                optimizer.step()
    """)
    path = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)])
    deadline = time.monotonic() + 120
    while not path.exists() or path.stat().st_size < 20_000:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    trace = ck.audit.Trace.load(path)
    assert [step.number for step in trace.steps] == list(range(len(trace.steps)))
    assert len(trace.steps) > 20


# The command ------------------------------------------------------------------------------------


def test_diff(tmp_path, capsys):
    run(tmp_path / "a")
    run(tmp_path / "b")
    run(tmp_path / "c", **CHANGES["gradients"])
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main(["diff", a, b]) == 0
    verdict = f"the runs have the same bits in all {STEPS} steps that both have"
    assert capsys.readouterr().out.startswith(verdict)
    assert main(["diff", a, c]) == 1
    out = capsys.readouterr().out
    assert out.startswith("the runs first differ in step 3: gradients\n")
    assert "still the same: batch, loss, buffers" in out
    assert main(["diff", "--json", a, c]) == 1
    data = json.loads(capsys.readouterr().out)
    assert (data["kind"], data["format"]) == ("churn-audit diff", 1)
    assert (data["step"], data["first"]) == (3, "gradients")
    assert [trace["steps"] for trace in data["traces"]] == [STEPS, STEPS]
    assert main(["diff", a, str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_damaged_trace_is_not_the_same(tmp_path, capsys):
    for name, changes in (("a", {}), ("b", {}), ("c", CHANGES["gradients"])):
        run(tmp_path / name, **changes)
    a, b, c = (tmp_path / name for name in "abc")
    b.write_bytes(b.read_bytes()[:-20])  # a process was killed while it wrote
    assert main(["diff", str(a), str(b)]) == 2
    out = capsys.readouterr().out
    assert out.startswith(f"the runs have the same bits in all {STEPS - 1} steps that both have")
    assert f"{b}: {STEPS - 1} steps; line " in out
    assert main(["diff", str(b), str(c)]) == 1  # before the damage
    lines = a.read_bytes().splitlines(keepends=True)
    a.write_bytes(b"".join(lines[:-2]))  # a shorter run: the damage is beyond its end
    assert main(["diff", str(a), str(b)]) == 0
