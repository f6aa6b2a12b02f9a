"""Exact sums over torch.distributed, and losses of rows whose classes are split over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from churn_kernels import _blocks, _checks
from churn_kernels._class_shards import Merge
from churn_kernels._placements import is_placed
from churn_kernels.exact import sum_across


def exact_sum(x: Tensor, group: Any = None) -> Tensor:
    """The exact sum of every process's x, rounded once to float32: round(sum_r sum_i x_ri).

    Every process gets the same bits, those of `churn_kernels.exact_sum` of all elements in one
    process, however they are distributed. One all-reduce of 12 int64 words (96 bytes).

    Args:
        x: as in `churn_kernels.exact_sum`; shapes may differ between processes, and tensors may be
            empty.
        group: a process group, whose members all call this; None: every process. Its backend must
            take int64 tensors of x's device, as gloo does on the CPU and NCCL on GPUs.
    Returns: float32 scalar () on x's device. Nothing waits for a GPU.
    Gradient: this process's upstream gradient, for every element of its x, in x's dtype, without
        communication: if every process computes the same loss from the sum, each gets the gradient
        of that one loss, not of the sum of all losses.
    Raises: TypeError as `churn_kernels.exact_sum`, and for a DTensor; RuntimeError if
        torch.distributed is missing or was not initialised; ValueError if this process is not in
        the group.
    """
    x = _checks.summand("x", x)
    if is_placed(x):
        raise TypeError(
            "x must be a Tensor, this process's part of the sum, got a DTensor; pass "
            "x.to_local(), or call churn_kernels.exact_sum(x) for the sum of the whole DTensor"
        )
    _check_group("exact_sum", group, "churn_kernels.exact_sum in one process")

    def all_reduce(words: Tensor) -> Tensor:
        dist.all_reduce(words, group=group)
        return words

    return sum_across(x, all_reduce)


@contextmanager
def class_parallel(group: Any = None) -> Iterator[None]:
    """A block in which each process passes some of the classes, and losses are those of whole rows.

    Every process passes the logits of some classes, (N, C_r), or DTensors sharded in this way: the
    parts are in the order of the group's ranks, C = sum_r C_r, and may be arbitrarily uneven,
    C_r >= 1. `target` holds classes in [0, C), `class_weight` is (C,); both, and all other
    arguments, must be equal in all processes. All members of the group call the same losses in the
    same order. The block applies to the thread and asyncio task that opens it:

        with ck.distributed.class_parallel():
            loss = ck.codistillation_loss([my_classes_a, my_classes_b], target)
        loss.backward()

    The loss and its terms are those of mode "exact" on the whole rows, bit for bit, in every
    process and however the classes are split; the gradients are the shard's part of them. Per row,
    24 bytes per model are gathered from every process, and 168 per model and 80 per pair (120 for
    L1 and distillation) are reduced; with top_k, 16 k per student are also gathered.

    Args:
        group: a process group; None: every process. Its backend must take CPU tensors, as gloo
            does.
    Gradient: that of the loss for this process's classes; parameters shared by all processes before
        the logits need the sum of the processes' gradients. The backward pass may run outside the
        block, without communication unless it recomputes the loss (activation checkpointing).
    Raises: RuntimeError if torch.distributed was not initialised, ValueError if this process is
        not in the group, both before the block; from the losses ValueError for tensors that are
        not on the CPU, for float64 logits, and, in every process, if one of them rejects its
        tensors or the processes' arguments do not match. A wrong option raises before any
        collective, only in its own process; the others wait for the group's timeout. `churn_report`
        raises ValueError in the block.
    Source: vocabulary-parallel cross entropy (Shoeybi et al. 2019, "Megatron-LM"), made exact.
    """
    _check_group("class_parallel", group, "the losses outside the block in one process")
    with _blocks.block(class_exchange=_GroupExchange(group)):
        yield


class _GroupExchange:
    """The exchange over a process group, whose members hold a shard of the classes each."""

    def __init__(self, group: Any) -> None:
        self._group = group
        self.place = dist.get_rank(group)
        self.ranks = dist.get_process_group_ranks(group)

    def gather(self, x: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyone, x, group=self._group)
        return everyone

    def merge(self, table: Tensor, merge: Merge) -> Tensor:
        if merge not in (torch.maximum, torch.add):
            return reduce(merge, self.gather(table))
        how = dist.ReduceOp.MAX if merge is torch.maximum else dist.ReduceOp.SUM
        dist.all_reduce(table, how, group=self._group)
        return table


def _check_group(caller: str, group: Any, alternative: str) -> None:
    """torch.distributed is initialised, and this process is in the group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"churn_kernels.distributed.{caller} needs an initialised torch.distributed; call "
            f"torch.distributed.init_process_group first, or {alternative}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            "group must include this process, got a group without it; call from its members only"
        )
