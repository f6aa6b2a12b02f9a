"""Time of forward + backward, against a copy of the same bytes, torch.compile and eager PyTorch.

Every loss and its gradients are checked in float64 before they are timed. Peers of a shape run one
right after the other, so that what else the machine does hits them alike.
"""

from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import churn_kernels as ck
from benchmarks.peers import ALPHA, PEERS, SHAPES, Loss, batch, fused, shape_name, step

pytestmark = pytest.mark.benchmark(
    disable_gc=True, warmup=True, warmup_iterations=3, min_rounds=7, max_time=1.0
)

# Largest relative error in the Euclidean norm, by the result's dtype: what rounding can explain.
NORM_ERROR = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


class Variant(NamedTuple):
    """A loss and the logits it takes."""

    loss: Loss
    dtype: torch.dtype = torch.float32
    models: int = 2
    teachers: int = 0
    upstream: float | None = None  # the loss's own gradient; None: backward() without one


class Problem(NamedTuple):
    logits: list
    target: torch.Tensor
    expected: list  # the loss and the gradients of it, in float64


def codistillation(**options):
    return lambda logits, target: ck.codistillation_loss(
        logits, target, **{"alpha": ALPHA, **options}
    )


def distillation(logits, target):
    return ck.distillation_loss(logits[0], logits[1:], target, alpha=0.5, temperature=3.0)


PAIR = Variant(fused)
VARIANTS = {
    "pair": PAIR,
    "bfloat16": Variant(fused, dtype=torch.bfloat16),
    # As under a loss scaler, without which most of these gradients underflow.
    "float16": Variant(fused, dtype=torch.float16, upstream=65536.0),
    "float64": Variant(fused, dtype=torch.float64),
    "one model": Variant(fused, models=1),
    "three models": Variant(fused, models=3),
    "top_k=10": Variant(codistillation(top_k=10)),
    "uniform_skl": Variant(codistillation(regularizer="uniform_skl", alpha=0.01)),
    "l1": Variant(codistillation(divergence="l1")),
    "ce": Variant(codistillation(divergence="ce")),
    "temperature=3": Variant(codistillation(temperature=3.0)),
    "reduction none": Variant(codistillation(reduction="none"), upstream=1.0),
    "return_terms": Variant(lambda *batch: codistillation(return_terms=True)(*batch)[0]),
    "distillation": Variant(distillation, teachers=1),
}


@lru_cache(maxsize=1)
def problem(variant, shape):
    """A batch and what its loss should be; the last one is kept, its peers come next."""
    logits, target = batch(shape, variant.dtype, variant.models, variant.teachers)
    wide = [z.detach().double().requires_grad_(z.requires_grad) for z in logits]
    with ck.backend("reference"):
        loss = step(variant.loss, wide, target, variant.upstream)()
    return Problem(logits, target, [loss.detach(), *(z.grad for z in wide if z.requires_grad)])


def check(loss, logits, expected):
    results = [loss.detach(), *(z.grad for z in logits if z.requires_grad)]
    for actual, want in zip(results, expected, strict=True):
        error = (actual.double() - want).norm() / want.norm()
        assert error <= NORM_ERROR[actual.dtype], f"relative error {error:.1e} of {actual.dtype}"


def time_loss(benchmark, loss, case, upstream=None):
    """Check one step, then time it."""
    run = step(loss, case.logits, case.target, upstream)
    check(run(), case.logits, case.expected)
    benchmark(run)


def time_copy(benchmark, logits):
    """Time a copy of as many bytes: logits are read, gradients written, each once."""
    read = sum(z.nbytes for z in logits)
    written = sum(z.nbytes for z in logits if z.requires_grad)
    source = torch.ones((read + written) // 8)
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
