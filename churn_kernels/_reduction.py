"""Reduces the rows' terms to the loss: weights, ignored rows, and the divisors of "mean"."""

import torch
from torch import Tensor

from churn_kernels._options import NO_REGULARIZER, REDUCTIONS, ROW_TERMS, LossOptions


def row_counts(
    target: Tensor | None,  # (N,)
    class_weight: Tensor | None,  # (C,)
    rows: int,
    ignore_index: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """The divisors of "mean", in float64: the rows not ignored, and the sum of their weights."""
    if target is None:
        count = torch.full((), rows, dtype=torch.float64, device=device)
        return count, count
    keep = target != ignore_index
    count = keep.sum().to(torch.float64)
    if class_weight is None:
        return count, count
    in_range = (target >= 0) & (target < class_weight.shape[0])
    weights = class_weight.to(torch.float64)[torch.where(in_range, target, 0)]
    return count, torch.where(keep, weights, 0.0).sum()


def reduce_terms(
    ce: Tensor,  # (N, K)
    r: Tensor,  # (N, K)
    d: Tensor,  # (N, P)
    nothing: Tensor,  # (N,), zeros with a zero gradient for the logits
    rows: Tensor,
    ce_rows: Tensor,
    has_target: bool,
    options: LossOptions,
) -> Tensor:
    """Weight the terms and reduce over the rows; a term of weight 0 is skipped, never 0 * inf.

    If all are skipped, the loss is `nothing`: 0, with a gradient.
    """
    if options.reduction == ROW_TERMS:
        return torch.cat([ce, r, d], dim=1)
    has_ce = has_target and options.ce_weight != 0
    has_r = options.regularizer != NO_REGULARIZER and options.regularizer_weight != 0
    has_d = d.shape[1] > 0 and options.divergence_weight != 0
    ce_part = ce.new_zeros(ce.shape[0])
    other_part = torch.zeros_like(ce_part) if has_ce or has_r or has_d else nothing
    if has_ce:
        ce_part = options.ce_weight * ce.sum(1)
    if has_r:
        other_part = other_part + options.regularizer_weight * r.sum(1)
    if has_d:
        other_part = other_part + options.divergence_weight * d.mean(1)
    if options.reduction == REDUCTIONS["none"]:
        return ce_part + other_part
    if options.reduction == REDUCTIONS["sum"]:
        return ce_part.sum() + other_part.sum()
    if not has_ce:
        return other_part.sum() / rows
    return ce_part.sum() / ce_rows + other_part.sum() / rows
