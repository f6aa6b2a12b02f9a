"""A backend's ops as differentiable functions.

Three paths, for three kinds of calls:

- `_FusedLoss`, the default: the forward pass computes the gradients together with the loss, in
  one read of the logits, and the backward pass scales them by the scalar upstream gradient.
- `_Loss`, for per-row upstream gradients, for torch.func, and for float16, whose gradients would
  underflow if they were rounded before the loss scale is applied: the forward pass saves a few
  numbers per row, and the backward pass computes the gradients from them.
- the formula registered with the op, for torch.compile: the same as `_Loss`, in the form that its
  tracer supports.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from churn_kernels import _ops
from churn_kernels._inference import saveable, saveable_in_graph
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
_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # retain_graph of this pass
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # by is_grads_batched=True

_SCALAR_REDUCTIONS = (REDUCTIONS["mean"], REDUCTIONS["sum"])

# The functions below take the logits last, after this many arguments without a gradient.
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
        return _traced(ops, logits, target, class_weight, options, with_terms)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        pass  # under these transforms, requires_grad does not tell whether a gradient is wanted
    elif not torch.is_grad_enabled() or not any(map(_requires_grad, logits)):
        loss, _, terms, _ = _call(ops, logits, target, class_weight, options, want)
        return loss, terms
    elif comes_with_gradients(options, logits):
        want |= WANT_GRADIENTS
        return _FusedLoss.apply(ops, target, class_weight, options, want, *logits)
    return evaluate_by_rows(ops, logits, target, class_weight, options, with_terms)


def evaluate_by_rows(
    ops: Any,
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    with_terms: bool,
) -> tuple[Tensor, Tensor]:
    """As `evaluate`, with gradients from row statistics; `ops` needs only the loss's ops."""
    want = WANT_STATS | (WANT_TERMS if with_terms else 0)
    loss, _, terms = _Loss.apply(ops, target, class_weight, options, want, *logits)
    return loss, terms


def comes_with_gradients(options: LossOptions, logits: Sequence[Tensor]) -> bool:
    """Whether the forward pass computes the gradients, for the backward pass to scale."""
    return options.reduction in _SCALAR_REDUCTIONS and logits[0].dtype != torch.float16


def _traced(
    ops: OpSet,
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    with_terms: bool,
) -> tuple[Tensor, Tensor]:
    """The loss for torch.compile: the op's row terms, weighted by PyTorch.

    The op takes its weights as numbers, and the compiler would recompile for each new number;
    outside the op they become inputs of the graph, so alpha and beta may ramp. PyTorch's sums
    depend on their order, so exact mode calls the op, with its weights as tensors.
    """
    want = WANT_STATS | (WANT_TERMS if with_terms else 0)
    logits, target, class_weight = saveable_in_graph(logits, target, class_weight)
    # torch.func cannot transform the op's registered formula, but it can transform `_Loss`.
    transformed = torch._C._are_functorch_transforms_active() and _let_into_graphs()
    if options.mode == EXACT and transformed:
        return ops.loss_in_transforms(logits, target, class_weight, options, with_terms)
    if options.mode == EXACT:
        one = torch.ones((), dtype=torch.float64, device="cpu")
        weights = [weight * one if weight != 0 else None for weight in options[: len(WEIGHTS)]]
        arguments = *weights, *options[len(WEIGHTS) :], want
        loss, _, terms, _ = ops.loss_tensor_weights(logits, target, class_weight, *arguments)
        return loss, terms
    unweighted = options._replace(
        ce_weight=1.0, regularizer_weight=1.0, divergence_weight=1.0, reduction=ROW_TERMS
    )
    if transformed:
        by_row, terms = ops.loss_in_transforms(logits, target, class_weight, unweighted, with_terms)
    else:
        by_row, _, terms, _ = ops.loss(logits, target, class_weight, *unweighted, want)
    models = len(logits) if logits[0].dim() == 2 else logits[0].shape[0]
    students = models - options.teachers
    pairs = pair_count(students, options.teachers)
    ce, r, d = by_row.to(torch.float64).split([students, students, pairs], dim=1)
    rows, ce_rows = row_counts(
        target, class_weight, by_row.shape[0], options.ignore_index, by_row.device
    )
    nothing = ce[:, :0].sum(1)
    loss = reduce_terms(ce, r, d, nothing, rows, ce_rows, target is not None, options)
    return loss.to(by_row.dtype), terms


# Functions that a graph calls without tracing into them.
_IN_GRAPHS: list[Callable[..., Any]] = []


def _let_into_graphs() -> bool:
    for function in _IN_GRAPHS:
        torch._dynamo.allow_in_graph(function)
    return True


