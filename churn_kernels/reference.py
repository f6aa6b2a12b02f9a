"""The specification of every loss: float64 PyTorch, slow and obvious, differentiable twice.

The kernels are tested against this file. Nothing is fused or optimised: each formula is written as
in the papers, on whole (N, C) tensors in float64.

A class whose logit is -inf in a model is outside that model's classes and contributes nothing.
"""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from churn_kernels import _checks
from churn_kernels._options import (
    DISTILLATION,
    DIVERGENCES,
    NO_DIVERGENCE,
    NO_REGULARIZER,
    REGULARIZERS,
    LossOptions,
)
from churn_kernels._reduction import reduce_terms, row_counts


def loss(
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor]:
    """The loss of `options` and the means of its terms, as `churn_kernels::loss` returns them.

    Args:
        logits: K tensors (N, C), or one (K, N, C) tensor in a sequence of one; the last
            `options.teachers` models are held fixed.
        target: (N,) int64 class indices, or None for no cross entropy.
        class_weight: (C,) weights of the cross entropy, or None.
        options: what to compute.
    Returns:
        The loss, () or (N,), or (N, 2K+P) for the reduction `ROW_TERMS`; and the terms, (5K+P+1,):
        cross entropy, regulariser, accuracy, confidence and entropy of each student, the divergence
        of each pair, the agreement. float32, or float64 for float64 logits.
    Gradient: flows to the students, to any order.
    Raises: TargetError if a target of a CPU batch is neither a class nor `ignore_index`.
    """
    result_dtype = torch.float64 if logits[0].dtype == torch.float64 else torch.float32
    models = logits[0] if logits[0].dim() == 3 else torch.stack(list(logits))
    z = models.to(torch.float64)  # (M, N, C)
    students = z.shape[0] - options.teachers
    keep = torch.ones_like(z[0, :, 0], dtype=torch.bool)  # (N,) rows that are not ignored
    label = None
    if target is not None:
        _checks.target_range(target, z.shape[2], options.ignore_index)
        keep = target != options.ignore_index
        in_range = (target >= 0) & (target < z.shape[2])
        label = torch.where(in_range, target, 0)
        # Where raising would cost a device synchronisation, an invalid target makes its row NaN.
        z = torch.where((keep & ~in_range)[:, None], torch.nan, z)
    # An ignored row is replaced by zeros first, so that no NaN in it reaches a loss or a gradient.
    z = torch.where(keep[:, None], z, 0.0)
    z = _saturate(z, logits[0].dtype)
    z = torch.cat([z[:students], z[students:].detach()])

    weight = None if class_weight is None else class_weight.to(torch.float64, copy=True)
    limit = _largest(logits[0].dtype)
    cross_entropy = [
        _cross_entropy(row, label, weight, options.label_smoothing, limit) for row in z[:students]
    ]
    regularizer = [_regularizer(row, options) for row in z[:students]]
    tempered = z / options.temperature
    if options.divergence == DISTILLATION:
        tempered = _saturate(tempered, logits[0].dtype)
    divergence = _divergences(tempered, students, options)
    # Columns (N, K), (N, K), (N, P); 0 in ignored rows.
    columns = [
        torch.stack(terms, dim=1) if terms else z.new_zeros(z.shape[1], 0)
        for terms in (cross_entropy, regularizer, divergence)
    ]
    ce, r, d = (torch.where(keep[:, None], column, 0.0) for column in columns)

    rows, ce_rows = row_counts(target, weight, z.shape[1], options.ignore_index, z.device)
    terms = _term_means(
        z, label, keep, students, ce.sum(0) / ce_rows, r.sum(0) / rows, d.sum(0) / rows
    )
    nothing = z[:students, :, :0].sum(dim=(0, 2))
    result = reduce_terms(ce, r, d, nothing, rows, ce_rows, label is not None, options)
    return result.to(result_dtype), terms.detach().to(result_dtype)


def _largest(dtype: torch.dtype) -> float:
    """The largest finite number in the losses: of float32, or of float64 for float64 logits."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max


def _saturate(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Raise finite logits that are further below the row's maximum than the largest finite number.

    The gradient passes through.
    """
    lowest = z.detach().amax(-1, keepdim=True) - _largest(dtype)
    return z + torch.where(_inside(z) & (z < lowest), lowest - z, 0.0).detach()


def _cross_entropy(
    z: Tensor,  # (N, C)
    label: Tensor | None,
    weight: Tensor | None,
    label_smoothing: float,
    limit: float,
) -> Tensor:
    """Cross entropy of each row, (N,), as `torch.nn.functional.cross_entropy` defines it."""
    if label is None:
        return torch.zeros_like(z[:, 0])
    surprise = -torch.log_softmax(z, dim=1)
    hard = _weighed(surprise.gather(1, label[:, None]).squeeze(1), weight, label)
    if label_smoothing == 0:  # a part of weight 0 is skipped, never 0 * inf
        return hard
    smooth = _weighed(surprise, weight, slice(None))
    beyond = torch.where(smooth == torch.inf, 0.0, (smooth - limit).clamp(min=0.0))
    smooth = (smooth - beyond.detach()).mean(1)
    return (
        smooth if label_smoothing == 1 else (1 - label_smoothing) * hard + label_smoothing * smooth
    )


def _weighed(surprise: Tensor, weight: Tensor | None, classes: Tensor | slice) -> Tensor:
    """Multiply by the weights of these classes; a class of weight 0 adds 0, even if at -inf."""
    if weight is None:
        return surprise
    lost = (weight[classes] == 0) & (surprise == torch.inf)
    return torch.where(lost, 0.0, surprise * weight[classes])


