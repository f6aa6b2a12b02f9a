"""Exact sums over the processes of torch.distributed."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from churn_kernels import _checks
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
    Raises: TypeError as `churn_kernels.exact_sum`; RuntimeError where torch.distributed is missing
        or was not initialised; ValueError if this process is not in the group.
    """
    x = _checks.summand("x", x)
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "churn_kernels.distributed.exact_sum needs an initialised torch.distributed; call "
            "torch.distributed.init_process_group first, or churn_kernels.exact_sum in one process"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            "group must hold this process, got a group without it; call from its members only"
        )

    def all_reduce(words: Tensor) -> Tensor:
        dist.all_reduce(words, group=group)
        return words

    return sum_across(x, all_reduce)
