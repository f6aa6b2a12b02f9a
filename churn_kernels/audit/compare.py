"""The first difference between two recorded runs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from churn_kernels.audit.trace import (
    BEFORE,
    RANDOM,
    VALUE,
    Step,
    Trace,
    TraceError,
    base_of,
    without_round,
)

_MEANING = {
    "buffers": "buffers (such as batch normalisation's means) differ by the forward pass or by "
    "a change before it",
    "gradients": "the data, the forward or the backward pass, or state that was not named",
    "parameters": "the optimizer's step: parameters, gradients, state and settings went into it "
    "with the same bits",
    "optimizer": "the optimizer's state: gradients and parameters have the same bits",
}
_MEANING_BEFORE = {
    "buffers": "the buffers were changed between the steps, or by a forward pass ahead of the "
    "first value that the step observes",
    "parameters": "the parameters were changed between the steps, in one run or in both",
    "optimizer": "the optimizer's state was changed between the steps, in one run or in both",
}


@dataclass(frozen=True)
class Difference:
    """The first mismatch of two runs.

    Attributes:
        step: the first step whose hashes differ; 0 is the state before the first.
        first: name of what differs first, in the order in which the step comes to it; what was
            changed between this step and the one before has a name that ends in " before".
        also: names of the rest that differs in that step.
        same: names of what still has the same bits in it.
        values: of a setting, such as the learning rate, what it is in the two runs.
    """

    step: int
    first: str
    also: list[str]
    same: list[str]
    values: tuple[str, str] | None = None

    @property
    def when(self) -> str:
        """When it shows, in words."""
        if self.step == 0:
            return "before the first step"
        return f"{'before' if self._is_before else 'in'} step {self.step}"

    @property
    def _is_before(self) -> bool:
        return without_round(self.first).endswith(BEFORE)

    @property
    def what(self) -> str:
        """What differs first, with its values where they are known."""
        name = base_of(self.first)
        return f"{name} {self.values[0]} against {self.values[1]}" if self.values else name

    @property
    def meaning(self) -> str:
        """What that says about the cause."""
        base = base_of(self.first)
        if base.startswith(RANDOM):
            return "a random number was drawn in one run only, or the seeds differ"
        if self.values:
            return f"{base} was set to another value in one run"
        if self.step == 0:
            return "the runs begin with other values"
        if self._is_before:
            return _MEANING_BEFORE.get(base, f"{base} changed between the steps, to other values")
        return _MEANING.get(base, "what the run was given to it, or computed up to there")


@dataclass(frozen=True)
class Generator:
    """A random number generator whose state differs from the start, or where a run was resumed.

    Attributes:
        name: as in a trace.
        drawn: the first step in or before which a run drew from it; None if none did.
        after: the step after which a run was resumed with another state; 0 for the start.
    """

    name: str
    drawn: int | None
    after: int = 0


@dataclass(frozen=True)
class Comparison:
    """Two traces side by side.

    Attributes:
        a, b: the traces.
        steps: steps that both have.
        difference: the first one; None if what both have is the same. A generator that differs from
            the start, or where a run was resumed, is none before something was drawn from it.
        then: where random states are all that differs there, the first difference of anything else.
        generators: those that differ from the start, or where a run was resumed.
        settings: names of what the two ran on that differs, with both values; where it changed
            when an interrupted run went on, the step after which, as well.
    """

    a: Trace
    b: Trace
    steps: int
    difference: Difference | None
    settings: dict[str, tuple[Any, Any]]
    then: Difference | None = None
    generators: tuple[Generator, ...] = ()


def compare(a: Trace, b: Trace) -> Comparison:
    """Find the first difference between two recorded runs.

    Raises: TraceError if they are not runs of one model and optimizer, if their hashes are of
        different kinds, or if one has no step.
    """
    for name, what in (
        ("hash_spec", "hashes of one HASH_SPEC"),
        ("tensors", "runs of one model, with the same names, dtypes and shapes"),
        ("optimizer", "runs with the same kind of optimizer"),
        ("state", "runs with the same named state"),
    ):
        if a.header[name] != b.header[name]:
            got = "" if name == "tensors" else f", got {a.header[name]} and {b.header[name]}"
            raise TraceError(f"{a.path} and {b.path} must hold {what}{got}; record both anew")
    for trace in (a, b):
        if not trace.steps:
            damage = f"{trace.damage}; " if trace.damage else ""
            raise TraceError(
                f"{trace.path} must hold a step, got none; {damage}record the run anew"
            )
    both = list(zip(a.steps, b.steps, strict=False))
    settings = _differing(a.header["manifest"], b.header["manifest"])
    for after in sorted({one.after for trace in (a, b) for one in trace.resumptions}):
        if any(trace.manifest(after) != trace.manifest(after + 1) for trace in (a, b)):
            changed = _differing(a.manifest(after + 1), b.manifest(after + 1))
            settings |= {f"{name} after step {after}": pair for name, pair in changed.items()}
    generators = _generators(both, (a, b))
    found = _differences(both, {one.name for one in generators})
    difference = next(found, None)
    then = None
    if difference and all(map(_is_random, (difference.first, *difference.also))):
        then = next((one for one in found if not _is_random(one.first)), None)
    return Comparison(
        a,
        b,
        len(both),
        difference,
        settings,
        then,
        generators,
    )


def _is_random(name: str) -> bool:
    return name.startswith(RANDOM)


def _generators(
    both: list[tuple[Step, Step]], traces: tuple[Trace, Trace]
) -> tuple[Generator, ...]:
    """A step has the state of a generator only if something was drawn from it."""
    found: dict[str, Generator] = {}
    known: tuple[dict[str, str], dict[str, str]] = ({}, {})  # of either run, up to a step
    for steps in both:
        number = steps[0].number
        moved: list[str] = []
        for states, step, trace in zip(known, steps, traces, strict=True):
            states |= {base_of(n): x for n, x in step.hashes.items() if _is_random(n)}
            moved += states if number == 0 else ()
            for one in trace.resumptions:
                if one.after == number:
                    moved += [n for n, x in one.random_states.items() if states.get(n) != x]
                    states |= one.random_states
        for name in moved:
            if name not in found and known[0].get(name) != known[1].get(name):
                later = (x.number for x, y in both[number + 1 :] if name in _bases(x, y))
                found[name] = Generator(name, next(later, None), number)
    return tuple(found.values())


def _bases(a: Step, b: Step) -> set[str]:
    return {base_of(name) for name in (*a.hashes, *b.hashes)}


def _differences(
    both: list[tuple[Step, Step]], unequal_generators: set[str]
) -> Iterator[Difference]:
    """Each step that differs."""
    values: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for a, b in both:
        known = tuple(map(dict, values))
        for of_run, step in zip(values, (a, b), strict=True):
            of_run.update({base_of(n): x for n, x in step.hashes.items() if x.startswith(VALUE)})
        if a.hashes == b.hashes:
            continue
        names = _merged(list(a.hashes), list(b.hashes))
        differ = [n for n in names if a.hashes.get(n) != b.hashes.get(n)]
        if a.number == 0:
            differ = [n for n in differ if n not in unequal_generators]
        # What was drawn from one that differed before does ahead of anything made of it.
        differ.sort(key=lambda n: base_of(n) not in unequal_generators)
        if differ:
            first, *also = differ
            pair = None
            if VALUE in (a.hashes.get(first, "")[:1], b.hashes.get(first, "")[:1]):
                pair = (_value(a, first, known[0]), _value(b, first, known[1]))
            same = [n for n in names if n not in differ and base_of(n) not in unequal_generators]
            yield Difference(a.number, first, also, same, pair)


def _value(step: Step, name: str, known: dict[str, str]) -> str:
    """What a setting is in a run, which says so only in the step that changes it."""
    return step.hashes.get(name, known.get(base_of(name), "nothing")).removeprefix(VALUE)


def _merged(a: list[str], b: list[str]) -> list[str]:
    """The names of both, in the order of either."""
    names = list(a)
    place = 0
    for name in b:
        if name in a:
            place = names.index(name) + 1
        else:
            names.insert(place, name)
            place += 1
    return names


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys((*a, *b))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
