"""Runs into their folders: what is there, what is skipped, what goes on, what is refused."""

import csv
import io
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from churn_trainer import checkpoint as checkpoints
from churn_trainer import loop, run_folder, stored
from churn_trainer import train as training
from churn_trainer.checkpoint import Checkpoint
from churn_trainer.config import PRECISIONS, Data, Model, Optimisation, Seeds
from churn_trainer.data import digits
from churn_trainer.loop import Loop, fit
from churn_trainer.models import build_model
from churn_trainer.run_folder import Busy, RunFolder, read_runs
from churn_trainer.settings import to_toml
from churn_trainer.stored import save_tensors
from churn_trainer.train import Options, train
from small_study import small_run

from churn_kernels._files import write_atomically
from churn_kernels.metrics import churn_report

FILES = {"config.json", "metrics.json", "logits.npz", "curves.csv", "weights.pt", ".lock"}


def seeds(number):
    return Seeds(number, number, number, number, number)


def names(folder):
    return {path.name for path in folder.iterdir()}


def told(events):
    return [
        (event.kind, [run.id for run in event.runs]) for event in events if event.kind != "epoch"
    ]


# What a run leaves behind -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [small_run("skl", seeds=seeds(number)) for number in (0, 1)]
    events = []
    folders = train(runs, root, Options(curve_points=2), events.append)
    return root, runs, folders, events


def test_a_finished_run_s_folder_holds_what_the_page_says(trained):
    root, runs, folders, _ = trained
    assert {path.name for path in root.iterdir()} == {run.id for run in runs}
    for run, folder in zip(runs, folders, strict=True):
        assert folder.path == root / run.id
        assert names(folder.path) == FILES
        assert folder.status == "finished"
        assert folder.run() == run


def test_its_numbers_are_those_of_the_loop_and_of_the_library(trained):
    _, runs, folders, _ = trained
    whole = fit(runs, digits())
    reports = churn_report(whole.logits.clone(), None)
    assert float(reports.churn[0, 1]) > 0
    for place, folder in enumerate(folders):
        logits, labels = folder.logits()
        assert torch.equal(logits, whole.logits[place])
        assert torch.equal(labels, whole.labels[place])
        metrics = folder.metrics()
        wanted = churn_report([logits, logits], labels)
        for name in ("accuracy", "confidence", "entropy", "ece"):
            assert metrics["test"][name] == pytest.approx(float(getattr(wanted, name)[0]), rel=1e-5)
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels)
        assert metrics["test"]["cross_entropy"] == pytest.approx(float(cross_entropy), rel=1e-5)
        assert metrics["test_rows"] == 1737
        assert metrics["environment"]["runs_together"] == 2
        weights = folder.weights()
        assert len(weights) == 2
        for member, state in enumerate(weights):
            own = whole.members.weights(member, place)
            assert all(torch.equal(own[name], value) for name, value in state.items())


