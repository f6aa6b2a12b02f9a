"""Folders from anybody and from failing disks: links, flipped bits, values that are none."""

import json
import os
import re
import shutil
import tomllib
from random import Random

import numpy as np
import pytest
import torch
from churn_trainer import cli, curves
from churn_trainer.checkpoint import Checkpoint
from churn_trainer.config import Data, Optimisation, Seeds, Study, Synthetic
from churn_trainer.data import digits, load_dataset
from churn_trainer.found import find_runs
from churn_trainer.loop import Loop, make_fabric
from churn_trainer.outcomes import measure
from churn_trainer.report import make_report, write_report
from churn_trainer.run_folder import RunFolder, read_runs
from churn_trainer.settings import read_settings
from churn_trainer.state import state_form
from churn_trainer.stored import save_tensors
from churn_trainer.surroundings import THREADS
from churn_trainer.train import Options, _Group, train
from damage import ODD, damaged, with_odd_content
from small_study import small_run, small_study
from typer.testing import CliRunner

DAMAGES = 200


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with two finished runs, whose files the tests copy and spoil."""
    root = tmp_path_factory.mktemp("two") / "runs"
    drawn = Data(name="prototypes", synthetic=Synthetic(train_rows=60, test_rows=50, dimension=8))
    runs = [small_run(data=drawn, seeds=Seeds(0, *[number] * 4)) for number in (1, 2)]
    train(runs, root, Options(curve_points=2))
    return root


@pytest.fixture
def runs(two, tmp_path):
    """A copy of them, the first of which a test may spoil."""
    shutil.copytree(two, tmp_path / "runs")
    return tmp_path / "runs"


def folders(root):
    return [RunFolder(path) for path in sorted(root.iterdir())]


# Links --------------------------------------------------------------------------------------------

PARTIAL = [
    f".{name}.partial"
    for name in (
        *("config.json", "checkpoint.pt", "weights.pt", "logits.npz", "curves.csv"),
        "metrics.json",
    )
]


@pytest.fixture
def outside(tmp_path):
    """A folder that is not ours, of which a test has to leave every file as it was."""
    folder = tmp_path / "outside"
    (folder / "deeper").mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    (folder / "deeper" / "notes").write_text("mine too")

    def content():
        return {
            str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob("*")
        }

    before = content()
    yield folder
    assert content() == before


@pytest.mark.parametrize("hard", [False, True])
def test_scratch_files_that_are_links_are_replaced(hard, tmp_path, outside):
    run = small_run(optimisation=Optimisation(epochs=1))
    folder = tmp_path / "runs" / run.id
    folder.mkdir(parents=True)
    names = [*PARTIAL, "curves.csv", "weights.pt", "logits.npz", "steps.trace"]
    for name in [*names, ".lock"] if hard else names:
        target = outside / "thesis.tex"
        (folder / name).hardlink_to(target) if hard else (folder / name).symlink_to(target)
    options = Options(checkpoint_seconds=0, trace=True)
    assert train([run], tmp_path / "runs", options)[0].status == "finished"
    assert not any((folder / name).is_symlink() for name in names)
    assert not set(PARTIAL) & {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", [".lock", "tensorboard", "."])
def test_what_cannot_be_replaced_is_refused(name, tmp_path, outside):
    run = small_run(optimisation=Optimisation(epochs=1))
    folder = tmp_path / "runs" / run.id
    place = folder if name == "." else folder / name
    place.parent.mkdir(parents=True)
    place.symlink_to(outside / "thesis.tex" if name == ".lock" else outside)
    wanted = "file" if name == ".lock" else "folder"
    with pytest.raises(
        ValueError, match=f"must be a {wanted} of its own, got a symbolic link to .*"
    ):
        train([run], tmp_path / "runs", Options(tensorboard=True))


def test_checkpoints_of_a_stack_go_through_no_link(tmp_path, outside):
    runs = [small_run(seeds=Seeds(initialisation=number)) for number in (0, 1)]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".together").symlink_to(outside)
    with pytest.raises(ValueError, match=r"\.together must be a folder of its own, got a symbolic"):
        train(runs, tmp_path / "runs", Options(checkpoint_seconds=0))


def test_a_study_and_a_report_go_through_no_link(runs, tmp_path, outside):
    study = tmp_path / "study.json"
    study.write_text(json.dumps(small_study(("baseline",), splits=1).to_mapping()))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "runs").symlink_to(outside)
    shutil.rmtree(outside / "deeper")
    (outside / "deeper").mkdir()  # empty: what a report may otherwise replace
    (outside / "deeper" / "notes").write_text("mine too")
    (runs / "report").symlink_to(outside / "deeper")
    for line in (["study", study, "--out", tmp_path / "out"], ["report", runs]):
        done = CliRunner().invoke(cli.app, [*map(str, line)])
        assert done.exit_code == 2
        assert "must be a folder of its own, got a symbolic link to" in " ".join(
            done.stderr.split()
        )
        assert "Traceback" not in done.output


def test_what_a_killed_report_left_is_no_link(runs, tmp_path, outside):
    for name in (".report-0123456789ab", ".report-0123456789ab-earlier"):
        (tmp_path / name).symlink_to(outside)
    write_report(runs, tmp_path / "report")
    assert (tmp_path / "report" / "report.html").is_file()
    assert not (tmp_path / "report").is_symlink()


def test_a_pipe_or_a_device_is_read_as_damage(runs):
    spoiled, whole = folders(runs)
    for name in ("config.json", "logits.npz", "curves.csv", "weights.pt"):
        (spoiled.path / name).unlink()
    os.mkfifo(spoiled.path / "config.json")
    (spoiled.path / "logits.npz").symlink_to("/dev/zero")
    (found,) = find_runs(runs).damaged
    assert "config.json is no regular file" in found
    with pytest.raises(ValueError, match="is no regular file; delete"):
        spoiled.logits()
    assert [one.folder for one in find_runs(runs).finished] == [whole]


# Flipped bits -------------------------------------------------------------------------------------


def flipped(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def state(step):
    return {"step": step, "members": {"weight": torch.arange(50.0) * step}}


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    random, path = Random(0), tmp_path / "checkpoint.pt"
    Checkpoint(path, ["run"]).save(state(7))
    Checkpoint(path, ["run"]).save(state(8))
    content = path.read_bytes()
    for bit in random.sample(range(8 * len(content)), DAMAGES):
        said = []
        path.write_bytes(content)
        flipped(path, bit)
        loaded = Checkpoint(path, ["run"], warn=said.append).load()
        assert loaded["step"] == 7
        assert torch.equal(loaded["members"]["weight"], state(7)["members"]["weight"])
        (sentence,) = said
        assert "a file that is damaged, for its checksum" in sentence
        assert sentence.endswith("; goes on from the checkpoint before it")
    checkpoint = Checkpoint(path, ["run"])
    assert checkpoint.load()["step"] == 7
    checkpoint.save(state(9))  # in place of the damaged one, not of the one before it
    flipped(path, 4000)
    assert Checkpoint(path, ["run"]).load()["step"] == 7
    flipped(path.with_name("checkpoint.pt.earlier"), 4000)
    with pytest.raises(
        ValueError, match=r"checksum is that of another; delete .*pt and checkpoint\.pt\.earlier to"
    ):
        Checkpoint(path, ["run"]).load()
    path.write_bytes(content)
    assert Checkpoint(path, ["run"]).load()["step"] == 8
    path.unlink()  # killed between two renames
    (tmp_path / "checkpoint.pt.earlier").write_bytes(content)
    checkpoint = Checkpoint(path, ["run"])
    assert checkpoint.exists
    assert checkpoint.load()["step"] == 8
    checkpoint.remove()
    assert not checkpoint.exists
    assert not tmp_path.exists()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_with_the_same_bits(tmp_path):
    run, told = small_run(), []
    (whole,) = train([run], tmp_path / "whole", Options(curve_points=3))
    options = Options(curve_points=3, checkpoint_seconds=0)

    class KilledError(BaseException):
        pass

    def kill(event):
        if event.kind == "epoch" and event.epoch == 2:
            raise KilledError

    with pytest.raises(KilledError):
        train([run], tmp_path / "runs", options, kill)
    flipped(tmp_path / "runs" / run.id / "checkpoint.pt", 12345)
    (folder,) = train([run], tmp_path / "runs", options, told.append)
    (said,) = [event for event in told if event.kind == "damaged"]
    assert "goes on from the checkpoint before it" in said.detail
    assert torch.equal(folder.logits()[0], whole.logits()[0])
    assert (folder.path / "curves.csv").read_bytes() == (whole.path / "curves.csv").read_bytes()


def test_a_full_disk_leaves_both_checkpoints(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "checkpoint.pt", ["run"])
    checkpoint.save(state(7))
    checkpoint.save(state(8))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("churn_kernels._files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(state(9))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_bit_of_weights_or_logits_flips_unseen(runs, tmp_path):
    random, folder = Random(1), folders(runs)[0]
    for name, read in (("weights.pt", folder.weights), ("logits.npz", folder.logits)):
        content = (folder.path / name).read_bytes()
        ends = [*range(8 * 90), *range(8 * len(content) - 8 * 90, 8 * len(content))]
        for bit in [*ends[::15], *random.sample(range(8 * len(content)), DAMAGES // 2)]:
            (folder.path / name).write_bytes(content)
            flipped(folder.path / name, bit)
            with pytest.raises(ValueError, match=r"got: a file that is damaged, .*; delete"):
                read()


def test_files_from_before_there_were_checksums_are_read(runs, tmp_path):
    folder = folders(runs)[0]
    weights, (logits, labels) = folder.weights(), folder.logits()
    torch.save(weights, folder.path / "weights.pt")
    np.savez(folder.path / "logits.npz", logits=logits.numpy(), labels=labels.numpy())
    assert torch.equal(folder.logits()[0], logits)
    assert folder.weights()[0].keys() == weights[0].keys()
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": 2, "owner": ["run"], "state": state(3)}, path)
    assert Checkpoint(path, ["run"]).load()["step"] == 3
    torch.save({"format": 1, "owner": ["run"], "state": state(3)}, path)
    with pytest.raises(
        ValueError, match=r"\['format'\] must be 2, and is int 1; delete .* to train"
    ):
        Checkpoint(path, ["run"]).load()


def test_other_programs_read_the_files(runs):
    folder = folders(runs)[0]
    assert np.load(folder.path / "logits.npz")["labels"].shape == (50,)
    for mmap in (False, True):
        (weights,) = torch.load(folder.path / "weights.pt", weights_only=True, mmap=mmap)
        assert weights.keys() == folder.weights()[0].keys()


# Damage and odd content, of every kind ------------------------------------------------------------


def value_or_sentence(read):
    """What `read` returns, or None where it says in one printable line what is wrong."""
    try:
        return read()
    except ValueError as error:
        said = error
    assert type(said) is ValueError, repr(said)
    assert str(said).isprintable(), said
    assert " must " in str(said) or "there is no setting" in str(said), said
    return None


TOML = """
title = "a study"
methods = ["baseline", {name = "mine", method = {name = "skl", beta = 9.0}, fixed = ["order"]}]
runs = 2
[model]
name = "mlp"
hidden = [8, 8]
[model.options]
depth = 3
[optimisation]
learning_rate = 1e-2
milestones = [1, 2]
"""


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_settings(kind, tmp_path):
    random, path, other = Random(2), tmp_path / f"study.{kind}", tmp_path / "odd.json"
    tables = tomllib.loads(TOML)
    content = TOML if kind == "toml" else json.dumps(tables)
    assert Study.from_mapping(tables).methods[1].method.beta == 9
    read = 0
    for _ in range(DAMAGES):
        path.write_bytes(damaged(content.encode(), random))
        read += value_or_sentence(lambda: Study.load(path)) is not None
        other.write_text(json.dumps(with_odd_content(tables, random)))
        study = value_or_sentence(lambda: Study.load(other))
        if study is not None:
            assert Study.from_mapping(json.loads(json.dumps(study.to_mapping()))) == study
            assert study.run(study.methods[0], 0, 0).id
    assert 0 < read < DAMAGES / 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "deep.json",
            '{"data":' + "[" * 100_000,
            "deep.json must hold JSON, got: maximum recursion",
        ),
        (
            "deep.toml",
            "data = " + "[" * 100_000,
            "deep.toml must hold TOML, got: maximum recursion",
        ),
        ("deep.json", "[" * 90 + "]" * 90, "got: more than 32 levels of tables and lists; correct"),
        ("deep.toml", "x = " + "[" * 90 + "]" * 90, "more than 32 levels of tables and lists"),
        ("date.toml", "[model.options]\nday = 1979-05-27", "got: 1979-05-27, a date; correct it"),
        ("inf.toml", "seed = inf", "got: the number inf, which is not finite; correct it there"),
        ("nan.json", '{"seed": NaN}', "got: the number NaN, which JSON does not have; correct it"),
        ("big.json", '{"seed": ' + "9" * 5000 + "}", "big.json must hold JSON, got: Exceeds the"),
        ("half.json", '{"title": "\\ud800"}', "half.json must hold JSON, got: 'utf-8' codec can't"),
    ],
)
def test_settings_that_no_run_could_use_are_explained(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings(tmp_path / name)
    done = CliRunner().invoke(cli.app, ["train", "--config", str(tmp_path / name)])
    assert done.exit_code == 2
    assert "Traceback" not in done.output


def test_a_file_too_large_for_settings_is_not_read(tmp_path):
    path = tmp_path / "run.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no room on the disk
    with pytest.raises(ValueError, match=r"got: 1099511627776 bytes, more than 67108864; correct"):
        read_settings(path)


def without_checksum(path):
    np.savez(path, **dict(np.load(path)))


READ = {
    "config.json": lambda folder: folder.run(),
    "metrics.json": lambda folder: folder.metrics(),
    "curves.csv": lambda folder: curves._table(folder),
    "logits.npz": lambda folder: (folder.logits(), folder.predictions_along()),
}


@pytest.mark.parametrize("name", READ)
def test_no_run_s_damage_stops_another_run_s_report(name, runs):
    random = Random(f"report {name}")
    spoiled, whole = folders(runs)
    path = spoiled.path / name
    if name == "logits.npz":
        without_checksum(path)
    content = path.read_bytes()
    for number in range(DAMAGES):
        if name.endswith(".json") and number % 2:
            path.write_text(json.dumps(with_odd_content(json.loads(content), random)))
        else:
            path.write_bytes(damaged(content, random))
        value_or_sentence(lambda: READ[name](spoiled))
        if number % 8 > 1:  # it takes longer
            continue
        found = find_runs(runs)
        outcomes, sentences = measure(found.finished)
        splits = [split for outcome in outcomes for split in outcome.splits.values()]
        assert whole in [one.folder for split in splits for one in split.found]
        for sentence in [*sentences, *found.damaged, *curves.read_curves(outcomes)[1]]:
            assert sentence.isprintable()
    make_report(runs)


def test_a_run_whose_metrics_are_damaged_is_said_and_stops_no_other(runs):
    spoiled, whole = folders(runs)
    (spoiled.path / "metrics.json").write_text("{")
    with pytest.warns(UserWarning, match=r"metrics\.json must hold the metrics of a run, got: .*"):
        assert read_runs(runs) == [whole]
    config = runs.parent / "run.json"
    config.write_text((spoiled.path / "config.json").read_text())
    done = CliRunner().invoke(cli.app, ["train", "--config", str(config), "--out", str(runs)])
    assert done.exit_code == 2, done.output
    assert "must hold the metrics of a run, got: " in " ".join(done.stderr.split())


def test_weights_and_arrays(runs, tmp_path):
    random, folder = Random(3), folders(runs)[0]
    weights, (logits, labels) = folder.weights(), folder.logits()
    torch.save(weights, tmp_path / "weights")
    arrays = {"logits": logits.numpy(), "labels": labels.numpy()}
    np.savez(tmp_path / "arrays.npz", **arrays)
    plain = (tmp_path / "weights").read_bytes(), (tmp_path / "arrays.npz").read_bytes()
    network = Loop([folder.run()], load_dataset(folder.run().data), make_fabric(), None, ()).members
    for _ in range(DAMAGES):
        (folder.path / "weights.pt").write_bytes(damaged(plain[0], random))
        value_or_sentence(folder.weights)
        (folder.path / "logits.npz").write_bytes(damaged(plain[1], random))
        value_or_sentence(folder.logits)
        torch.save(with_odd_content(weights, random), folder.path / "weights.pt")
        for one in value_or_sentence(folder.weights) or []:
            value_or_sentence(lambda one=one: network.load_weights(0, 0, one))


def test_checkpoints(tmp_path):
    random, path = Random(4), tmp_path / "checkpoint.pt"
    run = small_run("ce-stale", optimisation=Optimisation(epochs=2, batch_rows=30))
    group = _Group([run], digits(), tmp_path, Options(), lambda event: None, make_fabric())
    group.folders, group.boards = [RunFolder(tmp_path)], []

    def loop():
        return Loop([run], digits(), make_fabric(), None, ())

    first = loop()
    for _ in range(3):
        first.one_step()
        if first.step == 2:
            first.end_epoch([1], group._on_epoch)
    state = first.state()
    state["surroundings"] = {THREADS: state["surroundings"][THREADS]}  # all else is only shown
    content = {"format": 2, "owner": [run.id], "state": state}
    second = loop()
    form = state_form(second, group._kept(second.batches.test_labels))

    def resume():
        state = Checkpoint(path, [run.id]).load(form)
        second.load_state(state)
        second.one_step() if second.step < second.total_steps else None
        return state

    save_tensors(path, content)
    assert resume()["step"] == 3
    torch.save(content, path)
    plain, resumed = path.read_bytes(), 0
    for _ in range(DAMAGES):
        path.write_bytes(damaged(plain, random))
        value_or_sentence(resume)
        torch.save(with_odd_content(content, random), path)
        resumed += value_or_sentence(resume) is not None
    assert 0 < resumed < DAMAGES / 2  # what nothing reads may be anything


def test_the_damages_are_real():
    random, content = Random(5), TOML.encode()
    changed = [damaged(content, random) for _ in range(DAMAGES)]
    assert sum(one != content for one in changed) > 0.9 * DAMAGES
    assert len({repr(with_odd_content({"a": [1, {"b": 2}]}, random)) for _ in range(100)}) > len(
        ODD
    )
