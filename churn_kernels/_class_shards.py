"""Losses of rows whose classes are split into shards, with the bits of whole rows.

Exact mode's sums are integers and their scale factors are maxima, so tables of them merge in any
order and grouping. A shard computes the tables of its own classes in stages, each from the
merged tables of the earlier stages (csrc/cpu/class_shard.h); the merged tables hold everything that
a row's loss and a shard's gradients need.
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
    """Position of a shard's classes in the whole rows."""

    first_class: int
    classes: int  # of the whole rows


class Exchange(Protocol):
    """Collectives among the processes that hold the shards of a row."""

    place: int  # of this process in the order of the classes
    ranks: list[int]  # of all processes in that order

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every process's x, all of one shape, in the order of their classes."""

    def merge(self, table: Tensor, merge: Merge) -> Tensor:
        """The merged table of all processes."""


def merge_extremes(a: Tensor, b: Tensor) -> Tensor:
    """Merge (N, models x 3): largest logit, second largest, class of the largest."""
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
    """Merge (N, students x k x 2): a logit and its class; ties go to the lowest class."""

    def merge(a: Tensor, b: Tensor) -> Tensor:
        both = torch.cat([x.unflatten(1, (-1, k, 2)) for x in (a, b)], dim=2)
        for column, descending in ((1, False), (0, True)):
            order = both[..., column].argsort(dim=2, descending=descending, stable=True)
            both = both.take_along_dim(order[..., None], 2)
        return both[:, :, :k].flatten(1)

    return merge


def stages(options: LossOptions) -> tuple[Merge, ...]:
    """The merge function of each stage, in order."""
    return merge_extremes, merge_top_k(options.top_k), torch.maximum, torch.add, torch.add


class ShardOps:
    """The loss's ops (`_ops.OpSet`) on a shard, with the interface of those on whole rows.

    `loss` calls collectives; `loss_backward` computes a shard's gradients without communication.
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
        self._shard = shard = _check_agreement(
            logits, target, class_weight, options, self._exchange
        )
        if target is not None:
            _checks.several_classes(shard.classes)
        if class_weight is not None:
            class_weight = _checks.class_weight(class_weight, logits[0], shard.classes)
        if options.top_k:
            _checks.top_k_fits(options.top_k, shard.classes)
        ops = torch.ops.churn_kernels
        tables: list[Tensor] = []  # merged over all shards, of the stages so far
        for merge in stages(options):
            table = ops.class_table(logits, target, class_weight, tables, *shard, *options)
            tables.append(self._exchange.merge(table, merge) if table.numel() else table)
        loss, stats, terms = ops.class_loss(
            logits, target, class_weight, tables, *shard, *options, want
        )
        # The extra dimension lets checkpointing detect a recomputation without class_parallel.
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
        """Scale the gradients in place."""
        torch.ops.churn_kernels.scale_(gradients, upstream, exact)


# Activation checkpointing may recompute a loss in the backward pass, after the block has closed, so
# the exchange is stored on the graph nodes that may do so.
_EXCHANGE_ATTRIBUTE = "_churn_kernels_class_exchange"
_any_stored = False  # whether any node in this process has one


def store_exchange(exchange: Exchange, loss: Tensor) -> None:
    """Store the exchange on the loss's node, and on the nodes whose forward pass is running.

    Non-reentrant checkpointing recomputes the loss from the loss's own node; reentrant
    checkpointing from the others, which are `ctx` in the calling frames.
    """
    global _any_stored
    _any_stored = True
    nodes: list[Any] = [loss.grad_fn]
    frame = sys._getframe(1)
    while frame is not None:
        first = frame.f_code.co_varnames[:1]
        nodes += [frame.f_locals.get(name) for name in first]
        frame = frame.f_back  # type: ignore[assignment]
    for node in nodes:
        if isinstance(node, torch._C._FunctionBase):
            setattr(node, _EXCHANGE_ATTRIBUTE, exchange)


def exchange_of(block: Choices) -> Exchange | None:
    """The exchange of the open block, or the one stored for a recomputation."""
    exchange: Exchange | None = block.class_exchange
    if exchange is None and _any_stored and not torch.compiler.is_compiling():
        return _stored_exchange()
    return exchange


def _stored_exchange() -> Exchange | None:
    """In a backward pass: the exchange of the running node, or of the nearest upstream of it."""
    nodes: list[Any] = [torch._C._current_autograd_node()]
    seen = set(nodes)
    for node in nodes:
        exchange: Exchange | None = getattr(node, _EXCHANGE_ATTRIBUTE, None)
        if exchange is not None or node is None:
            return exchange
        new = {following for following, _ in node.next_functions} - seen - {None}
        nodes += new
        seen |= new
    return None


_MARK = 0x636B_7368  # distinguishes a loss from another collective
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Length of the vector by which ranks check that they compute the same loss: mark, whether a rank
# rejected its arguments, classes, and the arguments that must be equal.
_FACTS = 3 + 3 + len(LossOptions._fields) + 2


def report_rejection(exchange: Exchange) -> None:
    """Tell the other ranks that this one rejected its arguments."""
    facts = torch.zeros(_FACTS, dtype=torch.float64, device="cpu")
    facts[0], facts[1] = _MARK, 1.0
    exchange.gather(facts)


def _check_agreement(
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    exchange: Exchange,
) -> Shard:
    """This rank's shard; raises unless all ranks compute the same loss."""
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
    for rank, (_, rejected, *_) in enumerate(everyone):
        if rejected:
            raise ValueError(
                f"every rank of class_parallel must accept its arguments, but rank {rank} "
                f"of the group rejected its own; see its error"
            )
    for rank, (mark, _, _, *theirs) in enumerate(everyone):
        if mark != _MARK:
            raise ValueError(
                f"every rank of class_parallel must call the same losses in the same order, but "
                f"rank {rank} of the group is in another collective; did an earlier call on it "
                f"raise?"
            )
        for name, here, there in zip(shared, everyone[0][3:], theirs, strict=True):
            if here != there:
                raise ValueError(
                    f"{name} must be the same on every rank of class_parallel, got "
                    f"{_format_fact(name, here)} on rank 0 and {_format_fact(name, there)} on rank "
                    f"{rank}; split only the classes of the logits"
                )
    widths = [int(width) for _, _, width, *_ in everyone]
    return Shard(sum(widths[: exchange.place]), sum(widths))


def _format_fact(name: str, value: float) -> str:
    if name in ("target", "class_weight"):
        return "none" if value < 0 else f"one with checksum {int(value):08x}"
    return str(_DTYPES[int(value)]) if name == "dtype" else f"{value:g}"


def _checksum(x: Tensor | None) -> int:
    if x is None:
        return -1
    return zlib.crc32(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
