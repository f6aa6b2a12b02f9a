"""State of the open blocks: `reduction_mode`, `backend` and `distributed.class_parallel`.

A block applies to the thread or asyncio task that opened it: a ContextVar stores the open blocks.
Three cases need more than that:

- Blocks may close in any order (generators, ExitStack): each removes only itself.
- Autograd runs backward passes on a GPU, and deeply nested ones, in threads of its own, which may
  recompute a loss (activation checkpointing). It passes PyTorch's thread-local objects on to
  them, so the open blocks are stored there, too.
- torch.compile cannot trace a ContextVar. It can read a module attribute, `current`, and guards its
  graph on it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import Any, NamedTuple

import torch

UNSET = ""


class Choices(NamedTuple):
    """The settings of the open blocks; the innermost of each kind wins."""

    mode: str | None = UNSET  # None: PyTorch's own switch decides
    backend: str | None = None  # None: no block chooses one
    class_exchange: Any = None  # the `_class_shards.Exchange` of class_parallel


class _State(NamedTuple):
    choices: Choices
    blocks: tuple[dict[str, Any], ...]  # the settings of each open block, innermost last
    handed_over: Any  # in an autograd thread: (thread, state) of the thread that called backward


_NONE = _State(Choices(), (), None)
_open: ContextVar[_State] = ContextVar("churn_kernels", default=_NONE)
_traced: Choices | None = None  # in a block that torch.compile traces
_used = False  # whether any block was ever opened

_KEY = "churn_kernels"  # of PyTorch's thread-local objects
_this = sys.modules[__name__]


def choices() -> Choices:
    """The settings of the blocks that are open in this thread and task."""
    if torch.compiler.is_compiling():
        return _this.current if _traced is None else _traced
    return _state().choices if _used else _NONE.choices


def __getattr__(name: str) -> Choices:
    if name == "current":
        return _state().choices
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _handed_over() -> Any:
    """(thread, state) passed on by another thread, or None."""
    if torch._C._is_key_in_tls(_KEY):
        handed_over = torch._C._get_obj_in_tls(_KEY)
        if handed_over[0] != get_ident():
            return handed_over
    return None


def _state() -> _State:
    state = _open.get()
    if state is _NONE and (handed_over := _handed_over()):
        return handed_over[1]
    return state


def _set_blocks(blocks: tuple[dict[str, Any], ...], handed_over: Any) -> None:
    global _used
    _used = True
    chosen: dict[str, Any] = handed_over[1].choices._asdict() if handed_over else {}
    for block in blocks:
        chosen |= block
    state = _State(Choices(**chosen), blocks, handed_over) if blocks else _NONE
    _open.set(state)
    only_handed_over = handed_over and not blocks
    torch._C._stash_obj_in_tls(_KEY, handed_over if only_handed_over else (get_ident(), state))


@contextmanager
def block(**chosen: Any) -> Iterator[None]:
    """A block that sets these fields of `Choices`."""
    if torch.compiler.is_compiling():
        global _traced
        before = _traced
        _traced = choices()._replace(**chosen)
        try:
            yield
        finally:
            _traced = before
        return
    state = _open.get()
    _set_blocks((*state.blocks, chosen), _handed_over() if state is _NONE else state.handed_over)
    try:
        yield
    finally:
        state = _open.get()
        blocks = tuple(other for other in state.blocks if other is not chosen)
        _set_blocks(blocks, state.handed_over)
