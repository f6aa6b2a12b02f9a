"""The command line: what it prints, what it refuses, and how it is interrupted."""

import dataclasses
import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from churn_trainer import cli
from churn_trainer.config import Data, Model, Optimisation, Run, Seeds, Synthetic
from churn_trainer.data import DATASETS
from churn_trainer.methods import METHODS, Method
from churn_trainer.models import NETWORKS
from churn_trainer.run_folder import Busy, read_runs
from churn_trainer.train import MOST_DEVICES
from test_train import environment
from typer.testing import CliRunner


def one_line(text):
    return " ".join(text.split())


def test_methods_are_listed():
    done = CliRunner().invoke(cli.app, ["methods"])
    assert done.exit_code == 0
    for method in METHODS.values():
        assert method.name in done.output
        assert method.source in done.output


# churn-train train --------------------------------------------------------------------------------

TINY = ["--data-train-rows", "60", "--epochs", "2", "--model-hidden", "8"]


def train(out, *arguments):
    line = ["train", "--out", out, "--accelerator", "cpu", *TINY, *arguments]
    return CliRunner().invoke(cli.app, list(map(str, line)))


def test_train_makes_runs_says_so_and_does_not_repeat_them(tmp_path):
    done = train(tmp_path, "--method", "skl", "--runs", 2)
    assert done.exit_code == 0, done.output
    assert one_line(done.stderr).count("finished digits-mlp-skl-") == 2
    runs = [folder.run() for folder in read_runs(tmp_path)]
    assert sorted(run.seeds.order for run in runs) == [0, 1]
    again = train(tmp_path, "--method", "skl", "--runs", 3)
    assert one_line(again.stderr).count("skipped ") == 2
    assert one_line(again.stderr).count("finished ") == 1


def test_every_setting_of_a_run_is_an_option():
    given = {
        "data": ("--data", "multi-view"),
        "data.path": ("--data-path", "x"),
        "data.flip": ("--data-flip",),
        "data.synthetic.classes": ("--synthetic-classes", 3),
        "model": ("--model", "cnn"),
        "model.hidden": ("--model-hidden", 5, "--model-hidden", 6),
        "method": ("--method", "entropy"),
        "method.alpha": ("--method-alpha", 0.25),
        "method.renormalize": ("--no-method-renormalize-top-k",),
        "optimisation": ("--milestones", 1, "--milestones", 2, "--nesterov"),
        "seeds": ("--seed", 7, "--seed-order", 3),
        "repeat": ("--repeat", 4),
    }
    done = CliRunner().invoke(
        cli.app, ["train", "--show", *map(str, [x for part in given.values() for x in part])]
    )
    assert done.exit_code == 0, done.output
    assert Run.from_mapping(tomllib.loads(done.stdout)) == Run(
        data=Data(name="multi-view", path="x", flip=True, synthetic=Synthetic(classes=3)),
        model=Model(name="cnn", hidden=(5, 6)),
        method=replace(METHODS["entropy"], alpha=0.25, renormalize_top_k=False),
        optimisation=Optimisation(milestones=(1, 2), nesterov=True),
        seeds=Seeds(7, 7, 3, 7, 7),
        repeat=4,
    )


def test_help_names_every_setting_and_its_default():
    done = CliRunner().invoke(cli.app, ["train", "--help"], env={"COLUMNS": "250"})
    assert done.exit_code == 0
    for kind in (Data, Synthetic, Model, Method, Optimisation, Seeds):
        for field in dataclasses.fields(kind):
            if "help" in field.metadata and field.name != "options":
                words = one_line(done.output.replace("│", " "))
                assert field.metadata["help"].split(".")[0] in words, field.name
    assert "Default: 0.02." in done.output
    assert "Default: 64 64." in done.output


