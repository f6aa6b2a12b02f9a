"""churn_report and its pieces against hand-computed cases, brute force, and their properties."""

import itertools
import json
import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from churn_kernels import metrics

NAN = math.nan


def logits_of(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


# Three rows, three classes; labels 0, 1, 2. Run 0 predicts 0, 1, 0; run 1 predicts 0, 2, 2.
FIRST = logits_of([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.0, 0.4]])
SECOND = logits_of([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5], [0.25, 0.25, 0.5]])
LABELS = torch.tensor([0, 1, 2])


def random_runs(runs, rows, classes, *, seed=0, scale=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, classes, generator=generator)
    logits = common + scale * torch.randn(runs, rows, classes, generator=generator)
    return logits.to(dtype), torch.randint(classes, (rows,), generator=generator)


def test_report_of_two_small_runs_by_hand():
    report = metrics.churn_report([FIRST, SECOND], LABELS)

    def expect(values, wanted):
        torch.testing.assert_close(values, torch.tensor(wanted, dtype=torch.float64))

    expect(report.accuracy, [2 / 3, 2 / 3])
    expect(report.churn, [[0, 2 / 3], [2 / 3, 0]])
    expect(report.churn_correct, [[0, 1 / 2], [1 / 2, 0]])
    expect(report.churn_incorrect, [[0, 1], [1, 0]])
    expect(report.negative_flips, [[0, 1 / 3], [1 / 3, 0]])
    expect(report.confidence, [(0.2 + 0.7 + 0.2) / 3, (0.5 + 0.2 + 0.25) / 3])
    # Row 0: |.5-.7| + |.3-.2| + |.2-.1| = .4 < .2 + .5; the other rows disagree.
    expect(report.certified_agreement, [[1, 1 / 3], [1 / 3, 1]])
    # Rows scaled by their maximum: (1, .6, .4) and (1, 2/7, 1/7); (.125, 1, .125) and (.4, .6, 1);
    # (1, 0, 2/3) and (.5, .5, 1).
    distance = (0.6 - 2 / 7) + (0.4 - 1 / 7) + 0.275 + 0.4 + 0.875 + 0.5 + 0.5 + 1 / 3
    expect(report.schurn, [[0, distance / 6], [distance / 6, 0]])
    entropies = [sum(-p * math.log(p) for p in row if p > 0) for row in SECOND.exp().tolist()]
    assert float(report.entropy[1]) == pytest.approx(sum(entropies) / 3)
    # Run 0: .5 right, .8 right, .6 wrong, each alone in its bin.
    assert float(report.ece[0]) == pytest.approx((0.5 + 0.2 + 0.6) / 3)
    # Run 1: .7 right in one bin; .5 wrong and .5 right share one, where they cancel.
    assert float(report.ece[1]) == pytest.approx(0.3 / 3)
    assert report.rows == 3


def test_top_k_entropy_is_of_the_renormalised_largest_probabilities():
    report = metrics.churn_report([FIRST, SECOND], top_k=2)
    wanted = [scipy.stats.entropy(pair) for pair in ([5, 3], [8, 1], [6, 4])]
    assert float(report.entropy[0]) == pytest.approx(sum(wanted) / 3)
    whole = metrics.churn_report([FIRST, SECOND], top_k=3).entropy
    torch.testing.assert_close(whole, metrics.churn_report([FIRST, SECOND]).entropy)
    alone = metrics.churn_report([FIRST, SECOND], top_k=1).entropy
    assert alone.tolist() == [0, 0]


