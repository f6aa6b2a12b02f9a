"""Audits for people: the verdict, then what it rests on, in lines of plain text."""

import math
from collections.abc import Iterable

from churn_kernels._printable import printable
from churn_kernels.audit.advice import advice
from churn_kernels.audit.amplify import Amplification
from churn_kernels.audit.attribute import FEWEST_PAIRS, Attribution, Share
from churn_kernels.audit.blame import seen_from_here
from churn_kernels.audit.compare import Comparison
from churn_kernels.audit.examine import Axis, Examination
from churn_kernels.audit.manifest import manifest_hash
from churn_kernels.audit.operators import Differences, Finding
from churn_kernels.audit.replay import Replayed
from churn_kernels.audit.selftest import Trial
from churn_kernels.intervals import Estimate, rule_of_three


def as_text(lines: Iterable[str]) -> str:
    """Lines below each other; what a name or a file put into one stays in it, and is printable."""
    return "\n".join(map(printable, lines))


def of_trial(trial: Trial) -> str:
    """One planted operator, and what became of it."""
    found, passed = trial.finding, "right" if trial.passed else "WRONG"
    planted = "an exact sum" if trial.place == "nowhere" else f"a race in {trial.place}"
    if found.operation is None:
        return f"{passed}: {planted}: {no_difference(found)}"
    where = found.operation.module or "no module"
    what = "given other inputs" if found.verdict == "input" else "other outputs of equal inputs"
    return f"{passed}: {planted}: {found.operation.name} ({where}): {what}"


def of_comparison(found: Comparison) -> str:
    """What `churn-audit diff` found."""
    difference = found.difference
    last = min(found.a.steps[-1].number, found.b.steps[-1].number)
    if difference is None:
        lines = [f"the runs have the same bits in all {last} steps that both have"]
    else:
        lines = [f"the runs first differ {difference.when}: {difference.what}"]
        lines.append(f"  {difference.meaning}")
        lines.append(f"  also differs: {', '.join(difference.also) or 'nothing'}")
        lines.append(f"  still the same: {', '.join(difference.same) or 'nothing'}")
    if found.then:
        lines.append(f"anything else differs {found.then.when} first: {found.then.what}")
    for one in found.generators:
        drawn = "nothing was" if one.drawn is None else f"step {one.drawn} is the first that was"
        since = f"where a run was resumed after step {one.after}" if one.after else "from the start"
        lines.append(f"note: {one.name} differs {since}; {drawn} drawn from it")
    for name, (a, b) in found.settings.items():
        lines.append(f"ran on another {name}: {a} and {b}")
    if not found.settings:
        lines.append(f"ran on the same: {found.a.header['manifest_hash']}")
    for trace in (found.a, found.b):
        damage = f"; {trace.damage}" if trace.damage else ""
        lines.append(f"{trace.path}: {trace.steps[-1].number} steps{damage}")
    return as_text(lines)


def of_replayed(replayed: Replayed) -> str:
    """What replays of the step that differs showed."""
    where = f"replays of step {replayed.step} on {' and '.join(replayed.devices)}"
    state = "the recorded bits" if replayed.as_recorded else "OTHER BITS than the runs recorded"
    lines = [f"{where}: {of_finding(replayed.finding)}", *evidence(replayed.finding)]
    lines.append(f"  before the step, parameters and optimizer had {state}")
    return as_text(lines)


def of_examination(found: Examination, target: str) -> str:
    """What `churn-audit run` found."""
    lines = [verdict(found), *evidence(found.finding), of_pairs(found)]
    if len(found.operators) > 1:
        lines.append(f"operators that race: {', '.join(found.operators)}")
    if found.axes:
        lines += ["under stress:", *(f"  {axis.name}: {of_axis(axis)}" for axis in found.axes)]
    if found.attribution:
        lines += [f"why: {of_attribution(found.attribution)}; of that a twin removes"]
        lines += [f"  {share.suspect}: {of_share(share)}" for share in found.attribution.shares]
        lines += [f"  {name}: skipped: {why}" for name, why in found.attribution.skipped.items()]
    if found.amplification:
        lines.append(of_amplification(found.amplification))
    lines += [f"stopped early: {part}: {why}" for part, why in found.stopped.items()]
    lines += ["what to do now:", *(f"  {one}" for one in advice(found))]
    lines.append(f"{target} on {found.device}; ran on: {manifest_hash(found.manifest)}")
    return as_text(lines)


