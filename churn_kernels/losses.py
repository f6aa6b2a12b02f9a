"""The functional API: fused losses for reproducible predictions.

Every function maps its arguments onto one set of options (`_options.LossOptions`) and calls
the backend that `_backend` selects, for DTensors through `_dtensor`. Losses are in nats, float32
(float64 for float64 logits); gradients have the logits' dtype. No input is ever modified.

Logits (..., C) with a target (...) are treated as rows (N, C) with a target (N,): as views, copied
only if the strides do not allow a view. Per-row results have the shape (...).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from churn_kernels import _arguments, _checks, _dtensor
from churn_kernels._compiler import with_compile_errors
from churn_kernels._options import ROW_TERMS, LossOptions, pair_count


class LossTerms(NamedTuple):
    """Detached means of every term over the rows that are not ignored, from the same pass.

    K students and P pairs, (0, 1), (0, 2), .., (1, 2), ..; float32 (float64 for float64 logits).
    """

    cross_entropy: Tensor
    """(K,) cross entropy, in nats, with smoothing and class weights; NaN without a target."""
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
    """() share of rows for which all models (and teachers) predict the same class: 1 - churn."""


class RowTerms(NamedTuple):
    """Every row's terms, unweighted and differentiable; 0 for an ignored row."""

    cross_entropy: Tensor
    """(N, K) cross entropy of each model, in nats; 0 without a target."""
    regularizer: Tensor
    """(N, K) the regulariser R of each model, in nats."""
    divergence: Tensor
    """(N, P) the divergence D of each pair, (0, 1), (0, 2), .., (1, 2), .."""


@with_compile_errors
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
            device, contiguous or not; or one (K, N, C) tensor. Tensors (..., C) of one shape, with
            a target (...), are also accepted. A class at -inf is outside its model's classes. With
            DTensors, sharded by rows or replicated, target and class_weight must be DTensors too;
            the results are DTensors of the whole batch.
        target: (N,) or (...) int64 class indices, for C >= 2; None: no cross entropy.
        alpha: weight of the regulariser, in [0, 1).
        beta: weight of the divergence, >= 0.
        regularizer: "entropy", R = H(p) = -sum p log p (Eq. 6); or "uniform_skl",
            R = -(KL(p || U) + KL(U || p)) with U uniform over the row's classes (Eq. 7). Eq. 7 is
            unbounded below in the logits.
        top_k: regularise only the k largest probabilities of each row, 1 <= k <= C, ties broken by
            the lowest index; None: all.
        renormalize_top_k: True: the k renormalised to a distribution (U uniform over the k);
            False: their terms of the full softmax.
        divergence: D between softmax(z_i / T) and softmax(z_j / T). "skl": KL(p||q) + KL(q||p)
            (Eq. 9); "l1": sum |p - q| (Eq. 8); "ce": the value of "skl", but each model's gradient
            holds the other fixed, (p_i - p_j) / T (Eq. 17, Anil et al. 2018).
        label_smoothing: in [0, 1], on the cross entropy, as in `torch.nn.functional.cross_entropy`.
        class_weight: (C,) floating-point weights of the cross entropy, as there; no gradient flows
            to it.
        ignore_index: a row with this target is excluded from every term.
        temperature: T > 0, divides the logits in the divergence only; there is no T^2 factor.
        reduction: "mean" divides by the number of rows that are not ignored, and the cross entropy
            by the sum of their class weights; "sum" does not divide; "none" returns every row.
        mode: reduction mode (see `ck.reduction_mode`); None: the current default.
        return_terms: also return `LossTerms`.
    Returns:
        The loss, () or with reduction="none" (N,) or (...); or (loss, LossTerms) with
        return_terms=True. The mean over no rows is NaN.
    Gradient: flows to every tensor of `logits`, for any upstream gradient; first order only (for
        second derivatives use `with ck.backend("reference")`). A row with NaN or only -inf affects
        only its own loss and gradient.
    Raises:
        TypeError, ValueError: naming the argument, the expected and actual value, and the remedy.
        TargetError: a target out of range (an IndexError and a ValueError); on a GPU only with
            CHURN_DEBUG=1 in the environment, because it synchronises: without, the row is NaN.
        NotImplementedError: a mode that cannot be kept.
    """
    options = _arguments.options(
        _arguments.codistillation,
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
    models, batch = _checks.models("logits", logits)
    loss, terms = _dtensor.evaluate(
        models, batch, target, class_weight, options, mode, return_terms
    )
    return (
        (loss, _loss_terms(_model_count(models, batch), terms, options)) if return_terms else loss
    )


@with_compile_errors
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
    """The terms of `codistillation_loss` per row, unweighted.

    For weights that differ by row, model or pair, or that are tensors: any function of the terms
    can be differentiated, at the cost of one more pass over the logits.

    Args: as in `codistillation_loss`.
    Returns: RowTerms, cross_entropy (N, K), regularizer (N, K), divergence (N, P), P = K(K-1)/2;
        for logits (..., C) with (...) in place of N.
    Gradient: flows to every tensor of `logits` from every entry; first order only.
    Raises: as `codistillation_loss`.
    """
    options = _arguments.options(
        _arguments.codistillation,
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
    models, batch = _checks.models("logits", logits)
    rows, _ = _dtensor.evaluate(models, batch, target, class_weight, options, mode, False)
    count = _model_count(models, batch)
    # Slices, because the views that split returns do not allow in-place changes.
    return RowTerms(rows[..., :count], rows[..., count : 2 * count], rows[..., 2 * count :])


@with_compile_errors
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
        logits: (N, C) or (..., C).
        target: (N,) or (...) int64 class indices.
        The others as in `codistillation_loss`.
    Returns: as `codistillation_loss`; the terms hold one model and no pair.
    Gradient: flows to `logits`; first order only.
    Raises: as `codistillation_loss`.
    """
    _checks.one_model("logits", logits)
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