def brute_force(logits, target, alpha):
    """One pair of runs at a time, one row at a time."""
    runs, rows, _ = logits.shape
    p = logits.double().softmax(-1)
    names = ("churn", "schurn", "churn_correct", "churn_incorrect", "negative_flips")
    out = {name: torch.zeros(runs, runs, dtype=torch.float64) for name in names}
    out["certified_agreement"] = torch.zeros(runs, runs, dtype=torch.float64)
    for i, j in itertools.product(range(runs), repeat=2):
        right = wrong = 0
        for n in range(rows):
            a, b, label = p[i, n], p[j, n], int(target[n])
            differ = int(a.argmax()) != int(b.argmax())
            sure = [float(q.sort().values[-1] - q.sort().values[-2]) for q in (a, b)]
            scaled = ((a / a.max()) ** alpha - (b / b.max()) ** alpha).abs().sum()
            out["churn"][i, j] += differ / rows
            out["schurn"][i, j] += float(scaled) / (2 * rows)
            out["negative_flips"][i, j] += (int(a.argmax()) == label != int(b.argmax())) / rows
            out["certified_agreement"][i, j] += (float((a - b).abs().sum()) < sum(sure)) / rows
            hit = int(a.argmax()) == label
            right, wrong = right + hit, wrong + (not hit)
            out["churn_correct" if hit else "churn_incorrect"][i, j] += differ
        out["churn_correct"][i, j] /= right
        out["churn_incorrect"][i, j] /= wrong
    return out


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
def test_pairwise_metrics_equal_brute_force(alpha):
    logits, target = random_runs(4, 40, 5, dtype=torch.float64)
    report = metrics.churn_report(logits, target, schurn_alpha=alpha)
    for name, wanted in brute_force(logits, target, alpha).items():
        torch.testing.assert_close(getattr(report, name), wanted, msg=name)


