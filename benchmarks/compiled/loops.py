"""Finds a kernel's loops in its control flow, since compilers order blocks arbitrarily."""

from collections.abc import Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One line of a listing."""

    address: int
    name: str
    jump: int | None  # target address, if it can jump
    falls: bool  # control may fall through to the next instruction


def reached(start: int, edges: Sequence[Sequence[int]], without: int | None) -> set[int]:
    """Nodes reachable from `start`, inclusive, by paths that avoid `without`."""
    found = set() if start == without else {start}
    waiting = list(found)
    while waiting:
        for place in edges[waiting.pop()]:
            if place != without and place not in found:
                found.add(place)
                waiting.append(place)
    return found


def innermost_loops(instructions: Sequence[Instruction]) -> tuple[int, ...]:
    """Instructions of each innermost loop, in order of their beginnings.

    A loop begins at an instruction that dominates a jump back to it, and contains
    everything that leads to that jump.
    """
    places = {instruction.address: n for n, instruction in enumerate(instructions)}
    ahead: list[list[int]] = [[] for _ in instructions]
    behind: list[list[int]] = [[] for _ in instructions]
    targets = set()
    for n, instruction in enumerate(instructions):
        if instruction.falls and n + 1 < len(instructions):
            ahead[n].append(n + 1)
        if instruction.jump in places:
            ahead[n].append(places[instruction.jump])
            targets.add(places[instruction.jump])
        for place in ahead[n]:
            behind[place].append(n)
    live = reached(0, ahead, None)
    loops: dict[int, set[int]] = {}
    for first in targets & live:
        around = reached(0, ahead, first)
        for last in behind[first]:
            if last in live and last not in around:
                body = reached(last, behind, first) & live
                loops.setdefault(first, {first}).update(body)
    inner = [first for first in sorted(loops) if not loops[first] & (loops.keys() - {first})]
    return tuple(len(loops[first]) for first in inner)
