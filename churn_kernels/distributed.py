"""Exact sums, and losses of rows that no process holds whole, over torch.distributed."""

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

    The same bits in every process, and the bits of `churn_kernels.exact_sum` of all the x in one
    process, however they are spread. 96 bytes travel: one all-reduce of 12 int64 words.

    Args:
        x: as `churn_kernels.exact_sum` takes it; shapes may differ between processes, and may hold
            no elements.
        group: a process group, whose members all call this; None: every process. Its backend must
            take int64 tensors of x's device, as gloo does on the CPU and NCCL on GPUs.
    Returns: float32 scalar () on x's device. Nothing waits for a GPU.
    Gradient: this process's upstream gradient, for every element of its x, in x's dtype. Nothing is
        sent: where every process computes the same loss from the sum, each gets the gradient of
        that one loss, not of the losses of all.
    Raises: TypeError as `churn_kernels.exact_sum`, and for a DTensor; RuntimeError where
        torch.distributed is missing or was not initialised; ValueError if this process is not in
        the group.
    """
    x = _checks.summand("x", x)
    if is_placed(x):
        raise TypeError(
            "x must be a Tensor, what this process adds to the sum, got a DTensor; pass "
            "x.to_local(), or call churn_kernels.exact_sum(x) for the sum of the whole DTensor"
        )
    _check_group("exact_sum", group, "churn_kernels.exact_sum in one process")

    def all_reduce(words: Tensor) -> Tensor:
        dist.all_reduce(words, group=group)
        return words

    return sum_across(x, all_reduce)


@contextmanager
def class_parallel(group: Any = None) -> Iterator[None]:
    """A block whose losses take rows that no process holds whole, and give those of whole rows.

    Every process passes the logits of some classes, (N, C_r), or DTensors sharded so: the classes
    follow each other in the order of the group's ranks, C = sum_r C_r, in as uneven parts as you
    like, C_r >= 1. `target` holds classes of [0, C), `class_weight` is (C,); both, and all else,
    are the same everywhere. All members of the group call the same losses in the same order. The
    block is that of the thread and asyncio task that opens it:

        with ck.distributed.class_parallel():
            loss = ck.codistillation_loss([my_classes_a, my_classes_b], target)
        loss.backward()

    The loss and its terms are those of mode "exact" of the whole rows, bit for bit, in every
    process and however the classes are split; the gradients are the shard's part of them. For each
    row 24 bytes a model are gathered from every process, and 128 a model and 32 a pair (56 for L1
    and distillation) are reduced; with top_k, 16 k a student are gathered, too.

    Args:
        group: a process group; None: every process. Its backend must take CPU tensors, as gloo
            does.
    Gradient: that of the loss for the classes that this process holds; what all processes share
        before the logits has the sum of their gradients. The backward pass may stand outside the
        block, and sends nothing unless it computes the loss again (activation checkpointing).
    Raises: RuntimeError where torch.distributed was not initialised, ValueError if this process is
        not in the group, both before the block; from the losses ValueError for tensors that are
        not on the CPU, for float64 logits, and, in every process, where one of them refuses its
        tensors or the processes' arguments do not fit each other. A wrong option raises before they
        meet, in its process alone; the others wait for the group's timeout. `churn_report` raises
        ValueError in the block.
    Source: vocabulary-parallel cross entropy (Shoeybi et al. 2019, "Megatron-LM"), made exact.
    """
    _check_group("class_parallel", group, "the losses outside of the block in one process")
    with _blocks.block(class_exchange=_GroupExchange(group)):
        yield


class _GroupExchange:
    """The processes of a group, each with a shard of the classes."""

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
    """The group is there, and this process in it."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"churn_kernels.distributed.{caller} needs an initialised torch.distributed; call "
            f"torch.distributed.init_process_group first, or {alternative}"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            "group must hold this process, got a group without it; call from its members only"
        )