def verdict(found: Examination) -> str:
    """One sentence on replays as they are."""
    if found.verdict == "unexplained":
        return (
            f"inconclusive: replays part in step {found.step}, but with every operator logged "
            f"{no_difference(found.finding)}"
        )
    return f"step {found.step}: {of_finding(found.finding)}"


def of_finding(found: Finding) -> str:
    """One clause on what replays of a step showed."""
    one, other = found.operation, found.other
    if found.verdict == "none":
        return no_difference(found)
    if found.verdict == "sequence":
        names = " and ".join(
            operation.name if operation else "nothing" for operation in (one, other)
        )
        return f"the replays call different operators: {names}{_outside(found)}"
    assert one is not None
    if found.verdict == "memory":
        return f"{one.name} reads memory that nothing has written"
    if found.verdict == "input":
        what = f"{one.name} is given inputs that differ, and that no operator made"
        return what + _outside(found)
    return f"{one.name} makes other outputs of the same inputs"


def _outside(found: Finding) -> str:
    """What is not brought back between replays, and how to have it brought back."""
    if not found.outside:
        return ""
    return (
        f"; outside of what is brought back before each replay, these change: "
        f"{', '.join(found.outside)}; add them to state={{name: object}}, and make buffers of "
        f"tensors that a model holds"
    )


def no_difference(found: Finding) -> str:
    """What can be said when replays do not differ."""
    if found.bound >= 1:
        return f"no difference in {found.replays} replays, too few to bound how often there is one"
    return (
        f"no difference in {found.replays} replays: fewer than {found.bound:.0%} of steps differ, "
        f"at 95 %"
    )


def evidence(found: Finding) -> list[str]:
    """Where the first operator that differs is, and how its outputs do."""
    one = found.operation
    if one is None:
        return []
    lines = [
        f"  operation {found.index + 1} of {len(found.log)}; {one.phase or 'outside of the model'}"
        f"{', module ' + one.module if one.module else ''}; "
        f"{seen_from_here(one.source) or 'unknown source'}",
        f"  {one.tensors}",
    ]
    many = len(found.outputs) > 1
    for number, differ in enumerate(found.outputs):
        if differ:
            lines.append(f"  output{f' {number}' if many else ''}: {of_differences(differ)}")
    return lines


def of_differences(found: Differences) -> str:
    """Share, sizes and places of the elements that differ."""
    parts = [f"{_small_share(found.share)} of the elements differ"]
    if found.ulps:
        counts = ", ".join(f"{bucket(least)}: {n}" for least, n in found.ulps.items())
        parts.append(f"by up to {found.largest_ulps} units in the last place ({counts})")
    places = ", ".join(f"({', '.join(map(str, place))})" for place in found.positions if place)
    return "; ".join([*parts, f"first at {places}"] if places else parts)


def _small_share(share: float) -> str:
    """In per cent, with as many digits as show that it is not 0."""
    return f"{share:.1%}" if share >= 0.0005 else f"{100 * share:.1g}%"


def bucket(least: int) -> str:
    """The numbers of units in the last place from a power of two to the next."""
    return "1" if least == 1 else f"{least}-{2 * least - 1}"


def of_pairs(found: Examination) -> str:
    """How many pairs differ, and when."""
    count, steps = len(found.pairs), len(found.pairs[0].distances) - 1
    parted = [pair for pair in found.pairs if pair.step is not None]
    if not parted:
        return f"0 of {count} pairs of {steps} steps differ ({_below(rule_of_three(count))})"
    first = min(parted, key=lambda pair: pair.step or 0)
    return (
        f"{len(parted)} of {count} pairs of {steps} steps differ, the first in step {first.step}: "
        f"{first.what}"
    )


