"""Audits of the trainer's runs: traces of trainings, and steps that are run again."""

import json
import subprocess
import sys

import pytest
from churn_trainer import cli, loop
from churn_trainer import train as training
from churn_trainer.audited import training_of
from churn_trainer.config import Optimisation, Seeds
from churn_trainer.data import digits
from churn_trainer.loop import fit
from churn_trainer.run_folder import TRACE
from churn_trainer.train import Options, train
from small_study import independent, small_run
from test_loop import Killed
from test_train import environment
from typer.testing import CliRunner

from churn_kernels import audit


def kill(*_):
    raise Killed


def trace_of(run, root, **changes):
    (folder,) = train([run], root, Options(trace=True, **changes))
    return audit.Trace.load(folder.path / TRACE)


def test_traces_of_equal_runs_agree_and_name_what_differs(tmp_path):
    one, same = (trace_of(independent("skl", 0), tmp_path / name) for name in "ab")
    assert audit.compare(one, same).difference is None
    assert len(one.steps) == 1 + 3 * 2
    reordered = trace_of(small_run("skl", seeds=Seeds(0, 0, 1, 0, 0)), tmp_path / "c")
    difference = audit.compare(one, reordered).difference
    assert (difference.step, difference.first) == (1, "inputs")


def test_two_processes_leave_the_same_trace(tmp_path):
    settings = ["--data-train-rows", "60", "--epochs", "1", "--model-hidden", "8"]
    for name in "ab":
        line = [sys.executable, "-m", "churn_trainer", "train", *settings, "--trace"]
        subprocess.run([*line, "--out", str(tmp_path / name)], env=environment(), check=True)
    traces = [audit.Trace.load(next(tmp_path.glob(f"{name}/*/{TRACE}"))) for name in "ab"]
    assert audit.compare(*traces).difference is None


def test_a_stack_has_one_trace(tmp_path):
    runs = [independent("baseline", number) for number in range(2)]
    train(runs, tmp_path, Options(trace=True))
    found = [path.parent.name for path in tmp_path.glob(f"*/{TRACE}")]
    assert found == [runs[0].id]


def test_a_killed_training_goes_on_with_its_trace(tmp_path, monkeypatch):
    run = independent("baseline", 0)
    whole = trace_of(run, tmp_path / "whole")

    on_epoch = training._Group._on_epoch

    def killing(self, epoch):
        if epoch.number == 2:
            raise Killed
        return on_epoch(self, epoch)

    monkeypatch.setattr(training._Group, "_on_epoch", killing)
    with pytest.raises(Killed):
        trace_of(run, tmp_path / "killed", checkpoint_seconds=0)
    monkeypatch.undo()
    again = trace_of(run, tmp_path / "killed", checkpoint_seconds=0)
    assert audit.compare(whole, again).difference is None
    assert len(again.steps) == len(whole.steps)


def test_steps_are_those_of_the_training():
    run = small_run("skl-entropy")
    training = training_of(run)("cpu")
    for number in range(1, 3 * 2 + 1):
        training.step(number)
    trained = fit([run], digits())
    for one, other in zip(
        training.model.state_dict().values(), trained.members.state_dict().values(), strict=True
    ):
        assert one.equal(other)
    assert training.predict().equal(trained.logits[0][: loop.TEST_BLOCK])


@pytest.mark.parametrize("method", ["distillation", "ce-stale"])
def test_a_method_whose_steps_depend_on_more_is_refused(method):
    with pytest.raises(ValueError, match=rf"without teachers or stale partners, got {method}, "):
        training_of(small_run(method))


def test_a_run_that_goes_on_from_another_is_refused():
    going_on = small_run(optimisation=Optimisation(epochs=3, go_on_from=(1,)))
    with pytest.raises(
        ValueError, match=r"go_on_from empty, got \[1\]; audit what it is made from"
    ):
        training_of(going_on)


def test_a_trace_begins_with_its_training(tmp_path, monkeypatch):
    run = independent("baseline", 0)
    monkeypatch.setattr(training._Group, "_write", kill)
    with pytest.raises(Killed):
        train([run], tmp_path, Options(checkpoint_seconds=0))
    with pytest.raises(ValueError, match=r"trace must hold every step up to 6, .* without a trace"):
        trace_of(run, tmp_path)


SMALLEST = ("--replays", "2", "--pairs", "2", "--steps", "2", "--amplify-steps", "2")


def test_the_command_says_what_it_found(tmp_path):
    line = ["audit", "--data-train-rows", "60", "--epochs", "2", *SMALLEST]
    done = CliRunner().invoke(cli.app, [*line, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "no difference in 2 replays" in done.stdout
    assert f"Report: {tmp_path / 'out' / 'audit.html'}" in done.stdout
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["verdict"] == "none"
    assert found["target"].startswith("digits-mlp-baseline-")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"audit.html", "audit.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "distillation"), "method must be one without teachers"),
        (("--model", "mpl"), "mlp"),
        (("--device", "tpu"), "device must be one of cpu, cuda, got 'tpu'"),
    ],
)
def test_wrong_settings_are_explained(arguments, message, tmp_path):
    done = CliRunner().invoke(cli.app, ["audit", *arguments, "--out", str(tmp_path / "out")])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.output
