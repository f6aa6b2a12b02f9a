"""The first difference between two recorded runs."""

from dataclasses import dataclass
from typing import Any

from churn_kernels.audit.trace import Trace, TraceError

_MEANING = {
    "random state": "a random number was drawn in one run only, or the seeds differ",
    "buffers": "buffers (such as batch normalisation's means) differ: the forward pass did",
    "gradients": "the backward pass, or what the forward pass did not show",
    "parameters": "the optimizer's step: gradients and state went into it with the same bits",
    "optimizer": "the optimizer's state or settings: gradients and parameters have the same bits",
}


@dataclass(frozen=True)
class Difference:
    """Where two runs part ways.

    Attributes:
        step: the first step whose hashes differ; 0 is the state before the first.
        first: name of what differs first, in the order in which the step comes to it.
        also: names of the rest that differs in that step.
        same: names of what still has the same bits in it.
    """

    step: int
    first: str
    also: list[str]
    same: list[str]

    @property
    def meaning(self) -> str:
        """What that says about the cause."""
        return _MEANING.get(self.first, "what the run was given to it, or computed up to there")


@dataclass(frozen=True)
class Comparison:
    """Two traces side by side.

    Attributes:
        a, b: the traces.
        steps: steps that both have.
        difference: the first one; None if what both have is the same.
        settings: names of what the two ran on that differs, with both values; where it changed
            when an interrupted run went on, the step after which, as well.
    """

    a: Trace
    b: Trace
    steps: int
    difference: Difference | None
    settings: dict[str, tuple[Any, Any]]


def compare(a: Trace, b: Trace) -> Comparison:
    """Find the first difference between two recorded runs.

    Raises: TraceError if they are not runs of one model and optimizer, if their hashes are of
        different kinds, or if one has no step.
    """
    for name, what in (
        ("hash_spec", "hashes of one HASH_SPEC"),
        ("tensors", "runs of one model, with the same names, dtypes and shapes"),
        ("optimizer", "runs with the same kind of optimizer"),
    ):
        if a.header[name] != b.header[name]:
            got = "" if name == "tensors" else f", got {a.header[name]} and {b.header[name]}"
            raise TraceError(f"{a.path} and {b.path} must hold {what}{got}; record both anew")
    for trace in (a, b):
        if not trace.steps:
            raise TraceError(f"{trace.path} must hold a step, got none; {trace.damage}")
    both = list(zip(a.steps, b.steps, strict=False))
    settings = _differing(a.header["manifest"], b.header["manifest"])
    for after in sorted({one.after for trace in (a, b) for one in trace.resumptions}):
        if any(trace.manifest(after) != trace.manifest(after + 1) for trace in (a, b)):
            changed = _differing(a.manifest(after + 1), b.manifest(after + 1))
            settings |= {f"{name} after step {after}": pair for name, pair in changed.items()}
    return Comparison(
        a,
        b,
        len(both),
        next((found for pair in both if (found := _difference(*pair))), None),
        settings,
    )


def _difference(a: Any, b: Any) -> Difference | None:
    if a.chain == b.chain and a.hashes == b.hashes and a.number == b.number:
        return None
    names = list(dict.fromkeys((*a.hashes, *b.hashes)))
    differ = [name for name in names if a.hashes.get(name) != b.hashes.get(name)]
    if not differ:
        return None
    first, *also = differ
    return Difference(a.number, first, also, [name for name in names if name not in differ])


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys((*a, *b))
    return {name: (a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)}
