"""The functional API: fused losses for reproducible predictions.

Every function maps its arguments onto one set of options (`_options.LossOptions`) and hands it to
the backend that `_backend` picks, DTensors by way of `_dtensor`. Losses are in nats, float32
(float64 for float64 logits); gradients have the logits' dtype. No input is ever modified.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from churn_kernels import _checks, _dtensor
from churn_kernels._options import (
    DISTILLATION,
    DIVERGENCES,
    REDUCTIONS,
    REGULARIZERS,
    ROW_TERMS,
    LossOptions,
    pair_count,
)

# Distinct argument sets whose checked options are kept: a ramp makes a new one each step.
_CACHED_OPTIONS = 256


class LossTerms(NamedTuple):
    """Detached means of every term over the rows that are not ignored, from the loss's own pass.

    K students and P pairs, (0, 1), (0, 2), .., (1, 2), ..; float32 (float64 for float64 logits).
    """

    cross_entropy: Tensor
    """(K,) cross entropy, in nats, smoothed and weighted as asked; NaN without a target."""
    regularizer: Tensor
    """(K,) the regulariser R, in nats, before its weight."""
    divergence: Tensor
    """(P,) the divergence D of each pair, before its weight."""
    accuracy: Tensor
    """(K,) share of rows whose largest logit is the target's; NaN without a target."""
    confidence: Tensor
    """(K,) difference of the two largest softmax probabilities."""
    entropy: Tensor
    """(K,) entropy of the whole softmax, in nats."""
    agreement: Tensor
    """() share of rows whose predicted class all models (teachers too) share: 1 - churn."""


class RowTerms(NamedTuple):
    """Every row's terms, unweighted and differentiable; 0 for an ignored row."""

    cross_entropy: Tensor
    """(N, K) cross entropy of each model, in nats; 0 without a target."""
    regularizer: Tensor
    """(N, K) the regulariser R of each model, in nats."""
    divergence: Tensor
    """(N, P) the divergence D of each pair, (0, 1), (0, 2), .., (1, 2), .."""


def codistillation_loss(
    logits: Sequence[Tensor] | Tensor,
    target: Tensor | None = None,
    *,
    alpha: float = 0.0,
    beta: float = 1.0,
    regularizer: str = "entropy",
    top_k: int | None = None,
    renormalize_top_k: bool = True,
    divergence: str = "skl",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    reduction: str = "mean",
    mode: str | None = None,
    return_terms: bool = False,
) -> Any:
    """Cross entropy, minimum-entropy regulariser and co-distillation of K models in one pass.

    Mean over rows of [ sum over models of ((1 - alpha) CE_k + alpha R_k) + beta * mean over pairs
    of D ] (Bhojanapalli et al. 2021, Eq. 19; any number of models is our extension).

    Args:
        logits: K >= 1 tensors (N, C) of one shape, dtype (float32, float64, bfloat16, float16) and
            device, contiguous or not; or one (K, N, C) tensor. A class at -inf is outside its
            model's classes. DTensors are sharded by rows or replicated, and so are target and
            class_weight then; the results are DTensors of the whole batch.
        target: (N,) int64 class indices; None: no cross entropy.
        alpha: weight of the regulariser, in [0, 1).
        beta: weight of the divergence, >= 0.
        regularizer: "entropy", R = H(p) = -sum p log p (Eq. 6); or "uniform_skl",
            R = -(KL(p || U) + KL(U || p)) with U uniform over the row's classes (Eq. 7). Eq. 7 is
            unbounded below in the logits.
        top_k: regularise only the k largest probabilities of each row, 1 <= k <= C, ties by lowest
            index; None: all.
        renormalize_top_k: True: those k as a distribution of their own (U uniform over the k);
            False: their terms of the full softmax.
        divergence: D between softmax(z_i / T) and softmax(z_j / T). "skl": KL(p||q) + KL(q||p)
            (Eq. 9); "l1": sum |p - q| (Eq. 8); "ce": the value of "skl", but each model's gradient
            holds the other fixed, (p_i - p_j) / T (Eq. 17, Anil et al. 2018).
        label_smoothing: in [0, 1], on the cross entropy, as in `torch.nn.functional.cross_entropy`.
        class_weight: (C,) floating-point weights of the cross entropy, as there; no gradient flows
            to it.
        ignore_index: a row with this target takes no part in any term.
        temperature: T > 0, divides the logits in the divergence only; there is no T^2 factor.
        reduction: "mean" divides by the number of rows that are not ignored, and the cross entropy
            by the sum of their class weights; "sum" does not divide; "none" keeps the rows.
        mode: reduction mode (see `ck.reduction_mode`); None: the current default.
        return_terms: also return `LossTerms`.
    Returns:
        The loss, () or (N,) with reduction="none"; or (loss, LossTerms) with return_terms=True. The
        mean over no rows is NaN.
    Gradient: flows to every tensor of `logits`, for any upstream gradient; once (differentiate
        twice inside `with ck.backend("reference")`). A NaN or an all -inf row poisons its own loss
        and gradient only.
    Raises:
        TypeError, ValueError: naming the argument, what it must be, what it was, and what to do.
        TargetError: a target out of range (an IndexError and a ValueError); on a GPU only with
            CHURN_DEBUG=1 in the environment, since looking synchronises: without, the row is NaN.
        NotImplementedError: a mode that cannot be kept.
    """
    options = _cached(
        _codistillation_options,
        alpha,
        beta,
        regularizer,
        top_k,
        renormalize_top_k,
        divergence,
        label_smoothing,
        ignore_index,
        temperature,
        reduction,
    )
    models = _checks.models("logits", logits)
    loss, terms = _dtensor.evaluate(models, target, class_weight, options, mode, return_terms)
    return (loss, _loss_terms(models, terms, options)) if return_terms else loss


