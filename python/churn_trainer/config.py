"""What a study is: every setting with its default, and every random seed, in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np


class Draw(IntEnum):
    """What a seed is drawn for; a source of randomness is fixed by fixing its seeds."""

    SPLIT = 0
    INITIALISATION = 1
    ORDER = 2


@dataclass(frozen=True)
class Training:
    """How one model is trained: SGD with momentum at a constant learning rate.

    Attributes:
        epochs: passes over the training rows.
        batch_rows: rows per minibatch; the last one of an epoch may be smaller.
        learning_rate: step size, constant.
        momentum: decay of the velocity, in [0, 1).
        clip_norm: largest Euclidean norm of one model's gradient.
        ramp_share: share of the steps after which a ramp has reached its full weight, in (0, 1].
    """

    epochs: int = 100
    batch_rows: int = 32
    learning_rate: float = 0.02
    momentum: float = 0.9
    clip_norm: float = 1.0
    ramp_share: float = 0.5

    def __post_init__(self) -> None:
        _at_least("epochs", self.epochs, 1, "one epoch is one pass over the training rows")
        _at_least("batch_rows", self.batch_rows, 1, "32 is the default")
        _positive("learning_rate", self.learning_rate, "0.02 is the default")
        _positive("clip_norm", self.clip_norm, "pass a large number to leave gradients unclipped")
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum must be in [0, 1), got {self.momentum}; 0 is plain gradient descent"
            )
        if not 0 < self.ramp_share <= 1:
            raise ValueError(
                f"ramp_share must be in (0, 1], got {self.ramp_share}; "
                "1 lets ramps rise through the whole training"
            )


@dataclass(frozen=True)
class Study:
    """Methods x splits x runs on one data set.

    Attributes:
        dataset: a name in `data.DATASETS`.
        methods: names in `methods.METHODS`; the first is what the others are compared with.
        runs: independent runs per split and method, at least 2.
        splits: random splits of the data into training and test rows.
        train_rows: training rows of a split; all others are test rows.
        hidden: widths of the hidden layers.
        seed: the one number all randomness follows from, >= 0.
        level: coverage of the intervals, in (0, 1).
        curve_points: how many times a training is measured on the test rows for the curves.
        training: see `Training`.
    """

    dataset: str
    methods: tuple[str, ...]
    runs: int = 10
    splits: int = 8
    train_rows: int = 300
    hidden: tuple[int, ...] = (64, 64)
    seed: int = 0
    level: float = 0.95
    curve_points: int = 20
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        _at_least("runs", self.runs, 2, "churn compares runs")
        _at_least("splits", self.splits, 1, "with one split the intervals are over runs alone")
        _at_least("train_rows", self.train_rows, 1, "300 is the default")
        _at_least("seed", self.seed, 0, "any whole number from 0 will do")
        _at_least("curve_points", self.curve_points, 1, "the last point is the trained model")
        for width in self.hidden:
            _at_least("hidden", width, 1, "list the widths of the hidden layers")
        if not 0 < self.level < 1:
            raise ValueError(f"level must be in (0, 1), got {self.level}; 0.95 is customary")
        if len(set(self.methods)) != len(self.methods) or not self.methods:
            raise ValueError(
                f"methods must name each method once and at least one, got {list(self.methods)}; "
                "drop what is there twice"
            )

    def seed_for(self, draw: Draw, *where: int) -> int:
        """A 63-bit seed for one draw, the same for every method.

        Args:
            draw: what is drawn.
            where: indices that tell this draw from others of its kind: split, run, member.
        """
        sequence = np.random.SeedSequence(self.seed, spawn_key=(int(draw), *where))
        return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def measured_epochs(self) -> tuple[int, ...]:
        """The epochs (from 1) after which the curves have a point; the last epoch is among them."""
        epochs = self.training.epochs
        points = min(self.curve_points, epochs)
        return tuple(round(epochs * point / points) for point in range(1, points + 1))


def _at_least(name: str, value: int, minimum: int, remedy: str) -> None:
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}; {remedy}")


def _positive(name: str, value: float, remedy: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value}; {remedy}")