# The compiler calls this while tracing; see `_backend._gpu_problem`.
_let_into_graphs._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
        loss, _, terms, gradients = _call(ops, logits, target, class_weight, options, want)
        ctx.ops, ctx.options = ops, options
        # The backward pass reads neither target nor weights, and needs the logits only for the
        # graph of a second derivative, which raises. Saving them lets autograd detect in-place
        # changes.
        ctx.save_for_backward(*saveable(target, class_weight, *logits), *gradients)
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        needed = ctx.needs_input_grad[len(_BEFORE_LOGITS) :]
        _, _, *tensors = ctx.saved_tensors
        gradients = tensors[len(needed) :]
        exact = ctx.options.mode == EXACT
        if _keeps_graph() or torch.is_grad_enabled() or _is_batched(upstream):
            scale = partial(_scaled_copies, ctx.ops, exact, len(needed))
            gradients = _Gradients.apply(scale, upstream, *tensors)
        else:  # the last use of the gradients: scale them in place
            ctx.ops.scale_(gradients, upstream, exact)
        return _BEFORE_LOGITS + _wanted(gradients, needed)


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
        ctx.save_for_backward(*saveable(target, class_weight, stats, *logits))
        ctx.mark_non_differentiable(stats, terms)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        compute = partial(_gradients, ctx.ops, ctx.options)
        gradients = _Gradients.apply(compute, upstream, *ctx.saved_tensors)
        return _BEFORE_LOGITS + _wanted(gradients, ctx.needs_input_grad[len(_BEFORE_LOGITS) :])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise _not_implemented("forward-mode differentiation")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _one_by_one(_Loss.apply, info.batch_size, in_dims, inputs)


class _Gradients(Function):
    """The gradients as a differentiable function, so that double backward raises."""

    @staticmethod
    def forward(
        compute: Callable[..., Sequence[Tensor]], upstream: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        if not _is_batched(upstream):
            return tuple(compute(upstream, *tensors))
        # is_grads_batched=True: a batch of upstream gradients, always at vmap level 1
        batch = torch._remove_batch_dim(upstream, 1, 1, 0)
        each = [compute(one, *tensors) for one in batch.unbind(0)]
        return tuple(
            torch._add_batch_dim(torch.stack(gradients), 0, 1)
            for gradients in zip(*each, strict=True)
        )

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
        return _one_by_one(_Gradients.apply, info.batch_size, in_dims, inputs)


def _scaled_copies(
    ops: OpSet, exact: bool, models: int, upstream: Tensor, *tensors: Tensor
) -> list[Tensor]:
    """The gradients, which follow the models' logits in `tensors`, times the upstream gradient."""
    gradients = [gradient.clone() for gradient in tensors[models:]]
    ops.scale_(gradients, upstream, exact)
    return gradients


def _gradients(
    ops: OpSet,
    options: LossOptions,
    upstream: Tensor,
    target: Tensor | None,
    class_weight: Tensor | None,
    stats: Tensor,
    *logits: Tensor,
) -> list[Tensor]:
    """The gradients from the row statistics, with the bits of those computed with the loss."""
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
    """One gradient or None per model; models held fixed come last and have none."""
    if len(gradients) == len(needed) and False not in needed:
        return tuple(gradients)
    padded = (*gradients, *[None] * (len(needed) - len(gradients)))
    return tuple([g if need else None for g, need in zip(padded, needed, strict=True)])


def _one_by_one(
    function: Callable[..., Any], examples: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """torch.vmap's rule: one call for each example, stacked.

    Without examples, the sum over the empty dimension provides an example of zeros for the shapes.
    """
    results = []
    for example in range(max(examples, 1)):
        arguments = [
            (value.select(dim, example) if examples else value.sum(dim))
            if isinstance(value, Tensor) and dim is not None
            else value
            for value, dim in zip(inputs, in_dims, strict=True)
        ]
        results.append(function(*arguments))
    outputs = tuple(torch.stack(column) for column in zip(*results, strict=True))
    if not examples:
        outputs = tuple(output[:0] for output in outputs)
    return outputs, (0,) * len(outputs)


def _not_implemented(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what} is not implemented by the kernel; compute the loss inside "
        f'`with churn_kernels.backend("reference")`, which supports all derivatives, or '
        f"detach what needs no gradient"
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
    gradients = _gradients(ops, ctx.options, upstream, target, class_weight, stats, *logits)
    return [*gradients, *[None] * (len(logits) - len(gradients))], *without_gradient


@cache
def differentiable(ops: OpSet) -> OpSet:
    """The same ops, with their gradient formula registered for torch.compile."""
    weighed = _ops.with_tensor_weights(ops)
    for one in (ops, weighed):
        torch.library.register_autograd(one.loss, partial(_backward, one), setup_context=_save)

    def in_transforms(
        logits: Sequence[Tensor],
        target: Tensor | None,
        class_weight: Tensor | None,
        options: Sequence[Any],
        with_terms: bool,
    ) -> tuple[Tensor, Tensor]:
        return evaluate_by_rows(
            ops, logits, target, class_weight, LossOptions(*options), with_terms
        )

    _IN_GRAPHS.append(in_transforms)
    return ops._replace(loss_tensor_weights=weighed.loss, loss_in_transforms=in_transforms)
