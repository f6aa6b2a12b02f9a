"""Time of an exact sum of float32 numbers, against torch.sum and a copy of as many bytes."""

from functools import partial

import pytest
import torch

import churn_kernels as ck

pytestmark = pytest.mark.benchmark(
    group="exact sum", disable_gc=True, warmup=True, warmup_iterations=3, min_rounds=7, max_time=1.0
)

PEERS = {
    "copy": lambda x: partial(torch.zeros_like(x).copy_, x),
    "torch.sum": lambda x: x.sum,
    "churn_kernels": lambda x: partial(ck.exact_sum, x),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("numbers", [1_000, 1_000_000, 12_500_000])
def test_exact_sum(benchmark, request, numbers, peer):
    size = 100 if request.config.getoption("--tiny") else numbers
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    assert abs(ck.exact_sum(x).item() - x.double().sum().item()) <= 2**-23 * size**0.5 * 4
    benchmark.extra_info.update(shape=str(numbers), peer=peer)
    benchmark(PEERS[peer](x))