def _inside(z: Tensor) -> Tensor:
    """Where a class belongs to the model: its logit is not -inf."""
    return z != -torch.inf


def _finite_log_softmax(z: Tensor) -> Tensor:
    """Log softmax with 0 in place of -inf, so its product with a probability of 0 is 0."""
    return torch.where(_inside(z), torch.log_softmax(z, dim=-1), 0.0)


def _regularizer(z: Tensor, options: LossOptions) -> Tensor:
    """Entropy of each row, or minus its symmetric KL to uniform, (N,); whole or top-k."""
    if options.regularizer == NO_REGULARIZER:
        return torch.zeros_like(z[:, 0])
    inside = _inside(z)
    chosen = inside.to(z.dtype)
    classes = chosen.sum(1, keepdim=True)  # (N, 1) how many classes the uniform distribution covers
    p, log_p = torch.softmax(z, dim=1), _finite_log_softmax(z)
    if options.top_k:
        order = torch.sort(
            z, dim=1, descending=True, stable=True
        ).indices  # ties: the lowest index first
        rank = torch.argsort(order, dim=1)
        chosen = chosen * (rank < options.top_k)
        p = p * chosen
        if options.renormalize_top_k:
            mass = p.sum(1, keepdim=True)
            classes = chosen.sum(1, keepdim=True)
            p, log_p = p / mass, log_p - torch.log(mass)
    if options.regularizer == REGULARIZERS["entropy"]:
        return -(p * log_p).sum(1)
    return -((p - 1 / classes) * (log_p + torch.log(classes)) * chosen).sum(1)


def _divergences(z: Tensor, students: int, options: LossOptions) -> list[Tensor]:
    """The divergence of each pair, a list of (N,); z (M, N, C) is divided by the temperature."""
    if options.divergence == DISTILLATION:
        return [_kl_to_fixed(torch.softmax(z[1:], dim=2).mean(0), _inside(z[1:]).any(0), z[0])]
    value = {
        NO_DIVERGENCE: lambda a, b: torch.zeros_like(a[:, 0]),
        DIVERGENCES["skl"]: _symmetric_kl,
        DIVERGENCES["ce"]: _mutual_cross_entropy,
        DIVERGENCES["l1"]: _l1,
    }[options.divergence]
    return [value(z[i], z[j]) for i, j in combinations(range(students), 2)]


def _symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p), (N,); infinite if a class belongs to only one of the models."""
    p, q = torch.softmax(a, dim=1), torch.softmax(b, dim=1)
    both = _inside(a) & _inside(b)
    gap = torch.where(both, _finite_log_softmax(a) - _finite_log_softmax(b), 0.0)
    infinite = torch.where((_inside(a) != _inside(b)).any(1), torch.inf, 0.0)
    # The factor p + q sums to 2; it makes the gradient of an infinite row NaN, which it has to be.
    return ((p - q) * gap).sum(1) + infinite * (p + q).sum(1)


def _mutual_cross_entropy(a: Tensor, b: Tensor) -> Tensor:
    """The value of the symmetric KL, (N,); the gradient holds each model's partner fixed."""
    p, q = torch.softmax(a, dim=1).detach(), torch.softmax(b, dim=1).detach()
    return _kl_to_fixed(q, _inside(b), a) + _kl_to_fixed(p, _inside(a), b)


def _l1(a: Tensor, b: Tensor) -> Tensor:
    """Sum over classes of |p - q|, (N,)."""
    return (torch.softmax(a, dim=1) - torch.softmax(b, dim=1)).abs().sum(1)


def _kl_to_fixed(p: Tensor, p_inside: Tensor, z: Tensor) -> Tensor:
    """KL(p || softmax(z)) with p held fixed, (N,); its gradient softmax(z) - p is always finite."""
    p, log_q = p.detach(), torch.log_softmax(z, dim=1)
    kl = (torch.xlogy(p, p) - torch.where(p == 0, 0.0, p * log_q)).sum(1)
    kl = kl - kl.detach().clamp(max=0)  # rounding may make it negative if the models agree
    infinite = torch.where((p_inside & ~_inside(z)).any(1), torch.inf, 0.0)
    return kl + infinite


def _term_means(
    z: Tensor,  # (M, N, C)
    label: Tensor | None,
    keep: Tensor,
    students: int,
    ce: Tensor,  # (K,)
    r: Tensor,  # (K,)
    d: Tensor,  # (P,)
) -> Tensor:
    """Every term and metric as a mean over the rows that are not ignored, (5K+P+1,)."""
    z = z.detach()
    p = torch.softmax(z, dim=2)
    has_nan = p.isnan().any(2)  # (M, N) rows without a prediction, whose metrics are NaN
    ordered = torch.sort(z, dim=2, descending=True, stable=True)
    prediction = ordered.indices[:, :, 0]  # ties: the lowest index
    largest = p.gather(2, ordered.indices)
    confidence = largest[:, :, 0] - (largest[:, :, 1] if z.shape[2] > 1 else 0.0)
    entropy = -(p * _finite_log_softmax(z)).sum(2)
    agrees = (prediction == prediction[:1]).all(0)
    agreement = torch.where(has_nan.any(0), torch.nan, agrees.to(z.dtype))

    def mean(values: Tensor) -> Tensor:  # over the last dimension
        return torch.where(keep, values, 0.0).sum(-1) / keep.sum()

    if label is None:
        ce = accuracy = torch.full_like(ce, torch.nan)
    else:
        accuracy = mean(torch.where(has_nan, torch.nan, (prediction == label).to(z.dtype)))[
            :students
        ]
    confidence, entropy = mean(confidence)[:students], mean(entropy)[:students]
    return torch.cat([ce, r, accuracy, confidence, entropy, d, mean(agreement)[None]])
