"""Exact mode on the CPU: right, and the same bits however it is run.

Each test of the second kind has its negative control: the same comparison must find the fast mode,
or a plain sum, at fault.
"""

import math
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from parity import (
    EXACT,
    EXACT_DTYPES,
    EXACT_KINDS,
    KINDS,
    OPTIONS,
    PLAIN,
    bytes_of,
    check,
    kernel,
    random_logits,
    random_target,
    seeded,
    special_logits,
)

import churn_kernels as ck
from churn_kernels import _ops

pytestmark = pytest.mark.skipif(not _ops.LOADED, reason="the compiled library was not built")

INSTRUCTION_SETS = ck.build_info()["instruction_sets"] if _ops.LOADED else []
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
@pytest.mark.parametrize("models", [1, 2, 3, 4])
@pytest.mark.parametrize("name", EXACT)
def test_options(name, models, dtype):
    generator = seeded(name, models, dtype)
    options = EXACT[name]
    logits = random_logits(generator, models, 6, 37, dtype)
    target = random_target(generator, 6, 37)
    target[1] = options.ignore_index if options.ignore_index >= 0 else target[1]
    rows = (6,) if options.reduction == 0 else (6, 2 * models + models * (models - 1) // 2)
    shape = rows if options.reduction in (0, 3) else ()
    check(logits, target, options, upstream=torch.randn(shape, generator=generator))


@pytest.mark.parametrize("classes", [1, 2, 15, 16, 17, 1000, 2049, 8142, 131073])
@pytest.mark.parametrize("name", ["plain", "temperature", "l1_divergence", "top_k", "uniform_skl"])
def test_class_counts(name, classes):
    generator = seeded(name, classes)
    options = EXACT[name]._replace(top_k=min(EXACT[name].top_k, classes))
    for models in (1, 2, 3):
        logits = random_logits(generator, models, 2, classes)
        check(logits, random_target(generator, 2, classes), options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["plain", "uniform_skl", "top_k", "l1_divergence", "temperature_ce"]
)
def test_special_rows(name, kind):
    if (name, kind) == ("l1_divergence", "tied"):
        pytest.skip("equal probabilities: any subgradient is right, and rounding picks one")
    for dtype in EXACT_DTYPES:
        logits = special_logits(kind, seeded(name, kind, dtype), 2, dtype)
        check(logits, torch.tensor([1, 2, 3, 40]), EXACT[name]._replace(reduction=0))


@pytest.mark.parametrize("lead", [4.0, 12.0, 30.0, 60.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_models_that_are_equally_sure(lead, temperature):
    """What is left of their divergence, which may be very small, keeps its digits."""
    models = random_logits(seeded("sure", lead), 2, 20, 300)
    for z in models:
        z[:, 7] = z.max() + lead
    options = {"beta": 1.0, "temperature": temperature, "reduction": "none"}
    got = ck.codistillation_loss(models, mode="exact", **options)
    with ck.backend("reference"):
        want = ck.codistillation_loss([z.double() for z in models], **options)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=0)


@pytest.mark.parametrize("teachers", [1, 3])
def test_distillation(teachers):
    generator = seeded("distillation", teachers)
    options = PLAIN._replace(
        divergence=4, teachers=teachers, regularizer=0, temperature=3.0, mode=3
    )
    for kind in (None, *KINDS):
        logits = random_logits(generator, 1 + teachers, 4, 41)
        if kind:
            logits = special_logits(kind, generator, 1 + teachers, torch.float32)
        check(logits, random_target(generator, 4, 41), options)


def results(logits, target, options, weight=None):
    loss, terms, gradients = kernel(logits, target, weight, options)
    return [loss, terms, *gradients]


def ways(logits, target, options, weight, threads):
    """The same call run in every way that must not matter, by name."""
    best = torch.ops.churn_kernels.cpu_isa("")
    for isa in INSTRUCTION_SETS:
        try:
            torch.ops.churn_kernels.cpu_isa(isa)
        except ValueError:
            continue  # this machine has it not
        yield isa, results(logits, target, options, weight)
    torch.ops.churn_kernels.cpu_isa(best)
    for count in (2, 3, 64):
        threads(count)
        yield f"{count} threads", results(logits, target, options, weight)
    threads(1)
    apart = [torch.stack([z, z], 2)[..., 0] for z in logits]
    yield "columns apart", results(apart, target, options, weight)
    rows, classes = logits[0].shape
    offset = [
        torch.empty(rows * classes + 3, dtype=z.dtype)[3:].view(z.shape).copy_(z) for z in logits
    ]
    yield "odd addresses", results(offset, target, options, weight)
    if torch.set_flush_denormal(True):
        try:
            yield "subnormals flushed", results(logits, target, options, weight)
        finally:
            torch.set_flush_denormal(False)


def differing(logits, target, options, weight, threads):
    """The ways that give other bits than the plain call on one thread."""
    threads(1)
    plain = list(map(bytes_of, results(logits, target, options, weight)))
    return {
        way
        for way, found in ways(logits, target, options, weight, threads)
        if list(map(bytes_of, found)) != plain
    }


@pytest.mark.parametrize("classes", [37, 5003])
@pytest.mark.parametrize("name", EXACT)
def test_no_way_to_run_it_shows(name, classes, threads):
    generator = seeded(name, classes)
    for models, dtype in zip((1, 2, 3), EXACT_DTYPES, strict=True):
        logits = random_logits(generator, models, 3, classes, dtype)
        logits[0][1, :5] = 1e-40  # subnormal
        weight = torch.rand(classes, generator=generator) if models == 2 else None
        target = random_target(generator, 3, classes)
        assert differing(logits, target, EXACT[name], weight, threads) == set()


@pytest.mark.parametrize("kind", EXACT_KINDS)
def test_no_way_to_run_it_shows_in_special_rows(kind, threads):
    for name in ("plain", "uniform_skl", "l1_divergence"):
        logits = special_logits(kind, seeded(name, kind), 2, torch.float32)
        assert differing(logits, torch.tensor([1, 2, 3, 40]), EXACT[name], None, threads) == set()


def test_ways_to_run_show_in_fast_mode(threads):
    """The negative control of the two tests above."""
    generator = seeded("control")
    logits = random_logits(generator, 2, 3, 5003)
    found = differing(logits, random_target(generator, 3, 5003), PLAIN, None, threads)
    assert "baseline" in found or len(INSTRUCTION_SETS) == 1


def permuted(options, order, logits, target, weight=None):
    """Results with the classes in another order, brought back to the first."""
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    weight = None if weight is None else weight[order]
    shuffled = [z[:, order].contiguous() for z in logits]
    loss, terms, *gradients = results(shuffled, place[target], options, weight)
    return [loss, terms, *(g[:, place] for g in gradients)]


@pytest.mark.parametrize("name", ["plain", "uniform_skl", "top_k", "l1_divergence", "everything"])
def test_the_order_of_the_classes_does_not_show(name):
    generator = seeded("classes", name)
    logits = random_logits(generator, 2, 3, 4099)
    target = random_target(generator, 3, 4099)
    weight = torch.rand(4099, generator=generator)
    differs = {"exact": 0, "fast": 0}
    for _ in range(3):
        order = torch.randperm(4099, generator=generator)
        for mode, options in (("exact", EXACT[name]), ("fast", OPTIONS[name])):
            want = results(logits, target, options, weight)
            found = permuted(options, order, logits, target, weight)
            differs[mode] += list(map(bytes_of, found)) != list(map(bytes_of, want))
    assert differs == {"exact": 0, "fast": 3}


def rounded_sum(losses):
    """The sum of float32 numbers, rounded once to float32: torch rounds a float64 to nearest."""
    total = sum((Fraction(x) for x in losses.tolist()), Fraction())
    nearest = torch.tensor(float(total), dtype=torch.float64).to(torch.float32)
    around = [nearest, torch.nextafter(nearest, nearest + 1), torch.nextafter(nearest, nearest - 1)]
    return min(around, key=lambda x: abs(Fraction(x.item()) - total))


def batch_losses(mode):
    """A batch of 301 rows, its reduced losses, and those of its rows."""
    generator = seeded("batch")
    logits = random_logits(generator, 2, 301, 29, scale=40.0)
    target = random_target(generator, 301, 29)
    target[7] = -100

    def loss(rows, reduction):
        cut = [z[rows] for z in logits]
        with ck.backend("cpu"):
            return ck.codistillation_loss(
                cut, target[rows], alpha=0.1, beta=3.0, mode=mode, reduction=reduction
            )

    return loss


def test_the_batch_loss_is_the_exact_sum_of_its_rows():
    loss = batch_losses("exact")
    rows = loss(slice(None), "none")
    total = loss(slice(None), "sum")
    assert total == ck.exact_sum(rows) == rounded_sum(rows)
    assert loss(slice(None), "mean") == torch.tensor(ck.ExactSum().add(rows).value() / 300).float()


def test_a_batch_adds_up_what_its_rows_show():
    """Subnormal losses of rows are 0, in the batch's sum too, where they would add up to more."""
    logits = [torch.tensor([[0.0, -86.0]]).repeat(9, 1)]
    options = EXACT["per_row"]._replace(ce_weight=0.1, regularizer=0, divergence=0)
    target = torch.zeros(9, dtype=torch.int64)
    rows, _, _ = kernel(logits, target, None, options)
    assert bool((kernel(logits, target, None, options._replace(ce_weight=1.0))[0] > 0).all())
    total, _, _ = kernel(logits, target, None, options._replace(reduction=2))
    assert rows.tolist() == [0.0] * 9
    assert total == 0.0


def test_the_batch_loss_is_rounded_once():
    """2^24 + 129 is a tie in float32, and in float64 what lies above it is lost."""
    logits = [torch.tensor([[2.0**24, 0.0], [129.0, 0.0], [-80.0, 0.0]])]
    options = EXACT["sum"]._replace(ce_weight=1.0, regularizer=0, divergence=0)
    loss, _, _ = kernel(logits, torch.tensor([1, 1, 1]), None, options)
    assert loss == 2.0**24 + 130


def test_the_order_and_the_split_of_the_rows_do_not_show():
    loss = batch_losses("exact")
    total = loss(slice(None), "sum")
    generator = seeded("rows")
    plain = set()
    for shards in (1, 2, 3, 7, 64):
        order = torch.randperm(301, generator=generator)
        assert loss(order, "sum") == total
        merged = ck.ExactSum()
        floats = torch.zeros(())
        for part in order.tensor_split(shards):
            losses = loss(part, "none")
            merged.merge(ck.ExactSum.from_bytes(ck.ExactSum().add(losses).to_bytes()))
            for x in losses:
                floats += x
        assert torch.tensor(merged.value()).float() == total
        plain.add(floats.item())
    assert len(plain) > 1, "a sum that has an order was not caught"


def test_reports_have_no_order():
    generator = seeded("report")
    logits = random_logits(generator, 3, 65, 31)
    target = random_target(generator, 65, 31)
    order = torch.randperm(65, generator=generator)
    for weight in (None, torch.rand(31, generator=generator)):
        _, terms, _ = kernel(logits, target, weight, EXACT["plain"])
        _, again, _ = kernel([z[order] for z in logits], target[order], weight, EXACT["plain"])
        assert bytes_of(terms) == bytes_of(again)


@pytest.mark.parametrize("fill", [0.0, 1e4, -1e4, 3e38, 1e-40, -0.0])
def test_a_million_equal_logits(fill):
    """The most that a sum of fixed point has to hold."""
    classes = 2**20
    logits = [torch.full((1, classes), fill) for _ in range(2)]
    loss, terms, gradients = kernel(logits, torch.tensor([3]), None, EXACT["uniform_skl"])
    ce, want = terms[0].item(), math.log(classes)
    assert ce == pytest.approx(want, rel=1e-7)
    assert terms[-2] == 0
    for g in gradients:
        # 2^20 classes of about 1e-6, each rounded at 2^-24 of it, besides that of the target.
        assert g.sum().item() == pytest.approx(0.0, abs=1e-3)
    assert bool(loss.isfinite())


@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf")])
def test_one_nan_and_no_negative_zero(poison):
    generator = seeded("nan")
    for dtype in EXACT_DTYPES:
        logits = random_logits(generator, 2, 3, 41, dtype)
        logits[0][1, 5] = poison
        loss, _, (gradient, other) = kernel(
            logits, random_target(generator, 3, 41), None, EXACT["per_row"]
        )
        nan = {torch.float32: 0x7FC00000, torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
        integers = torch.int32 if dtype == torch.float32 else torch.int16
        assert bool((gradient[1].view(integers) == nan).all())
        assert bool((other[1].view(integers) == nan).all())
        assert loss.view(torch.int32)[1] == 0x7FC00000
        assert bool(loss[[0, 2]].isfinite().all())


def test_results_hold_no_subnormal():
    """A machine that flushes them to 0 would show."""
    logits = [
        torch.tensor([[0.0, -80.0, -86.0, -87.5]]),
        torch.tensor([[0.0, -81.0, -86.5, -90.0]]),
    ]
    upstream = torch.tensor(1e-3)
    _, _, gradients = kernel(logits, torch.tensor([0]), None, EXACT["plain"], upstream)
    smallest = torch.finfo(torch.float32).tiny
    _, _, fast = kernel(logits, torch.tensor([0]), None, PLAIN, upstream)
    assert any(bool(((g != 0) & (g.abs() < smallest)).any()) for g in fast)
    for g in gradients:
        assert not bool(((g != 0) & (g.abs() < smallest)).any())
        assert not bool((torch.signbit(g) & (g == 0)).any())


DIGESTS = {
    "311": {
        "exp32": "4ea79c545310fe42",
        "log32": "97f098577d654b19",
        "exp64": "7fbe53977f519001",
        "log64": "3cb27c179139504e",
        "fma": "52874a3640db7daa",
        "fixed": "a20a9d6dfbe3b4fa",
        "series": "5594f316026dcdeb",
    },
    "1": {
        "exp32": "9d65e38f171bf5fd",
        "log32": "1efce22d43d21f1f",
        "exp64": "0a2c61fb224dcc8a",
        "log64": "7ddf9704bb99b43c",
        "fma": "0e8bf732640dfe8d",
        "fixed": "a73f8ad49ae0b284",
        "series": "e10450053cabfe77",
    },
}
COMPILER = shutil.which("c++") or shutil.which("g++")
SOFTWARE = "-DCK_SOFTWARE_FMA=1"


def digest(folder, flags, step):
    """What tests/cpp/exact_digest.cpp prints when it is compiled with these flags."""
    features = [flag.removeprefix("-m") for flag in flags if flag.startswith("-m")]
    cpuinfo = Path("/proc/cpuinfo")
    known = cpuinfo.read_text() if cpuinfo.exists() else ""
    if not all(re.search(rf"\b{feature}\b", known) for feature in features):
        pytest.skip(f"this machine has no {' '.join(features)}")
    program = folder / "digest"
    source = ROOT / "tests/cpp/exact_digest.cpp"
    command = [COMPILER, "-std=c++20", *flags, "-Wall", "-Wextra", "-Werror", source, "-o", program]
    subprocess.run(command, check=True)
    output = subprocess.run([program, step], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in output.splitlines())


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "flags",
    [
        ["-O0", SOFTWARE],
        ["-O3", SOFTWARE],
        ["-O0", "-mfma"],
        ["-O2", "-mavx2", "-mfma"],
        ["-O3", "-mavx512f", "-mfma"],
    ],
    ids=" ".join,
)
def test_no_compiler_flag_shows(tmp_path, flags):
    assert digest(tmp_path, [*flags, "-ffp-contract=off"], "311") == DIGESTS["311"]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_compiler_that_contracts_is_caught(tmp_path):
    flags = ["-O3", "-mavx2", "-mfma", "-ffp-contract=fast"]
    assert digest(tmp_path, flags, "311") != DIGESTS["311"]


@pytest.mark.nightly
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("flags", [["-O3", SOFTWARE], ["-O3", "-mavx2", "-mfma"]], ids=" ".join)
def test_every_float(tmp_path, flags):
    assert digest(tmp_path, [*flags, "-ffp-contract=off"], "1") == DIGESTS["1"]


def test_torch_compile_keeps_the_bits():
    generator = seeded("compiled")
    leaves = [z.requires_grad_() for z in random_logits(generator, 2, 5, 37)]
    target = random_target(generator, 5, 37)

    def loss(logits, target):
        return ck.codistillation_loss(logits, target, alpha=0.1, mode="exact")

    with ck.backend("cpu"):
        found = []
        for run in (loss, torch.compile(loss, fullgraph=True)):
            value = run(leaves, target)
            found.append([bytes_of(x) for x in (value, *torch.autograd.grad(value, leaves))])
    assert found[0] == found[1]


def test_the_environment_sets_the_mode(monkeypatch):
    monkeypatch.setenv("CHURN_REDUCTION_MODE", "exact")
    program = "import churn_kernels as ck; print(ck.get_reduction_mode())"
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "exact\n", result.stderr
