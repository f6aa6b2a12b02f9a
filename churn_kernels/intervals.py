"""Intervals for statistics of training runs: Student's t, delete-one-run jackknife, permutation."""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A mean with its interval, in the units of the metric.

    `low`, `high` and `standard_error` are NaN if there are too few runs.
    """

    mean: float
    low: float
    high: float
    standard_error: float


def run_mean(values: Tensor) -> float:
    """Mean over runs of an (R,) tensor, or over pairs i != j of an (R, R) one, ignoring NaN."""
    return float(_off_diagonal(values).nanmean())


def leave_one_run_out(values: Tensor) -> Tensor:
    """`run_mean` with each run left out in turn.

    Args:
        values: (R,) or (R, R), as in a `ChurnReport`.
    Returns: float64 (R,); NaN where no value is left.
    """
    others = ~torch.eye(values.shape[0], dtype=torch.bool, device=values.device)
    rest = [values[keep] if values.ndim == 1 else values[keep][:, keep] for keep in others]
    return torch.tensor([run_mean(part) for part in rest], dtype=torch.float64, device="cpu")


def jackknife_interval(mean: float, leave_one_out: Tensor, level: float = 0.95) -> Estimate:
    """Delete-one interval: mean +- t se, se^2 = (R - 1)/R sum_r (m_(r) - mean m_(.))^2.

    Args:
        mean: the statistic on all R runs.
        leave_one_out: (R,) the statistic without run r.
        level: coverage in (0, 1); t is Student's quantile with R - 1 degrees of freedom.
    Returns: an `Estimate`; NaN bounds for fewer than two runs or where a value is NaN.
    Raises: ValueError if `level` is out of range.
    """
    runs = leave_one_out.numel()
    spread = leave_one_out.to(torch.float64)
    if runs < 2:
        return _estimate(mean, math.nan, 1, level)
    variance = (runs - 1) / runs * (spread - spread.mean()).square().sum()
    return _estimate(mean, math.sqrt(float(variance)), runs - 1, level)


def t_interval(values: Tensor, level: float = 0.95) -> Estimate:
    """Student's t interval for the mean of independent values: mean +- t s / sqrt(n).

    Args:
        values: (n,) independent measurements, for example one per data split.
        level: coverage in (0, 1); n - 1 degrees of freedom.
    Returns: an `Estimate`; NaN bounds for fewer than two values.
    Raises: ValueError if `level` is out of range.
    """
    values = values.to(torch.float64)
    count = values.numel()
    if count < 2:
        return _estimate(float(values.mean()), math.nan, 1, level)
    return _estimate(float(values.mean()), float(values.std() / math.sqrt(count)), count - 1, level)


def ratio_interval(values: Tensor, base: Tensor, level: float = 0.95) -> Estimate:
    """Interval for the factor between two independent samples: mean(values) / mean(base).

    A factor r is in it unless a two-sided permutation test of the sums tells `values` and r `base`
    apart. Where the two samples have one distribution, 1 is in it with a probability of `level` or
    more, whatever that distribution is and however few they are; no variance is estimated. The test
    accepts r until too few of the ways to swap as many values V as base values B leave
    sum(V) / sum(B) beyond r, so the bounds are order statistics of these ratios.

    Args:
        values, base: (n,) measurements, not negative and not all of `base` 0.
        level: coverage in (0, 1).
    Returns: an `Estimate` without a standard error; [0, inf] where nothing can be excluded, as for
        n < 4 at a level of 0.95.
    Raises: ValueError if `level` is out of range.
    """
    _check_level(level)
    values, base = values.to(torch.float64), base.to(torch.float64)
    kept = _regroupings(len(values))
    swapped_out = (1 - kept[:, : len(values)]) @ values
    ratios = swapped_out / (kept[:, len(values) :] @ base)  # 0 / 0: no factor shows in this swap
    place = 1 + math.floor((1 - level) * len(ratios) / 2 + 1e-9)
    low = ratios.nan_to_num(0.0, posinf=math.inf).kthvalue(place).values
    high = ratios.nan_to_num(math.inf, posinf=math.inf).kthvalue(len(ratios) + 1 - place).values
    return Estimate(float(values.mean() / base.mean()), float(low), float(high), math.nan)


_MOST_REGROUPINGS = 20_000


@functools.cache
def _regroupings(count: int) -> Tensor:
    """Ways to draw `count` of twice as many, as they are first; (ways, 2 count) float64 of 0 and 1.

    All of them, or of more than `_MOST_REGROUPINGS` a sample that is always the same.
    """
    if math.comb(2 * count, count) <= _MOST_REGROUPINGS:
        chosen = torch.tensor(list(itertools.combinations(range(2 * count), count)))
    else:
        generator = torch.Generator("cpu").manual_seed(0)
        order = torch.rand(_MOST_REGROUPINGS, 2 * count, generator=generator, device="cpu")
        chosen = order.argsort(dim=1)[:, :count]
        chosen[0] = torch.arange(count)
    drawn = torch.zeros(len(chosen), 2 * count, dtype=torch.float64, device="cpu")
    return drawn.scatter_(1, chosen, 1.0)


def rule_of_three(count: int) -> float:
    """95 % upper bound on the probability of an event that none of `count` trials showed.

    (1 - p)^n = 0.05 for p of about 3/n; at most 1.
    """
    return min(1.0, 3.0 / count)


def _off_diagonal(values: Tensor) -> Tensor:
    """A pairwise (R, R) tensor with NaN on its diagonal; an (R,) tensor unchanged."""
    if values.ndim == 1:
        return values
    return values.clone().fill_diagonal_(math.nan)


def _estimate(mean: float, error: float, degrees: int, level: float) -> Estimate:
    _check_level(level)
    half = _student_t_quantile((1 + level) / 2, degrees) * error
    return Estimate(mean, mean - half, mean + half, error)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be a number in (0, 1), got {level!r}; 0.95 is customary")


def _student_t_quantile(probability: float, degrees: int) -> float:
    """The t >= 0 with P(T <= t) = probability, bisecting the angle atan(t / sqrt(degrees))."""
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        if _student_t_central(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.tan(middle) * math.sqrt(degrees)


def _student_t_central(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle)): the finite series of Abramowitz and Stegun 26.7.3-4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for step in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (step - 1) / step
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
