"""Errors of somebody else's code, each in one line that says where."""

import inspect
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import churn_kernels
from churn_kernels._printable import from_here, printable

_OURS = tuple(str(Path(module.__file__ or "").parent) for module in (torch, churn_kernels))
_PYTHON = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
_INSTALLED = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))


def place_of(error: BaseException) -> str:
    """File and line that raised it, outside of PyTorch, this library and Python's own; or "".

    The innermost outside of all that is installed, if there is one.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f"{from_here(error.filename)}:{error.lineno}"
    frames = [
        frame
        for frame in reversed(traceback.extract_tb(error.__traceback__))
        if not frame.filename.startswith(("<frozen ", *_OURS))
        and (frame.filename.startswith(_INSTALLED) or not frame.filename.startswith(_PYTHON))
    ]
    own = [frame for frame in frames if not frame.filename.startswith(_INSTALLED)]
    return next((f"{from_here(one.filename)}:{one.lineno}" for one in (*own, *frames)), "")


def seen_from_here(source: str) -> str:
    """The source of an `Operation`, its file as seen from the working folder."""
    before, backward, path = source.rpartition("backward of ")
    return before + backward + from_here(path)


def told(error: BaseException) -> str:
    """Kind, message and place of an error, in one line of at most 300 characters and the place."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    words = " ".join(f"{type(error).__name__}: {message}".split()).removesuffix(":")
    place = place_of(error)
    return printable(words[:300] + (f" ({place})" if place else ""))


def misfit(function: Callable[..., Any], *arguments: Any) -> str:
    """What a function takes, if it cannot be called with these arguments; else ""."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""  # a builtin's, which nothing tells
    try:
        signature.bind(*arguments)
    except TypeError:
        return str(signature)
    return ""