def codistillation_terms(
    logits: Sequence[Tensor] | Tensor,
    target: Tensor | None = None,
    *,
    regularizer: str = "entropy",
    top_k: int | None = None,
    renormalize_top_k: bool = True,
    divergence: str = "skl",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    mode: str | None = None,
) -> RowTerms:
    """The terms of `codistillation_loss` row by row and unweighted, to be weighed by the caller.

    For weights that differ by row, model or pair, or that are tensors: any function of the terms
    can be differentiated, at the cost of one more pass over the logits.

    Args: as in `codistillation_loss`.
    Returns: RowTerms, cross_entropy (N, K), regularizer (N, K), divergence (N, P), P = K(K-1)/2.
    Gradient: flows to every tensor of `logits` from every entry; once.
    Raises: as `codistillation_loss`.
    """
    options = _cached(
        _codistillation_options,
        0.0,
        1.0,
        regularizer,
        top_k,
        renormalize_top_k,
        divergence,
        label_smoothing,
        ignore_index,
        temperature,
        "none",
    )._replace(reduction=ROW_TERMS)
    models = _checks.models("logits", logits)
    rows, _ = _dtensor.evaluate(models, target, class_weight, options, mode, False)
    count = _model_count(models)
    return RowTerms(*rows.split([count, count, pair_count(count, 0)], dim=1))


def regularized_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.0,
    regularizer: str = "entropy",
    top_k: int | None = None,
    renormalize_top_k: bool = True,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    mode: str | None = None,
    return_terms: bool = False,
) -> Any:
    """Cross entropy with a minimum-entropy regulariser, (1 - alpha) CE + alpha R, of one model.

    `codistillation_loss` with K = 1 (Bhojanapalli et al. 2021, Eq. 6 and 7).

    Args:
        logits: (N, C).
        target: (N,) int64 class indices.
        The others as in `codistillation_loss`.
    Returns: as `codistillation_loss`; the terms hold one model and no pair.
    Gradient: flows to `logits`; once.
    Raises: as `codistillation_loss`.
    """
    _checks.matrix("logits", logits)
    _checks.target_given(target)
    return codistillation_loss(
        [logits],
        target,
        alpha=alpha,
        regularizer=regularizer,
        top_k=top_k,
        renormalize_top_k=renormalize_top_k,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        mode=mode,
        return_terms=return_terms,
    )


