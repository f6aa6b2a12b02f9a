"""The command line: what it prints, what it refuses, and how it is interrupted."""

import os
import signal
import subprocess
import sys

import pytest
from churn_trainer import cli
from churn_trainer.loop import TrainingDiverged
from churn_trainer.methods import METHODS
from typer.testing import CliRunner

SMALL = ["digits", "--runs", "2", "--splits", "1", "--epochs", "1", "--train-rows", "40"]


def run(*arguments):
    return CliRunner().invoke(cli.app, [*SMALL, *map(str, arguments)])


def one_line(text):
    return " ".join(text.split())


def test_digits_prints_the_table_and_writes_the_report(tmp_path):
    out = tmp_path / "out"
    done = run("--method", "skl", "--out", out)
    assert done.exit_code == 0, done.output
    assert "SKL co-distillation" in done.output
    assert "baseline" in done.output
    assert "entropy 0.3" not in done.output
    assert str(out / "report.html") in done.output
    assert (out / "report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runs", 1), "runs must be at least 2, got 1; churn compares runs"),
        (("--splits", 0), "splits must be at least 1, got 0"),
        (("--epochs", 0), "epochs must be at least 1, got 0"),
        (("--seed", -3), "seed must be at least 0, got -3"),
        (("--train-rows", 5), "train_rows must be in [10, 1787], got 5; every class needs rows"),
        (("--workers", 0), "workers must be at least 1, got 0; leave it out for all cores"),
        (("--method", "kl"), "method must be one of baseline, entropy, uniform-skl, ce, l1, skl"),
        (("--method", "skl", "--method", "skl"), "methods must name each method once"),
    ],
)
def test_wrong_values_are_explained_and_nothing_is_written(arguments, message, tmp_path):
    out = tmp_path / "out"
    done = run(*arguments, "--out", out)
    assert done.exit_code == 2
    assert one_line(done.stderr).startswith("error: ")
    assert message in one_line(done.stderr)
    assert "Traceback" not in done.output
    assert not out.exists()


def test_a_folder_with_other_files_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "run_study", lambda *_, **__: pytest.fail("trained"))
    (tmp_path / "notes.txt").write_text("mine")
    done = run("--out", tmp_path)
    assert done.exit_code == 2
    assert "which holds other files; name a new folder" in one_line(done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted; no report was written to"),
        (OSError("disk full"), 1, ": disk full"),
        (TrainingDiverged("the loss of baseline diverged in epoch 1"), 1, "nothing to compare"),
    ],
)
def test_what_goes_wrong_under_way_has_a_message_and_a_status(
    error, status, message, tmp_path, monkeypatch
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "run_study", fail)
    done = run("--out", tmp_path / "out")
    assert done.exit_code == status
    assert message in one_line(done.stderr)
    assert "Traceback" not in done.output


# The command line itself, which tells when the training is under way.
TELLING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a job runs in background
from churn_trainer import cli
run_study = cli.run_study

def telling(study, *, on_epoch, **options):
    def tell(method, epoch):
        on_epoch(method, epoch)
        print("epoch", flush=True)
    return run_study(study, on_epoch=tell, **options)

cli.run_study = telling
cli.app()
"""


def test_ctrl_c_ends_the_training_without_a_report(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", TELLING, "digits", "--epochs", "100000", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        while (line := process.stdout.readline()) != "epoch\n":
            assert line, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"interrupted; no report was written to {out}" in one_line(errors)
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_methods_are_listed():
    done = CliRunner().invoke(cli.app, ["methods"])
    assert done.exit_code == 0
    for method in METHODS.values():
        assert method.name in done.output
        assert method.source in done.output
