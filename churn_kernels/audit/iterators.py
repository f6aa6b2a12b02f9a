"""Iterators that can be set back, for steps that take their batches from one."""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.data import dataloader

from churn_kernels.audit.generators import random_states

_ATTRIBUTE = "_churn_rewindable"


class _Mark:
    """A position that somebody may want back."""

    def __init__(self, position: int) -> None:
        self.position = position


class Rewindable:
    """An iterator over anything, such as a `DataLoader` or a generator, that can be set back.

    What was taken since the earliest position that somebody may go back to is held in memory, with
    the random states it left behind; nothing is while there is no such position. Its items are
    made outside of what is logged or pinned: replays of a step get the same ones.

        batches = ck.audit.Rewindable(loader)
        training = ck.audit.Training(model, optimizer, step, state={"batches": batches})

    Args:
        iterable: whose items it gives, once each.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._items = iter(iterable)
        self._held: deque[tuple[Any, Callable[[], None]]] = deque()
        self._begin = self.position = 0
        self._marks: weakref.WeakSet[_Mark] = weakref.WeakSet()

    def __iter__(self) -> "Rewindable":
        return self

    def __next__(self) -> Any:
        place = self.position - self._begin
        if place < len(self._held):
            item, restore = self._held[place]
            restore()
        else:
            with _disable_current_modes():
                item = next(self._items)
            if self._marks:
                self._held.append((item, random_states()))
        self.position += 1
        self._forget()
        if not self._held:
            return item
        with _disable_current_modes():  # a step may write to its batch
            return tree_map_only(Tensor, torch.clone, item)

    def state_dict(self) -> dict[str, int]:
        """How many items were taken."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position: forth by taking items, back to where something still holds on to.

        Raises: ValueError if that is further back.
        """
        position = state["position"]
        if position < self._begin:
            raise ValueError(
                f"position must be at least {self._begin}, got {position}; what came before is "
                f"forgotten, so begin with a new iterator"
            )
        self.position = min(position, self._begin + len(self._held))
        while self.position < position:
            next(self)

    def mark(self) -> Callable[[], None]:
        """A function that sets it back to where it is; while that lives, items are held."""
        mark = _Mark(self.position)
        self._marks.add(mark)

        def restore() -> None:
            self.position = mark.position

        return restore

    def _forget(self) -> None:
        """Drop what nobody can go back to."""
        least = min((mark.position for mark in self._marks), default=self.position)
        for _ in range(min(least, self.position) - self._begin):
            self._begin += 1
            if self._held:
                self._held.popleft()


def rewindable_loader(value: Any) -> Rewindable | None:
    """Of an iterator of a `DataLoader`, what holds its batches; None for anything else."""
    if not isinstance(value, dataloader._BaseDataLoaderIter):
        return None
    found = value.__dict__.get(_ATTRIBUTE)
    if found is None:
        found = Rewindable(_calls(value._next_data))
        value.__dict__[_ATTRIBUTE] = found
        value.__dict__["_next_data"] = found.__next__
    return found


def _calls(function: Callable[[], Any]) -> Iterator[Any]:
    while True:
        try:
            item = function()
        except StopIteration:
            return
        yield item
