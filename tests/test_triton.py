"""The Triton kernels against the float64 reference: on a GPU, or in Triton's interpreter.

The interpreter takes a second for a program, so that without a GPU most cases are left to
`make nightly`; what is not is chosen to meet each option, plan, dtype and number of models.
"""

import itertools

import pytest
import torch
from parity import (
    DTYPES,
    KINDS,
    OPTIONS,
    PLAIN,
    bytes_of,
    check,
    expected,
    kernel,
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

SWEEPS = 8400  # a class count beyond the resident plan

# Every option meets every dtype and 1 to 3 models in several rows a program, the cheapest plan.
QUICK = {(1, torch.float64), (2, torch.float32), (2, torch.bfloat16), (3, torch.float16)}


def products(quick, *axes):
    """Every combination of the axes; those that are not `quick` only at night, or on a GPU."""
    return [
        pytest.param(*case, marks=() if quick(*case) else pytest.mark.nightly)
        for case in itertools.product(*axes)
    ]


@pytest.mark.parametrize(
    ("models", "dtype"), products(lambda *case: case in QUICK, [1, 2, 3, 4], DTYPES)
)
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


@pytest.mark.parametrize(
    ("name", "classes"),
    products(
        lambda name, classes: name == "plain" or classes < 128,
        ["plain", "temperature", "l1_divergence", "top_k", "uniform_skl"],
        [1, 2, 3, 10, 64, 127, 128, 255, 256, 257, 511, 1000, 1001, 4099, 8192, SWEEPS, 21841],
    ),
)
def test_class_counts(name, classes):
    """Every plan, with rows that vectors divide and of odd width."""
    generator = seeded(name, classes)
    options = OPTIONS[name]
    options = options._replace(top_k=min(options.top_k, classes))
    logits = random_logits(generator, 2, 2, classes)
    check(logits, random_target(generator, 2, classes), options, backend="triton")


@pytest.mark.parametrize(
    ("name", "classes", "models"),
    products(
        lambda name, classes, models: models == 2 and (classes == 601 or "top_k" not in name),
        OPTIONS,
        [601, SWEEPS],
        [1, 2, 3],
    ),
)
def test_every_option_of_wide_rows(name, classes, models):
    generator = seeded(name, classes, models)
    logits = random_logits(generator, models, 1, classes, DTYPES[models - 1])
    weight = torch.rand(classes, generator=generator) if models % 2 == 0 else None
    target = random_target(generator, 1, classes)
    check(logits, target, OPTIONS[name], class_weight=weight, backend="triton")


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "models"),
    products(
        lambda name, kind, dtype, models: dtype in (torch.float32, torch.bfloat16) and models == 2,
        ["plain", "uniform_skl", "top_k", "l1_divergence", "temperature_ce"],
        KINDS,
        DTYPES,
        [1, 2, 3],
    ),
)
def test_special_rows(name, kind, dtype, models):
    generator = seeded(name, kind, dtype)
    if (name, kind) == ("l1_divergence", "tied"):
        pytest.skip("equal probabilities: any subgradient is right, and rounding picks one")
    logits = special_logits(kind, generator, models, dtype)
    target = torch.tensor([1, 2, 3, 40])
    check(logits, target, OPTIONS[name]._replace(reduction=0), backend="triton")


def test_a_term_without_weight_may_be_infinite():
    logits = special_logits("masked_in_one", seeded("no weight"), 2, torch.float32)
    options = OPTIONS["divergence_weight_0"]
    check(logits, torch.tensor([1, 2, 3, 40]), options, backend="triton")


@pytest.mark.parametrize("name", ["plain", "top_k", "top_k_unnormalised"])
def test_few_ties(name):
    """Two logits share the maximum; zeros of both signs are equal, and the first of them belong."""
    generator = seeded("few ties", name)
    logits = random_logits(generator, 2, 2, 41)
    logits[0][0, [3, 20]] = 9.0
    logits[1][1] = 0.0
    logits[1][1, ::2] = -0.0
    options = OPTIONS[name]._replace(reduction=0)
    check(logits, torch.tensor([1, 2]), options, backend="triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "classes", [300, pytest.param(SWEEPS, marks=pytest.mark.nightly)], ids=["resident", "sweeps"]
)
def test_special_wide_rows(kind, classes):
    """As above, where lanes may be without a class and blocks without a finite logit."""
    generator = seeded(kind, classes)
    logits = [
        z[:1].repeat_interleave(-(-classes // 41), 1)[:, :classes]
        for z in special_logits(kind, generator, 2, torch.float32)
    ]
    check(logits, torch.tensor([7]), PLAIN._replace(reduction=0), backend="triton")


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), "no class"])
@pytest.mark.parametrize("classes", [41, 300])
def test_a_poisoned_row_poisons_itself_alone(poison, classes):
    generator = seeded(poison, classes)
    logits = random_logits(generator, 2, 3, classes)
    clean = [z.clone() for z in logits]
    logits[0][1] = -float("inf") if poison == "no class" else logits[0][1]
    if poison != "no class":
        logits[0][1, 5] = poison
    target = random_target(generator, 3, classes)
    options = PLAIN._replace(reduction=0)
    loss, terms, gradients = kernel(logits, target, None, options, backend="triton")
    want, _, want_gradients = kernel(clean, target, None, options, backend="triton")
    assert loss[1].isnan()
    assert terms[4:6].isnan().tolist() == [True, False]  # accuracy
    assert all(g[1].isnan().all() for g in gradients)
    rest = [0, 2]
    assert bytes_of(loss[rest]) == bytes_of(want[rest])
    for got, good in zip(gradients, want_gradients, strict=True):
        assert bytes_of(got[rest]) == bytes_of(good[rest])


