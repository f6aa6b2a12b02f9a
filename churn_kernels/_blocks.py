"""What the open blocks choose: `reduction_mode`, `backend` and `distributed.class_parallel`.

A block holds for the thread or the asyncio task that opened it: a ContextVar keeps the open ones.
Three places need more than that:

- Blocks may close in any order (generators, ExitStack): each takes away itself, and nothing else.
- Autograd runs backward passes of a GPU, and deeply nested ones, in threads of its own, which may
  compute a loss again (activation checkpointing). It hands PyTorch's thread-local objects over to
  them, so the open blocks are kept there, too.
- torch.compile cannot trace a ContextVar. It can read an attribute of a module, and reads it again
  before each call to find out whether its graph still fits: `current`.
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
    """What holds where the open blocks are; of each kind the innermost decides."""

    mode: str | None = UNSET  # None: PyTorch's own switch decides
    backend: str | None = None  # None: no block chooses one
    class_exchange: Any = None  # what brings the classes together that the processes hold


class _State(NamedTuple):
    choices: Choices
    blocks: tuple[dict[str, Any], ...]  # the choices of each open block, the innermost last
    handed_over: Any  # in a thread of autograd's: (thread, state) from the one that called backward


_NONE = _State(Choices(), (), None)
_open: ContextVar[_State] = ContextVar("churn_kernels", default=_NONE)
_traced: Choices | None = None  # in a block that torch.compile traces
_used = False  # whether there ever was a block: without, nothing is handed over

_KEY = "churn_kernels"  # of PyTorch's thread-local objects
_this = sys.modules[__name__]


def choices() -> Choices:
    """What the blocks choose that are open in this thread and task."""
    if torch.compiler.is_compiling():
        return _this.current if _traced is None else _traced
    return _state().choices if _used else _NONE.choices


def __getattr__(name: str) -> Choices:
    if name == "current":
        return _state().choices
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _handed_over() -> Any:
    """What another thread has handed over: (thread, state), or None."""
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


def _keep(blocks: tuple[dict[str, Any], ...], handed_over: Any) -> None:
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
    """A block in which these fields of `Choices` hold."""
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
    _keep((*state.blocks, chosen), _handed_over() if state is _NONE else state.handed_over)
    try:
        yield
    finally:
        state = _open.get()
        blocks = tuple(other for other in state.blocks if other is not chosen)
        _keep(blocks, state.handed_over)