def symmetric_kl(
    p_logits: Tensor,
    q_logits: Tensor,
    *,
    reduction: str = "mean",
    mode: str | None = None,
) -> Tensor:
    """Symmetric KL divergence KL(p||q) + KL(q||p) of two softmaxes.

    Bhojanapalli et al. 2021, Eq. 9.

    Args:
        p_logits, q_logits: (N, C) logits of the same shape, dtype and device.
        reduction: "mean", "sum" or "none", over the rows.
        mode: reduction mode; None: the current default.
    Returns: the divergence in nats, () or (N,) with reduction="none". A class at -inf in both
        contributes nothing; at -inf in one only, the divergence is +inf.
    Gradient: flows to both arguments, once; detach one to hold it fixed.
    Raises: TypeError, ValueError if the two do not match, or for an unknown reduction.
    """
    _checks.matrix("p_logits", p_logits)
    _checks.matrix("q_logits", q_logits)
    _checks.same("q_logits", q_logits, "p_logits", p_logits)
    options = _cached(_symmetric_kl_options, reduction)
    models, names = [p_logits, q_logits], ("p_logits", "q_logits")
    return _dtensor.evaluate(models, None, None, options, mode, False, names)[0]


def softmax_entropy(
    logits: Tensor,
    *,
    top_k: int | None = None,
    renormalize_top_k: bool = True,
    reduction: str = "mean",
    mode: str | None = None,
) -> Tensor:
    """Entropy of the softmax, H(p) = -sum p log p (Bhojanapalli et al. 2021, Eq. 6).

    Args:
        logits: (N, C).
        top_k, renormalize_top_k: over the k largest probabilities, as in `codistillation_loss`.
        reduction: "mean", "sum" or "none", over the rows.
        mode: reduction mode; None: the current default.
    Returns: the entropy in nats, () or (N,) with reduction="none".
    Gradient: flows to `logits`; once.
    Raises: TypeError, ValueError for a wrong argument.
    """
    return _one_regularizer(logits, "entropy", 1.0, top_k, renormalize_top_k, reduction, mode)


def uniform_skl(
    logits: Tensor,
    *,
    top_k: int | None = None,
    renormalize_top_k: bool = True,
    reduction: str = "mean",
    mode: str | None = None,
) -> Tensor:
    """Symmetric KL of the softmax to uniform, KL(p||U) + KL(U||p).

    Bhojanapalli et al. 2021, Eq. 7.
    The regulariser "uniform_skl" of `codistillation_loss` is minus this.

    Args:
        logits: (N, C). U is uniform over the classes that are not at -inf.
        top_k, renormalize_top_k: over the k largest probabilities, as in `codistillation_loss`.
        reduction: "mean", "sum" or "none", over the rows.
        mode: reduction mode; None: the current default.
    Returns: the divergence in nats, () or (N,) with reduction="none".
    Gradient: flows to `logits`; once.
    Raises: TypeError, ValueError for a wrong argument.
    """
    return _one_regularizer(logits, "uniform_skl", -1.0, top_k, renormalize_top_k, reduction, mode)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    target: Tensor | None,
    *,
    alpha: float,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    mode: str | None = None,
    return_terms: bool = False,
) -> Any:
    """Distillation from one teacher or an ensemble, held fixed (Hinton et al. 2015).

    Mean over rows of (1 - alpha) CE(s) + alpha T^2 KL(mean_m softmax(t_m / T) || softmax(s / T)).

    Args:
        student_logits: (N, C).
        teacher_logits: (N, C), M tensors (N, C), or one (M, N, C) tensor.
        target: (N,) int64 class indices; None: no cross entropy.
        alpha: weight of the distillation term, in [0, 1].
        temperature: T > 0, divides all logits in the distillation term.
        The others as in `codistillation_loss`.
    Returns: as `codistillation_loss`; the terms hold one model (the student, whose regulariser is
        0) and one divergence.
    Gradient: flows to `student_logits` only, once.
    Raises: as `codistillation_loss`.
    """
    _checks.matrix("student_logits", student_logits)
    if isinstance(teacher_logits, Tensor) and teacher_logits.dim() == 2:
        teachers = [teacher_logits]
    else:
        teachers = _checks.models("teacher_logits", teacher_logits)
        if teachers[0].dim() == 3:
            teachers = _dtensor.unstack("teacher_logits", teachers[0])
    for teacher in teachers:
        _checks.matrix("teacher_logits", teacher)
        _checks.same("teacher_logits", teacher, "student_logits", student_logits)
    options = _cached(
        _distillation_options,
        alpha,
        len(teachers),
        label_smoothing,
        ignore_index,
        temperature,
        reduction,
    )
    models = [student_logits, *(teacher.detach() for teacher in teachers)]
    names = "student_logits", "teacher_logits"
    loss, terms = _dtensor.evaluate(
        models, target, class_weight, options, mode, return_terms, names
    )
    return (loss, _loss_terms(models, terms, options)) if return_terms else loss


