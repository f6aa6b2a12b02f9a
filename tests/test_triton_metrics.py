"""churn_report's Triton path against its PyTorch path: on a GPU, or in Triton's interpreter."""

import contextlib
import itertools
import math
from unittest import mock

import pytest
import torch
from parity import DTYPES, seeded
from tolerances import assert_close

import churn_kernels as ck
from churn_kernels import metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("triton" not in ck.available_backends(), reason="no Triton here"),
]
if "triton" in ck.available_backends():
    from churn_kernels.triton import report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEANS = {"confidence", "entropy", "ece", "schurn"}  # the others are shares of counted rows


@contextlib.contextmanager
def taken(count):
    """A block in which the Triton path is to be taken `count` times; it may not be elsewhere."""
    with (
        ck.backend("triton"),
        mock.patch.object(report, "row_results", wraps=report.row_results) as row_results,
    ):
        yield
    assert row_results.call_count == count


def fused_report(runs, target=None, *, blocks=1, **options):
    with taken(blocks):
        runs = [run.to(DEVICE) for run in runs]
        target = None if target is None else target.to(DEVICE)
        return metrics.churn_report(runs, target, **options)


def check(runs, target=None, **options):
    """Assert that both paths report the same; return what the Triton path does."""
    with ck.backend("reference"):
        wanted = metrics.churn_report(runs, target, **options).metrics()
    fused = fused_report(runs, target, **options)
    assert fused.metrics().keys() == wanted.keys()
    for name, value in fused.metrics().items():
        assert value.dtype == torch.float64
        if name in MEANS:
            assert_close(value.cpu(), wanted[name], "metric", runs[0].dtype)
        else:
            assert_close(value.cpu(), wanted[name], "metric", torch.float64)
    assert torch.equal(fused.schurn, fused.schurn.T)
    return fused


def random_runs(runs, rows, classes, dtype):
    """Runs that agree on about half of the rows, and labels that they often predict."""
    generator = seeded(runs, rows, classes, dtype)
    common = 2 * torch.randn(rows, classes, generator=generator)
    logits = common + torch.randn(runs, rows, classes, generator=generator)
    target = torch.where(torch.arange(rows) % 2 == 0, common.argmax(1), classes - 1)
    return list(logits.to(dtype)), target


@pytest.mark.parametrize("classes", [1, 2, 10, 37])
@pytest.mark.parametrize("runs", [2, 3, 5])
def test_runs_and_classes(runs, classes):
    dtype = DTYPES[(runs + classes) % len(DTYPES)]
    logits, target = random_runs(runs, 2, classes, dtype)
    check(logits, target, schurn_alpha=2.5 if runs == 3 else 1.0)


