"""The table of methods: what is added to the cross entropy, and how its weight rises."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from churn_trainer.settings import at_least, not_negative, one_of, positive, setting, share

RAMPS: dict[str, Callable[[float], float]] = {
    "none": lambda progress: 1.0,
    "linear": lambda progress: min(1.0, progress),
    "step": lambda progress: float(progress >= 1),
    # From 0.007 at the start over 1/2 half way to 0.993 at t0, and on to 1.
    "sigmoid": lambda progress: 1 / (1 + math.exp(-10 * (progress - 0.5))),
}
"""Share of the full weight at progress t / t0 of the ramp, t >= 0."""

MEASURED = ("member", "ensemble", "average")


@dataclass(frozen=True)
class Method:
    """One training objective over K members; `objectives` has the formulas.

    sum_k [(1 - alpha(t)) CE_k + alpha(t) R_k] + beta(t) mean over pairs of D(p_i, p_j), in the
    terms of `churn_kernels.codistillation_loss`; with teachers, `distillation_loss` instead.
    """

    name: str = setting("baseline", "Method of the table (`churn-train methods`) to start from.")
    members: int = setting(1, "Models trained together, K.")
    alpha: float = setting(0.0, "Full weight of the regulariser, in [0, 1).")
    regularizer: str = setting("entropy", "Regulariser: entropy or uniform_skl.")
    top_k: int = setting(0, "Regularise the k largest probabilities of a row; 0: all.")
    renormalize_top_k: bool = setting(True, "Take those k as a distribution of their own.")
    beta: float = setting(0.0, "Full weight of the divergence between members.")
    divergence: str = setting("skl", "skl and l1 update jointly, ce holds the partner fixed.")
    stale_steps: int = setting(0, "With ce: steps between renewals of the partner's weights.")
    ramp: str = setting("none", "How alpha and beta rise: none, linear, step or sigmoid.")
    ramp_share: float = setting(0.5, "Share of the steps after which they are full, in (0, 1].")
    label_smoothing: float = setting(0.0, "Smoothing of the labels, in [0, 1).")
    temperature: float = setting(1.0, "Divides the logits in divergence and distillation.")
    teachers: int = setting(0, "Models trained before, whose mean prediction is distilled.")
    distillation: float = setting(0.5, "Weight of the distillation term, in [0, 1].")
    measured: str = setting("member", "Measure one member, the ensemble, or the average's logits.")

    @classmethod
    def preset(cls, name: str) -> Method:
        """The method of that name in the table. Raises: ValueError naming the nearest."""
        return find_method(name)

    def __post_init__(self) -> None:
        at_least("method.members", self.members, 1, "1 trains a model alone", 1000)
        share("method.alpha", self.alpha, "1 would leave no cross entropy")
        one_of("method.regularizer", self.regularizer, ("entropy", "uniform_skl"))
        at_least("method.top_k", self.top_k, 0, "0 takes all classes")
        not_negative("method.beta", self.beta, "0 leaves the members uncoupled")
        one_of("method.divergence", self.divergence, ("skl", "l1", "ce"))
        at_least("method.stale_steps", self.stale_steps, 0, "0 is the partner as it is")
        one_of("method.ramp", self.ramp, RAMPS)
        if not 0 < self.ramp_share <= 1:
            raise ValueError(
                f"ramp_share must be in (0, 1], got {self.ramp_share}; "
                "1 lets ramps rise through the whole training"
            )
        share("method.label_smoothing", self.label_smoothing, "0 is none")
        positive("method.temperature", self.temperature, "1 leaves the logits as they are")
        at_least("method.teachers", self.teachers, 0, "0 learns from the labels alone", 1000)
        if not 0 <= self.distillation <= 1:
            raise ValueError(
                f"method.distillation must be in [0, 1], got {self.distillation}; 0.5 will do"
            )
        one_of("method.measured", self.measured, MEASURED)
        self._check_together()

    def _check_together(self) -> None:
        """Settings that are right by themselves and contradict each other."""
        if self.beta and (self.members == 1 or self.measured == "average"):
            raise ValueError(
                f"method.beta must be 0 where there is no pair to pull together, got {self.beta}; "
                "set method.members to 2 or more, and method.measured to 'member' or 'ensemble'"
            )
        if self.stale_steps and (self.divergence != "ce" or self.alpha or not self.beta):
            raise ValueError(
                f"method.stale_steps must be 0 but for ce co-distillation without regulariser, got "
                f"{self.stale_steps}; set divergence = 'ce', beta above 0 and alpha = 0"
            )
        if self.teachers and (self.members > 1 or self.alpha):
            raise ValueError(
                "method.teachers must be 0 with more members or a regulariser, got "
                f"{self.teachers}; set members = 1 and alpha = 0"
            )

    @property
    def label(self) -> str:
        """What tables and figures call it: the preset's label, and what was changed in it."""
        preset = find_method(self.name)
        changed = [
            f"{field.name} {getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(preset, field.name)
        ]
        return ", ".join([DESCRIPTIONS[self.name].label, *changed])

    @property
    def source(self) -> str:
        """Where its formula is from."""
        return DESCRIPTIONS[self.name].source

    def teacher(self) -> Method | None:
        """The ensemble this method learns from, or None; it shares the label smoothing."""
        if not self.teachers:
            return None
        preset = {1: BASELINE, 2: "2-ensemble"}.get(self.teachers, "ensemble")
        return dataclasses.replace(
            find_method(preset), members=self.teachers, label_smoothing=self.label_smoothing
        )

    def loss_options(self, progress: float) -> dict[str, Any]:
        """Arguments of `codistillation_loss` at `progress` t / t0 of the ramp."""
        weight = RAMPS[self.ramp](progress)
        return {
            "alpha": self.alpha * weight,
            "beta": self.beta * weight,
            "regularizer": self.regularizer,
            "top_k": self.top_k or None,
            "renormalize_top_k": self.renormalize_top_k,
            "divergence": self.divergence,
            "label_smoothing": self.label_smoothing,
            "temperature": self.temperature,
        }


