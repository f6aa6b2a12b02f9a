"""Save, call, return: a backend's ops as differentiable functions.

Three ways, for three kinds of calls:

- `_FusedLoss`, the usual one: the forward pass computes the gradients together with the loss, in
  one read of the logits, and the backward pass scales them by its one upstream number.
- `_Loss`, for per-row upstreams, for torch.func, and for float16, whose gradients would underflow
  if they were rounded before a loss scaler's factor reaches them: the forward pass saves a few
  numbers a row, and the backward pass computes the gradients from them.
- the formula registered with the op, for torch.compile: the same as `_Loss`, in the form its tracer
  takes.
"""

from collections.abc import Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from churn_kernels import _ops
from churn_kernels._ops import OpSet
from churn_kernels._options import (
    REDUCTIONS,
    ROW_TERMS,
    WANT_GRADIENTS,
    WANT_STATS,
    WANT_TERMS,
    WEIGHTS,
    LossOptions,
    pair_count,
)
from churn_kernels._reduction import reduce_terms, row_counts
from churn_kernels.modes import EXACT

_requires_grad = attrgetter("requires_grad")

_SCALAR_REDUCTIONS = (REDUCTIONS["mean"], REDUCTIONS["sum"])

# The functions below take the logits last, behind this many arguments without a gradient.
_BEFORE_LOGITS = (None, None, None, None, None)


def evaluate(
    ops: OpSet,
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    with_terms: bool,
) -> tuple[Tensor, Tensor]:
    """The loss on these ops, differentiable, and the terms (empty if not asked for)."""
    want = WANT_TERMS if with_terms else 0
    if torch.compiler.is_compiling():
        return _traced(ops, logits, target, class_weight, options, want | WANT_STATS)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        pass  # whoever watches the tensors does not ask them for a gradient
    elif not torch.is_grad_enabled() or not any(map(_requires_grad, logits)):
        loss, _, terms, _ = _call(ops, logits, target, class_weight, options, want)
        return loss, terms
    elif comes_with_gradients(options, logits):
        want |= WANT_GRADIENTS
        return _FusedLoss.apply(ops, target, class_weight, options, want, *logits)
    return evaluate_by_rows(ops, logits, target, class_weight, options, want)


def evaluate_by_rows(
    ops: Any,
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    want: int,
) -> tuple[Tensor, Tensor]:
    """As `evaluate`, with gradients out of row statistics; `ops` need no more than the loss's."""
    want |= WANT_STATS
    loss, _, terms = _Loss.apply(ops, target, class_weight, options, want, *logits)
    return loss, terms


def comes_with_gradients(options: LossOptions, logits: Sequence[Tensor]) -> bool:
    """Whether the loss computes its gradients at once, for its upstream to scale."""
    return options.reduction in _SCALAR_REDUCTIONS and logits[0].dtype != torch.float16


def _traced(
    ops: OpSet,
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    want: int,
) -> tuple[Tensor, Tensor]:
    """The loss as torch.compile is to see it: the op's row terms, weighed by PyTorch.

    The op takes its weights as numbers, and the compiler would compile anew for each new number;
    outside of it they become inputs of the graph, and alpha and beta may ramp. PyTorch's sums have
    an order, so exact mode stays with the op, and hands it its weights as tensors.
    """
    if options.mode == EXACT:
        one = torch.ones((), dtype=torch.float64, device="cpu")
        weights = [weight * one if weight != 0 else None for weight in options[: len(WEIGHTS)]]
        arguments = *weights, *options[len(WEIGHTS) :], want
        loss, _, terms, _ = ops.loss_tensor_weights(logits, target, class_weight, *arguments)
        return loss, terms
    unweighted = options._replace(
        ce_weight=1.0, regularizer_weight=1.0, divergence_weight=1.0, reduction=ROW_TERMS
    )
    by_row, _, terms, _ = ops.loss(logits, target, class_weight, *unweighted, want)
    models = len(logits) if logits[0].dim() == 2 else logits[0].shape[0]
    students = models - options.teachers
    pairs = pair_count(students, options.teachers)
    ce, r, d = by_row.to(torch.float64).split([students, students, pairs], dim=1)
    rows, ce_rows = row_counts(
        target, class_weight, by_row.shape[0], options.ignore_index, by_row.device
    )
    loss = reduce_terms(ce, r, d, rows, ce_rows, target is not None, options)
    return loss.to(by_row.dtype), terms