@with_compile_errors
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
        p_logits, q_logits: (N, C) or (..., C) logits of the same shape, dtype and device.
        reduction: "mean", "sum" or "none", over the rows.
        mode: reduction mode; None: the current default.
    Returns: the divergence in nats, () or with reduction="none" (N,) or (...). A class at -inf in
        both contributes nothing; at -inf in only one, it makes the divergence +inf.
    Gradient: flows to both arguments, first order only; detach one to hold it fixed.
    Raises: TypeError, ValueError if the two do not match, or for an unknown reduction.
    """
    _checks.one_model("p_logits", p_logits)
    _checks.one_model("q_logits", q_logits)
    _checks.same("q_logits", q_logits, "p_logits", p_logits)
    options = _arguments.options(_arguments.symmetric_kl, reduction)
    models, batch = _checks.rows(p_logits, q_logits)
    names = "p_logits", "q_logits"
    return _dtensor.evaluate(models, batch, None, None, options, mode, False, names)[0]


@with_compile_errors
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
        logits: (N, C) or (..., C).
        top_k, renormalize_top_k: over the k largest probabilities, as in `codistillation_loss`.
        reduction: "mean", "sum" or "none", over the rows.
        mode: reduction mode; None: the current default.
    Returns: the entropy in nats, () or with reduction="none" (N,) or (...).
    Gradient: flows to `logits`; first order only.
    Raises: TypeError, ValueError for an invalid argument.
    """
    return _one_regularizer(logits, "entropy", 1.0, top_k, renormalize_top_k, reduction, mode)


