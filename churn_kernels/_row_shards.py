"""Losses of a batch whose rows are split over ranks, as if one process had all of them.

Each rank computes the losses of its rows. The batch's loss takes sums over the ranks: of the
divisors of "mean", before the rows' losses are computed, and of these losses, afterwards.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from churn_kernels import _checks
from churn_kernels._options import (
    REDUCTIONS,
    ROW_TERMS,
    WANT_STATS,
    WANT_TERMS,
    LossOptions,
    pair_count,
)
from churn_kernels._reduction import reduce_terms, row_counts
from churn_kernels.exact import value_of
from churn_kernels.modes import EXACT

Total = Callable[[Tensor], Tensor]  # the sum over the ranks, in place


def mean_divisors(
    target: Tensor | None,
    class_weight: Tensor | None,
    logits: Tensor,
    classes: int,
    options: LossOptions,
    total: Total,
) -> tuple[Tensor, Tensor]:
    """The divisors of "mean", (2,) in float64: for this rank's rows, and for all.

    Does not wait for a GPU, where no rank checks the values of its targets.

    Raises: TargetError if a target on this rank is out of range, ValueError if one on another is.
    """
    rows, device = logits.shape[-2], logits.device
    mine = torch.stack(row_counts(target, class_weight, rows, options.ignore_index, device))
    try:
        if target is not None:
            _checks.target_range(target, classes, options.ignore_index)
        problem = None
    except _checks.TargetError as error:
        problem = error
    return mine, sum_and_check(problem, mine, total, check=mine.is_cpu)


def sum_and_check(
    problem: Exception | None, mine: Tensor, total: Total, *, check: bool = True
) -> Tensor:
    """The sum of `mine` over the ranks; with `check`, raises on every rank if one has a problem."""
    flagged = total(torch.cat([mine, mine.new_tensor([problem is not None])]))
    if problem is not None:
        raise problem
    if check and flagged[-1]:
        raise ValueError(
            "every rank of the mesh must accept its rows, but another rank rejected its own; see "
            "its error"
        )
    return flagged[:-1]


def reduced(
    by_row: Tensor,  # (N, 2K+P) on this rank, unweighted
    everyone: Tensor,
    has_target: bool,
    options: LossOptions,
    models: int,
) -> Tensor:
    """This rank's share of the batch's loss, in float64: the shares add up to it."""
    students = models - options.teachers
    pairs = pair_count(students, options.teachers)
    ce, r, d = by_row.to(torch.float64).split([students, students, pairs], dim=1)
    rows, ce_rows = everyone.to(by_row.device)
    return reduce_terms(ce, r, d, ce[:, :0].sum(1), rows, ce_rows, has_target, options)


def mean_terms(
    means: Tensor, mine: Tensor, everyone: Tensor, students: int, total: Total
) -> Tensor:
    """The terms of the batch from those of this rank's rows; the first `students` are CE."""
    kinds = torch.ones(len(means), dtype=torch.long, device=mine.device)
    kinds[students:] = 0
    own = mine[kinds].to(means.device)
    sums = total(torch.where(own == 0, 0.0, means * own))
    return (sums / everyone[kinds].to(means.device)).to(means.dtype)