class _FusedLoss(Function):
    """Loss and gradients in one pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        ops: OpSet,
        target: Tensor | None,
        class_weight: Tensor | None,
        options: LossOptions,
        want: int,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        loss, _, terms, ctx.gradients = _call(ops, logits, target, class_weight, options, want)
        ctx.ops, ctx.options = ops, options
        # The stored gradients need none of these. A second backward pass does, and autograd now
        # notices logits that were changed in place, whichever pass it is.
        ctx.save_for_backward(target, class_weight, *logits)
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        target, class_weight, *logits = ctx.saved_tensors
        ops, gradients = ctx.ops, ctx.gradients
        if gradients is None or torch.is_grad_enabled():
            options = ctx.options
            stats = _call(ops, logits, target, class_weight, options, WANT_STATS)[1]
            gradients = _LossBackward.apply(
                ops, target, class_weight, options, stats, upstream, *logits
            )
        else:
            ctx.gradients = None  # handed out below, to be changed by whoever holds them
            ops.scale_(gradients, upstream, ctx.options.mode == EXACT)
        return _BEFORE_LOGITS + _wanted(gradients, ctx.needs_input_grad[len(_BEFORE_LOGITS) :])


class _Loss(Function):
    """Loss and row statistics; the backward pass computes the gradients from the statistics."""

    @staticmethod
    def forward(
        ops: OpSet,
        target: Tensor | None,
        class_weight: Tensor | None,
        options: LossOptions,
        want: int,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, stats, terms, _ = _call(ops, logits, target, class_weight, options, want)
        return loss, stats, terms

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.ops, target, class_weight, ctx.options, _, *logits = inputs
        _, stats, terms = output
        ctx.save_for_backward(target, class_weight, stats, *logits)
        ctx.mark_non_differentiable(stats, terms)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        target, class_weight, stats, *logits = ctx.saved_tensors
        gradients = _LossBackward.apply(
            ctx.ops, target, class_weight, ctx.options, stats, upstream, *logits
        )
        return _BEFORE_LOGITS + _wanted(gradients, ctx.needs_input_grad[len(_BEFORE_LOGITS) :])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise _not_implemented("forward-mode differentiation")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _one_by_one(_Loss, info.batch_size, in_dims, inputs)


class _LossBackward(Function):
    """The gradients, as a function of their own: differentiating them raises instead of lying."""

    @staticmethod
    def forward(
        ops: OpSet,
        target: Tensor | None,
        class_weight: Tensor | None,
        options: LossOptions,
        stats: Tensor,
        upstream: Tensor,
        *logits: Tensor,
    ) -> tuple[Tensor, ...]:
        return tuple(_gradients(ops, logits, target, class_weight, stats, upstream, options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise _not_implemented("double backward")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise _not_implemented("forward-mode differentiation of the gradient")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _one_by_one(_LossBackward, info.batch_size, in_dims, inputs)


def _gradients(
    ops: OpSet,
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    stats: Tensor,
    upstream: Tensor,
    options: LossOptions,
) -> list[Tensor]:
    """The gradients from the row statistics, with the bits of those that came with the loss."""
    if options.mode != EXACT or not comes_with_gradients(options, logits):
        upstream = upstream.contiguous()
        return ops.loss_backward(logits, target, class_weight, stats, upstream, *options)
    one = torch.ones_like(upstream)
    gradients: list[Tensor] = ops.loss_backward(logits, target, class_weight, stats, one, *options)
    ops.scale_(gradients, upstream, True)
    return gradients


def _call(
    ops: OpSet,
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    want: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The op, without its registered formula; a target out of range raises a TargetError."""
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return ops.loss(logits, target, class_weight, *options, want)
    except (IndexError, RuntimeError) as error:
        _ops.raise_target_error(error)
        raise


def _wanted(gradients: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """A gradient for each model that wants one; those held fixed come last, and have none."""
    padded = (*gradients, *[None] * (len(needed) - len(gradients)))
    return tuple([g if need else None for g, need in zip(padded, needed, strict=True)])


def _one_by_one(
    function: Any, examples: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """torch.vmap's rule: one call for each example, stacked."""
    results = []
    for example in range(examples):
        arguments = [
            value.select(dim, example) if isinstance(value, Tensor) and dim is not None else value
            for value, dim in zip(inputs, in_dims, strict=True)
        ]
        results.append(function.apply(*arguments))
    outputs = tuple(torch.stack(column) for column in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _not_implemented(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what} is not implemented by the kernel; compute the loss inside "
        f'`with churn_kernels.backend("reference")`, which has derivatives of every kind'
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logits, target, class_weight, *options, _ = inputs
    _, stats, terms, gradients = output
    ctx.options = LossOptions(*options)
    ctx.save_for_backward(target, class_weight, stats, *logits)
    ctx.mark_non_differentiable(stats, terms, *gradients)
    ctx.set_materialize_grads(False)


def _backward(ops: OpSet, ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
    target, class_weight, stats, *logits = ctx.saved_tensors
    without_gradient = [None] * (2 + len(ctx.options) + 1)  # target, class_weight, options, want
    if upstream is None:
        return [None] * len(logits), *without_gradient
    gradients = _gradients(ops, logits, target, class_weight, stats, upstream, ctx.options)
    return [*gradients, *[None] * (len(logits) - len(gradients))], *without_gradient


@cache
def differentiable(ops: OpSet) -> OpSet:
    """The same ops, with the formula of their gradient registered for torch.compile."""
    weighed = _ops.with_tensor_weights(ops)
    for one in (ops, weighed):
        torch.library.register_autograd(one.loss, partial(_backward, one), setup_context=_save)
    return ops._replace(loss_tensor_weights=weighed.loss)