def test_the_command_line_goes_before_the_file(tmp_path):
    (tmp_path / "run.toml").write_text(
        "[method]\nname = 'l1'\nbeta = 1.0\n[optimisation]\nepochs = 9\n[seeds]\norder = 5\n"
        "[data.synthetic]\nclasses = 3\nnoise = 1.0\n"
    )
    line = ["train", "--show", "--config", tmp_path / "run.toml", "--epochs", 4]
    line += ["--synthetic-noise", 2]
    done = CliRunner().invoke(cli.app, list(map(str, line)))
    run = Run.from_mapping(tomllib.loads(done.stdout))
    assert run.method == replace(METHODS["l1"], beta=1.0)
    assert run.optimisation.epochs == 4
    assert run.seeds == Seeds(order=5)
    assert run.data.synthetic == Synthetic(classes=3, noise=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs", 0), "runs must be at least 1, got 0; 1 is the default"),
        (("--method", "skll"), "did you mean 'skl"),
        (("--data", "cifar"), "data.name must be one of digits"),
        (
            ("--data", "folder"),
            "data.path (--data-path) must be a folder of images, got none; name",
        ),
        (("--model", "cnnn"), "did you mean 'cnn'?"),
        (("--model", "os:system"), "pass --trust os (trust=['os'] in Python)"),
        (("--config", "nowhere.toml"), "the settings file must exist, got nowhere.toml; check"),
        (("--config", "seeds.toml"), "seeds must be a table of settings, got 3"),
        (("--data-train-rows", 5), "train_rows must be in [10, 1787], got 5"),
        (("--data-validation-rows", 55), "validation_rows must be 0 or in [10, 50], got 55; every"),
        (
            ("--config", "x.toml"),
            "x.toml must be a file of settings, got a folder; name the file in it",
        ),
        (("--config", "deep.json"), "the number of hidden layers must be at most 1000, got 3000"),
        (("--seed", "1" * 400), "seeds.split must be within 2^63, got a number of 400 digits"),
        (("--learning-rate", "1" * 400), "learning_rate must be a finite number above 0, got inf"),
        (("--learning-rate", "1e300"), "learning_rate must be at most 1e+38, got 1e+300; 0.02 is"),
        (("--runs", 10**8), "runs must be at most 100000, got 100000000; 1 is the default"),
        (("--devices", 10**8), f"devices must be at most {MOST_DEVICES}, got 100000000; 1 tra"),
        (("--model-hidden", 10**9, "--model-hidden", 10**9), "weights and gradients must fit into"),
        (("--model-hidden", 9 * 10**18), "weights and gradients must fit into the"),
        (("--method", "ensemble", "--model-hidden", 10**8), "gradients must fit into the"),
        (
            ("--data", "multi-view", "--synthetic-dimension", 10**12, "--data-train-rows", 0),
            "the data that are drawn must fit into the",
        ),
        (
            ("--data", "prototypes", "--synthetic-classes", 10**12, "--data-train-rows", 0),
            "the data that are drawn must fit into the",
        ),
        (("--data-crop-padding", 16000, "--batch-rows", 60), "a minibatch must fit into the"),
        (("--method-top-k", 11), "method.top_k must be at most 10, the classes of digits, got 11"),
        (
            ("--model", "json:dumps", "--trust", "json"),
            "got: TypeError: dumps() takes 1 positional",
        ),
        (("--batch-rows", 99, "--drop-last"), "batch_rows must be at most the 60 training rows"),
        (("--epochs", 2, "--go-on-from", 2), "must rise from 1 and stay below epochs = 2, got [2]"),
    ],
)
def test_train_explains_wrong_settings(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seeds.toml").write_text("seeds = 3")
    (tmp_path / "x.toml").mkdir()
    (tmp_path / "deep.json").write_text(json.dumps({"model": {"hidden": [8] * 3000}}))
    line = ["train", "--out", tmp_path / "out", "--accelerator", "cpu", *TINY[:4], *arguments]
    done = CliRunner().invoke(cli.app, list(map(str, line)))
    assert done.exit_code == 2, done.output
    assert message in one_line(done.stderr)
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()  # nothing had begun


def test_a_finished_run_goes_on_from_the_command_line(tmp_path):
    assert train(tmp_path).exit_code == 0
    done = train(tmp_path, "--epochs", 4, "--go-on-from", 2)
    assert done.exit_code == 0, done.output
    said = one_line(done.stderr)
    assert [said.count(word) for word in ("skipped", "resumed", "finished")] == [1, 1, 1]
    assert "after step 4" in said
    unkept = train(tmp_path / "unkept", "--no-keep-checkpoint")
    assert unkept.exit_code == 0
    done = train(tmp_path / "unkept", "--epochs", 4, "--go-on-from", 2)
    assert done.exit_code == 2
    assert "checkpoint.pt must hold the end of the run that go_on_from names" in done.stderr


@pytest.mark.parametrize("missing", ["typer", "rich", "lightning_fabric", "sklearn.datasets"])
def test_a_package_that_is_not_installed_is_named_in_one_line(missing, tmp_path):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv[0] = 'churn-train'\n"
        "from churn_trainer.__main__ import main; main()"
    )
    line = [sys.executable, "-c", code, "train", "--out", str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "churn-train: the trainer's packages must be installed, got no "
        f"{missing.partition('.')[0]}; pip install 'churn-kernels[trainer]'"
    ]


def test_the_command_is_the_one_that_names_them():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["churn-train"] == "churn_trainer.__main__:main"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")]
)
def test_memory_that_does_not_suffice_is_said(error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "train", fail)
    done = train(tmp_path)
    assert done.exit_code == 2
    assert "memory must hold models and minibatches, got: " in one_line(done.stderr)
    assert "make them smaller" in one_line(done.stderr)


def test_a_file_is_no_folder_of_runs(tmp_path):
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("mine")
    for command in ("train", "audit"):
        for out in (thesis, thesis / "runs"):
            done = CliRunner().invoke(cli.app, [command, "--out", str(out)])
            assert done.exit_code == 2, done.output
            assert f"got the file {thesis}" in one_line(done.stderr)
    assert thesis.read_text() == "mine"


def test_a_diverged_run_has_an_exit_status(tmp_path):
    done = train(tmp_path, "--learning-rate", "1e30", "--clip-norm", 0)
    assert done.exit_code == 1
    assert "diverged digits-mlp-baseline-" in one_line(done.stderr)
    assert "its loss or gradient is not finite" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on from what is there"),
        (OSError("disk full"), 1, "disk full; finished runs are kept; rerun the command to resume"),
        (Busy("it is busy"), 2, "it is busy"),
    ],
)
def test_what_stops_a_training_has_a_message_and_a_status(
    error, status, message, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "train", fail)
    done = train(tmp_path)
    assert done.exit_code == status
    assert message in one_line(done.stderr)


@pytest.mark.parametrize(("name", "table"), [("data", DATASETS), ("models", NETWORKS)])
def test_data_sets_and_networks_are_listed(name, table):
    done = CliRunner().invoke(cli.app, [name])
    assert done.exit_code == 0
    for key, (description, _) in table.items():
        assert key in done.output
        assert description.split(";")[0] in one_line(done.output)
