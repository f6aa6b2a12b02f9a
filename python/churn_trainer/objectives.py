"""What a step minimises: each objective a few lines over `churn_kernels`.

Every function takes the members' logits, (K, N, C), and the labels, (N,), and returns the sum over
the N rows, in nats, with its gradient. Runs that share no weights are simply more rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import churn_kernels as ck
from churn_trainer.methods import Method


def objective(
    method: Method,
    progress: float,
    logits: Tensor,
    target: Tensor,
    others: Tensor | None = None,
    mode: str | None = None,
) -> Tensor:
    """The sum over rows of what `method` minimises at `progress` t / t0 of its ramp.

    Args:
        logits: (K, N, C) of the members.
        target: (N,) int64 labels.
        others: (M, N, C) held fixed: of the teachers, or of the stale members.
        mode: reduction mode; None: the library's default.
    """
    if method.measured == "average":
        return average(method, progress, logits, target, mode)
    if method.teachers:
        assert others is not None
        return distillation(method, logits, target, others, mode)
    weight = method.loss_options(progress)["beta"]
    if others is not None and weight:
        return stale_codistillation(method, weight, logits, target, others, mode)
    return codistillation(method, progress, logits, target, mode)


def codistillation(
    method: Method, progress: float, logits: Tensor, target: Tensor, mode: str | None
) -> Tensor:
    """sum_k [(1 - alpha) CE_k + alpha R_k] + beta mean over pairs of D.

    Bhojanapalli et al. 2021, Eq. 19. With K = 1 or beta = 0 the baseline, a regulariser, or an
    ensemble; with D = "ce" each model's gradient holds the others fixed (Anil et al. 2018).
    """
    return ck.codistillation_loss(
        logits, target, reduction="sum", mode=mode, **method.loss_options(progress)
    )


def stale_codistillation(
    method: Method, beta: float, logits: Tensor, target: Tensor, stale: Tensor, mode: str | None
) -> Tensor:
    """sum_k [CE_k + (2 beta / K) KL(mean of the other members' earlier selves || p_k)].

    Anil et al. 2018 with stale predictions. 2 / K makes the gradient that of the divergence "ce",
    beta times the mean over pairs, when the earlier selves are the present ones.
    """
    members = len(logits)
    weight = 2 * beta / members * method.temperature**-2  # `distillation_loss` has the factor T^2
    total = torch.zeros((), device=logits.device)
    for member in range(members):
        total = total + (1 + weight) * ck.distillation_loss(
            logits[member],
            [stale[other] for other in range(members) if other != member],
            target,
            alpha=weight / (1 + weight),
            temperature=method.temperature,
            label_smoothing=method.label_smoothing,
            reduction="sum",
            mode=mode,
        )
    return total


def distillation(
    method: Method, logits: Tensor, target: Tensor, teachers: Tensor, mode: str | None
) -> Tensor:
    """(1 - l) CE + l T^2 KL(mean of the teachers' softmax(t / T) || softmax(s / T)) (Hinton)."""
    return ck.distillation_loss(
        logits[0],
        teachers,
        target,
        alpha=method.distillation,
        temperature=method.temperature,
        label_smoothing=method.label_smoothing,
        reduction="sum",
        mode=mode,
    )


def average(
    method: Method, progress: float, logits: Tensor, target: Tensor, mode: str | None
) -> Tensor:
    """The loss of the mean logits (F_1 + ... + F_K) / K (Allen-Zhu and Li 2020)."""
    return ck.codistillation_loss(
        [logits.mean(dim=0)], target, reduction="sum", mode=mode, **method.loss_options(progress)
    )


def measured_logits(method: Method, logits: Tensor) -> Tensor:
    """What a run predicts with, (..., C), from its measured members' logits, (k, ..., C).

    Member 0; the logarithm of an ensemble's mean probabilities; or the mean of the logits.
    """
    if method.measured == "ensemble":
        # As a sum of exponentials: where every member's probability underflows, this does not.
        return logits.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits))
    return logits.mean(dim=0) if method.measured == "average" else logits[0]


def measured_members(method: Method) -> int:
    """How many members, from the first, `measured_logits` needs."""
    return 1 if method.measured == "member" else method.members
