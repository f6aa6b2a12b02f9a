"""The commands for many runs: what they print, refuse, leave behind, and how they are stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib

import pytest
from churn_trainer import cli, named_studies, study_cli
from churn_trainer.config import Study
from churn_trainer.data import pinned
from churn_trainer.named_studies import find_study, recipes, study_files
from churn_trainer.run_folder import read_runs
from churn_trainer.study import STUDY
from churn_trainer.train import Event
from image_files import write_folder
from small_study import rows_of
from typer.testing import CliRunner

SMALL = """
runs = 2
splits = 1
methods = ["baseline", "skl"]
[data]
train_rows = 60
[model]
hidden = [8]
[optimisation]
epochs = 2
"""


def run(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def one_line(text):
    return " ".join(text.split())


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


# churn-train study --------------------------------------------------------------------------------


def test_a_study_prints_its_table_and_leaves_runs_and_report(small, tmp_path):
    out = tmp_path / "out"
    done = run("study", small, "--out", out, "--accelerator", "cpu")
    assert done.exit_code == 0, done.output
    assert "SKL co-distillation" in done.stdout
    assert f"Report: {out}/report/report.html" in done.stdout
    assert (out / "report" / "report.html").is_file()
    assert len(read_runs(out / "runs")) == 4
    assert Study.load(out / "runs" / STUDY) == Study.load(small)

    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.json")}
    more = run("study", small, "--out", out, "--runs", 3, "--method", "entropy")
    assert more.exit_code == 0, more.output
    assert "skipped digits-mlp-baseline-" in more.stderr
    assert "entropy 0.3" in more.stdout
    assert "SKL co-distillation" not in more.stdout
    assert len(read_runs(out / "runs")) == 4 + 1 + 3
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


def test_options_win_over_the_file(small):
    chosen = study_cli._study(str(small), ["l1", "skl", "baseline"], 4, 3, 7, 5)
    assert [variant.name for variant in chosen.methods] == ["baseline", "l1", "skl"]
    assert (chosen.runs, chosen.splits, chosen.seed) == (4, 3, 5)
    assert chosen.optimisation.epochs == 7
    assert chosen.model.hidden == (8,)


def test_a_method_of_the_study_keeps_what_the_study_says_of_it(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(
        'methods = ["baseline", {name = "mine", method = {name = "skl", beta = 9.0}}, "ce"]'
    )
    chosen = study_cli._study(str(path), ["mine"], None, None, None, None)
    assert [variant.name for variant in chosen.methods] == ["baseline", "mine"]
    assert chosen.methods[1].method.beta == 9


def test_progress_shows_a_method_s_own_name_on_images_too(small, tmp_path, monkeypatch):
    data = write_folder(tmp_path / "images", count=20)
    small.write_text(
        SMALL.replace('"skl"', '{name = "mine", method = {name = "skl"}}').replace(
            "train_rows = 60", f'name = "folder"\npath = "{data}"\nimage_size = 8\ntrain_rows = 20'
        )
    )
    shown = []

    def trains(study, root, workers, options, *, tell, **_):
        for run in pinned(study.all_runs()):
            tell(Event("started", [run]))

    def add_task(self, description, total):
        shown.append(description)

    monkeypatch.setattr(study_cli, "run_study", trains)
    monkeypatch.setattr(study_cli.Progress, "add_task", add_task)
    monkeypatch.setattr(study_cli, "_conclude", lambda *_: None)
    done = run("study", small, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert set(shown) == {"baseline x 1", "mine x 1"}


def test_a_method_that_diverges_has_an_exit_status(small, tmp_path):
    wild = '{name = "wild", changes = {optimisation = {learning_rate = 1e30, clip_norm = 0.0}}}'
    small.write_text(SMALL.replace('"skl"', wild))
    done = run("study", small, "--out", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert "diverged digits-mlp-baseline-" in done.stderr
    assert "Left out: digits-mlp-baseline-" in one_line(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs", 1), "runs must be at least 2, got 1; churn compares runs"),
        (("--splits", 0), "splits must be at least 1, got 0"),
        (("--epochs", 0), "epochs must be at least 1, got 0"),
        (("--seed", -3), "seed must be at least 0, got -3"),
        (("--workers", 0), "workers must be at least 1, got 0; leave it out for all cores"),
        (("--retries", -1), "retries must be at least 0, got -1; 0 gives up after the first"),
        (("--method", "kl"), "method must be one of baseline, entropy, uniform-skl, ce, l1, skl"),
        (("--method", "skl", "--method", "skl"), "methods must name each method once"),
        (("--accelerator", "gpu"), "accelerator must be one of cpu, cuda, auto, got 'gpu'"),
    ],
)
def test_wrong_values_are_explained_and_nothing_is_trained(arguments, message, small, tmp_path):
    out = tmp_path / "out"
    done = run("study", small, *arguments, "--out", out)
    assert done.exit_code == 2
    assert one_line(done.stderr).startswith("error: ")
    assert message in one_line(done.stderr)
    assert "Traceback" not in done.output
    assert not list(out.glob("runs/*/*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digts", "study must be one of digits, claims, .* or a file, got 'digts'; did you mean"),
        ("mine", "got 'mine'; or name a .toml or .json file"),
        ("mine.toml", "the settings file must exist, got mine.toml; check the path"),
    ],
)
def test_an_unknown_study_is_explained(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("study", name)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert re.search(message, one_line(done.stderr))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused_before_training(small, tmp_path, monkeypatch):
    monkeypatch.setattr(study_cli, "run_study", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "notes.txt").write_text("mine")
    done = run("study", small, "--out", tmp_path)
    assert done.exit_code == 2
    assert "which holds other files; name a new folder" in one_line(done.stderr)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from what is there"),
        (OSError("disk full"), 1, "disk full; finished runs are kept; rerun the command to resume"),
    ],
)
@pytest.mark.parametrize("command", ["study", "sources"])
def test_what_stops_a_study_has_a_message_and_a_status(
    command, error, status, message, small, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(study_cli, "run_study", fail)
    done = run(*([command, small] if command == "study" else [command]), "--out", tmp_path / "out")
    assert done.exit_code == status
    assert message in one_line(done.stderr)
    assert "Traceback" not in done.output


# The command line itself, which says when the first training is under way.
TELLING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a job runs in background
from churn_trainer import cli, tasks

def run(self, run=tasks._Schedule.run):
    tell = self.tell
    def telling(event):
        tell(event)
        print(event.kind, flush=True)
    self.tell = telling
    run(self)

tasks._Schedule.run = run
cli.app()
"""