@with_compile_errors
def uniform_skl(
    logits: Tensor,
    *,
    top_k: int | None = None,
    renormalize_top_k: bool = True,
    reduction: str = "mean",
    mode: str | None = None,
) -> Tensor:
    """Symmetric KL of the softmax to uniform, KL(p||U) + KL(U||p).

    Bhojanapalli et al. 2021, Eq. 7. The regulariser "uniform_skl" of `codistillation_loss` is its
    negative.

    Args:
        logits: (N, C) or (..., C). U is uniform over the classes that are not at -inf.
        top_k, renormalize_top_k: over the k largest probabilities, as in `codistillation_loss`.
        reduction: "mean", "sum" or "none", over the rows.
        mode: reduction mode; None: the current default.
    Returns: the divergence in nats, () or with reduction="none" (N,) or (...).
    Gradient: flows to `logits`; first order only.
    Raises: TypeError, ValueError for an invalid argument.
    """
    return _one_regularizer(logits, "uniform_skl", -1.0, top_k, renormalize_top_k, reduction, mode)


@with_compile_errors
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
        student_logits: (N, C) or (..., C).
        teacher_logits: one tensor of the same shape, M of them, or one tensor (M, N, C) or
            (M, ..., C).
        target: (N,) or (...) int64 class indices; None: no cross entropy.
        alpha: weight of the distillation term, in [0, 1].
        temperature: T > 0, divides all logits in the distillation term.
        The others as in `codistillation_loss`.
    Returns: as `codistillation_loss`; the terms hold one model (the student, whose regulariser is
        0) and one divergence.
    Gradient: flows to `student_logits` only; first order only.
    Raises: as `codistillation_loss`.
    """
    _checks.one_model("student_logits", student_logits)
    teachers = _teachers(teacher_logits, student_logits.dim())
    for teacher in teachers:
        _checks.one_model("teacher_logits", teacher)
        _checks.same("teacher_logits", teacher, "student_logits", student_logits)
    options = _arguments.options(
        _arguments.distillation,
        alpha,
        len(teachers),
        label_smoothing,
        ignore_index,
        temperature,
        reduction,
    )
    models, batch = _checks.rows(student_logits, *(teacher.detach() for teacher in teachers))
    names = "student_logits", "teacher_logits"
    loss, terms = _dtensor.evaluate(
        models, batch, target, class_weight, options, mode, return_terms, names
    )
    return (
        (loss, _loss_terms(_model_count(models, batch), terms, options)) if return_terms else loss
    )


def _teachers(logits: Tensor | Sequence[Tensor], dims: int) -> Sequence[Tensor]:
    """The teachers' logits, from one teacher's tensor, a stack or a sequence."""
    if not isinstance(logits, Tensor):
        return _checks.sequence("teacher_logits", logits)
    if logits.is_nested or logits.dim() == dims:
        return [logits]
    if logits.dim() != dims + 1 or logits.shape[0] == 0:
        raise ValueError(
            f"teacher_logits must be a tensor of the student's shape, a sequence of these, or one "
            f"or more stacked along dimension 0, got one tensor of shape {tuple(logits.shape)}; "
            f"pass the teachers' logits of the same rows and classes as student_logits"
        )
    return _dtensor.unstack("teacher_logits", logits)


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
    _checks.one_model("logits", logits)
    options = _arguments.options(
        _arguments.regularizer, regularizer, sign, top_k, renormalize_top_k, reduction
    )
    models, batch = _checks.rows(logits)
    return _dtensor.evaluate(models, batch, None, None, options, mode, False)[0]


# Names for the ops' outputs -----------------------------------------------------------------------


def _model_count(models: Sequence[Tensor], batch: Sequence[int] | None) -> int:
    stacked = batch is None and models[0].dim() == 3
    return models[0].shape[0] if stacked else len(models)


def _loss_terms(models: int, terms: Tensor, options: LossOptions) -> LossTerms:
    students = models - options.teachers
    pairs = pair_count(students, options.teachers)
    *named, agreement = terms.split([students] * 5 + [pairs, 1])
    cross_entropy, regularizer, accuracy, confidence, entropy, divergence = named
    return LossTerms(
        cross_entropy, regularizer, divergence, accuracy, confidence, entropy, agreement.squeeze(0)
    )