def test_schurn_of_a_large_exponent_is_churn():
    logits, _ = random_runs(3, 200, 6)
    report = metrics.churn_report(logits, schurn_alpha=1e9)
    torch.testing.assert_close(report.schurn, report.churn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sequence_iterator_and_stacked_tensor_give_the_same_report(dtype):
    logits, target = random_runs(3, 50, 7, dtype=dtype)
    kept = logits.clone()
    stacked = metrics.churn_report(logits, target).to_dict()
    assert metrics.churn_report(list(logits), target).to_dict() == stacked
    assert metrics.churn_report(iter(logits), target).to_dict() == stacked
    strided = [run.t().contiguous().t() for run in logits]
    assert metrics.churn_report(strided, target).to_dict() == stacked
    assert torch.equal(logits, kept)


@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_block_size_changes_no_count_and_only_rounding_elsewhere(block_rows):
    logits, target = random_runs(5, 130, 9)
    whole = metrics.churn_report(logits, target, top_k=4, block_rows=130).metrics()
    blocks = metrics.churn_report(logits, target, top_k=4, block_rows=block_rows).metrics()
    assert blocks.keys() == whole.keys()
    counted = {"confidence", "entropy", "ece", "schurn"}
    for name, value in blocks.items():
        if name in counted:
            torch.testing.assert_close(value, whole[name], rtol=1e-14, atol=1e-15)
        else:
            assert torch.equal(value, whole[name]), name


def test_a_block_is_the_largest_thing_in_memory(monkeypatch):
    logits, target = random_runs(4, 1000, 11)
    seen = []
    row_results = metrics._row_results

    def spy(block, alpha):
        seen.append((len(block), *block[0].shape))
        return row_results(block, alpha)

    monkeypatch.setattr(metrics, "_row_results", spy)
    monkeypatch.setattr(metrics, "_BLOCK_ELEMENTS", 4 * 11 * 300)
    metrics.churn_report(logits, target)
    assert seen == [(4, 300, 11)] * 3 + [(4, 100, 11)]


def test_conditional_churns_add_up_to_churn():
    logits, target = random_runs(6, 300, 4, scale=0.7)
    report = metrics.churn_report(logits, target)
    accuracy = report.accuracy[:, None]
    total = accuracy * report.churn_correct + (1 - accuracy) * report.churn_incorrect
    torch.testing.assert_close(total, report.churn)


def test_two_classes_never_certify_a_disagreement():
    # With two classes a disagreement sits exactly on the bound, so rounding alone decides.
    logits, _ = random_runs(8, 500, 2)
    report = metrics.churn_report(logits)
    assert bool((report.certified_agreement <= 1 - report.churn + 1e-12).all())


def test_one_class_is_certain():
    report = metrics.churn_report(torch.randn(2, 4, 1), torch.zeros(4, dtype=torch.int64))
    assert report.confidence.tolist() == [1, 1]
    assert report.churn.tolist() == [[0, 0], [0, 0]]
    assert report.ece.tolist() == [0, 0]
    assert report.churn_incorrect.isnan().all()


def test_masked_classes_count_as_probability_zero():
    logits, target = random_runs(3, 60, 5)
    masked = torch.cat([logits, torch.full((3, 60, 4), -math.inf)], dim=-1)
    wanted = metrics.churn_report(logits, target, top_k=5).metrics()
    for name, value in metrics.churn_report(masked, target, top_k=5).metrics().items():
        torch.testing.assert_close(value, wanted[name], msg=name)


def test_no_target_leaves_the_labelled_metrics_out():
    logits, _ = random_runs(3, 20, 4)
    report = metrics.churn_report(logits)
    labelled = {"accuracy", "ece", "churn_correct", "churn_incorrect", "negative_flips"}
    assert {name for name, value in vars(report).items() if value is None} == labelled
    assert report.summary().keys().isdisjoint(labelled)
    assert report.to_dict()["accuracy"] is None


def test_to_dict_is_json_with_null_for_undefined():
    certain = torch.eye(3)[None].expand(2, 3, 3) * 30
    report = metrics.churn_report(certain, torch.arange(3))
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["churn_incorrect"] == [[None, None], [None, None]]
    assert values["accuracy"] == [1, 1]
    assert values["rows"] == 3


def test_report_needs_no_gradient_and_leaves_none():
    logits = torch.randn(2, 5, 3, requires_grad=True)
    assert not metrics.churn_report(logits).schurn.requires_grad


runs_strategy = st.builds(
    random_runs,
    runs=st.integers(2, 5),
    rows=st.integers(1, 30),
    classes=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    scale=st.floats(0, 30),
)


@settings(max_examples=60, deadline=None)
@given(runs_strategy)
def test_properties(drawn):
    logits, target = drawn
    report = metrics.churn_report(logits, target)
    for name in ("churn", "schurn", "certified_agreement"):
        assert torch.equal(getattr(report, name), getattr(report, name).T), name
    assert (report.churn.diagonal() == 0).all()
    assert (report.schurn.diagonal() == 0).all()
    assert ((report.churn >= 0) & (report.churn <= 1)).all()
    assert (report.schurn >= 0).all()
    error = 1 - report.accuracy
    assert (report.churn <= error[:, None] + error[None, :] + 1e-12).all()
    assert (report.certified_agreement <= 1 - report.churn + 1e-12).all()
    for name in ("accuracy", "confidence", "ece"):
        values = getattr(report, name)
        assert ((values >= 0) & (values <= 1 + 1e-12)).all(), name
    assert (report.entropy <= math.log(logits.shape[-1]) + 1e-9).all()
    # What i gets right and j wrong, and the reverse, differ by the gap in accuracy.
    gap = report.accuracy[:, None] - report.accuracy[None, :]
    torch.testing.assert_close(report.negative_flips - report.negative_flips.T, gap)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6), st.floats(0.01, 3))
def test_certified_rows_agree_row_by_row(seed, classes, scale):
    logits, _ = random_runs(2, 1, classes, seed=seed, scale=scale)
    report = metrics.churn_report(logits)
    assert report.certified_agreement[0, 1] == 0 or report.churn[0, 1] == 0


# Pieces -------------------------------------------------------------------------------------------


def test_calibration_error_of_one_run_is_the_report_s():
    logits, target = random_runs(3, 400, 5)
    report = metrics.churn_report(logits, target)
    for run, wanted in zip(logits, report.ece, strict=True):
        torch.testing.assert_close(metrics.expected_calibration_error(run, target), wanted)