@pytest.mark.parametrize("rows", [0, 1, 257, 1100])
@pytest.mark.parametrize("mode", [0, 1])
def test_row_counts(rows, mode):
    """Several programs count, sum and finish; with and without float atomics for the batch."""
    generator = seeded(rows, mode)
    logits = random_logits(generator, 2, rows, 3)
    target = random_target(generator, rows, 3)
    check(logits, target, PLAIN._replace(mode=mode), backend="triton")


def test_every_row_ignored():
    logits = random_logits(seeded("ignored"), 2, 3, 300)
    logits[1][2, 4] = float("nan")
    target = torch.full((3,), -100)
    loss, _, gradients = kernel(logits, target, None, PLAIN, backend="triton")
    assert loss.isnan()
    assert all((g == 0).all() for g in gradients)
    nothing = PLAIN._replace(ce_weight=0.0, regularizer_weight=0.0, divergence_weight=0.0)
    assert kernel(logits, target, None, nothing, backend="triton")[0].isnan()


@pytest.mark.parametrize("mode", [0, 3])
def test_a_masked_target(mode):
    """Its cross entropy is infinite, not the largest number."""
    logits = random_logits(seeded("masked target"), 1, 2, 41)
    logits[0][0, 3] = -float("inf")
    options = PLAIN._replace(regularizer=0, divergence=0, reduction=0, mode=mode)
    loss, _, _ = kernel(logits, torch.tensor([3, 3]), None, options, backend="triton")
    assert loss.isinf().tolist() == [True, False]


@pytest.mark.parametrize(
    ("classes", "models", "dtype"), [(2047, 3, torch.float32), (4093, 2, torch.bfloat16)]
)
def test_odd_rows_about_one_block_long(classes, models, dtype):
    """Where the row begins decides whether it takes one block or two."""
    generator = seeded(classes)
    logits = random_logits(generator, models, 2, classes, dtype)
    options = PLAIN._replace(temperature=2.0, reduction=0)
    check(logits, random_target(generator, 2, classes), options, backend="triton")


def views(generator, kind):
    """Two models' logits (3, 301) that lie in memory in one of the ways users have them."""
    if kind == "stacked":
        return [torch.randn(2, 3, 301, generator=generator)]
    if kind == "stacked, rows left out":
        return [torch.randn(2, 4, 301, generator=generator)[:, :3]]
    if kind == "transposed":
        return [torch.randn(301, 3, generator=generator).t() for _ in range(2)]
    if kind == "every other column":
        return [torch.randn(3, 602, generator=generator)[:, ::2] for _ in range(2)]
    if kind == "rows apart":
        return [torch.randn(3, 400, generator=generator)[:, :301] for _ in range(2)]
    if kind == "off by one":
        return [torch.randn(3, 302, generator=generator)[:, 1:] for _ in range(2)]
    if kind == "off by one each":
        return [torch.randn(3, 303, generator=generator)[:, k : 301 + k] for k in (0, 1)]
    return [torch.randn(1, 301, generator=generator).expand(3, 301) for _ in range(2)]


@pytest.mark.parametrize("mode", [0, 2])
@pytest.mark.parametrize(
    "kind",
    [
        "stacked",
        "stacked, rows left out",
        "transposed",
        "every other column",
        "rows apart",
        "off by one",
        "off by one each",
        "one row for all",
    ],
)
def test_memory_layouts(kind, mode):
    logits = views(seeded(kind), kind)
    target = torch.tensor([0, 300, 7])
    options = PLAIN._replace(mode=mode)
    if "stacked" not in kind:
        check(logits, target, options, backend="triton")
        return
    loss, _, gradients = kernel(logits, target, None, options, backend="triton")
    want, _, want_gradients = expected(list(logits[0]), target, None, options)
    torch.testing.assert_close(loss.double(), want.double(), rtol=1e-5, atol=1e-5)
    stacked = torch.stack([g.float() for g in want_gradients])
    torch.testing.assert_close(gradients[0], stacked, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["per_row", "temperature_l1"])
@pytest.mark.parametrize("classes", [10, 301])
def test_invariant_rows(name, classes):
    """A row's bits do not depend on its batch, nor on where the batch begins in memory."""
    generator = seeded(name, classes)
    whole = random_logits(generator, 2, 4, classes)
    target = random_target(generator, 4, classes)
    options = OPTIONS[name]._replace(mode=2)
    loss, _, gradients = kernel(whole, target, None, options, backend="triton")
    for rows in (slice(0, 1), slice(3, 4), slice(1, 3)):
        cut = [z[rows] for z in whole]
        assert classes != 301 or rows.start == 0 or cut[0].data_ptr() % 16 != 0
        part, _, cut_gradients = kernel(cut, target[rows], None, options, backend="triton")
        assert bytes_of(part) == bytes_of(loss[rows])
        for a, b in zip(gradients, cut_gradients, strict=True):
            assert bytes_of(b) == bytes_of(a[rows])


def test_the_second_call_has_the_same_bits():
    generator = seeded("again")
    logits = random_logits(generator, 2, 300, 10)
    target = random_target(generator, 300, 10)
    options = PLAIN._replace(mode=1)
    results = set()
    for _ in range(2):
        loss, terms, gradients = kernel(logits, target, None, options, backend="triton")
        results.add(b"".join(map(bytes_of, (loss, terms, *gradients))))
    assert len(results) == 1
