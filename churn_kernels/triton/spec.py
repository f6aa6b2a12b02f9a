"""What a kernel is compiled for: the options that change its code, and the shape of its tile."""

from typing import Any

import torch
import triton.language as tl

from churn_kernels._options import (
    DISTILLATION,
    DIVERGENCES,
    NO_REGULARIZER,
    REDUCTIONS,
    REGULARIZERS,
    ROW_TERMS,
    LossOptions,
    pair_count,
)
from churn_kernels.modes import EXACT
from churn_kernels.triton.plan import Plan


class Spec:
    """Compile-time facts as attributes, each a `tl.constexpr`; two of one content are one key."""

    def __init__(self, **facts: Any) -> None:
        self._key = repr(facts)
        for name, value in facts.items():
            setattr(self, name, tl.constexpr(value))

    def __getattr__(self, name: str) -> Any:  # for type checkers: attributes are set by name
        raise AttributeError(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return self._key


# The fields of a row's record in their order: name, entries for each of "model" or "pair".
_FIELDS = (
    "maximum",
    "mass",
    "moment",
    "live",
    "spread",
    "excess",
    "lift",
    "tempered_mass",
    "top_mass",
    "top_moment",
    "top_live",
    "top_spread",
    "top_excess",
    "top_lift",
    "weighted_spread",
    "lost",
    "threshold",
    "last_tie",
    "first",
    "second",
    "gap",
    "other",
    "reach",
    "tail",
    "top_tail",
    "winner",
    "runner_up",
)


def make_spec(
    options: LossOptions,
    plan: Plan,
    dtype: torch.dtype,
    models: int,
    *,
    has_target: bool,
    weighted: bool,
    report: bool,
    strided: bool,
    places: int,
) -> Spec:
    """The facts that `options` on `models` models come down to, on a tile as `plan` has it.

    `places`: binary places of exact mode's sums; 0 in the others.
    """
    students = models - options.teachers
    pairs = pair_count(students, options.teachers) if options.divergence else 0
    regularizes = options.regularizer != NO_REGULARIZER
    top = regularizes and options.top_k > 0
    uniform = options.regularizer == REGULARIZERS["uniform_skl"]
    smooths = has_target and options.label_smoothing != 0.0
    exact = options.mode == EXACT
    couples = options.divergence in (DIVERGENCES["skl"], DIVERGENCES["ce"])
    sweeps_twice = options.divergence in (DIVERGENCES["l1"], DISTILLATION)
    tempered = options.temperature != 1.0 and options.divergence != 0
    lifts = uniform and not (top and options.renormalize_top_k)
    compute = tl.float64 if dtype == torch.float64 else tl.float32
    scalar = tl.float64 if exact else compute
    # Registers for one more sum there are not where a row is shared out over a program.
    others = couples and (exact or not plan.wide)
    present = {
        "maximum": models,
        "mass": models,
        "moment": models,
        "live": students * lifts,
        "spread": students * (uniform and not top),
        "excess": students * (uniform and not top),
        "lift": students * lifts,
        "tempered_mass": models * tempered,
        "top_mass": students * top,
        "top_moment": students * top,
        "top_live": students * (top and uniform),
        "top_spread": students * (top and uniform),
        "top_excess": students * (top and uniform),
        "top_lift": students * (top and uniform),
        "weighted_spread": students * smooths,
        "lost": students * smooths,
        "threshold": students * top,
        "last_tie": students * top,
        "first": pairs,
        "second": pairs * (options.divergence != DISTILLATION),
        "gap": pairs * (options.divergence != DISTILLATION),
        "other": pairs * couples,
        "reach": pairs * (options.divergence != DIVERGENCES["l1"]),
        "tail": models * exact,
        "top_tail": students * (top and exact),
        "winner": models * report,
        "runner_up": students * report,
    }
    term_pairs = pair_count(students, options.teachers)
    by_term = options.reduction == ROW_TERMS  # the upstream gradient alone weighs the terms
    reduces = options.reduction in (REDUCTIONS["mean"], REDUCTIONS["sum"])
    terms = 2 * students + pairs
    # Exact mode adds up the loss, its cross entropy and the rest; its terms are the report's.
    loss_sums = 3 * (exact and reduces)
    total_terms = loss_sums + terms * (report or (reduces and not exact))
    facts: dict[str, Any] = {}
    width = 0
    for name in _FIELDS:
        facts[f"at_{name}"] = width
        width += present[name]
    return Spec(
        models=models,
        students=students,
        pairs=pairs,
        compute=compute,
        scalar=scalar,  # of a row
        weight=tl.float64 if weighted else scalar,  # of class weights and what they are times
        exact=exact,
        # What sums over distances of logits are times, so that they do not overflow; exact mode's
        # have scales of their own.
        distance=1.0 if exact else 2.0**-32,
        places=places,
        unit=2.0**places,
        element_size=dtype.itemsize,
        regularizer=options.regularizer,
        entropic=options.regularizer == REGULARIZERS["entropy"],
        top=top,
        uniform=uniform,
        renormalize=options.renormalize_top_k,
        divergence=options.divergence,
        couples=couples,
        others=others,
        gaps=pairs > 0 and options.divergence != DISTILLATION and not exact,  # summed, not masses'
        sweeps_twice=sweeps_twice,
        tempered=tempered,
        smooths=smooths,
        weighted=weighted,
        has_target=has_target,
        report=report,
        reduction=options.reduction,
        ce=has_target and (by_term or options.ce_weight != 0),
        r=regularizes and (by_term or options.regularizer_weight != 0),
        d=pairs > 0 and (by_term or options.divergence_weight != 0),
        lifts=lifts,
        strided=strided,
        fields=width,
        term_pairs=term_pairs,  # places for pairs in what is returned; `pairs` of them are computed
        total_terms=total_terms + (3 * students + 1) * report,
        reduces=reduces,
        loss_sums=loss_sums,  # before those of the report
        keeps=plan.resident and not plan.again,  # a resident row, to the gradient
        **facts,
        **plan._asdict(),
    )