def test_its_curves_have_a_row_for_each_epoch(trained):
    _, _, folders, _ = trained
    with (folders[0].path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [bool(row["test_accuracy"]) for row in rows] == [False, True, True]
    assert float(rows[-1]["test_accuracy"]) == folders[0].metrics()["test"]["accuracy"]
    losses = [float(row["train_cross_entropy"]) for row in rows]
    assert losses == sorted(losses, reverse=True)


def test_a_lone_run_s_curves_grow_as_it_trains(tmp_path):
    run, seen = small_run(), []

    def look(event):
        if event.kind == "epoch":
            seen.append(len(rows_of(tmp_path / run.id)))

    train([run], tmp_path, Options(curve_points=3), look)
    assert seen == [1, 2, 3]


def test_what_has_ended_is_not_trained_again(trained, monkeypatch):
    root, runs, folders, events = trained
    assert told(events) == [
        ("started", [run.id for run in runs]),
        *(("finished", [run.id]) for run in runs),
    ]
    monkeypatch.setattr(training, "fit", lambda *_, **__: pytest.fail("trained"))
    before = [(path, path.stat().st_mtime_ns) for path in root.rglob("*")]
    again = []
    assert train(runs[:1], root, tell=again.append) == folders[:1]
    assert told(again) == [("skipped", [runs[0].id])]
    assert [(path, path.stat().st_mtime_ns) for path in root.rglob("*")] == before


def test_finished_runs_are_found(trained, tmp_path):
    root, runs, _, _ = trained
    assert [folder.run() for folder in read_runs(root)] == sorted(runs, key=lambda run: run.id)
    assert read_runs(tmp_path) == []


def test_weights_load_into_the_network_by_themselves(trained):
    _, runs, folders, _ = trained
    network = build_model(runs[0].model, (1, 8, 8), 10)
    network.load_state_dict(folders[0].weights()[0])
    source = loop.Batches(runs[:1], digits(), torch.device("cpu"))
    with torch.no_grad():
        logits = network(source.held_out(source.test_rows[:, :50])[0])
    torch.testing.assert_close(logits, folders[0].logits()[0][:50], rtol=1e-3, atol=1e-4)


def test_repetitions_of_a_run_are_trained_anew_and_agree_on_a_cpu(tmp_path):
    runs = [small_run("skl", repeat=repeat) for repeat in (0, 1)]
    events = []
    one, other = train(runs, tmp_path, tell=events.append)
    assert [kind for kind, _ in told(events)] == ["started", "finished"] * 2
    assert torch.equal(one.logits()[0], other.logits()[0])


def test_teachers_are_trained_first_and_once(tmp_path):
    runs = [small_run(name) for name in ("self-distillation", "2-ensemble", "2-distillation")]
    events = []
    train(runs, tmp_path, tell=events.append)
    assert [
        ids[0].split("-mlp-")[1].rsplit("-", 1)[0]
        for kind, ids in told(events)
        if kind == "finished"
    ] == [
        "baseline",
        "2-ensemble",
        "self-distillation",
        "2-distillation",
    ]
    teachers = training.load_teachers([runs[0].teacher()], tmp_path, (1, 8, 8), 10)
    wanted = fit(runs[:1], digits(), teachers=teachers)
    assert torch.equal(RunFolder(tmp_path / runs[0].id).logits()[0], wanted.logits[0])


@pytest.mark.parametrize("model", [Model(hidden=(16,)), Model(hidden=(16,), dropout=0.1)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_students_and_teachers_train_in_every_precision(precision, model, tmp_path):
    optimisation = Optimisation(epochs=2, precision=precision)
    run = small_run("self-distillation", model=model, optimisation=optimisation)
    (folder,) = train([run], tmp_path)
    assert folder.status == "finished"
    (trained,) = RunFolder(tmp_path / run.teacher().id).weights()
    loaded = training.load_teachers([run.teacher()], tmp_path, (1, 8, 8), 10).weights(0, 0)
    for name, values in trained.items():
        assert torch.equal(loaded[name], values.to(loaded[name].dtype))


def test_networks_that_cannot_be_stacked_are_trained_one_by_one(tmp_path):
    runs = [small_run(model=Model(dropout=0.1), seeds=seeds(number)) for number in (0, 1)]
    for folder in train(runs, tmp_path):
        assert folder.metrics()["environment"]["runs_together"] == 1


def test_tensorboard_s_files_hold_the_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = small_run()
    (folder,) = train([run], tmp_path, Options(curve_points=1, tensorboard=True))
    events = EventAccumulator(str(folder.path / "tensorboard")).Reload()
    assert [entry.step for entry in events.Scalars("train_cross_entropy")] == [1, 2, 3]
    (accuracy,) = events.Scalars("test_accuracy")
    assert accuracy.value == pytest.approx(folder.metrics()["test"]["accuracy"])


# Divergence ---------------------------------------------------------------------------------------


def test_a_run_that_diverges_is_recorded_and_the_others_finish(tmp_path):
    wild = Optimisation(epochs=3, learning_rate=1e30, clip_norm=0.0)
    runs = [
        small_run(optimisation=wild),
        small_run(),
        small_run("self-distillation", optimisation=wild),
    ]
    events = []
    folders = train(runs, tmp_path, tell=events.append)
    assert [folder.status for folder in folders] == ["diverged", "finished", "diverged"]
    assert folders[0].metrics()["message"] == "its loss or gradient is not finite, epoch 1"
    assert folders[2].metrics()["message"] == "its teachers diverged"
    assert "logits.npz" not in names(folders[0].path)
    assert [kind for kind, _ in told(events)].count("diverged") == 2
    assert [folder.run() for folder in read_runs(tmp_path)] == [runs[1]]
    train(runs, tmp_path, tell=lambda event: event.kind == "skipped" or pytest.fail(event.kind))


HELD_OUT = Data(train_rows=60, validation_rows=20)


@pytest.mark.parametrize("best", ["cross_entropy", "accuracy", "last"])
def test_a_run_with_validation_rows_that_diverges_is_recorded(best, tmp_path):
    wild = Optimisation(epochs=4, learning_rate=1e8, clip_norm=0.0, best=best)
    (folder,) = train([small_run(data=HELD_OUT, optimisation=wild)], tmp_path)
    assert folder.status == "diverged"
    last = rows_of(folder.path)[-1]
    assert last["validation_accuracy"] == last["validation_cross_entropy"] == ""


def test_a_run_that_diverges_leaves_its_stack_s_others_their_validation_rows(tmp_path, monkeypatch):
    runs = [small_run(data=HELD_OUT, seeds=seeds(number)) for number in range(3)]
    whole = train(runs, tmp_path / "whole")
    build = loop.build_members

    def broken(*arguments, **options):
        members = build(*arguments, **options)
        with torch.no_grad():
            members.stacked[0][1] = torch.inf
        return members

    def stop(event):
        if event.kind == "epoch" and event.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "build_members", broken)
    with pytest.raises(KeyboardInterrupt):
        train(runs, tmp_path / "runs", Options(checkpoint_seconds=0), stop)
    events = []
    folders = train(runs, tmp_path / "runs", tell=events.append)
    assert {"resumed", "damaged"} & {kind for kind, _ in told(events)} == {"resumed"}
    assert [folder.status for folder in folders] == ["finished", "diverged", "finished"]
    assert {row["validation_accuracy"] for row in rows_of(folders[1].path)} == {""}
    for place in (0, 2):
        assert rows_of(folders[place].path) == rows_of(whole[place].path)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("wild", [{"learning_rate": 1e38}, {"weight_decay": 1e38}])
def test_the_largest_settings_end_as_any_divergence(wild, precision, tmp_path):
    run = small_run(optimisation=Optimisation(epochs=2, precision=precision, **wild))
    (folder,) = train([run], tmp_path)
    assert folder.status == "diverged"


def test_a_student_without_teachers_does_not_stop_the_others(tmp_path):
    runs = [small_run("self-distillation", seeds=seeds(number)) for number in (0, 1)]
    train([run.teacher() for run in runs], tmp_path)
    lost = RunFolder(tmp_path / runs[0].teacher().id)
    lost.end("diverged", {"message": "it did"})
    folders = train(runs, tmp_path)
    assert [folder.status for folder in folders] == ["diverged", "finished"]


# Killed -------------------------------------------------------------------------------------------

LONG = {"optimisation": Optimisation(epochs=200, batch_rows=8)}


def command(root, run, *options):
    config = root / "run.toml"
    config.write_text(to_toml(run))
    arguments = ["train", "--config", config, "--out", root / "runs", "--accelerator", "cpu"]
    return [sys.executable, "-m", "churn_trainer", *map(str, arguments), *options]


def environment():
    path = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# The command line, which kills itself when its 15th checkpoint is written and not yet in place.
DYING = """
import os, signal
fsync, calls = os.fsync, []

def dying(descriptor):
    calls.append(descriptor)
    if len(calls) == 2 + 2 * 14 + 1:  # a file and its folder each: the settings, 14 checkpoints
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = dying
from churn_trainer import cli
cli.app()
"""


def step_of(folder):
    return Checkpoint(folder.path / "checkpoint.pt", [folder.path.name]).load()["step"]


def kill_when_it_has_moved_on(line, folder):
    """Starts the command, and kills it some steps later, wherever it is."""
    before = step_of(folder)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, env=environment())
    try:
        deadline = time.monotonic() + 120
        while step_of(folder) < before + 5:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


def test_kill_9_at_any_moment_and_the_run_ends_with_the_same_bits(tmp_path, threads):
    threads(1)
    run = small_run("skl", **LONG)
    (whole,) = train([run], tmp_path / "whole", Options(curve_points=3))
    folder = RunFolder(tmp_path / "runs" / run.id)
    line = command(tmp_path, run, "--curve-points", "3")
    often = [*line, "--checkpoint-seconds", "0"]

    dying = [sys.executable, "-c", DYING, *often[3:]]
    killed = subprocess.run(dying, capture_output=True, env=environment(), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder.path / ".checkpoint.pt.partial").exists()
    assert step_of(folder) == 14
    kill_when_it_has_moved_on(often, folder)
    assert 14 < step_of(folder) < 200 * 8
    assert not folder.done

    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert f"resumed {run.id}  after step" in done.stderr
    assert f"finished {run.id}" in done.stderr
    assert names(folder.path) == FILES | {"checkpoint.pt"}  # the command keeps it
    for name in ("curves.csv", "config.json"):
        assert (folder.path / name).read_bytes() == (whole.path / name).read_bytes()
    assert torch.equal(folder.logits()[0], whole.logits()[0])
    assert folder.metrics()["test"] == whole.metrics()["test"]
    for one, other in zip(folder.weights(), whole.weights(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


class Killed(BaseException):
    """Ends a process in the middle, as kill -9 would."""


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("file", ["weights.pt", "logits.npz", "curves.csv", "metrics.json"])
def test_killed_before_any_file_is_in_place_the_run_ends_all_the_same(
    file, together, tmp_path, monkeypatch
):
    runs = [small_run(seeds=seeds(number)) for number in range(together)]
    whole = train(runs, tmp_path / "whole")
    write = run_folder.write_atomically

    def die_before(path, content, earlier=None):
        if path.name == file and path.parent.name == runs[-1].id:
            (path.parent / f".{path.name}.partial").write_bytes(content[:7])
            raise Killed
        write(path, content, earlier)

    monkeypatch.setattr(run_folder, "write_atomically", die_before)
    monkeypatch.setattr(stored, "write_atomically", die_before)
    with pytest.raises(Killed):
        train(runs, tmp_path / "runs")
    monkeypatch.undo()
    assert not RunFolder(tmp_path / "runs" / runs[-1].id).done
    events = []
    folders = train(runs, tmp_path / "runs", tell=events.append)
    assert [kind for kind, _ in told(events)].count("finished") == 1
    for one, other in zip(folders, whole, strict=True):
        assert names(one.path) == FILES
        assert one.metrics()["test"] == other.metrics()["test"]
        assert torch.equal(one.logits()[0], other.logits()[0])
    assert not list((tmp_path / "runs").rglob("*.pt.partial"))
    assert not list((tmp_path / "runs").glob(".together/*"))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("churn_kernels._files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}
    monkeypatch.undo()
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"


# Refused ------------------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_checkpoints_of_others_are_refused(tmp_path):
    path = tmp_path / "c.pt"
    Checkpoint(path, ["a"]).save({"step": 1})
    assert Checkpoint(path, ["a"]).load() == {"step": 1}
    with pytest.raises(ValueError, match=r"must be a checkpoint of b, got one of a; delete it, or"):
        Checkpoint(path, ["b"]).load()
    save_tensors(path, {"format": 0})
    with pytest.raises(ValueError, match=r"got: it\['format'\] must be 2, and is int 0; delete"):
        Checkpoint(path, ["a"]).load()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"must hold tensors and plain values, got: .*; delete"):
        Checkpoint(path, ["a"]).load()
    Checkpoint(path, ["a"]).remove()
    assert Checkpoint(path, ["a"]).load() is None


@pytest.mark.parametrize(("seconds", "saves"), [(60.0, 9), (0.0, 6000)])
def test_several_processes_seldom_ask_whether_to_save(seconds, saves, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    checkpoint, asked, saved = Checkpoint(tmp_path / "c.pt", ["a"], seconds), [], [0.0]

    def broadcast(value):
        asked.append(value)
        return value

    several = SimpleNamespace(
        ranks=2, step=1000, first_step=1000, ask_at=0, fabric=SimpleNamespace(broadcast=broadcast)
    )
    for _ in range(6000):  # of 0.1 seconds, for ten minutes
        clock[0] += 0.1
        several.step += 1
        if Loop.time_to_save(several, checkpoint):
            checkpoint.save({})
            saved.append(clock[0])
    assert len(saved) - 1 == saves
    assert max(b - a for a, b in pairwise(saved)) < seconds + 0.25
    assert len(asked) <= max(saves, 150)


def test_hostile_files_run_no_code(tmp_path):
    witness = tmp_path / "witness"
    run = small_run()
    folder = RunFolder(tmp_path / run.id)
    folder.start(run)
    torch.save(
        {"format": 2, "owner": [run.id], "state": Hostile(witness)}, folder.path / "checkpoint.pt"
    )
    with pytest.raises(ValueError, match="must hold tensors and plain values, got"):
        train([run], tmp_path)
    assert not witness.exists()
    (folder.path / "checkpoint.pt").unlink()
    train([run], tmp_path)
    np.savez(folder.path / "logits.npz", logits=np.array([Hostile(witness)]), labels=np.zeros(1))
    with pytest.raises(
        ValueError, match=r"must hold the arrays logits and labels, got: .*; delete"
    ):
        folder.logits()
    (folder.path / "logits.npz").write_bytes(pickle.dumps(Hostile(witness)))
    with pytest.raises(ValueError, match="must hold the arrays logits and labels"):
        folder.logits()
    torch.save([Hostile(witness)], folder.path / "weights.pt")
    with pytest.raises(ValueError, match=r"must hold tensors and plain values, got: .*; delete"):
        folder.weights()
    torch.save("text", folder.path / "weights.pt")
    with pytest.raises(ValueError, match="got: it must be 1 values, and is str 'text'; delete"):
        folder.weights()
    assert not witness.exists()
    pickle.load(io.BytesIO(pickle.dumps(Hostile(witness)))).close()
    assert witness.exists()  # it would have shown


def test_folders_that_are_not_as_they_should_be_are_explained(tmp_path):
    run, other = small_run(), small_run("skl")
    folder = RunFolder(tmp_path / run.id)
    with pytest.raises(ValueError, match="must hold a run that has ended; train it"):
        folder.metrics()
    with pytest.raises(ValueError, match="must hold the arrays logits and labels, got"):
        folder.logits()
    folder.start(other)
    with pytest.raises(
        ValueError, match=rf"folder of the run {run.id}, got that of {other.id}; its"
    ):
        train([run], tmp_path)
    for content in ("{", "{}", "[]", '{"status": "fine"}', '{"status": []}'):
        folder.path.joinpath("metrics.json").write_text(content)
        with pytest.raises(ValueError, match=r"must hold the metrics of a run, got: .*; delete it"):
            folder.metrics()


def test_a_run_has_one_process(tmp_path):
    run = small_run()
    with (
        RunFolder(tmp_path / run.id).locked(),
        pytest.raises(
            Busy, match="must be trained by one process, got a second; wait for the first"
        ),
    ):
        train([run], tmp_path)
    assert train([run], tmp_path)[0].status == "finished"


def rows_of(folder):
    with (folder / "curves.csv").open() as file:
        return list(csv.DictReader(file))
