"""Time of forward + backward, against a copy of the same bytes, torch.compile and eager PyTorch.

Every loss and its gradients are checked against float64 before they are timed. Peers of a shape run
back to back, so that other load on the machine affects them equally.
"""

from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import PAIR, VARIANTS, check, expectation, moved_bytes
from benchmarks.peers import PEERS, SHAPES, batch, fused, shape_name, step

pytestmark = pytest.mark.benchmark(
    disable_gc=True, warmup=True, warmup_iterations=3, min_rounds=7, max_time=1.0
)


class Problem(NamedTuple):
    logits: list
    target: torch.Tensor
    expected: list  # the loss and its gradients, in float64


@lru_cache(maxsize=1)
def problem(variant, shape):
    """A batch and its expected loss; the last one is cached for the peers that follow."""
    logits, target = batch(shape, variant.dtype, variant.models, variant.teachers)
    return Problem(logits, target, expectation(variant.loss, logits, target, variant.upstream))


def time_loss(benchmark, loss, case, upstream=None):
    """Check one step, then time it."""
    run = step(loss, case.logits, case.target, upstream)
    check(run(), case.logits, case.expected)
    benchmark(run)


def time_copy(benchmark, logits):
    """Time a copy of as many bytes as the loss moves: logits read, gradients written, each once."""
    source = torch.ones(moved_bytes(logits) // 8)
    destination = torch.zeros_like(source)
    benchmark(destination.copy_, source)


@pytest.mark.parametrize("peer", ["copy", *PEERS])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name, indirect=True)
@pytest.mark.benchmark(group="pair")
def test_pair(benchmark, shape, peer):
    benchmark.extra_info.update(shape=shape_name(shape), peer=peer)
    case = problem(PAIR, shape)
    if peer == "copy":
        time_copy(benchmark, case.logits)
    else:
        time_loss(benchmark, PEERS[peer], case)


@pytest.mark.parametrize("peer", ["copy", "churn_kernels"])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", [(1024, 8142)], ids=shape_name, indirect=True)
@pytest.mark.benchmark(group="variants")
def test_variant(benchmark, shape, name, peer):
    benchmark.extra_info.update(shape=shape_name(shape), variant=name, peer=peer)
    variant = VARIANTS[name]
    case = problem(variant, shape)
    if peer == "copy":
        time_copy(benchmark, case.logits)
    else:
        time_loss(benchmark, variant.loss, case, variant.upstream)


@pytest.mark.parametrize("peer", ["F.cross_entropy", "churn_kernels"])
@pytest.mark.parametrize("shape", [(8, 10)], ids=shape_name, indirect=True)
@pytest.mark.benchmark(group="overhead")
def test_overhead(benchmark, shape, peer):
    benchmark.extra_info.update(shape=shape_name(shape), peer=peer)
    if peer == "churn_kernels":
        time_loss(benchmark, fused, problem(PAIR, shape))
        return
    logits, target = batch(shape, models=1)
    benchmark(step(lambda logits, target: F.cross_entropy(logits[0], target), logits, target))
