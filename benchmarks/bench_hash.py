"""Time of a tensor's hash, against a copy of as many bytes."""

from functools import partial

import pytest
import torch

from churn_kernels import audit

pytestmark = pytest.mark.benchmark(
    group="hash", disable_gc=True, warmup=True, warmup_iterations=3, min_rounds=7, max_time=1.0
)

PEERS = {
    "copy": lambda x: partial(torch.zeros_like(x).copy_, x),
    "churn_kernels": lambda x: partial(audit.hash_words, x),
}


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("size", [4_000, 4_000_000, 200_000_000])
def test_hash(benchmark, request, size, dtype, peer):
    count = 400 if request.config.getoption("--tiny") else size
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (count,), generator=generator, dtype=torch.uint8).view(dtype)
    assert audit.tensor_hash(x) != audit.tensor_hash(x.flip(0))
    name = str(dtype).removeprefix("torch.")
    benchmark.extra_info.update(shape=f"{size:,} {name}", peer=peer)
    benchmark(PEERS[peer](x))
