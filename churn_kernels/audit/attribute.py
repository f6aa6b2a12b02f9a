"""How much of a divergence each suspect causes, from swapping one at a time for a twin."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from churn_kernels.audit.pairs import Around, Pair, run_pair
from churn_kernels.audit.replay import Build, ReplayError
from churn_kernels.audit.stress import AXES
from churn_kernels.audit.twins import TWINS, Pins, missing_twins, two_parts
from churn_kernels.intervals import Estimate, ratio_interval, rule_of_three, t_interval


def _enter(
    axis: Callable[[int], AbstractContextManager[Any]], side: int, model: nn.Module
) -> AbstractContextManager[Any]:
    return axis(side)


STRESS: dict[str, Around] = {
    **{name: partial(_enter, axis) for name, axis in AXES.items()},
    "batch": two_parts,
}
"""In what the two sides of a pair may be made to differ: `AXES`, and "batch", computed in parts."""

EVERYTHING = "everything"

LEVEL = 0.97
"""Coverage of a share's interval: the most that four pairs, of 70 regroupings, can tell."""

FEWEST_PAIRS = 4
"""With fewer, no interval at `LEVEL` excludes anything."""


@dataclass(frozen=True)
class Share:
    """What a suspect causes.

    Attributes:
        suspect: its name; "everything" is all of them at once.
        share: of the mean squared distance that goes away with its twin:
            1 - mean(d_twin^2) / mean(d^2), with the interval of `ratio_interval` at `LEVEL`, which
            holds 0 for a suspect that causes nothing, however few the pairs; below 0 where the
            twin's pairs happened to end further apart. Without bounds where no distance is left,
            which `bound` says more of; -inf and 1 where the pairs are too few to exclude anything.
        pairs: that were run with its twin.
    """

    suspect: str
    share: Estimate
    pairs: list[Pair]

    @property
    def too_few(self) -> bool:
        """Whether the pairs exclude no share: too few part, or a distance is not finite."""
        return self.share.low == -math.inf and self.share.high == 1

    @property
    def certain(self) -> bool:
        """Whether the twin makes a difference: chance alone would hardly show such a share."""
        return math.isnan(self.share.low) or not self.share.low <= 0 <= self.share.high

    @property
    def differing(self) -> int:
        """Pairs that part all the same."""
        return sum(pair.step is not None for pair in self.pairs)

    @property
    def bound(self) -> float:
        """If none does: below it is the share of pairs that do, at 95 % (rule of three)."""
        return rule_of_three(len(self.pairs))


@dataclass(frozen=True)
class Attribution:
    """Shares of a divergence.

    Attributes:
        steps: after which distances were taken.
        apart: names of the stress in which the sides of a pair differ; empty for equal sides.
        pairs: without any twin.
        distance: mean parameter distance of these.
        shares: those that are certain first, then the largest, and "everything" last; empty if the
            pairs end up with equal bits.
        skipped: suspects that could not be swapped here, and why.
    """

    steps: int
    apart: tuple[str, ...]
    pairs: list[Pair]
    distance: Estimate
    shares: list[Share]
    skipped: dict[str, str]

    def slowdown(self, share: Share) -> float:
        """How many times as long steps take with the twin as without; NaN if nobody took the time.

        Medians over pairs.
        """
        with_twin, without = (
            statistics.median(pair.seconds for pair in pairs) for pairs in (share.pairs, self.pairs)
        )
        return with_twin / without if without else math.nan


