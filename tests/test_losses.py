"""The CPU kernel against the float64 reference: every option, dtype, shape, instruction set."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import (
    DTYPES,
    INF,
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
from churn_kernels import _ops, reference
from churn_kernels._options import LossOptions

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library was not built")

INSTRUCTION_SETS = ck.build_info()["instruction_sets"] if _ops.LOADED else []


def plan(logits, options) -> str:
    return torch.ops.churn_kernels.plan(logits, *options)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Each instruction set that was built and that this machine has."""
    best = torch.ops.churn_kernels.cpu_isa("")
    try:
        torch.ops.churn_kernels.cpu_isa(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    torch.ops.churn_kernels.cpu_isa(best)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("models", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, models, dtype):
    generator = seeded(name, models, dtype)
    options = OPTIONS[name]
    logits = random_logits(generator, models, 6, 37, dtype)
    target = random_target(generator, 6, 37)
    target[1] = options.ignore_index if options.ignore_index >= 0 else target[1]
    loss, *_ = expected(logits, target, None, options)
    upstream = torch.randn(loss.shape, generator=generator, dtype=torch.float64)
    check(logits, target, options, upstream=upstream)


@pytest.mark.parametrize("name", ["plain", "uniform_skl", "top_k", "everything"])
def test_instruction_sets(isa, name):
    for classes, dtype in itertools.product([5, 16, 1031], DTYPES):
        generator = seeded(isa, name, classes, dtype)
        logits = random_logits(generator, 2, 3, classes, dtype)
        assert plan(logits, OPTIONS[name]).split()[1] == isa
        check(logits, random_target(generator, 3, classes), OPTIONS[name])


# Every tail of a vector, the ImageNet and iNaturalist counts, chunk borders, and far above.
CLASS_COUNTS = [1, 2, 3, *range(7, 19), 31, 33, 63, 65, 255, 257, 1000, 1031, 2047, 2048, 2049]
LARGE_CLASS_COUNTS = [8142, 21841, 50257, 131072, 131073]


@pytest.mark.parametrize("classes", CLASS_COUNTS + LARGE_CLASS_COUNTS)
@pytest.mark.parametrize("name", ["plain", "temperature", "l1_divergence", "top_k", "uniform_skl"])
def test_class_counts(name, classes):
    generator = seeded(name, classes)
    options = OPTIONS[name]
    options = options._replace(top_k=min(options.top_k, classes))
    for models in (1, 2, 3):
        logits = random_logits(generator, models, 2, classes)
        check(logits, random_target(generator, 2, classes), options)


@pytest.mark.parametrize("classes", [2049, 21841, 131073])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_past_one_chunk(name, classes):
    """Each option with 1 to 4 models, class weights and each dtype, where sums cross chunks."""
    for models, dtype in zip((1, 2, 3, 4), DTYPES, strict=True):
        generator = seeded(name, classes, models)
        logits = random_logits(generator, models, 2, classes, dtype)
        weight = torch.rand(classes, generator=generator) if models % 2 == 0 else None
        target = random_target(generator, 2, classes)
        check(logits, target, OPTIONS[name], class_weight=weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [0.5, 1.5, 1 / 3, -3e-5, 1e-40, 1e30, INF, float("nan")])
def test_16_bits_are_rounded_as_in_pytorch(isa, dtype, factor):
    """Every number of the dtype times a factor; a NaN stays one, though its bits be all ones."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[1:]
    factor = torch.tensor(0x7FFFFFFF).int().view(torch.float32) if factor != factor else factor
    wanted = (every.float() * factor).to(dtype)
    found = every.clone()
    torch.ops.churn_kernels.scale_([found], torch.as_tensor(factor), False)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 31, 32, 33, 131, 300])
def test_row_counts(rows):
    generator = seeded(rows)
    logits = random_logits(generator, 2, rows, 19)
    target = random_target(generator, rows, 19)
    for name in ("plain", "sum", "per_row", "terms", "temperature"):
        check(logits, target, OPTIONS[name])


def test_plans():
    """The tests below rely on these shapes to take these paths."""
    wide = [torch.zeros(2, 131072)] * 2
    assert plan(wide, PLAIN).split()[0] == "fused"
    assert plan(wide, PLAIN._replace(temperature=2.0)).split()[0] == "general"
    assert plan([z.t().contiguous().t() for z in wide], PLAIN).split()[0] == "general"
    assert plan([torch.zeros(2, 5)] * 3, PLAIN).split()[0] == "general"
    assert plan([torch.zeros(500, 21841)] * 2, PLAIN).split()[3] == "streamed"
    assert plan(wide, PLAIN).split()[3] == "cached"


@pytest.mark.parametrize("name", ["plain", "everything", "per_row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(threads, name, dtype):
    """Whether threads share out rows or the chunks of one row, and however many there are."""
    generator = seeded(name, dtype)
    logits = random_logits(generator, 2, 2, 21841, dtype)
    target = random_target(generator, 2, 21841)
    results, plans = set(), set()
    for count in (1, 2, 3, 8):
        threads(count)
        plans.add(plan(logits, OPTIONS[name]).split()[2])
        loss, terms, gradients = kernel(logits, target, None, OPTIONS[name])
        results.add(b"".join(map(bytes_of, (loss, terms, *gradients))))
    assert plans == {"rows", "chunks"}
    assert len(results) == 1


@pytest.mark.parametrize("name", ["per_row", "top_k_uniform_unnormalised", "temperature_l1"])
@pytest.mark.parametrize("classes", [10, 1031, 8142])
def test_bits_of_a_row_do_not_depend_on_its_batch(name, classes):
    generator = seeded(name, classes)
    logits = random_logits(generator, 2, 70, classes)
    target = random_target(generator, 70, classes)
    loss, _, gradients = kernel(logits, target, None, OPTIONS[name])
    for rows in (slice(0, 1), slice(5, 9), slice(33, 70)):
        part, _, part_gradients = kernel(
            [z[rows] for z in logits], target[rows], None, OPTIONS[name]
        )
        assert bytes_of(part) == bytes_of(loss[rows])
        for whole, cut in zip(gradients, part_gradients, strict=True):
            assert bytes_of(cut) == bytes_of(whole[rows])


def test_bits_do_not_depend_on_how_gradients_are_written():
    """Past the caches for a large batch, aligned or not; through them for a small one."""
    generator = seeded("streamed")
    logits = random_logits(generator, 2, 420, 10501)
    target = random_target(generator, 420, 10501)
    options = PLAIN._replace(reduction=2)
    assert plan(logits, options).split()[3] == "streamed"
    assert plan([z[:9] for z in logits], options).split()[3] == "cached"
    _, _, gradients = kernel(logits, target, None, options)
    for start in range(0, 420, 70):
        rows = slice(start, start + 9)
        _, _, cut = kernel([z[rows] for z in logits], target[rows], None, options)
        for whole, part in zip(gradients, cut, strict=True):
            assert bytes_of(part) == bytes_of(whole[rows])


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_avx2_and_avx512_agree_bit_for_bit(name):
    if not {"avx2", "avx512"} <= set(INSTRUCTION_SETS):
        pytest.skip("built for one of the two at most")
    best = torch.ops.churn_kernels.cpu_isa("")
    if best != "avx512":
        pytest.skip("this machine has no avx512")
    generator = seeded(name)
    logits = random_logits(generator, 2, 5, 3001)
    target = random_target(generator, 5, 3001)
    results = set()
    for request in ("avx2", "avx512"):
        torch.ops.churn_kernels.cpu_isa(request)
        loss, _, gradients = kernel(logits, target, None, OPTIONS[name])
        results.add(b"".join(map(bytes_of, (loss, *gradients))))
    assert len(results) == 1


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
        check(logits, target, OPTIONS[name]._replace(reduction=0))


def test_of_equal_logits_the_first_are_the_largest(isa):
    """However many of a vector's lanes they are."""
    for k in range(1, 41):
        z = torch.zeros(1, 40, requires_grad=True)
        ck.softmax_entropy(z, top_k=k, renormalize_top_k=False, reduction="sum").backward()
        assert (z.grad[0] != z.grad[0, -1]).sum() == k % 40


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_a_term_without_weight_may_be_infinite(reduction):
    """A class at -inf in one model alone, whose divergence is infinite."""
    logits = special_logits("masked_in_one", seeded("no weight"), 2, torch.float32)
    options = OPTIONS["divergence_weight_0"]._replace(reduction=reduction)
    check(logits, torch.tensor([1, 2, 3, 40]), options)


def test_an_infinite_upstream_leaves_out_terms_without_weight():
    logits = random_logits(seeded("infinite upstream"), 2, 2, 7)
    options = PLAIN._replace(ce_weight=0.0, regularizer_weight=0.0, divergence_weight=0.0)
    target, upstream = torch.tensor([6, 6]), torch.tensor([INF, 1.0])
    _, _, gradients = kernel(logits, target, None, options._replace(reduction=0), upstream)
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@pytest.mark.parametrize("name", ["plain", "uniform_skl", "top_k_uniform", "temperature"])
@pytest.mark.parametrize("models", [1, 2, 3])
def test_a_class_masked_everywhere_contributes_nothing(name, models):
    generator = seeded(name, models)
    options = OPTIONS[name]._replace(reduction=0)
    kept = random_logits(generator, models, 5, 16)
    masked = [torch.cat([z, torch.full((5, 16), -INF)], 1) for z in kept]
    target = random_target(generator, 5, 16)
    loss, _, gradients = kernel(masked, target, None, options)
    small_loss, _, small_gradients = kernel(kept, target, None, options)
    torch.testing.assert_close(loss, small_loss, rtol=1e-6, atol=1e-6)
    for gradient, small in zip(gradients, small_gradients, strict=True):
        assert torch.count_nonzero(gradient[:, 16:]) == 0
        torch.testing.assert_close(gradient[:, :16], small, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("reduction", [0, 2])
def test_a_mask_of_the_lowest_float_keeps_gradients_finite(models, reduction):
    """With weights and upstream gradients above 1, where slope times d would overflow."""
    generator = seeded("lowest", models)
    logits = random_logits(generator, models, 4, 20)
    for z in logits:
        z[:, 5:9] = torch.finfo(torch.float32).min
    options = LossOptions(3.0, 5.0, 7.0, regularizer=1, divergence=1, reduction=reduction)
    target = torch.tensor([0, 1, 2, 19])
    upstream = torch.full((4,) if reduction == 0 else (), 30.0)
    _, _, gradients = kernel(logits, target, None, options, upstream)
    for gradient in gradients:
        assert bool(gradient.isfinite().all())
        assert torch.count_nonzero(gradient[:, 5:9]) == 0


@pytest.mark.parametrize("poison", [float("nan"), INF, "all_masked"])
@pytest.mark.parametrize("name", ["per_row", "temperature_l1", "top_k_uniform_unnormalised"])
def test_a_broken_row_poisons_itself_alone(name, poison):
    generator = seeded(name, poison)
    options = OPTIONS[name]
    logits = random_logits(generator, 2, 5, 40)
    target = random_target(generator, 5, 40)
    clean, _, clean_gradients = kernel(logits, target, None, options)
    if poison == "all_masked":
        logits[0][2] = -INF
    else:
        logits[0][2, 11] = poison
    loss, _, gradients = kernel(logits, target, None, options)
    others = [0, 1, 3, 4]
    assert bool(loss[2].isnan())
    assert bool(gradients[0][2].isnan().all())
    assert bytes_of(loss[others]) == bytes_of(clean[others])
    for gradient, before in zip(gradients, clean_gradients, strict=True):
        assert bytes_of(gradient[others]) == bytes_of(before[others])


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_broken_row_has_no_gradient_whatever_the_weights(backend):
    if backend not in ck.available_backends():
        pytest.skip(f"no {backend} here")
    logits = random_logits(seeded("broken"), 2, 3, 40)
    logits[0][1, 11] = float("nan")
    options = PLAIN._replace(ce_weight=0.0, regularizer_weight=0.0, divergence_weight=0.0)
    _, _, (gradient, other) = kernel(logits, torch.tensor([0, 1, 2]), None, options, None, backend)
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert torch.count_nonzero(gradient[[0, 2]]) == torch.count_nonzero(other) == 0


@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("layout", ["transposed", "every_second", "expanded", "stacked_view"])
def test_layouts(name, layout):
    generator = seeded(name, layout)
    wide = random_logits(generator, 2, 12, 130)
    if layout == "transposed":
        logits = [z[:6, :65].t().contiguous().t() for z in wide]
    elif layout == "every_second":
        logits = [z[::2, ::2] for z in wide]
    elif layout == "expanded":
        logits = [z[:1, :65].expand(6, 65) for z in wide]
    else:
        logits = list(torch.stack(wide, dim=1)[:6, :, 1:66].unbind(1))
    target = random_target(generator, 6, 65)
    check(logits, target, OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_class_weights(dtype):
    generator = seeded("weights", dtype)
    weight = torch.rand(37, generator=generator).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    for name in ("plain", "sum", "per_row", "label_smoothing", "ignore_index", "everything"):
        logits = random_logits(generator, 2, 9, 37, dtype)
        check(logits, random_target(generator, 9, 37), OPTIONS[name], class_weight=weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teachers", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation(teachers, temperature, dtype):
    generator = seeded(teachers, temperature, dtype)
    options = LossOptions(
        0.5, 0.0, 0.5 * temperature**2, divergence=4, teachers=teachers, temperature=temperature
    )
    for classes, reduction in itertools.product([1, 10, 1031, 21841], [0, 1]):
        logits = random_logits(generator, 1 + teachers, 4, classes, dtype)
        target = random_target(generator, 4, classes)
        check(logits, target, options._replace(reduction=reduction))


def test_all_rows_ignored():
    logits = random_logits(seeded("ignored"), 2, 3, 10)
    target = torch.full((3,), -100)
    loss, _, gradients = kernel(logits, target, None, PLAIN._replace(reduction=2))
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(g) == 0 for g in gradients)
    assert bool(kernel(logits, target, None, PLAIN)[0].isnan())


def test_offsets_are_64_bits_wide():
    """Row 2 begins 2^31 elements into the storage, of which only the rows are touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(2**31 + 10, dtype=torch.float16)
    logits = storage.as_strided((3, 10), (2**30, 1))
    logits.copy_(random_logits(seeded("offsets"), 1, 3, 10, torch.float16)[0])
    check([logits], torch.tensor([1, 2, 3]), OPTIONS["per_row"])


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1)])
def test_a_target_of_another_shape(shape):
    target = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"target must be an int64 tensor of shape \(N,\)"):
        torch.ops.churn_kernels.loss([torch.zeros(3, 2)], target, None, *PLAIN, 0)


def test_too_many_models():
    with pytest.raises(RuntimeError, match="1 to 64 models, got 65"):
        torch.ops.churn_kernels.loss([torch.zeros(1, 2)] * 65, None, None, *PLAIN, 0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_options(data):
    """Whatever the options, the kernel does what the reference does."""
    models = data.draw(st.integers(1, 4))
    rows, classes = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 70))
    divergence = data.draw(st.sampled_from([0, 1, 2, 3] if models == 1 else [0, 1, 2, 3, 4]))
    regularizer = data.draw(st.sampled_from([0, 1, 2]))
    weights = st.sampled_from([0.0, 0.3, 1.0, 2.0])
    options = LossOptions(
        data.draw(weights),
        data.draw(weights),
        data.draw(weights),
        regularizer,
        data.draw(st.integers(0, classes)) if regularizer else 0,
        data.draw(st.booleans()),
        divergence,
        models - 1 if divergence == 4 else 0,
        data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        data.draw(st.sampled_from([-100, 0])),
        data.draw(st.sampled_from([1.0, 0.5, 4.0])),
        data.draw(st.integers(0, 3)),
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(DTYPES))
    logits = random_logits(generator, models, rows, classes, dtype)
    target = data.draw(st.sampled_from([None, random_target(generator, rows, classes)]))
    if data.draw(st.booleans()) and classes > 1:
        for z in logits:
            z[:, data.draw(st.integers(0, classes - 1))] = -INF
    loss, _ = reference.loss([z.double().requires_grad_() for z in logits], target, None, options)
    if not loss.requires_grad:  # every weight is 0
        return
    check(logits, target, options)