def test_calibration_bins_are_closed_below_and_the_last_above():
    certain = torch.tensor([[0.0, -math.inf], [0.0, -math.inf]])
    error = metrics.expected_calibration_error(certain, torch.tensor([0, 1]), bins=2)
    assert float(error) == 0.5
    # Both rows at exactly 1/2 with one hit: calibrated only if they share the upper bin.
    even = torch.zeros(2, 2)
    assert float(metrics.expected_calibration_error(even, torch.tensor([0, 1]), bins=2)) == 0


def test_confidence_is_the_margin_of_the_softmax():
    margin = metrics.prediction_confidence(FIRST)
    torch.testing.assert_close(margin, torch.tensor([0.2, 0.7, 0.2], dtype=torch.float64))
    assert metrics.prediction_confidence(torch.zeros(2, 3, 1)).tolist() == [[1] * 3] * 2


# Intervals ----------------------------------------------------------------------------------------


def test_two_runs_have_means_and_no_pairwise_interval():
    summary = metrics.churn_report([FIRST, SECOND], LABELS).summary()
    assert summary["churn"].mean == pytest.approx(2 / 3)
    assert math.isnan(summary["churn"].low)
    assert not math.isnan(summary["confidence"].low)


# Bad input ----------------------------------------------------------------------------------------

GOOD = torch.zeros(3, 4)

