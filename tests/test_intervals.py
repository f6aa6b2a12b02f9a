"""Intervals against closed forms, SciPy, and the spread over many repetitions."""

import math

import pytest
import scipy.stats
import torch

from churn_kernels.intervals import (
    jackknife_interval,
    leave_one_run_out,
    ratio_interval,
    rule_of_three,
    run_mean,
    t_interval,
)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 30, 101])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_t_interval_uses_student_s_quantile(degrees, level):
    values = torch.linspace(-1, 2, degrees + 1, dtype=torch.float64)
    estimate = t_interval(values, level)
    low, high = scipy.stats.t.interval(
        level, degrees, loc=float(values.mean()), scale=scipy.stats.sem(values.numpy())
    )
    assert estimate.low == pytest.approx(low, rel=1e-9, abs=1e-9)
    assert estimate.high == pytest.approx(high, rel=1e-9, abs=1e-9)


def test_jackknife_of_a_mean_is_the_t_interval():
    values = torch.tensor([1.0, 4.0, 2.0, 9.0], dtype=torch.float64)
    jackknife = jackknife_interval(run_mean(values), leave_one_run_out(values))
    assert jackknife == pytest.approx(t_interval(values))


def test_jackknife_of_pairs_deletes_a_run_with_all_its_pairs():
    pairs = torch.tensor([[9.0, 1, 2], [1, 9, 4], [2, 4, 9]], dtype=torch.float64)
    assert run_mean(pairs) == pytest.approx(7 / 3)
    assert leave_one_run_out(pairs).tolist() == [4, 2, 1]
    variance = 2 / 3 * sum((m - 7 / 3) ** 2 for m in (4, 2, 1))
    estimate = jackknife_interval(run_mean(pairs), leave_one_run_out(pairs))
    assert estimate.standard_error == pytest.approx(math.sqrt(variance))
    half = scipy.stats.t.ppf(0.975, 2) * math.sqrt(variance)
    assert estimate.high - estimate.mean == pytest.approx(half)


def test_jackknife_error_of_churn_is_near_the_spread_over_repetitions():
    # 300 studies of 12 runs each; a row-and-column effect makes the pairs share runs.
    means, errors = [], []
    for seed in range(300):
        draw = torch.randn(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pairs = draw[:, None] + draw[None, :]
        estimate = jackknife_interval(run_mean(pairs), leave_one_run_out(pairs))
        means.append(estimate.mean)
        errors.append(estimate.standard_error)
    spread = torch.tensor(means).std()
    assert float(torch.tensor(errors).mean() / spread) == pytest.approx(1, abs=0.1)


def test_pairs_without_a_value_are_left_out_of_the_mean():
    pairs = torch.tensor(
        [[math.nan, math.nan, math.nan], [0.2, 0, 0.4], [0.6, 0.4, 0]], dtype=torch.float64
    )
    assert run_mean(pairs) == pytest.approx(0.4)


def test_single_values_have_no_interval():
    assert math.isnan(t_interval(torch.tensor([3.0])).low)
    assert t_interval(torch.tensor([3.0])).mean == 3
    assert math.isnan(jackknife_interval(3.0, torch.tensor([math.nan])).high)


def test_a_level_is_a_share():
    with pytest.raises(ValueError, match=r"level must be a number in \(0, 1\), got 95; 0.95 is"):
        t_interval(torch.ones(3), 95)


def test_a_ratio_s_interval_holds_what_a_permutation_test_accepts():
    values, base = (
        torch.rand(5, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        for n in range(2)
    )
    found = ratio_interval(values, base)
    assert found.mean == pytest.approx(float(values.mean() / base.mean()))
    for factor, accepted in (
        (found.low * 0.999, False),
        (found.low * 1.001, True),
        (found.high * 0.999, True),
        (found.high * 1.001, False),
    ):
        p_value = scipy.stats.permutation_test(
            (values.numpy(), factor * base.numpy()),
            lambda a, b: a.mean() - b.mean(),
            n_resamples=10_000,
        ).pvalue
        assert (p_value > 0.05) == accepted, factor


def test_a_ratio_of_few_or_of_zeros():
    one = torch.ones(3, dtype=torch.float64)
    assert ratio_interval(one, 2 * one)[:3] == (0.5, 0.0, math.inf)
    some = torch.arange(1.0, 5.0)
    assert ratio_interval(0 * some, some)[:3] == (0.0, 0.0, 0.0)
    assert ratio_interval(0 * some, torch.tensor([0.0, 0, 0, 1])).high == math.inf
    many = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 1  # a sample of regroupings
    assert ratio_interval(many, many) == ratio_interval(many, many)
    assert 0.8 < ratio_interval(many, many).low < 1 < ratio_interval(many, many).high < 1.25


def test_a_level_of_a_ratio_is_a_share():
    with pytest.raises(ValueError, match=r"level must be a number in \(0, 1\), got 1; 0.95 is"):
        ratio_interval(torch.ones(4), torch.ones(4), 1)


def test_the_rule_of_three():
    """p = 3/n would show in none of n trials with at most 5 %."""
    assert [rule_of_three(n) for n in (1, 3, 4, 300)] == [1.0, 1.0, 0.75, 0.01]
    for n in (4, 8, 100, 10_000):
        assert 0 < (1 - rule_of_three(n)) ** n < 0.05
