"""The operator that first computes something else from the same inputs.

A step is replayed, and every operator is logged (`log`). Of two logs the first operator whose
inputs agree and whose outputs differ is the cause; what differs after it, it made so.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from churn_kernels.audit.log import Operation, OperatorLog
from churn_kernels.audit.outside import changed_outside
from churn_kernels.intervals import rule_of_three

AroundReplay = Callable[[int], AbstractContextManager[Any]]
"""The block that a replay of a number from 0 runs in."""

Run = Callable[[int, int, int], OperatorLog]
"""Logs the replay of a number from 0, keeping the outputs of the operation of an index, which may
be -1 for none, with memory that nothing has written filled with a byte."""

# The second shows where it is added to other numbers, of any dtype.
_FILL, _OTHER_FILL = 0x00, 0x3F


@dataclass(frozen=True)
class Differences:
    """How two tensors differ.

    Attributes:
        share: of the elements that differ, in (0, 1].
        positions: indices of the first of them.
        ulps: of floating-point tensors, how many elements differ by 1, by 2 or 3, by 4 to 7, ..
            units in the last place, by the lower bound; of others, empty.
        largest_ulps: the largest such difference; 0 where there is none.
        largest: the largest absolute difference.
    """

    share: float
    positions: list[tuple[int, ...]]
    ulps: dict[int, int] = field(default_factory=dict)
    largest_ulps: int = 0
    largest: float = 0.0


def differences(a: Tensor, b: Tensor, positions: int = 8) -> Differences | None:
    """How two tensors of one dtype and shape differ; None if all their bits are the same."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    a, b = (x.detach().cpu().resolve_conj().resolve_neg().contiguous() for x in (a, b))
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    bits = [x.view(kinds[x.element_size()]).to(torch.int64) for x in (a, b)]
    differ = bits[0] != bits[1]
    if not differ.any():
        return None
    where = [tuple(place) for place in differ.nonzero()[:positions].tolist()]
    share = differ.double().mean().item()
    if not a.is_floating_point():
        return Differences(share, where)
    top = 1 << (8 * a.element_size() - 1)
    # Floats in order: those of negative sign count down from -1.
    ranks = [torch.where(x < 0, -(x & (top - 1)), x) for x in bits]
    finite = a.isfinite() & b.isfinite() & differ
    apart = (ranks[0] - ranks[1]).abs()[finite]
    apart = apart[apart > 0]
    ulps: dict[int, int] = {}
    for bucket in range(63):
        within = int((apart >> bucket == 1).sum())
        if within:
            ulps[1 << bucket] = within
    largest = (a.double() - b.double()).abs()[finite]
    return Differences(
        share,
        where,
        ulps,
        int(apart.max()) if len(apart) else 0,
        largest.max().item() if len(largest) else 0.0,
    )


@dataclass(frozen=True)
class Finding:
    """What replays of a step showed.

    Attributes:
        verdict: "operator": `operation` made different outputs of the same inputs. "input": it was
            given different inputs that no operator made: data, or memory written from outside.
            "sequence": the replays called different operators. "memory": it reads memory that
            nothing has written: with other bytes there, the step leaves other bits behind. "none":
            all replays were the same.
        index: of the operation in the step, from 0; -1 with "none".
        log: all operations of the first replay.
        other_log: those of the replay that differs; with "none", of the last one.
        outputs: how its outputs differ, one for each; empty where they could not be caught twice.
        replays: how often the step was run until two differed.
        outside: with "input" and "sequence", the names of what the step can reach that was not the
            same before each replay, or that could not be set back.
    """

    verdict: str
    index: int
    log: list[Operation]
    other_log: list[Operation]
    outputs: list[Differences | None]
    replays: int
    outside: tuple[str, ...] = ()

    @property
    def operation(self) -> Operation | None:
        """The operation, as the first replay has it; None with "none", or where it has ended."""
        return self.log[self.index] if 0 <= self.index < len(self.log) else None

    @property
    def other(self) -> Operation | None:
        """The same call in the replay that differs."""
        return self.other_log[self.index] if 0 <= self.index < len(self.other_log) else None

    @property
    def bound(self) -> float:
        """With "none": below it is the share of steps that differ, at 95 % (rule of three)."""
        return rule_of_three(self.replays - 1)


