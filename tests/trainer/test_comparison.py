"""Intervals and tests against closed forms and enumeration."""

import itertools
import math

import pytest
import scipy.stats
import torch
from churn_trainer.comparison import churn_swap_test, holm, over_splits, paired_change

from churn_kernels.intervals import jackknife_interval, leave_one_run_out, run_mean, t_interval


def draws(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairwise(runs, seed):
    half = draws(runs, runs, seed=seed)
    return (half + half.T).fill_diagonal_(0)


def test_over_splits_is_student_s_interval_of_the_split_means():
    values = [pairwise(4, seed) for seed in range(5)]
    means = torch.tensor([run_mean(value) for value in values], dtype=torch.float64)
    estimate = over_splits(values, 0.9)
    low, high = scipy.stats.t.interval(
        0.9, 4, loc=float(means.mean()), scale=scipy.stats.sem(means.numpy())
    )
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx(
        (float(means.mean()), low, high)
    )


def test_one_split_falls_back_on_the_jackknife_over_runs():
    value, base = pairwise(5, 1), pairwise(5, 2)
    assert over_splits([value], 0.95) == jackknife_interval(
        run_mean(value), leave_one_run_out(value), 0.95
    )
    change = paired_change([value], [base], 0.95)
    assert change == pytest.approx(over_splits([value - base], 0.95))


def test_paired_change_is_the_interval_of_the_differences():
    values, base = ([draws(3, seed=s + t) for s in range(6)] for t in (0, 10))
    differences = torch.tensor([float((a - b).mean()) for a, b in zip(values, base, strict=True)])
    wanted = scipy.stats.ttest_1samp(differences.double().numpy(), 0).confidence_interval(0.95)
    change = paired_change(values, base, 0.95)
    assert (change.low, change.high) == pytest.approx((wanted.low, wanted.high), rel=1e-5)


def test_a_shared_shift_of_a_split_cancels_in_the_change():
    base = [draws(4, seed=s) for s in range(5)]
    values = [value + 0.25 for value in base]
    change = paired_change(values, base, 0.95)
    assert change.mean == pytest.approx(0.25)
    assert change.high - change.low == pytest.approx(0, abs=1e-9)
    assert t_interval(torch.stack(base).mean(1)).standard_error > 0.01


def churn(predictions):
    differ = predictions[:, None] != predictions[None, :]
    return int(differ.sum())


def enumerated(method, baseline):
    """P(|T| >= |T observed|) by carrying out every swap."""
    splits, runs, _ = method.shape
    observed, statistics = None, []
    for swap in itertools.product([False, True], repeat=splits * runs):
        mask = torch.tensor(swap).view(splits, runs, 1)
        one, other = torch.where(mask, baseline, method), torch.where(mask, method, baseline)
        value = sum(churn(one[s]) - churn(other[s]) for s in range(splits))
        observed = value if observed is None else observed
        statistics.append(abs(value) >= abs(observed))
    return sum(statistics) / len(statistics)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(1, 5, 20), (2, 4, 30), (3, 3, 9)])
def test_swap_test_equals_enumeration(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(3, shape[2:], generator=generator)

    def predict(noise):
        wrong = torch.rand(shape, generator=generator) < noise
        return torch.where(wrong, torch.randint(3, shape, generator=generator), truth)

    method, baseline = predict(0.1 + 0.05 * seed), predict(0.4)
    wanted = enumerated(method, baseline)
    assert churn_swap_test(method, baseline) == pytest.approx(wanted, abs=1e-12)
    assert 0 < wanted <= 1


def test_swap_test_of_equal_predictions_is_one():
    predictions = torch.randint(4, (2, 6, 50), generator=torch.Generator().manual_seed(0))
    assert churn_swap_test(predictions, predictions) == 1


def test_swap_test_is_uniform_without_an_effect():
    p_values = []
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        pair = torch.randint(2, (2, 1, 6, 40), generator=generator)
        p_values.append(churn_swap_test(*pair))
    share = sum(p <= 0.1 for p in p_values) / len(p_values)
    assert share == pytest.approx(0.1, abs=0.05)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_undefined_values_stay_undefined():
    assert math.isnan(over_splits([torch.full((3, 3), math.nan)], 0.95).mean)
