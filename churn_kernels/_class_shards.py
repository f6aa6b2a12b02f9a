"""Losses of rows whose classes lie in several shards, with the bits of whole rows.

Exact mode's sums are integers, and what scales them are maxima: tables of numbers that merge in any
order and any grouping. A shard finds those of its own classes stage by stage, each out of the
merged tables of the stages before (csrc/cpu/class_shard.h); the last ones hold all that a row's
loss, and a shard's gradients, take.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from churn_kernels import _checks, _ops
from churn_kernels._autograd import comes_with_gradients
from churn_kernels._options import WANT_STATS, WANT_TERMS, LossOptions

Merge = Callable[[Tensor, Tensor], Tensor]


class Shard(NamedTuple):
    """Where a shard's classes lie in whole rows."""

    first_class: int
    classes: int  # of whole rows


class Exchange(Protocol):
    """What the holders of a row's shards have in common."""

    place: int  # of this holder in the order of the classes

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every holder's x, of one shape, in the order of their classes."""

    def merge(self, table: Tensor, merge: Merge) -> Tensor:
        """The tables of all holders in one."""


def merge_extremes(a: Tensor, b: Tensor) -> Tensor:
    """Of (N, models x 3): largest logit, second largest, class of the largest."""
    first, second, winner = a.unflatten(1, (-1, 3)).unbind(2)
    other_first, other_second, other_winner = b.unflatten(1, (-1, 3)).unbind(2)
    next_first = torch.minimum(first, other_first)
    lower = torch.minimum(winner, other_winner)
    return torch.stack(
        [
            torch.maximum(first, other_first),
            torch.maximum(next_first, torch.maximum(second, other_second)),
            torch.where(
                first > other_first,
                winner,
                torch.where(first < other_first, other_winner, lower),
            ),
        ],
        dim=2,
    ).flatten(1)


def merge_top_k(k: int) -> Merge:
    """Of (N, students x k x 2): a logit and its class; equal logits go by class."""

    def merge(a: Tensor, b: Tensor) -> Tensor:
        both = torch.cat([x.unflatten(1, (-1, k, 2)) for x in (a, b)], dim=2)
        for column, descending in ((1, False), (0, True)):
            order = both[..., column].argsort(dim=2, descending=descending, stable=True)
            both = both.take_along_dim(order[..., None], 2)
        return both[:, :, :k].flatten(1)

    return merge


def stages(options: LossOptions) -> tuple[Merge, ...]:
    """How the tables of each stage merge, in the stages' order."""
    return merge_extremes, merge_top_k(options.top_k), torch.maximum, torch.add, torch.add


def next_table(
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    tables: Sequence[Tensor],
    shard: Shard,
    options: LossOptions,
) -> Tensor:
    """The shard's own table of the stage that follows those whose merged `tables` are given."""
    table: Tensor = torch.ops.churn_kernels.class_table(
        logits, target, class_weight, tables, *shard, *options
    )
    return table


class ClassShardLoss(Function):
    """The loss of whole rows, and the gradients of one shard's classes: nothing more is sent."""

    @staticmethod
    def forward(
        ctx: Any,
        target: Tensor | None,
        class_weight: Tensor | None,
        tables: Sequence[Tensor],
        shard: Shard,
        options: LossOptions,
        want: int,
        *logits: Tensor,
    ) -> tuple[Tensor, Tensor]:
        try:
            loss, stats, terms = torch.ops.churn_kernels.class_loss(
                logits, target, class_weight, tables, *shard, *options, want | WANT_STATS
            )
        except (IndexError, RuntimeError) as error:
            _ops.raise_target_error(error)
            raise
        ctx.shard, ctx.options = shard, options
        ctx.save_for_backward(target, class_weight, stats, *logits)
        ctx.mark_non_differentiable(terms)
        ctx.set_materialize_grads(False)
        return loss, terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        target, class_weight, stats, *logits = ctx.saved_tensors
        ops = torch.ops.churn_kernels
        # Whole rows have their gradients before their upstream, where that is one number.
        scales = comes_with_gradients(ctx.options, logits)
        factor = torch.ones_like(upstream) if scales else upstream.contiguous()
        gradients = ops.class_loss_backward(
            logits, target, class_weight, stats, factor, *ctx.shard, *ctx.options
        )
        if scales:
            ops.scale_(gradients, upstream, True)
        held_fixed = len(logits) - len(gradients)  # teachers, behind the students
        return None, None, None, None, None, None, *gradients, *[None] * held_fixed


def evaluate(
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    with_terms: bool,
    exchange: Exchange,
) -> tuple[Tensor, Tensor]:
    """The loss of the rows whose classes `exchange` brings together, and the terms.

    Args: as of `_backend.evaluate`, whose checks are done but for those that take the number of all
        classes; options.mode is exact.
    Raises: ValueError if the holders' arguments do not fit each other: in each of them.
    """
    shard = _agree(logits, target, class_weight, options, exchange)
    if class_weight is not None:
        class_weight = _checks.class_weight(class_weight, logits[0], shard.classes)
    if options.top_k:
        _checks.top_k_fits(options.top_k, shard.classes)
    detached = [z.detach() for z in logits]
    tables: list[Tensor] = []
    for merge in stages(options):
        table = next_table(detached, target, class_weight, tables, shard, options)
        tables.append(exchange.merge(table, merge) if table.numel() else table)
    want = WANT_TERMS if with_terms else 0
    loss, terms = ClassShardLoss.apply(target, class_weight, tables, shard, options, want, *logits)
    return loss, terms


_SHARED = ("number of rows", "number of models", "dtype", "options", "target", "class_weight")


def _agree(
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    exchange: Exchange,
) -> Shard:
    """Where this holder's classes lie; raises unless all holders ask for the same loss."""
    first = logits[0]
    shared = (
        first.shape[-2],
        len(logits) if first.dim() == 2 else first.shape[0],
        zlib.crc32(str(first.dtype).encode()),
        zlib.crc32(repr(options).encode()),
        _checksum(target),
        _checksum(class_weight),
    )
    facts = torch.tensor([first.shape[-1], *shared])
    everyone = torch.stack(exchange.gather(facts)).tolist()
    for holder, (_, *theirs) in enumerate(everyone):
        for name, here, there in zip(_SHARED, everyone[0][1:], theirs, strict=True):
            if here != there:
                raise ValueError(
                    f"{name} must be the same in every process of class_parallel, but process "
                    f"{holder} of the group has another one than process 0; split the classes of "
                    f"the logits, and nothing else"
                )
    widths = [width for width, *_ in everyone]
    return Shard(sum(widths[: exchange.place]), sum(widths))


def _checksum(x: Tensor | None) -> int:
    if x is None:
        return -1
    return zlib.crc32(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