BAD_REPORTS = {
    "no runs": (
        ([],),
        {},
        ValueError,
        "runs must hold at least 2 runs, got 0; churn compares runs, so add the logits of another",
    ),
    "one run": (([GOOD],), {}, ValueError, "runs must hold at least 2 runs, got 1; churn compares"),
    "one matrix": (
        (GOOD,),
        {},
        ValueError,
        "runs must be a sequence of logit tensors (N, C) or one tensor (R, N, C), got a tensor of "
        "shape (3, 4); stack the runs' logits with torch.stack",
    ),
    "a number": (
        (7,),
        {},
        TypeError,
        "runs must be a sequence of logit tensors (N, C) or one tensor (R, N, C), got int; pass a "
        "list of the runs' logits",
    ),
    "lists": (
        ([GOOD, [[0.0]]],),
        {},
        TypeError,
        "runs[1] must be a tensor of shape (N, C), got list",
    ),
    "classes": (
        ([GOOD, GOOD.argmax(1)],),
        {},
        ValueError,
        "runs[1] must have shape (N, C) or (..., C), got (3,); ",
    ),
    "integers": (([GOOD.long()] * 2,), {}, TypeError, "runs[0] must be float32, float64"),
    "no classes": (
        ([torch.zeros(3, 0)] * 2,),
        {},
        ValueError,
        "runs[0] must have at least one class, got shape (3, 0)",
    ),
    "no rows": (
        ([torch.zeros(0, 3)] * 2,),
        {},
        ValueError,
        "runs[0] must have at least one row, got shape (0, 3); the metrics of no rows are ",
    ),
    "shapes": (
        ([GOOD, torch.zeros(2, 4)],),
        {},
        ValueError,
        "runs[1] must have the shape of the first run, (3, 4), got (2, 4); evaluate every run on "
        "the same examples",
    ),
    "devices": (
        ([GOOD, GOOD.to("meta")],),
        {},
        ValueError,
        "runs[1] must be on the first run's device, cpu, got meta; pass runs[1].to(cpu)",
    ),
    "nan": (
        ([GOOD, GOOD.log() / 0],),
        {"block_rows": 2},
        ValueError,
        "runs[1] must have probabilities in every row, got NaN, +inf or only -inf at row 0; leave "
        "the row out of every run, or drop a diverged run",
    ),
    "nan in a later block": (
        ([torch.tensor([[0.0], [0.0], [NAN]]), torch.zeros(3, 1)],),
        {"block_rows": 2},
        ValueError,
        "runs[0] must have probabilities in every row, got NaN, +inf or only -inf at row 2;",
    ),
    "target list": (
        ([GOOD, GOOD], [0, 1, 2]),
        {},
        TypeError,
        "target must be an int64 tensor of shape (3,), got list; pass torch.as_tensor(target)",
    ),
    "target dtype": (
        ([GOOD, GOOD], torch.zeros(3)),
        {},
        TypeError,
        "target must be int64 class indices, got float32; pass target.long()",
    ),
    "target shape": (
        ([GOOD, GOOD], torch.zeros(4, dtype=torch.int64)),
        {},
        ValueError,
        "target must have shape (3,), one class for each row of the logits, got (4,); pass 3",
    ),
    "target device": (
        ([GOOD, GOOD], torch.zeros(3, dtype=torch.int64, device="meta")),
        {},
        ValueError,
        "target must be on the logits' device, cpu, got meta; pass target.to(logits.device)",
    ),
    "target range": (
        ([GOOD, GOOD], torch.tensor([0, 4, -1])),
        {},
        IndexError,
        "target must hold class indices in [0, 4), got 4 at row 1; leave rows without a label out "
        "of target and of every run",
    ),
    "alpha": (
        ([GOOD, GOOD],),
        {"schurn_alpha": 0},
        ValueError,
        "schurn_alpha must be > 0, got 0.0; 1 is the value of the paper's tables",
    ),
    "infinite alpha": (
        ([GOOD, GOOD],),
        {"schurn_alpha": math.inf},
        ValueError,
        "schurn_alpha must be finite, got inf",
    ),
    "top_k zero": (([GOOD, GOOD],), {"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    "top_k large": (
        ([GOOD, GOOD],),
        {"top_k": 5},
        ValueError,
        "top_k must be at most the number of classes C = 4, got 5; pass None for all classes",
    ),
    "top_k float": (([GOOD, GOOD],), {"top_k": 2.0}, TypeError, "top_k must be an int, got 2.0"),
    "block_rows": (
        ([GOOD, GOOD],),
        {"block_rows": 0},
        ValueError,
        "block_rows must be at least 1, got 0; pass None for the default",
    ),
}


@pytest.mark.parametrize("case", BAD_REPORTS)
def test_bad_input_names_argument_wanted_got_and_remedy(case):
    args, options, error, message = BAD_REPORTS[case]
    with pytest.raises(error) as raised:
        metrics.churn_report(*args, **options)
    assert message in str(raised.value)


def test_bad_input_of_the_pieces():
    labels = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"bins must be at least 1, got 0; 15 is customary"):
        metrics.expected_calibration_error(GOOD, labels, bins=0)
    with pytest.raises(
        ValueError, match=r"logits must have shape \(N, C\) or \(\.\.\., C\), got \(4,\)"
    ):
        metrics.expected_calibration_error(GOOD[0], labels)
    with pytest.raises(ValueError, match="logits must have probabilities in every row, got NaN"):
        metrics.expected_calibration_error(GOOD * NAN, labels)
    with pytest.raises(
        ValueError, match=r"\(\.\.\., C\) with C >= 1, got \(\); pass one logit per"
    ):
        metrics.prediction_confidence(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"level must be a number in \(0, 1\), got 0; 0.95 is"):
        metrics.churn_report([FIRST, SECOND]).summary(level=0)


def test_runs_of_any_leading_dimensions():
    runs = torch.randn(3, 2, 4, 5)
    target = torch.randint(5, (2, 4))
    got = metrics.churn_report(list(runs), target)
    want = metrics.churn_report(list(runs.flatten(1, 2)), target.flatten())
    assert got.to_dict() == want.to_dict()
    assert got.rows == 8
    error = metrics.expected_calibration_error(runs[0], target)
    assert error == metrics.expected_calibration_error(runs[0].flatten(0, 1), target.flatten())
    with pytest.raises(ValueError, match=r"\(N, H, W\), pass logits.movedim\(1, -1\)$"):
        metrics.churn_report(list(runs), torch.zeros(2, 5, dtype=torch.long))