def of_axis(axis: Axis) -> str:
    """What an axis of stress showed."""
    if axis.skipped:
        return f"skipped: {axis.skipped}"
    if axis.finding:
        if not axis.shows:
            return no_difference(axis.finding)
        module = axis.finding.operation.module if axis.finding.operation else ""
        return of_finding(axis.finding) + (f" (module {module})" if module else "")
    assert axis.pair is not None
    if not axis.shows:
        return "the first step in two parts has the bits of one"
    return f"the first step in two parts ends {axis.pair.distances[-1]:.1e} away"


def of_attribution(found: Attribution) -> str:
    """What was attributed."""
    sides = f"sides that differ in {', '.join(found.apart)}" if found.apart else "replays"
    what = f"{len(found.pairs)} pairs of {sides}, of {found.steps} steps,"
    return f"{what} end {of_estimate(_not_negative(found.distance), '.2e')} apart"


def of_share(share: Share) -> str:
    """What a twin removes."""
    rest = f"{share.differing} of {len(share.pairs)} pairs still part"
    bound = "" if share.differing else f" ({_below(share.bound)})"
    return f"{share_and_interval(share)}; {rest}{bound}"


def share_and_interval(share: Share) -> str:
    """A share with what its interval allows to say of it."""
    if math.isnan(share.share.mean):
        return f"{mean_share(share)}: a distance is not finite"
    if share.too_few:
        few = len(share.pairs) < FEWEST_PAIRS
        return f"{mean_share(share)}{f', {FEWEST_PAIRS} are needed' if few else ' part'}"
    mean, low, high = map(percent, share.share[:3])
    interval = "" if math.isnan(share.share.low) else f" [{low}, {high}]"
    return f"{mean}{interval}{'' if share.certain else ', may be chance'}"


def mean_share(share: Share) -> str:
    """A share, where the pairs tell one."""
    if math.isnan(share.share.mean):
        return "no share"
    return "too few pairs" if share.too_few else percent(share.share.mean)


def percent(share: float) -> str:
    """A share in per cent; how far below -100 % it is says nothing more."""
    return "below -100%" if share < -1 else format(share, "z.0%")


def of_amplification(found: Amplification) -> str:
    """What becomes of a flip."""
    growth = found.growth
    rate = f"grows at a rate of {of_estimate(growth, '.3f')} per step"
    if growth.mean < 0:
        shrinking = Estimate(-growth.mean, -growth.high, -growth.low, growth.standard_error)
        rate = f"shrinks at a rate of {of_estimate(shrinking, '.3f')} per step"
    if growth.mean > 0:
        rate += f", twice as large every {math.log(2) / growth.mean:.1f} steps"
    if math.isnan(growth.mean):
        rate = "does not grow"
    elif math.isnan(growth.low):
        rate += ", by one flip alone"
    lines = [f"one unit in the last place, flipped before step {found.inject_at}, {rate}"]
    if found.absorbed:
        lines.append(f"{found.absorbed} of {len(found.pairs)} flips are rounded away")
    if found.churn:
        flips, count = found.first_flips, len(found.pairs)
        if flips:
            churn = of_estimate(_not_negative(found.churn), ".2%")
            lines.append(
                f"a prediction flips in {len(flips)} of {count} pairs, the first after step "
                f"{flips[0]}; churn after step {found.steps}: {churn}"
            )
        else:
            lines.append(f"no prediction flips in {count} pairs ({_below(rule_of_three(count))})")
    return "; ".join(lines)


def of_estimate(found: Estimate, form: str) -> str:
    """A mean with its interval, or without where too few measurements leave none."""
    mean = format(found.mean, form)
    if math.isnan(found.low):
        return mean
    return f"{mean} [{format(found.low, form)}, {format(found.high, form)}]"


def _not_negative(found: Estimate) -> Estimate:
    """The estimate of what cannot be below 0."""
    return found if math.isnan(found.low) else found._replace(low=max(0.0, found.low))


def _below(bound: float) -> str:
    return f"p < {bound:.0%} at 95 %" if bound < 1 else "too few to bound how many would"