def test_ctrl_c_leaves_what_the_same_command_goes_on_with(small, tmp_path):
    out = tmp_path / "out"
    arguments = ["study", str(small), "--out", str(out), "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", TELLING, *arguments, "--checkpoint-seconds", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        # The longer method has ended, the other is under way.
        while (line := process.stdout.readline()) != "finished\n":
            assert line, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, workers included
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on from what is there" in one_line(errors)
    assert "Traceback" not in errors
    finished = read_runs(out / "runs")
    assert finished
    stamps = {one.path: (one.path / "metrics.json").stat().st_mtime_ns for one in finished}
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "skipped " in done.stderr
    assert len(read_runs(out / "runs")) == 4
    assert {path: (path / "metrics.json").stat().st_mtime_ns for path in stamps} == stamps


# churn-train sources ------------------------------------------------------------------------------


def test_sources_reports_the_table_of_every_subset(tmp_path):
    config = tmp_path / "run.json"
    tables = {"data": {"train_rows": 60, "crop_padding": 1}, "model": {"hidden": [8]}}
    config.write_text(json.dumps(tables))
    line = ["sources", "--config", config, "--runs", 2, "--splits", 1, "--epochs", 2]
    done = run(*line, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "out" / "report" / "table-sources.csv")
    held = {row["held fixed"]: row for row in rows if row["column"] == "churn"}
    assert len(held) == 8
    assert {"nothing", "initialisation", "order", "augmentation", "everything"} <= set(held)
    for name, row in held.items():
        identical, _, pairs = row["identical pairs"].split()
        assert identical == (pairs if name == "everything" else "0")
        assert int(pairs) > 0
    said = one_line(done.stdout)
    assert "with every seed the same, on cpu: churn 0.00 %, 1 of 1 pairs of runs have" in said
    assert "trained with 1 or 2 threads" in said
    assert run(*line, "--out", tmp_path / "out").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs", 1), "runs must be at least 2, got 1"),
        (("--threads", 0), "threads must be at least 1, got 0; 1 computes with one thread"),
        (("--config", "nowhere.toml"), "the settings file must exist, got nowhere.toml"),
        (("--accelerator", "tpu"), "accelerator must be one of cpu, cuda, auto, got 'tpu'"),
    ],
)
def test_sources_explains_wrong_settings(arguments, message, tmp_path):
    done = run("sources", *arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert message in one_line(done.stderr)
    assert not list(tmp_path.glob("out/runs/*/*/*"))


# churn-train recipes, and the studies of the package ----------------------------------------------


@pytest.mark.parametrize("name", list(study_files()))
def test_every_study_of_the_package_is_one(name):
    study = Study.load(find_study(name))
    assert study.title
    assert study.methods[0].name == "baseline"
    assert len(study.all_runs()) == len(study.methods) * study.runs * study.splits


def test_the_recipes_have_the_paper_s_numbers():
    known = recipes()
    temperatures = {}
    for name, study in known.items():
        names = [variant.name for variant in study.methods]
        assert {"2-distillation", "ce", "entropy", "uniform-skl", "skl", "skl-entropy"} <= set(
            names
        )
        distilled = study.methods[names.index("2-distillation")].method
        temperatures[name.split("-")[0]] = distilled.temperature
        assert study.runs == 5
        assert study.optimisation.batch_rows == 1024
    assert temperatures == {
        "cifar10": 3,
        "cifar100": 4,
        "imagenet": 1,
        "inaturalist2018": 1,
        "svhn": 4,
    }
    cifar = known["cifar100-resnet32"].optimisation
    assert (cifar.epochs, cifar.learning_rate, cifar.warmup_epochs) == (450, 1.0, 15)
    assert (cifar.milestones, cifar.decay, cifar.nesterov) == ((200, 300, 400), 0.1, True)
    imagenet = known["imagenet-resnet-v2-50"].optimisation
    assert (imagenet.epochs, imagenet.learning_rate, imagenet.warmup_epochs) == (90, 0.8, 5)
    assert (imagenet.milestones, imagenet.momentum) == ((30, 60, 80), 0.9)


def test_a_recipe_says_of_each_number_where_it_is_from():
    for name in recipes():
        for line in study_files()[name].read_text(encoding="utf-8").splitlines():
            setting, _, comment = line.partition("#")
            number = setting.partition("=")[2].strip()
            if number and setting.split()[0] not in ("title", "splits", "name", "path", "method"):
                assert "paper" in comment or "ours" in comment, (name, line)


def test_recipes_are_listed_and_written(tmp_path):
    done = run("recipes")
    assert done.exit_code == 0
    for name, study in recipes().items():
        assert name in done.stdout
        assert study.title in one_line(done.stdout)
    folder = tmp_path / "recipes"
    written = run("recipes", "--write", folder)
    assert written.exit_code == 0
    assert sorted(written.stdout.split()) == sorted(map(str, folder.iterdir()))
    for name, study in recipes().items():
        assert Study.from_mapping(tomllib.loads((folder / f"{name}.toml").read_text())) == study
    assert run("recipes", "--write", folder).exit_code == 0
    (folder / "svhn-lenet5.toml").write_text("changed = 1")
    refused = run("recipes", "--write", folder)
    assert refused.exit_code == 2
    assert "whose svhn-lenet5.toml differs; name another folder" in one_line(refused.stderr)
    assert (folder / "svhn-lenet5.toml").read_text() == "changed = 1"


def test_studies_are_listed():
    done = run("study")
    assert done.exit_code == 0
    for name in (*named_studies.OWN, *recipes()):
        assert f"{name} " in done.stdout
