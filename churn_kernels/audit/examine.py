"""The whole audit of one training: whether replays part, where, why, and what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from churn_kernels.audit.amplify import Amplification, amplify
from churn_kernels.audit.attribute import STRESS, Attribution, attribute, together
from churn_kernels.audit.blame import told
from churn_kernels.audit.manifest import manifest
from churn_kernels.audit.operators import Finding
from churn_kernels.audit.pairs import Pair, check_injection, run_pair
from churn_kernels.audit.replay import Build, ReplayError, Training, built, find_in_step
from churn_kernels.audit.stress import AXES
from churn_kernels.audit.twins import Pins, splittable

MOST_OPERATORS = 8
"""Operators that race, after which no more are looked for."""

STRESS_REPLAYS = 4

INTERRUPTED = "interrupted by Ctrl-C"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Axis:
    """What one axis of stress showed.

    Attributes:
        name: in `AXES`; or "batch", computed in two parts; or "device", a CPU against a GPU.
        finding: of replays with and without it; None for "batch" and where it was skipped.
        pair: of "batch": the first step with and without it, after which parameters may differ.
        skipped: why it was; "" if it was not.
    """

    name: str
    finding: Finding | None = None
    pair: Pair | None = None
    skipped: str = ""

    @property
    def shows(self) -> bool:
        """Whether a bit depends on it."""
        if self.pair is not None:
            return self.pair.step is not None
        return self.finding is not None and self.finding.verdict != "none"


@dataclass(frozen=True)
class Examination:
    """What `examine` found.

    Attributes:
        device: of the training.
        pairs: replays of the first steps, two at a time, as they are.
        step: the step that was replayed: the first in which a pair parted, or the last of these.
        finding: of its replays.
        operators: names of the operators that race in it, at most `MOST_OPERATORS`: with those
            before it pinned, each is the first that makes other outputs of equal inputs.
        axes: what stress showed, with these operators pinned.
        attribution: shares of the divergence of the replays; or, where they do not part, of the
            divergence between the axes that showed; None where nothing did.
        amplification: of one unit in the last place, with the operators that race pinned; None
            where it was stopped.
        manifest: what it all ran on.
        stopped: the parts of the examination that ended before their end, and why.
    """

    device: str
    pairs: list[Pair]
    step: int
    finding: Finding
    operators: list[str]
    axes: list[Axis]
    attribution: Attribution | None
    amplification: Amplification | None
    manifest: dict[str, Any]
    stopped: dict[str, str]

    @property
    def interrupted(self) -> bool:
        """Whether it was ended by Ctrl-C."""
        return INTERRUPTED in self.stopped.values()

    @property
    def verdict(self) -> str:
        """That of the finding; but "unexplained" if pairs part and no replay of the step does."""
        if self.finding.verdict == "none" and any(pair.step is not None for pair in self.pairs):
            return "unexplained"
        return self.finding.verdict


def examine(
    build: Build,
    *,
    device: str = "cpu",
    replays: int = 20,
    pairs: int = 8,
    steps: int = 10,
    amplify_steps: int = 100,
    inject_at: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> Examination:
    """Find out whether replays of a training part, where, why, and what becomes of a difference.

    1. Pairs of replays, as they are, run side by side; the first step in which one parts is
       replayed with every operator logged, until those that race are known, or `MOST_OPERATORS`
       of them (`find_operator`).
    2. The same step under each axis of stress (`stress`), and on a CPU against a GPU if there is
       one; of batches in two parts, the first step.
    3. Suspects are swapped for deterministic twins, one at a time (`attribute`).
    4. One unit in the last place is flipped, and followed (`amplify`).

    Args:
        build: builds the training.
        device: where it is examined.
        replays: of the one step, at least 2.
        pairs: for each measurement, at least 2.
        steps: of each pair, in 1. and 3., at least 1.
        amplify_steps, inject_at: of 4.
        tell: is told what comes next.
    Returns: an `Examination`. From 2. on, what the training raises ends the part that it raises in,
        and Ctrl-C those that are left; `stopped` says so.
    Raises: ReplayError for numbers out of range, and if two builds differ before the first step;
        what the training raises in 1.
    """
    for name, count, least in (("replays", replays, 2), ("pairs", pairs, 2), ("steps", steps, 1)):
        if count < least:
            raise ReplayError(f"{name} must be at least {least}, got {count}; run more of them")
    check_injection(amplify_steps, inject_at)
    tell(f"{pairs} pairs of {steps} steps, as they are")
    plain = [run_pair(build, steps, device=device) for _ in range(pairs)]
    for pair in plain:
        if pair.step == 0:
            raise ReplayError(
                f"target must build the same training each time, got another {pair.what} before "
                f"the first step; seed the random states in it"
            )
    step = min((pair.step for pair in plain if pair.step), default=steps)
    training = built(build, device, step)
    tell(f"{replays} replays of step {step}, operator by operator")
    finding = find_in_step([training], step, replays=replays)
    parts = _Parts()
    operators: list[str] = []
    parts.do(
        "search for operators",
        lambda: _add_racing(operators, training, step, finding, replays, parts),
    )
    parted = finding.verdict != "none" or any(pair.step is not None for pair in plain)
    axes: list[Axis] = []
    for name in (*(name for name in AXES if name != "nothing"), "batch", "device"):
        rest = (name, build, training, device, step, operators, finding, tell)
        axis = parts.do(f"stress: {name}", partial(_try_axis, *rest))
        axes += [axis] if axis else []
    apart = [axis.name for axis in axes if axis.shows and axis.name in STRESS]
    shown = [finding, *(axis.finding for axis in axes if axis.name in apart and axis.finding)]
    suspected = [f.operation.name for f in shown if f.verdict == "operator" and f.operation]
    attribution = None
    if parted or apart:
        attribution = parts.do(
            "shares of the causes",
            lambda: attribute(
                build,
                steps,
                pairs=pairs,
                apart=() if parted else apart,
                operators=operators or list(dict.fromkeys(suspected)),
                device=device,
                tell=tell,
            ),
        )
    amplification = parts.do(
        "flips of one unit in the last place",
        lambda: amplify(
            build,
            amplify_steps,
            inject_at=inject_at,
            pairs=pairs,
            device=device,
            around=Pins(operators),
            tell=tell,
        ),
    )
    return Examination(
        device,
        plain,
        step,
        finding,
        operators,
        axes,
        attribution,
        amplification,
        manifest(),
        parts.stopped,
    )


class _Parts:
    """The parts of an examination: what one raises ends it alone, and Ctrl-C those that are left.

    Attributes:
        stopped: the parts that did not come to their end, and why.
    """

    def __init__(self) -> None:
        self.stopped: dict[str, str] = {}

    def do(self, name: str, work: Callable[[], _T]) -> _T | None:
        """What `work` returns; None where it did not come to its end."""
        if INTERRUPTED in self.stopped.values():
            self.stopped[name] = INTERRUPTED
            return None
        try:
            return work()
        except KeyboardInterrupt:
            self.stopped[name] = INTERRUPTED
        except Exception as error:  # the training's own
            self.stopped[name] = f"it raised {told(error)}"
        return None


def _add_racing(
    names: list[str],
    training: Training,
    step: int,
    finding: Finding,
    replays: int,
    parts: _Parts,
) -> None:
    """Add the names of operators that race, `MOST_OPERATORS` at most.

    Each is found with those before it pinned.
    """
    while finding.verdict == "operator" and len(names) < MOST_OPERATORS:
        assert finding.operation is not None
        if finding.operation.name in names:
            break
        names.append(finding.operation.name)
        finding = find_in_step([training], step, replays=replays, around=Pins(names))
    if names and finding.verdict != "none":
        parts.stopped["search for operators"] = _why_no_more(finding, names)


def _why_no_more(finding: Finding, names: list[str]) -> str:
    if finding.operation and finding.operation.name in names:
        return (
            f"{finding.operation.name} differs though its outputs are pinned; what races after it "
            f"was not looked for"
        )
    if finding.verdict == "operator":
        return (
            f"it ends at {MOST_OPERATORS}, and there are more; make these repeat their bits, and "
            f"run the audit again"
        )
    return "with these pinned replays still part, and no operator that could be pinned makes them"


def _try_axis(
    name: str,
    build: Build,
    training: Training,
    device: str,
    step: int,
    operators: list[str],
    finding: Finding,
    tell: Callable[[str], None],
) -> Axis:
    if finding.verdict in ("input", "sequence", "memory"):
        return Axis(name, skipped="replays part without it, and no operator to pin makes them")
    if name == "device" and not torch.cuda.is_available():
        return Axis(name, skipped="there is no CUDA device")
    if name == "batch" and not splittable(training.model):
        return Axis(name, skipped="no module of the model is known to take a batch in parts")
    tell(f"{'the first step' if name == 'batch' else f'step {step}'} under stress: {name}")
    pins = Pins(operators)
    if name == "device":
        other = "cpu" if device != "cpu" else "cuda"
        try:
            trainings = [training, built(build, other, step)]
            return Axis(name, find_in_step(trainings, step, replays=2, around=pins))
        except Exception as error:  # the target's own: it need not run anywhere else
            return Axis(name, skipped=f"the training does not run on {other}: {told(error)}")

    around = together([STRESS[name], pins])
    if name == "batch":
        return Axis(name, pair=run_pair(build, 1, device=device, around=around))
    return Axis(
        name,
        find_in_step(
            [training],
            step,
            replays=STRESS_REPLAYS,
            around=lambda replay: around(replay, training.model),
        ),
    )
