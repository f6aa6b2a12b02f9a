"""Trainings that are stopped and go on, as other trainers' users have reported them to go wrong."""

import time
from itertools import cycle

import pytest
import torch
from churn_trainer import train as training
from churn_trainer.checkpoint import Checkpoint
from churn_trainer.config import Data, Optimisation
from churn_trainer.loop import Loop
from churn_trainer.train import Options, train
from small_study import small_run


class KilledError(BaseException):
    """Ends a process in the middle, as kill -9 would."""


def die(*_):
    raise KilledError


def test_killed_again_and_again_within_an_epoch_order_and_step_size_stay(tmp_path, monkeypatch):
    """No epoch is shuffled anew, no schedule begins anew, no step comes twice or is left out."""
    recipe = Optimisation(epochs=3, batch_rows=8, schedule="cosine", warmup_epochs=1)
    run = small_run("skl", data=Data(train_rows=61, crop_padding=1), optimisation=recipe)
    (whole,) = train([run], tmp_path / "whole", Options(curve_points=3))
    options, steps, ends = Options(curve_points=3, checkpoint_seconds=0), [], []
    one_step = Loop.one_step

    def one_step_until_the_end(self):
        if self.step == ends[-1]:
            raise KilledError
        steps.append(self.step)
        one_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "one_step", one_step_until_the_end)
        patch.setattr(training._Group, "_write", die)
        for end in (11, 13, 16, 24):  # twice within the second epoch, at its end, after the last
            ends.append(end)
            with pytest.raises(KilledError):
                train([run], tmp_path / "runs", options)
    assert steps == list(range(24))
    monkeypatch.setattr(Loop, "one_step", die)  # nothing is left to do but to write
    (folder,) = train([run], tmp_path / "runs", options)
    assert torch.equal(folder.logits()[0], whole.logits()[0])
    assert (folder.path / "curves.csv").read_bytes() == (whole.path / "curves.csv").read_bytes()


def test_a_clock_that_is_set_changes_nothing(tmp_path, monkeypatch):
    run, jumps = small_run(), cycle((0.0, 4e9, -1e9, 1.7e9))
    (whole,) = train([run], tmp_path / "whole")
    running, saved = [0.0], []
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(time, "monotonic", lambda: running[0])  # which no clock's setting moves
    save = Checkpoint.save
    monkeypatch.setattr(
        Checkpoint, "save", lambda self, state: (saved.append(state["step"]), save(self, state))
    )

    def pass_time(event):
        running[0] += 40.0 if event.kind == "epoch" else 0.0

    (folder,) = train([run], tmp_path / "set", Options(checkpoint_seconds=60), pass_time)
    assert saved == [4, 6]  # after the second epoch, 80 seconds on, and at the end
    assert torch.equal(folder.logits()[0], whole.logits()[0])
    assert folder.metrics()["environment"]["seconds"] >= 0
