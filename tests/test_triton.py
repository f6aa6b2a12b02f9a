"""The Triton kernels against the float64 reference: on a GPU, or in Triton's interpreter."""

import pytest
import torch
from parity import (
    DTYPES,
    OPTIONS,
    check,
    expected,
    random_logits,
    random_target,
    seeded,
    special_logits,
)

import churn_kernels as ck

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("triton" not in ck.available_backends(), reason="no Triton here"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, models, dtype):
    generator = seeded(name, models, dtype)
    options = OPTIONS[name]
    logits = random_logits(generator, models, 6, 37, dtype)
    target = random_target(generator, 6, 37)
    target[1] = options.ignore_index if options.ignore_index >= 0 else target[1]
    loss, *_ = expected(logits, target, None, options)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64)
    check(logits, target, options, upstream=upstream, backend="triton")


# Every plan, for two models: several rows a program; one row resident in one warp and in several;
# two sweeps; with rows of a width that vectors divide, and of odd width.
CLASS_COUNTS = {
    "rows": [1, 2, 3, 10, 64, 255],
    "resident": [257, 1000, 1001, 2049],
    "sweeps": [16385, 21841],
}


@pytest.mark.parametrize("name", ["plain", "temperature", "l1_divergence", "top_k", "uniform_skl"])
@pytest.mark.parametrize("classes", [c for counts in CLASS_COUNTS.values() for c in counts])
def test_class_counts(name, classes):
    generator = seeded(name, classes)
    options = OPTIONS[name]
    options = options._replace(top_k=min(options.top_k, classes))
    for models, dtype in ((1, torch.float32), (2, torch.bfloat16), (3, torch.float32)):
        logits = random_logits(generator, models, 2, classes, dtype)
        check(logits, random_target(generator, 2, classes), options, backend="triton")


@pytest.mark.parametrize("classes", [2049, 16400])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_wide_rows(name, classes):
    for models, dtype in zip((1, 2, 3), DTYPES, strict=False):
        generator = seeded(name, classes, models)
        logits = random_logits(generator, models, 2, classes, dtype)
        weight = torch.rand(classes, generator=generator) if models % 2 == 0 else None
        target = random_target(generator, 2, classes)
        check(logits, target, OPTIONS[name], class_weight=weight, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["shifted", "masked", "masked_in_one", "one_hot", "equal", "tied", "huge"]
)
@pytest.mark.parametrize(
    "name", ["plain", "uniform_skl", "top_k", "l1_divergence", "temperature_ce"]
)
def test_special_rows(name, kind, dtype):
    generator = seeded(name, kind, dtype)
    if (name, kind) == ("l1_divergence", "tied"):
        pytest.skip("equal probabilities: any subgradient is right, and rounding picks one")
    for models in (1, 2, 3):
        logits = special_logits(kind, generator, models, dtype)
        target = torch.tensor([1, 2, 3, 40])
        check(logits, target, OPTIONS[name]._replace(reduction=0), backend="triton")
