"""Distributed data parallel: two processes on half of the batch each take one process's step."""

import cases
import pytest
import torch
import torch.distributed as dist
from processes import run
from tolerances import assert_close
from torch.nn.parallel import DistributedDataParallel

import churn_kernels as ck

WORLD = 2


class Pair(torch.nn.Module):
    """Two linear models that see the same input."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.models = torch.nn.ModuleList([torch.nn.Linear(7, 5) for _ in range(2)])
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        return [model(x) for model in self.models]


def data():
    (x,), target = cases.batch(rows=8, models=1, ignore=False)
    return x.detach(), target % 5


def gradients(pair, x, target):
    module = ck.CodistillationLoss(alpha=0.1, beta=0.5)
    module(pair(x), target).backward()
    return [parameter.grad for parameter in pair.parameters()]


def worker(rank, world):
    x, target = data()
    half = slice(rank * 4, rank * 4 + 4)
    return gradients(DistributedDataParallel(Pair()), x[half], target[half])


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_take_the_step_of_one(tmp_path):
    wanted = gradients(Pair(), *data())
    for found in run(worker, WORLD, tmp_path / "step"):
        for a, b in zip(found, wanted, strict=True):
            assert_close(a, b, "gradient", torch.float32)
