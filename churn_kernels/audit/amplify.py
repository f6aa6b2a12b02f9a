"""How fast a difference of one unit in the last place grows, and when a prediction flips."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from churn_kernels.audit.pairs import Around, Pair, as_they_are, check_injection, run_pair
from churn_kernels.audit.replay import Build
from churn_kernels.intervals import Estimate, t_interval

RANGE = 0.9
"""Share of a curve's rise, in logarithms, over which its growth rate is fitted."""


@dataclass(frozen=True)
class Amplification:
    """What becomes of a flip of one unit in the last place.

    Attributes:
        steps: that were run.
        inject_at: the step before which one number among the parameters was flipped.
        pairs: one for each flip.
        growth: growth rate of the parameter distance, per step, of the flips that were not
            absorbed; see `growth_rate`.
        churn: share of rows with other predictions after the last step; None without predictions.
    """

    steps: int
    inject_at: int
    pairs: list[Pair]
    growth: Estimate
    churn: Estimate | None

    @property
    def absorbed(self) -> int:
        """Flips that were rounded away: no distance after them is larger than that of the flip."""
        return sum(_absorbed(pair.distances[self.inject_at - 1 :]) for pair in self.pairs)

    @property
    def first_flips(self) -> list[int]:
        """The steps after which a prediction flipped, of the pairs in which one did, in order."""
        return sorted(pair.first_flip for pair in self.pairs if pair.first_flip is not None)


def amplify(
    build: Build,
    steps: int = 100,
    *,
    inject_at: int = 1,
    pairs: int = 8,
    device: str = "cpu",
    around: Around = as_they_are,
    tell: Callable[[str], None] = lambda _: None,
) -> Amplification:
    """Flip one number by one unit in the last place, and follow the two trainings.

    Args:
        build: builds the training.
        steps: to run.
        inject_at: the step, from 1, before which the parameters of one of the two are flipped.
        pairs: flips of other numbers, each followed by itself; intervals are over them.
        around: the block that a side takes a step in, such as `Pins` of operators that race, whose
            own differences would hide the flip's. What the flip changes does not pass through a
            pinned operator either: growth and churn are then lower bounds.
        tell: is told of each pair.
    Raises: ReplayError if `inject_at` is none of the steps, and as `run_pair`.
    """
    check_injection(steps, inject_at)
    found = []
    for seed in range(pairs):
        tell(f"a flip of one unit in the last place: pair {seed + 1} of {pairs}")
        found.append(run_pair(build, steps, device=device, around=around, flip=(inject_at, seed)))
    curves = [pair.distances[inject_at - 1 :] for pair in found]
    rates = [growth_rate(curve) for curve in curves if not _absorbed(curve)]
    grown = torch.tensor([rate for rate in rates if not math.isnan(rate)], device="cpu")
    ends = torch.tensor([pair.churn[-1] for pair in found if pair.churn], device="cpu")
    return Amplification(
        steps,
        inject_at,
        found,
        t_interval(grown) if len(grown) else Estimate(*[math.nan] * 4),
        t_interval(ends) if len(ends) else None,
    )


def _absorbed(curve: list[float]) -> bool:
    return all(distance <= curve[0] for distance in curve)  # NaN is none of these


def growth_rate(distances: list[float]) -> float:
    """The exponential rate at which a distance grows, before it saturates.

    The least-squares slope of ln d_n against n, from the first distance to the one at which
    `RANGE` of the whole rise of ln d is reached: d_n ~ d_0 exp(rate n), twice as large every
    ln 2 / rate steps.

    Args:
        distances: d_0, d_1, .. one a step.
    Returns: per step; NaN if a distance on the way is zero or not finite, or if there is no step.
    """
    logs = [math.log(d) if 0 < d < math.inf else math.nan for d in distances]
    finite = [x for x in logs if not math.isnan(x)]
    if not finite:
        return math.nan
    level = logs[0] + RANGE * (max(finite) - logs[0])
    end = next((n for n, x in enumerate(logs) if n and x >= level), len(logs) - 1)
    part = torch.tensor(logs[: end + 1], dtype=torch.float64, device="cpu")
    times = torch.arange(len(part), dtype=torch.float64, device="cpu")
    times -= times.mean()
    if len(part) < 2:
        return math.nan
    return float((times * part).sum() / times.square().sum())
