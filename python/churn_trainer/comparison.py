"""Methods against a baseline, paired by split and run: intervals, and an exact test."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from churn_kernels.intervals import (
    Estimate,
    jackknife_interval,
    leave_one_run_out,
    run_mean,
    t_interval,
)


def over_splits(values: Sequence[Tensor], level: float) -> Estimate:
    """A metric's mean over splits, with an interval.

    With two splits or more, Student's t over the splits' means, which takes in the chance of the
    split and of the runs. With one split, the delete-one-run jackknife.

    Args:
        values: per split the metric of a `ChurnReport`, (R,) or (R, R).
        level: coverage in (0, 1).
    """
    if len(values) == 1:
        return jackknife_interval(run_mean(values[0]), leave_one_run_out(values[0]), level)
    means = torch.tensor([run_mean(value) for value in values], dtype=torch.float64)
    return t_interval(means, level)


def paired_change(values: Sequence[Tensor], baseline: Sequence[Tensor], level: float) -> Estimate:
    """The change of a metric from the baseline, with an interval for the paired difference.

    What split s and run r share (training rows, initialisation, minibatch order) cancels in the
    difference. The interval is that of `over_splits`, of the differences; with one split each
    run is deleted from both methods at once.

    Args:
        values, baseline: per split the metric, (R,) or (R, R), of the same splits and seeds.
        level: coverage in (0, 1).
    """
    if len(values) == 1:
        change = run_mean(values[0]) - run_mean(baseline[0])
        left_out = leave_one_run_out(values[0]) - leave_one_run_out(baseline[0])
        return jackknife_interval(change, left_out, level)
    changes = [run_mean(a) - run_mean(b) for a, b in zip(values, baseline, strict=True)]
    return t_interval(torch.tensor(changes, dtype=torch.float64), level)


def churn_swap_test(
    predictions: Tensor | Sequence[Tensor], baseline: Tensor | Sequence[Tensor]
) -> float:
    """Exact permutation test of "the method does not change churn", two-sided.

    Were the method without effect, the two models of any split and run could change places. Over
    all 2^(S R) ways to do so the statistic, the change of the summed pairwise disagreements, is
    compared with the one observed. With signs e_r = +-1 (kept or swapped) it is linear,

        T = sum_r e_r w_r,  2 w_r = sum_(j != r) (m_r m_j) - (b_r b_j) + (m_r b_j) - (b_r m_j),

    where (x y) counts the rows on which x and y disagree, so its distribution is a convolution of
    two-point ones: exact for any number of runs.

    Args:
        predictions: (S, R, N) classes predicted by the method's runs, or S of (R, N), of which
            each split may have its own R and N.
        baseline: those of the baseline, of the same splits and seeds.
    Returns: P(|T| >= |T observed|), in (0, 1].
    """
    weights = torch.cat([_swap_weights(m, b) for m, b in zip(predictions, baseline, strict=True)])
    reach = int(weights.abs().sum())
    distribution = torch.zeros(2 * reach + 1, dtype=torch.float64)  # of T, from -reach to reach
    distribution[reach] = 1
    for weight in weights.tolist():
        shifted = torch.roll(distribution, weight) + torch.roll(distribution, -weight)
        distribution = shifted / 2
    observed = abs(int(weights.sum()))
    return float(distribution[torch.arange(-reach, reach + 1).abs() >= observed].sum().clamp(max=1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction for testing several methods at once, in the order given."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _swap_weights(method: Tensor, baseline: Tensor) -> Tensor:
    """2 w_r of one split, (R,) int64, from the (R, N) predictions."""

    def disagreements(a: Tensor, b: Tensor) -> Tensor:
        counts = (a[:, None] != b[None, :]).sum(dim=-1)  # (R, R)
        return counts.fill_diagonal_(0)

    crossed = disagreements(method, baseline)
    own = disagreements(method, method) - disagreements(baseline, baseline)
    return (own + crossed - crossed.T).sum(dim=1)
