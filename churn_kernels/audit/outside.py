"""What a step can reach that nobody brings back between its replays."""

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from churn_kernels.audit.hashes import data_hash, optimizer_settings, optimizer_state
from churn_kernels.audit.state import can_be_kept, contents

_DEPTH = 4
_OF_EVERY_MODULE = vars(nn.Module())
_PLAIN = (int, float, complex, str, bytes, bool, type(None))


def changed_outside(
    step: Callable[..., Any],
    run: Callable[[], Any],
    restore: Callable[[], Any],
    known: Mapping[str, Any],
) -> tuple[str, ...]:
    """Names of what a step reaches by its variables that is not the same before each replay.

    Args:
        step: whose variables are followed: those around it, those of its module that it names, and
            the attributes of what it is bound to.
        run: runs it.
        restore: called before it.
        known: what is brought back, by name, and followed no further; but for what a model holds
            besides its tensors.
    Returns: names as the step spells them; among them iterators that cannot be set back.
    """
    restore()
    before = _reached(step, known)
    run()
    restore()
    after = _reached(step, known)
    return tuple(name for name in after if after[name] is None or before.get(name) != after[name])


def _reached(step: Callable[..., Any], known: Mapping[str, Any]) -> dict[str, str | None]:
    """A hash of each object that has a state, by name; None for iterators that hide theirs."""
    found: dict[str, str | None] = {}
    seen = {id(x) for x in known.values()}
    models = {name: x for name, x in known.items() if isinstance(x, nn.Module)}
    for model in models.values():
        seen |= {id(y) for y in (*model.modules(), *model.parameters(), *model.buffers())}
    for name, model in models.items():
        for path, module in model.named_modules(prefix=name):
            for attribute, value in vars(module).items():
                if attribute not in _OF_EVERY_MODULE:
                    _follow(f"{path}.{attribute}", value, 1, seen, found)
            _follow_methods(type(module), 1, seen, found)
    _follow("", step, 0, seen, found)
    return found


def _follow(name: str, value: Any, depth: int, seen: set[int], found: dict[str, Any]) -> None:
    if isinstance(value, _PLAIN):
        found[name] = repr(value)
        return
    if id(value) in seen or depth > _DEPTH or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, types.MethodType):
        _follow(name, value.__func__, depth, seen, found)
        _follow(name or "self", value.__self__, depth, seen, found)
    elif isinstance(value, partial):
        for i, item in enumerate((value.func, *value.args, *value.keywords.values())):
            _follow(f"{name}[{i}]" if i else name, item, depth, seen, found)
    elif isinstance(value, types.FunctionType):
        for variable, item in _variables(value):
            _follow(variable, item, depth + 1, seen, found)
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _follow(f"{name}[{key!r}]", item, depth + 1, seen, found)
        found[name] = repr(len(value))
    elif isinstance(value, nn.Module):
        seen |= {id(y) for y in (*value.modules(), *value.parameters(), *value.buffers())}
        found[name] = data_hash([contents(value), [m.training for m in value.modules()]])()
    elif isinstance(value, torch.optim.Optimizer):
        found[name] = data_hash([optimizer_state(value), optimizer_settings(value)])()
    elif isinstance(value, np.ndarray | set | frozenset):
        found[name] = data_hash(value)()
    elif isinstance(value, Tensor) or can_be_kept(value) or hasattr(value, "state_dict"):
        with suppress(Exception):  # the object's own; what it does not tell is left out
            found[name] = data_hash(contents(value))()
    elif isinstance(value, Iterator):
        found[name] = None
    elif _is_of_the_user(type(value)):
        _follow_methods(type(value), depth + 1, seen, found)
        for attribute, item in vars(value).items() if hasattr(value, "__dict__") else ():
            _follow(f"{name}.{attribute}", item, depth + 1, seen, found)


def _follow_methods(kind: type, depth: int, seen: set[int], found: dict[str, Any]) -> None:
    """What the methods of a class of the user's name."""
    for one in filter(_is_of_the_user, kind.__mro__):
        for value in vars(one).values():
            if isinstance(value, types.FunctionType):
                _follow("", value, depth, seen, found)


def _variables(function: types.FunctionType) -> list[tuple[str, Any]]:
    """What a function names: variables around it, and those of its module."""
    found = []
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found.append((name, cell.cell_contents))
        except ValueError:  # not assigned yet
            continue
    if _is_of_the_user(function):
        names = _names(function.__code__)
        found += [(n, function.__globals__[n]) for n in names if n in function.__globals__]
    return [(name, value) for name, value in found if not isinstance(value, types.ModuleType)]


def _names(code: types.CodeType) -> list[str]:
    """Global names in a function, and in those that it defines."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return list(dict.fromkeys([*code.co_names, *(n for c in inner for n in _names(c))]))


def _is_of_the_user(thing: Any) -> bool:
    """Not of Python's own, PyTorch's or this library's modules."""
    package = str(getattr(thing, "__module__", "")).partition(".")[0]
    return package not in sys.stdlib_module_names - {"__main__"} | {
        *("torch", "numpy", "churn_kernels", "builtins"),
    }
