"""Losses of rows whose classes lie in several shards, with the bits of whole rows.

Exact mode's sums are integers, and what scales them are maxima: tables of numbers that merge in any
order and any grouping. A shard finds those of its own classes stage by stage, each out of the
merged tables of the stages before (csrc/cpu/class_shard.h); the last ones hold all that a row's
loss, and a shard's gradients, take.
"""

import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from churn_kernels import _checks
from churn_kernels._blocks import Choices
from churn_kernels._options import LossOptions

Merge = Callable[[Tensor, Tensor], Tensor]


class Shard(NamedTuple):
    """Where a shard's classes lie in whole rows."""

    first_class: int
    classes: int  # of whole rows


class Exchange(Protocol):
    """How the processes that hold a row's shards tell each other of them."""

    place: int  # of this process in the order of the classes
    ranks: list[int]  # of all in that order

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every process's x, of one shape, in the order of their classes."""

    def merge(self, table: Tensor, merge: Merge) -> Tensor:
        """The tables of all processes in one."""


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


class ShardOps:
    """The loss's ops (`_ops.OpSet`) on a shard, for `_autograd` to call as those of whole rows.

    The processes meet in `loss`; `loss_backward` computes a shard's gradients alone.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._shard = Shard(0, 0)

    def loss(
        self,
        logits: Sequence[Tensor],
        target: Tensor | None,
        class_weight: Tensor | None,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Loss, statistics and terms of the whole rows."""
        options, want = LossOptions(*arguments[:-1]), arguments[-1]
        self._shard = shard = _agree(logits, target, class_weight, options, self._exchange)
        if target is not None:
            _checks.several_classes(shard.classes)
        if class_weight is not None:
            class_weight = _checks.class_weight(class_weight, logits[0], shard.classes)
        if options.top_k:
            _checks.top_k_fits(options.top_k, shard.classes)
        ops = torch.ops.churn_kernels
        tables: list[Tensor] = []  # of all shards, of the stages so far
        for merge in stages(options):
            table = ops.class_table(logits, target, class_weight, tables, *shard, *options)
            tables.append(self._exchange.merge(table, merge) if table.numel() else table)
        loss, stats, terms = ops.class_loss(
            logits, target, class_weight, tables, *shard, *options, want
        )
        # Of a shape of its own: checkpointing that computes another loss in its place takes notice.
        return loss, stats[None], terms, []

    def loss_backward(
        self,
        logits: Sequence[Tensor],
        target: Tensor | None,
        class_weight: Tensor | None,
        stats: Tensor,
        upstream: Tensor,
        *options: Any,
    ) -> list[Tensor]:
        """The gradients of the shard's classes."""
        gradients: list[Tensor] = torch.ops.churn_kernels.class_loss_backward(
            logits, target, class_weight, stats[0], upstream, *self._shard, *options
        )
        return gradients

    @staticmethod
    def scale_(gradients: Sequence[Tensor], upstream: Tensor, exact: bool) -> None:
        """In place times a factor."""
        torch.ops.churn_kernels.scale_(gradients, upstream, exact)


# Where a loss is computed again in the backward pass (activation checkpointing), the block may be
# over by then: the exchange stays with the nodes of the graph that may do so.
_KEPT = "_churn_kernels_class_exchange"
_keeps = False  # whether any does in this process


def keep(exchange: Exchange, loss: Tensor) -> None:
    """Leave the exchange with the loss's own node, and with those whose forward pass calls.

    The first computes the loss again if checkpointing is not reentrant, the others (they are
    `ctx` in the frames below) if it is.
    """
    global _keeps
    _keeps = True
    nodes: list[Any] = [loss.grad_fn]
    frame = sys._getframe(1)
    while frame is not None:
        first = frame.f_code.co_varnames[:1]
        nodes += [frame.f_locals.get(name) for name in first]
        frame = frame.f_back  # type: ignore[assignment]
    for node in nodes:
        if isinstance(node, torch._C._FunctionBase):
            setattr(node, _KEPT, exchange)


def exchange_of(block: Choices) -> Exchange | None:
    """What brings the classes together: the open block's, or one kept for computing again."""
    exchange: Exchange | None = block.class_exchange
    if exchange is None and _keeps and not torch.compiler.is_compiling():
        return _kept()
    return exchange


def _kept() -> Exchange | None:
    """In a backward pass: the exchange of the node that runs, or of the nearest one behind it."""
    nodes: list[Any] = [torch._C._current_autograd_node()]
    seen = set(nodes)
    for node in nodes:
        found: Exchange | None = getattr(node, _KEPT, None)
        if found is not None or node is None:
            return found
        new = {behind for behind, _ in node.next_functions} - seen - {None}
        nodes += new
        seen |= new
    return None


_MARK = 0x636B_7368  # tells a loss from another collective that a process has come to
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Numbers by which processes find out whether they ask for the same: mark, whether one refused its
# arguments, classes, and what they share.
_FACTS = 3 + 3 + len(LossOptions._fields) + 2


def refuse(exchange: Exchange) -> None:
    """Tell the other processes that this one does not go on, and raises."""
    facts = torch.zeros(_FACTS, dtype=torch.float64, device="cpu")
    facts[0], facts[1] = _MARK, 1.0
    exchange.gather(facts)


def _agree(
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    exchange: Exchange,
) -> Shard:
    """Where this process's classes lie; raises unless all processes ask for the same loss."""
    first = logits[0]
    shared = {
        "number of rows": first.shape[-2],
        "number of models": len(logits) if first.dim() == 2 else first.shape[0],
        "dtype": _DTYPES.index(first.dtype),
        **options._asdict(),
        "target": _checksum(target),
        "class_weight": _checksum(class_weight),
    }
    facts = [_MARK, 0, first.shape[-1], *shared.values()]
    everyone = torch.stack(
        exchange.gather(torch.tensor(facts, dtype=torch.float64, device="cpu"))
    ).tolist()
    for process, (_, refused, *_) in enumerate(everyone):
        if refused:
            raise ValueError(
                f"every process of class_parallel must accept its arguments, but process {process} "
                f"of the group refused its own; its error says why"
            )
    for process, (mark, _, _, *theirs) in enumerate(everyone):
        if mark != _MARK:
            raise ValueError(
                f"every process of class_parallel must call the same losses in the same order, but "
                f"process {process} of the group has come to another collective; did a call of its "
                f"raise before?"
            )
        for name, here, there in zip(shared, everyone[0][3:], theirs, strict=True):
            if here != there:
                raise ValueError(
                    f"{name} must be the same in every process of class_parallel, got "
                    f"{_shown(name, here)} in process 0 and {_shown(name, there)} in process "
                    f"{process}; split the classes of the logits, and nothing else"
                )
    widths = [int(width) for _, _, width, *_ in everyone]
    return Shard(sum(widths[: exchange.place]), sum(widths))


def _shown(name: str, value: float) -> str:
    if name in ("target", "class_weight"):
        return "none" if value < 0 else f"one of checksum {int(value):08x}"
    return str(_DTYPES[int(value)]) if name == "dtype" else f"{value:g}"


def _checksum(x: Tensor | None) -> int:
    if x is None:
        return -1
    return zlib.crc32(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
