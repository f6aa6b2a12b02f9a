"""Exact mode in Triton: byte for byte what the CPU computes. Without a GPU, in the interpreter."""

import pytest
import torch
from parity import (
    EXACT,
    EXACT_DTYPES,
    EXACT_KINDS,
    PLAIN,
    bytes_of,
    kernel,
    random_logits,
    random_target,
    seeded,
    special_logits,
)

import churn_kernels as ck
from churn_kernels import _checks, _ops

pytestmark = pytest.mark.skipif(
    not _ops.LOADED or "triton" not in ck.available_backends(),
    reason="no GPU, and TRITON_INTERPRET was not set",
)


def differences(logits, target, options, weight=None, upstream=None):
    """The results whose bytes are not the CPU's."""
    found = {}
    for backend in ("cpu", "triton"):
        loss, terms, gradients = kernel(logits, target, weight, options, upstream, backend)
        found[backend] = {"loss": loss, "terms": terms}
        found[backend] |= {f"gradient {k}": g for k, g in enumerate(gradients)}
    cpu, triton = found["cpu"], found["triton"]
    return {name for name in cpu if bytes_of(cpu[name]) != bytes_of(triton[name])}


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("name", EXACT)
def test_options(name, models):
    dtype = EXACT_DTYPES[models - 1]
    generator = seeded("triton", name, models)
    options = EXACT[name]
    logits = random_logits(generator, models, 5, 37, dtype)
    target = random_target(generator, 5, 37)
    target[1] = options.ignore_index if options.ignore_index >= 0 else target[1]
    weight = torch.rand(37, generator=generator) if models == 2 else None
    shape = {0: (5,), 3: (5, 2 * models + models * (models - 1) // 2)}.get(options.reduction, ())
    upstream = torch.randn(shape, generator=generator)
    assert differences(logits, target, options, weight, upstream) == set()


@pytest.mark.parametrize("classes", [1, 128, 601, 1000, 4097, 21841])
@pytest.mark.parametrize("name", ["plain", "uniform_skl", "l1_divergence"])
def test_every_plan(name, classes):
    """Rows in a warp, resident and in sweeps, of even and odd width."""
    if classes > 4097 and name != "plain":
        pytest.skip("the interpreter is slow")
    generator = seeded("triton", name, classes)
    dtype = torch.bfloat16 if classes == 601 else torch.float32
    logits = random_logits(generator, 2, 1, classes, dtype)
    target = random_target(generator, 1, classes)
    assert differences(logits, target, EXACT[name]) == set()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # NumPy, in the interpreter
@pytest.mark.parametrize("kind", ["huge", "broken", "far"])
@pytest.mark.parametrize("teachers", [1, 2])
def test_distillation(teachers, kind):
    generator = seeded("triton distillation", teachers, kind)
    options = PLAIN._replace(
        divergence=4, teachers=teachers, regularizer=0, temperature=3.0, mode=3
    )
    logits = special_logits(kind, generator, 1 + teachers, torch.float32)
    assert differences(logits, random_target(generator, 4, 41), options) == set()


@pytest.mark.parametrize("kind", [kind for kind in EXACT_KINDS if kind != "shifted"])
@pytest.mark.parametrize(
    "name", ["plain", "top_k_uniform", "everything", "temperature", "temperature_l1"]
)
def test_special_rows(name, kind):
    generator = seeded("triton", name, kind)
    logits = special_logits(kind, generator, 2, torch.float32)
    options = EXACT[name]._replace(reduction=0)
    assert differences(logits, torch.tensor([1, 2, 3, 40]), options) == set()


def far_apart(classes):
    """Rows that ask for what few rows do: masks, wide bounds, NaN, subnormal numbers."""
    generator = seeded("far apart", classes)
    a, b = random_logits(generator, 2, 9, classes)
    lowest = torch.finfo(torch.float32).min
    a[0, 1] = b[0, 1] = -float("inf")
    a[1, 1] = lowest
    a[2, 1] = b[2, 1] = lowest
    a[3, 0] = float("nan")
    a[4, 0] = float("inf")
    a[5] = -float("inf")
    a[6] *= 200
    b[6] *= 100
    a[7], b[7] = 1e-40, -0.0
    a[8], b[8] = 3e38, -1e38
    return [a, b], random_target(generator, 9, classes)


@pytest.mark.parametrize("classes", [7, 300])
@pytest.mark.parametrize("name", ["plain", "temperature", "l1_divergence", "label_smoothing"])
def test_rows_far_apart(name, classes):
    logits, target = far_apart(classes)
    weight = torch.rand(classes, generator=seeded("weight")) if name == "label_smoothing" else None
    for row in range(9):
        one = [z[row : row + 1] for z in logits]
        assert differences(one, target[row : row + 1], EXACT[name], weight) == set(), row


def test_a_target_out_of_range_poisons_its_row(monkeypatch):
    """As on a GPU, where nobody looks at the targets before."""
    monkeypatch.setattr(_checks, "target_range", lambda *arguments: None)
    logits = random_logits(seeded("range"), 2, 3, 7)
    options = EXACT["per_row"]._replace(regularizer=0, divergence=0)
    loss, _, gradients = kernel(logits, torch.tensor([1, 7, -1]), None, options, None, "triton")
    assert loss.isnan().tolist() == [False, True, True]
    assert all(g.isnan().all(1).tolist() == [False, True, True] for g in gradients)


def test_batches_of_many_programs():
    generator = seeded("triton batch")
    logits = random_logits(generator, 2, 700, 5)
    target = random_target(generator, 700, 5)
    for weight in (None, torch.rand(5, generator=generator)):
        assert differences(logits, target, EXACT["label_smoothing"], weight) == set()


def test_fast_mode_is_caught():
    """The negative control: the same comparison of what is only close."""
    generator = seeded("triton control")
    logits = random_logits(generator, 2, 5, 601)
    assert differences(logits, random_target(generator, 5, 601), PLAIN) != set()