def find_operator(
    step: Callable[[], Any],
    model: nn.Module,
    restore: Callable[[], Any],
    *,
    replays: int = 5,
    around: AroundReplay = nullcontext,
) -> Finding:
    """Replay a step until two replays differ, and name the first operator that makes them.

    Args:
        step: one training step: forward, backward, optimizer, or a part of that.
        model: whose modules are named.
        restore: brings everything that the step starts from back to one state, random states
            included; called before each replay. `snapshot` makes such a function.
        replays: how often to run the step, at least 2; more only to catch the outputs that differ.
        around: the block that a replay runs in, by the replay's number from 0: to compare settings,
            let it alternate between them, as `stress` does.
    Returns: a `Finding`. Every operator's tensors are hashed, so a step takes many times as long;
        it runs once before it is logged, for what is made at first use.
    Raises: ValueError for fewer than two replays.
    """

    def run(replay: int, keep: int, fill: int) -> OperatorLog:
        restore()
        with around(replay), OperatorLog(model, keep, fill) as log:
            step()
        return log

    if replays > 1:
        restore()
        step()
    found = first_difference(run, replays)
    return with_outside(found, lambda: changed_outside(step, step, restore, {"model": model}))


def first_difference(run: Run, replays: int) -> Finding:
    """The first difference between replays of any kind, on one device or on two.

    Raises: ValueError for fewer than two replays.
    """
    if replays < 2:
        raise ValueError(
            f"replays must be at least 2, got {replays}; one has nothing to differ from"
        )
    first = run(0, -1, _FILL)
    one = again = first.operations
    for replay in range(1, replays):
        again = run(replay, -1, _FILL).operations
        found = _where_logs_part(one, again)
        if found is None:
            continue
        verdict, index = found
        outputs = _catch(run, index, replay, replays) if verdict == "operator" else []
        return Finding(verdict, index, one, again, outputs, replay + 1)
    other = run(0, -1, _OTHER_FILL)
    if first.left != other.left:
        reader = _reads_what_was_not_written(one, other.operations)
        if reader is not None:
            return Finding("memory", reader, one, other.operations, [], replays + 1)
    return Finding("none", -1, one, again, [], replays)


def with_outside(found: Finding, look: Callable[[], tuple[str, ...]]) -> Finding:
    """A finding with what changes outside, which `look` finds, where nothing else explains it."""
    return replace(found, outside=look()) if found.verdict in ("input", "sequence") else found


def _reads_what_was_not_written(a: list[Operation], b: list[Operation]) -> int | None:
    """The first operation that made new tensors of other bytes in memory that nothing wrote.

    What only fills in a part of its argument has left the rest as it was.
    """
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if (one.name, one.tensors) != (other.name, other.tensors):
            return index
        if one.outputs != other.outputs and not one.in_place:
            return index if one.inputs != other.inputs else None
    return None


def _where_logs_part(a: list[Operation], b: list[Operation]) -> tuple[str, int] | None:
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if (one.name, one.tensors) != (other.name, other.tensors):
            return "sequence", index
        if one.inputs != other.inputs:
            return "input", index
        if one.outputs != other.outputs:
            return "operator", index
    return None if len(a) == len(b) else ("sequence", min(len(a), len(b)))


def _catch(run: Run, index: int, differed: int, replays: int) -> list[Differences | None]:
    """The operation's outputs in two more replays that differ, side by side."""
    kept = run(0, index, _FILL).kept
    for replay in range(differed, differed + max(replays, 10)):
        again = run(replay, index, _FILL).kept
        if len(kept) == len(again):
            found = [differences(a, b) for a, b in zip(kept, again, strict=True)]
            if any(found):
                return found
    return []