def _one_regularizer(
    logits: Tensor,
    regularizer: str,
    sign: float,
    top_k: int | None,
    renormalize_top_k: bool,
    reduction: str,
    mode: str | None,
) -> Tensor:
    """A regulariser alone, of one model."""
    _checks.matrix("logits", logits)
    options = _cached(_regularizer_options, regularizer, sign, top_k, renormalize_top_k, reduction)
    return _dtensor.evaluate([logits], None, None, options, mode, False)[0]


# Scalar arguments to options: checked once for each distinct set ----------------------------------


def _cached(build: Any, *arguments: Any) -> LossOptions:
    """`build(*arguments)`, out of its cache where it can be."""
    if (
        not torch.compiler.is_compiling()
    ):  # the compiler traces through a cache, and warns that it does
        try:
            return build(*arguments)
        except TypeError:
            pass  # an argument that cannot be hashed cannot be right: let its check say so
    return build.__wrapped__(*arguments)


@lru_cache(_CACHED_OPTIONS, typed=True)
def _codistillation_options(
    alpha: float,
    beta: float,
    regularizer: str,
    top_k: int | None,
    renormalize_top_k: bool,
    divergence: str,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    reduction: str,
) -> LossOptions:
    alpha = _checks.share("alpha", alpha, below_one=True)
    return LossOptions(
        ce_weight=1.0 - alpha,
        regularizer_weight=alpha,
        divergence_weight=_checks.weight("beta", beta),
        regularizer=_checks.choice("regularizer", regularizer, REGULARIZERS),
        top_k=_checks.top_k(top_k),
        renormalize_top_k=_checks.flag("renormalize_top_k", renormalize_top_k),
        divergence=_checks.choice("divergence", divergence, DIVERGENCES),
        label_smoothing=_checks.share("label_smoothing", label_smoothing),
        ignore_index=_checks.integer("ignore_index", ignore_index),
        temperature=_checks.positive("temperature", temperature),
        reduction=_checks.choice("reduction", reduction, REDUCTIONS),
    )


@lru_cache(_CACHED_OPTIONS, typed=True)
def _symmetric_kl_options(reduction: str) -> LossOptions:
    return LossOptions(
        ce_weight=0.0,
        divergence_weight=1.0,
        divergence=DIVERGENCES["skl"],
        reduction=_checks.choice("reduction", reduction, REDUCTIONS),
    )


@lru_cache(_CACHED_OPTIONS, typed=True)
def _regularizer_options(
    regularizer: str, sign: float, top_k: int | None, renormalize_top_k: bool, reduction: str
) -> LossOptions:
    return LossOptions(
        ce_weight=0.0,
        regularizer_weight=sign,
        regularizer=REGULARIZERS[regularizer],
        top_k=_checks.top_k(top_k),
        renormalize_top_k=_checks.flag("renormalize_top_k", renormalize_top_k),
        reduction=_checks.choice("reduction", reduction, REDUCTIONS),
    )


@lru_cache(_CACHED_OPTIONS, typed=True)
def _distillation_options(
    alpha: float,
    teachers: int,
    label_smoothing: float,
    ignore_index: int,
    temperature: float,
    reduction: str,
) -> LossOptions:
    alpha = _checks.share("alpha", alpha)
    temperature = _checks.positive("temperature", temperature)
    return LossOptions(
        ce_weight=1.0 - alpha,
        divergence_weight=alpha * temperature**2,
        divergence=DISTILLATION,
        teachers=teachers,
        label_smoothing=_checks.share("label_smoothing", label_smoothing),
        ignore_index=_checks.integer("ignore_index", ignore_index),
        temperature=temperature,
        reduction=_checks.choice("reduction", reduction, REDUCTIONS),
    )


# The ops' outputs to named terms ------------------------------------------------------------------


def _model_count(models: Sequence[Tensor]) -> int:
    return models[0].shape[0] if models[0].dim() == 3 else len(models)


def _loss_terms(models: Sequence[Tensor], terms: Tensor, options: LossOptions) -> LossTerms:
    students = _model_count(models) - options.teachers
    pairs = pair_count(students, options.teachers)
    *named, agreement = terms.split([students] * 5 + [pairs, 1])
    cross_entropy, regularizer, accuracy, confidence, entropy, divergence = named
    return LossTerms(
        cross_entropy, regularizer, divergence, accuracy, confidence, entropy, agreement.squeeze(0)
    )