def attribute(
    build: Build,
    steps: int = 10,
    *,
    pairs: int = 8,
    apart: Sequence[str] = (),
    operators: Sequence[str] = (),
    suspects: Mapping[str, Around] | None = None,
    device: str = "cpu",
    tell: Callable[[str], None] = lambda _: None,
) -> Attribution:
    """Run pairs of equal trainings, with one suspect at a time swapped for its deterministic twin.

    While differences are small they add up: squared distances of independent causes do, so that
    their shares sum to 1. Take few enough steps that a divergence is not saturated; `amplify` shows
    when it is. A cause that only shows when another one has happened has a share in both. Through a
    pinned operator no difference passes, so its share is that of its race and of what other causes
    send through it.

    Args:
        build: builds the training.
        steps: to run before the distance is taken.
        pairs: independent ones for each suspect, at least 2; intervals are over them.
        apart: names in `STRESS`, of settings in which the two sides differ; empty for replays of
            one thing, which part only where something races.
        operators: names of suspected operators, such as `find_operator` finds. Their twin on one
            side are the outputs that they had on the other (`Pins`).
        suspects: twins by name; None for those of `TWINS` that can be swapped here ("batch" only
            if the sides differ in it).
        device: of the training.
        tell: is told of each pair.
    Raises: ReplayError for fewer than two pairs or one step, for an unknown stress, and as
        `run_pair`.
    """
    if pairs < 2 or steps < 1:
        raise ReplayError(
            f"pairs must be at least 2 and steps at least 1, got {pairs} and {steps}; an interval "
            f"needs two pairs"
        )
    for name in apart:
        if name not in STRESS:
            raise ReplayError(f"apart must be some of {', '.join(STRESS)}, got {name!r}; drop it")
    skipped = {} if suspects is not None else missing_twins()
    if suspects is None:
        unused = set() if "batch" in apart else {"batch"}
        suspects = {n: twin for n, twin in TWINS.items() if n not in skipped and n not in unused}
    stressed = [STRESS[name] for name in apart]
    twins: dict[str, Sequence[Around]] = {"": (), **{name: (Pins([name]),) for name in operators}}
    twins.update({name: (twin,) for name, twin in suspects.items()})
    twins[EVERYTHING] = (Pins(operators), *suspects.values())
    found: dict[str, list[Pair]] = {name: [] for name in twins}
    for number in range(pairs):  # a pair of each in turn: a machine's load changes with time
        tell(f"pair {number + 1} of {pairs} with a twin of each: {', '.join(twins).strip(', ')}")
        for name in [name for name in twins if name not in skipped]:
            around = together([*stressed, *twins[name]])
            try:
                found[name].append(run_pair(build, steps, device=device, around=around))
            except NotImplementedError as error:  # a loss that has no exact mode, for one
                if not name:
                    raise  # the training's own: no twin is in its way
                skipped[name] = str(error)
                twins[EVERYTHING] = tuple(
                    one for one in twins[EVERYTHING] if one not in twins[name]
                )
    plain = found.pop("")
    base = _distances(plain)
    shares = []
    if base.any():
        shares = [_share(name, ran, base) for name, ran in found.items() if name not in skipped]
        shares.sort(key=lambda one: (one.suspect == EVERYTHING, not one.certain, -one.share.mean))
    return Attribution(steps, tuple(apart), plain, t_interval(base), shares, skipped)


def together(blocks: Sequence[Around]) -> Around:
    """One block of several, the last innermost."""

    @contextmanager
    def entered(side: int, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(block(side, model))
            yield

    def around(side: int, model: nn.Module) -> AbstractContextManager[None]:
        return entered(side, model)

    return around


def _distances(pairs: list[Pair]) -> Tensor:
    return torch.tensor([pair.distances[-1] for pair in pairs], dtype=torch.float64, device="cpu")


def _share(name: str, pairs: list[Pair], base: Tensor) -> Share:
    """What is gone of the mean square, of which as much is left as `ratio_interval` says."""
    squares = _distances(pairs).square()
    if not (squares.isfinite().all() and base.isfinite().all()):
        return Share(name, Estimate(math.nan, -math.inf, 1.0, math.nan), pairs)
    left = ratio_interval(squares, base.square(), LEVEL)
    low, high = 1 - left.high, 1 - left.low
    if low == high == 1:
        low = high = math.nan  # no distance is left in any pair
    return Share(name, Estimate(1 - left.mean, low, high, math.nan), pairs)