class RowShardOps:
    """The loss's ops (`_ops.OpSet`) in exact mode on some of the rows, with the bits of all rows.

    `ops` compute per-row results, which are summed exactly. `loss` calls collectives;
    `loss_backward` computes the gradients of this rank's rows without communication.
    """

    def __init__(self, total: Total, classes: int, ops: Any, sums: Any) -> None:
        self._total = total
        self._classes = classes
        self._ops = ops
        self._sums = sums
        self._unit: list[float] = []

    def loss(
        self,
        logits: Sequence[Tensor],
        target: Tensor | None,
        class_weight: Tensor | None,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Loss and terms of the whole batch, statistics of this rank's rows."""
        options, want = LossOptions(*arguments[:-1]), arguments[-1]
        inputs = logits, target, class_weight
        students = _shape(logits)[0] - options.teachers
        pairs = pair_count(students, options.teachers)
        _, everyone = mean_divisors(target, None, logits[0], self._classes, options, self._total)
        active = weight = float(everyone[0])
        if target is not None and class_weight is not None:
            taken = class_weight[target[target != options.ignore_index]]
            (weight,) = self._exact([taken])
        by_term = options._replace(reduction=ROW_TERMS)
        terms_by_row, stats, _, _ = self._ops.loss(*inputs, *by_term, want & WANT_STATS)
        has_target = target is not None and options.ce_weight != 0
        mean = options.reduction == REDUCTIONS["mean"]
        self._unit = [
            *[_divided(options.ce_weight * has_target, weight if mean else 1.0)] * students,
            *[_divided(options.regularizer_weight, active if mean else 1.0)] * students,
            *[_divided(options.divergence_weight / max(pairs, 1), active if mean else 1.0)] * pairs,
        ]
        if options.reduction in (REDUCTIONS["none"], ROW_TERMS):
            loss = self._ops.loss(*inputs, *options, 0)[0]
        else:
            value = self._value(inputs, options, has_target, active, weight)
            loss = _canonical([value], terms_by_row).squeeze(0)
        terms = loss.new_empty(0)
        if want & WANT_TERMS:
            terms = self._terms(inputs, options, terms_by_row, active, weight)
        return loss, stats, terms, []

    def loss_backward(
        self,
        logits: Sequence[Tensor],
        target: Tensor | None,
        class_weight: Tensor | None,
        stats: Tensor,
        upstream: Tensor,
        *arguments: Any,
    ) -> list[Tensor]:
        """The gradients of this rank's rows."""
        options = LossOptions(*arguments)
        if options.reduction != ROW_TERMS:
            unit = torch.tensor(self._unit, dtype=torch.float64, device=upstream.device)
            by_term = torch.where(unit == 0, 0.0, unit * upstream.to(torch.float64).reshape(-1, 1))
            upstream = by_term.expand(_shape(logits)[1], -1).contiguous()
            options = options._replace(reduction=ROW_TERMS)
        gradients: list[Tensor] = self._ops.loss_backward(
            logits, target, class_weight, stats, upstream, *options
        )
        return gradients

    def scale_(self, gradients: Sequence[Tensor], upstream: Tensor, exact: bool) -> None:
        """Scale the gradients in place."""
        self._ops.scale_(gradients, upstream, exact)

    def _value(
        self, inputs: Any, options: LossOptions, has_target: bool, active: float, weight: float
    ) -> float:
        """The reduced loss, as in csrc/cpu/loss.cpp: from sums of the rows' float32 losses."""

        def by_row(**left_out: Any) -> Tensor:
            chosen = options._replace(reduction=REDUCTIONS["none"], **left_out)
            loss: Tensor = self._ops.loss(*inputs, *chosen, 0)[0]
            return loss

        if options.reduction == REDUCTIONS["sum"]:
            return self._rounded(by_row())
        if active == 0:
            return math.nan
        if inputs[2] is None or not has_target:
            return self._exact([by_row()])[0] / active
        hard, rest = self._exact(
            [by_row(regularizer_weight=0.0, divergence_weight=0.0), by_row(ce_weight=0.0)]
        )
        return _divided(hard, weight) + rest / active

    def _terms(
        self,
        inputs: Any,
        options: LossOptions,
        by_row: Tensor,
        active: float,
        weight: float,
    ) -> Tensor:
        """The means of all rows' terms, each row's rounded to float32 before the sum."""
        logits, target, _ = inputs
        models, rows = _shape(logits)
        students = models - options.teachers
        # Some terms are reported as means only: a call with a single row returns that row's terms.
        single = LossOptions(ignore_index=options.ignore_index, mode=EXACT)
        reports = [by_row.new_empty(0, 3 * students + 1)]
        for row in range(rows):
            if target is not None and target[row] == options.ignore_index:
                continue
            one = [z[..., row : row + 1, :] for z in logits]
            label = None if target is None else target[row : row + 1]
            found = self._ops.loss(one, label, None, *single, WANT_TERMS)[2]
            kinds = found[: 5 * models].view(5, models)[2:, :students].flatten()
            reports.append(torch.cat([kinds, found[-1:]])[None])
        report = torch.cat(reports)
        terms = list(by_row.unbind(1))
        terms[2 * students : 2 * students] = report[:, :-1].unbind(1)
        sums = self._exact([*terms, report[:, -1]])
        divisors = [weight] * students + [active] * (len(sums) - students)
        means = list(map(_divided, sums, divisors))
        if target is None:
            means[:students] = means[2 * students : 3 * students] = [math.nan] * students
        return _canonical(means, by_row)

    def _words(self, parts: Sequence[Tensor]) -> Tensor:
        return self._total(torch.stack([self._sums.exact_words(x.contiguous()) for x in parts]))

    def _rounded(self, x: Tensor) -> float:
        """The sum of x over all ranks, in float32."""
        return float(self._sums.exact_round(self._words([x])[0]))

    def _exact(self, parts: Sequence[Tensor]) -> list[float]:
        """The sum of each part over all ranks, in float64."""
        return [value_of(words) for words in self._words(parts).unbind(0)]


def _shape(logits: Sequence[Tensor]) -> tuple[int, int]:
    """(models, rows)."""
    first = logits[0]
    return (len(logits) if first.dim() == 2 else first.shape[0]), first.shape[-2]


def _divided(x: float, y: float) -> float:
    """Divide like tensors: x / 0 is an infinity or NaN."""
    if y != 0:
        return x / y
    return math.nan if x == 0 else x * math.inf


def _canonical(values: list[float], like: Tensor) -> Tensor:
    """Convert to float32 in exact mode's canonical form: one NaN, no subnormal number, no -0."""
    x = torch.tensor(values, dtype=torch.float64, device=like.device).to(torch.float32)
    x = torch.where(x.abs() < torch.finfo(torch.float32).tiny, 0.0, x)
    return torch.where(x.isnan(), math.nan, x)