@dataclass(frozen=True)
class Description:
    """What people call a method, and where it is from."""

    label: str
    source: str


_PAPER = "Bhojanapalli et al. 2021"
_HINTON = "Hinton et al. 2015"
_MYSTERIES = "Allen-Zhu and Li 2020"
_SKL: dict[str, Any] = {"members": 2, "beta": 3.0, "ramp": "linear"}

_TABLE: tuple[tuple[Method, str, str], ...] = (
    (Method("baseline"), "baseline", "cross entropy"),
    (Method("entropy", alpha=0.3), "entropy 0.3", f"{_PAPER}, Eq. 6"),
    (
        Method("uniform-skl", alpha=0.003, regularizer="uniform_skl"),
        "SKL to uniform 0.003",
        f"{_PAPER}, Eq. 7",
    ),
    (
        Method("ce", members=2, beta=3.0, divergence="ce", ramp="step"),
        "CE co-distillation",
        "Anil et al. 2018",
    ),
    (
        Method("l1", members=2, beta=3.0, divergence="l1", ramp="linear"),
        "L1 co-distillation",
        f"{_PAPER}, Eq. 8",
    ),
    (Method("skl", **_SKL), "SKL co-distillation", f"{_PAPER}, Eq. 9"),
    (Method("skl-entropy", alpha=0.3, **_SKL), "SKL + entropy 0.3", f"{_PAPER}, Eq. 19"),
    (
        Method("skl-uniform", alpha=0.003, regularizer="uniform_skl", **_SKL),
        "SKL + SKL to uniform 0.003",
        f"{_PAPER}, Eq. 19",
    ),
    (Method("entropy-top5", alpha=0.3, top_k=5), "entropy 0.3 of the top 5", f"{_PAPER}, Sec. 3.1"),
    (
        Method("uniform-skl-top5", alpha=0.003, regularizer="uniform_skl", top_k=5),
        "SKL to uniform 0.003 of the top 5",
        f"{_PAPER}, Sec. 3.1",
    ),
    (
        Method("ce-stale", members=2, beta=3.0, divergence="ce", ramp="step", stale_steps=50),
        "CE co-distillation, stale partner",
        "Anil et al. 2018",
    ),
    (Method("skl3", members=3, beta=3.0, ramp="linear"), "SKL co-distillation of 3", _PAPER),
    (Method("smoothing", label_smoothing=0.1), "label smoothing 0.1", "Szegedy et al. 2016"),
    (
        Method("2-ensemble", members=2, measured="ensemble"),
        "ensemble of 2",
        f"{_PAPER}, Table 6",
    ),
    (Method("ensemble", members=10, measured="ensemble"), "ensemble of 10", _MYSTERIES),
    (
        Method("2-distillation", teachers=2, temperature=3.0),
        "distillation of 2",
        f"{_HINTON}; {_PAPER}, Table 6",
    ),
    (Method("distillation", teachers=10, temperature=3.0), "distillation of 10", _HINTON),
    (
        Method("self-distillation", teachers=1, temperature=3.0),
        "self-distillation",
        _MYSTERIES,
    ),
    (
        Method("average", members=10, measured="average"),
        "training the average of 10",
        _MYSTERIES,
    ),
)
METHODS: dict[str, Method] = {method.name: method for method, _, _ in _TABLE}
DESCRIPTIONS: dict[str, Description] = {
    method.name: Description(label, source) for method, label, source in _TABLE
}
BASELINE = "baseline"


def find_method(name: str) -> Method:
    """The method of that name. Raises: ValueError naming the methods there are, or the nearest."""
    one_of("method", name, METHODS, "`churn-train methods` describes them")
    return METHODS[name]
