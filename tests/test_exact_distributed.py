"""Exact sums over processes: the bits of one process, however many share the numbers."""

import re

import pytest
import torch
import torch.distributed as dist
from exactness import CASES, bits_of, float32_sum, shards, shuffled
from processes import run

import churn_kernels as ck
from churn_kernels import _ops

pytestmark = [
    pytest.mark.skipif(not _ops.LOADED, reason="the compiled library is not built"),
    pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed"),
]

NAIVE = "far from 0"  # numbers whose rounded partial sums give them away


def naive_sum(x):
    """What the exact sum is there to replace."""
    total = x.sum()
    dist.all_reduce(total)
    return total


def without_me(rank, world):
    """What a process says that is not in the group; None where there is no such process."""
    if world == 1:
        return None
    group = dist.new_group([0])
    if rank == 0:
        return ck.distributed.exact_sum(torch.ones(3), group=group).item()
    try:
        ck.distributed.exact_sum(torch.ones(3), group=group)
    except ValueError as error:
        return str(error)


def worker(rank, world):
    found = {}
    for name, x in CASES.items():
        part = shards(shuffled(x, world), world, world)[rank]
        found[name] = bits_of(ck.distributed.exact_sum(part))
    part = shards(CASES[NAIVE], world)[rank].requires_grad_()
    ck.distributed.exact_sum(part).backward(torch.tensor(rank + 1.0))
    return {
        "bits": found,
        "naive": bits_of(naive_sum(part.detach())),
        "gradient": part.grad,
        "group": without_me(rank, world),
    }


@pytest.mark.slow
def test_no_number_of_processes_shows(tmp_path):
    naive = set()
    want = {name: float32_sum(x) for name, x in CASES.items()}
    for world in (1, 2, 3, 8):
        found = run(worker, world, tmp_path / str(world))
        assert [one["bits"] for one in found] == [want] * world
        assert len({one["naive"] for one in found}) == 1
        naive.add(found[0]["naive"])
        for rank, one in enumerate(found):
            assert torch.equal(one["gradient"], torch.full_like(one["gradient"], rank + 1.0))
        assert sum(len(one["gradient"]) for one in found) == len(CASES[NAIVE])
        if world > 1:
            assert found[0]["group"] == 3.0
            message = (
                "group must include this process, got a group without it; call from its members"
            )
            assert all(one["group"].startswith(message) for one in found[1:])
    assert len(naive) > 1, "the check would not catch a sum that has an order"


def test_needs_torch_distributed_to_be_initialised():
    message = (
        "churn_kernels.distributed.exact_sum needs an initialised torch.distributed; call "
        "torch.distributed.init_process_group first, or churn_kernels.exact_sum in one process"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        ck.distributed.exact_sum(torch.ones(3))


def test_checks_its_numbers_first():
    message = "x must be a float32, float16 or bfloat16 tensor, got torch.float64; pass x.float()"
    with pytest.raises(TypeError, match=re.escape(message)):
        ck.distributed.exact_sum(torch.ones(3, dtype=torch.float64))
