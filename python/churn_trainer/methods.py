"""The table of methods: what is added to the cross entropy, and how its weight rises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

RAMPS: dict[str, Callable[[float], float]] = {
    "none": lambda progress: 1.0,
    "linear": lambda progress: min(1.0, progress),
    "step": lambda progress: float(progress >= 1),
    # From 0.007 at the start over 1/2 half way to 0.993 at t0, and on to 1.
    "sigmoid": lambda progress: 1 / (1 + math.exp(-10 * (progress - 0.5))),
}
"""Share of the full weight at progress t / t0 of the ramp, t >= 0."""


@dataclass(frozen=True)
class Method:
    """One training objective.

    sum_k [(1 - alpha(t)) CE_k + alpha(t) R_k] + beta(t) D(p_1, p_2), in the terms of
    `churn_kernels.codistillation_loss`.

    Attributes:
        name: what the command line and the CSV files call it.
        label: what the table and the figures call it.
        source: where the formula is from.
        members: models trained together; 1 has no divergence. Member 0 is the one measured.
        alpha, beta: full weights of regulariser and divergence.
        regularizer, divergence: names as in `codistillation_loss`.
        ramp: a name in `RAMPS`, for both weights.
    """

    name: str
    label: str
    source: str
    members: int = 1
    alpha: float = 0.0
    beta: float = 0.0
    regularizer: str = "entropy"
    divergence: str = "skl"
    ramp: str = "none"

    def loss_options(self, progress: float) -> dict[str, Any]:
        """Arguments of `codistillation_loss` at `progress` t / t0 of the ramp."""
        share = RAMPS[self.ramp](progress)
        return {
            "alpha": self.alpha * share,
            "beta": self.beta * share,
            "regularizer": self.regularizer,
            "divergence": self.divergence,
        }


_PAPER = "Bhojanapalli et al. 2021"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("baseline", "baseline", "cross entropy"),
        Method("entropy", "entropy 0.3", f"{_PAPER}, Eq. 6", alpha=0.3),
        Method(
            "uniform-skl",
            "SKL to uniform 0.003",
            f"{_PAPER}, Eq. 7",
            alpha=0.003,
            regularizer="uniform_skl",
        ),
        Method(
            "ce",
            "CE co-distillation",
            "Anil et al. 2018",
            members=2,
            beta=3.0,
            divergence="ce",
            ramp="step",
        ),
        Method(
            "l1",
            "L1 co-distillation",
            f"{_PAPER}, Eq. 8",
            members=2,
            beta=3.0,
            divergence="l1",
            ramp="linear",
        ),
        Method(
            "skl",
            "SKL co-distillation",
            f"{_PAPER}, Eq. 9",
            members=2,
            beta=3.0,
            ramp="linear",
        ),
        Method(
            "skl-entropy",
            "SKL + entropy 0.3",
            f"{_PAPER}, Eq. 19",
            members=2,
            alpha=0.3,
            beta=3.0,
            ramp="linear",
        ),
    )
}
BASELINE = "baseline"


def find_method(name: str) -> Method:
    """The method of that name.

    Raises: ValueError naming the methods there are.
    """
    if name not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {name!r}; "
            "`churn-trainer methods` describes them"
        )
    return METHODS[name]