@pytest.mark.parametrize("alpha", [1.0, 2.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_with_and_without_labels(dtype, alpha):
    logits, target = random_runs(2, 4, 40, dtype)
    check(logits, target if alpha == 1 else None, schurn_alpha=alpha)


@pytest.mark.parametrize(
    ("runs", "classes", "dtype"),
    [
        (2, 1000, torch.bfloat16),  # vectors of eight, of four, of two
        (3, 1000, torch.float32),
        (2, 1000, torch.float64),
        (5, 1000, torch.float16),
        (2, 2049, torch.float32),  # class by class
        (2, 8192, torch.bfloat16),  # two warps
    ],
)
def test_many_classes(runs, classes, dtype):
    logits, target = random_runs(runs, 1, classes, dtype)
    check(logits, target, schurn_alpha=2.5 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize(
    ("runs", "dtype"),
    [(11, torch.float32), (8, torch.float64), (17, torch.float32)],
    ids=["two turns", "two turns in float64", "three groups"],
)
def test_more_pairs_than_a_thread_holds(runs, dtype):
    logits, target = random_runs(runs, 1, 3, dtype)
    check(logits, target, schurn_alpha=2.5)


@pytest.mark.parametrize("runs", [2, 3, 8, 9, 16, 17, 24, 25, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_pair_is_in_one_launch_and_one_turn(runs, dtype):
    most = report.LAUNCH_RUNS // (2 if dtype == torch.float64 else 1)
    groups = report.groups(runs, most)
    assert len(groups) == 1 or runs > most
    launches = [(group, range(0)) for group in groups] + list(itertools.combinations(groups, 2))
    pairs = []
    for some, others in launches:
        members = [*some, *others]
        assert len(members) <= most
        spec = report.make_spec(10, len(members), len(some) if others else 0, dtype, 1, True)
        local = zip(spec.lefts.value, spec.rights.value, strict=True)
        pairs += [(members[i], members[j]) for i, j in local]
        turns = list(itertools.pairwise(spec.turns.value))
        assert sum(last - first for first, last in turns) == len(spec.lefts.value)
        assert all(0 < last - first <= report.TURN_PAIRS for first, last in turns)
    assert sorted(pairs) == list(itertools.combinations(range(runs), 2))


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_top_k(top_k):
    logits, target = random_runs(2, 3, 10, torch.float32)
    check(logits, target, top_k=top_k)


@pytest.mark.parametrize("alpha", [1e-60, 1e60])
def test_exponents_beyond_float32(alpha):
    logits, _ = random_runs(2, 4, 10, torch.float32)
    logits[0][0, :4] = -math.inf
    fused = check(logits, schurn_alpha=alpha)
    if alpha > 1:
        assert torch.equal(fused.schurn, fused.churn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_logits_predict_the_first_class(dtype):
    first, second, third = (torch.zeros(2, 700, dtype=dtype) for _ in range(3))
    first[0, [650, 3, 500]] = 2.0  # of several threads
    second[0, [500, 501]] = 2.0  # of one
    third[1, 699] = 1.0
    results = report.row_results([z.to(DEVICE) for z in (first, second, third)], 1.0)
    assert results[0].tolist() == [[3, 0], [500, 0], [0, 699]]
    confidence = results[2]
    assert confidence[:2].tolist() == [[0, 0], [0, 0]]
    check([first, second, third], torch.tensor([3, 699]))


@pytest.mark.parametrize("low", [-math.inf, "lowest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_masked_classes_have_probability_zero(dtype, low):
    low = torch.finfo(dtype).min if low == "lowest" else low
    logits, target = random_runs(3, 2, 70, dtype)
    logits[0][:, 40:] = low  # whole threads without a class
    logits[1][:, :69] = low  # one class left
    logits[2][1, 1::2] = low
    fused = check(logits, target)
    assert fused.confidence[1] == 1
    assert fused.entropy[1] == 0


# The interpreter's maximum warns of classes that are all NaN.
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_a_row_s_results_do_not_depend_on_the_other_rows():
    logits, _ = random_runs(2, 5, 37, torch.bfloat16)
    logits = [z.to(DEVICE) for z in logits]
    whole = report.row_results(logits, 2.5)
    for row in (0, 3):
        alone = report.row_results([z[row : row + 1].clone() for z in logits], 2.5)
        for some, one in zip(whole, alone, strict=True):
            assert torch.equal(some[..., row : row + 1], one)
    logits[1][2] = math.nan
    for some, other in zip(whole, report.row_results(logits, 2.5), strict=True):
        assert torch.equal(some[..., 3:], other[..., 3:])


def test_blocks_and_views():
    logits, target = random_runs(2, 4, 10, torch.float32)
    whole = check(logits, target).metrics()
    padded = torch.full((2, 4, 13), math.nan)
    padded[..., 2:12] = torch.stack(logits)
    blocks = fused_report(padded[..., 2:12].unbind(0), target, block_rows=3, blocks=2).metrics()
    for name, value in blocks.items():
        assert_close(value, whole[name], "metric", torch.float32)


def test_what_the_kernel_does_not_take_goes_to_pytorch():
    logits, target = random_runs(2, 5, 10, torch.float32)
    columns = [z.t().contiguous().t().to(DEVICE) for z in logits]
    mixed = [logits[0].to(DEVICE), logits[1].to(DEVICE, torch.float64)]
    target = target.to(DEVICE)
    with ck.backend("reference"):
        wanted = metrics.churn_report([z.to(DEVICE) for z in logits], target).to_dict()
    for runs in (columns, mixed):
        with taken(0):
            assert metrics.churn_report(runs, target).to_dict() == wanted
    with ck.backend("reference"), mock.patch.object(report, "row_results") as row_results:
        metrics.churn_report([z.to(DEVICE) for z in logits], target)
    row_results.assert_not_called()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_without_probabilities_raises(value):
    logits, target = random_runs(2, 3, 40, torch.float32)
    logits[1][2, 39 if value != -math.inf else slice(None)] = value
    with pytest.raises(
        ValueError, match=r"runs\[1\] must have probabilities in every row, .* row 2"
    ):
        fused_report(logits, target, block_rows=2, blocks=2)
