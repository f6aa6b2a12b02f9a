"""Files: written whole or not at all, and read as values that have been checked.

What lies in a folder may come from anybody. Nothing is written through a link that lies there, and
whatever a file holds, reading it gives values of the form that was asked for or a ValueError.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from torch import Tensor, strided

from churn_kernels._printable import excerpt

DEEPEST = 32
"""Levels of tables and lists that a file may have within each other."""

LONGEST = 1 << 26
"""Bytes of text that are read from one file of settings or measurements."""


# Writing ------------------------------------------------------------------------------------------


def refuse_link(path: Path, wanted: str = "a folder") -> None:
    """Raises ValueError if `path` is a symbolic link, through which nothing is to be written."""
    if path.is_symlink():
        raise ValueError(
            f"{path} must be {wanted} of its own, got a symbolic link to {os.readlink(path)}; "
            "remove the link, or name what it leads to"
        )


def make_folder(path: Path) -> None:
    """Makes a folder, unless it is there. Raises: ValueError if a symbolic link takes its place."""
    refuse_link(path)
    path.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, content: bytes | memoryview, earlier: Path | None = None) -> None:
    """Replaces a file by `content`: killed at any moment, it is the old one or the new one.

    One writer at a time: its scratch file has a fixed name, so that a killed one leaves no heap.
    Links of that name, or of the file's own, are replaced and not followed.

    Args:
        path: the file.
        content: what it will hold.
        earlier: where the old file goes. Between the two renames it is the only one.
    Raises: OSError (full disk); the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.unlink(missing_ok=True)
        with scratch.open("xb") as file:  # new, so that it is no link to another file
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if earlier is not None:
            with suppress(FileNotFoundError):
                path.replace(earlier)
        scratch.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        scratch.unlink(missing_ok=True)


def open_lock(path: Path) -> IO[bytes]:
    """A file to lock, which is made where there is none and whose content is left as it is.

    Raises: ValueError if a symbolic link takes its place.
    """
    refuse_link(path, "a file")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return open(os.open(path, flags, 0o666), "r+b", buffering=0)


# Reading ------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path, wanted: str, remedy: str) -> Iterator[None]:
    """Whatever the block raises becomes a ValueError that names file, reason and remedy.

    The one place that decides what a file may do to who reads it: parsers raise all kinds of errors
    at what was damaged or made to trouble them.

    Args:
        path: the file that the block reads.
        wanted: what it must hold.
        remedy: what to do if it does not.
    """
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{path} must hold {wanted}, got: no such file; {remedy}") from None
    except Exception as error:
        reason = excerpt(str(error).strip().partition("\n")[0]) or type(error).__name__
        raise ValueError(f"{path} must hold {wanted}, got: {reason}; {remedy}") from None


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file; a pipe or device, which might never end, is refused.

    Args:
        path: the file.
        most: bytes that it may have; None: any number.
    Raises: OSError if it cannot be read, ValueError if it is none, or larger.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no regular file")
        if most is not None and status.st_size > most:
            raise ValueError(f"{status.st_size} bytes, more than {most}")
        return file.read()


def read_text(path: Path) -> str:
    """The UTF-8 text of a file of at most `LONGEST` bytes. Raises: OSError, ValueError."""
    return read_bytes(path, LONGEST).decode("utf-8")


def parse_json(text: str | bytes) -> Any:
    """JSON as `plain` values. Raises: ValueError for what is none, not finite, or too deep."""
    return plain(json.loads(text, parse_constant=_refuse_constant))


def plain(value: Any) -> Any:
    """The value itself, if it is one that JSON can hold and that every consumer can handle.

    Raises: ValueError for numbers that are not finite, texts that cannot be encoded, values of
        other kinds (such as dates), and more than `DEEPEST` levels.
    """
    pending = [(value, 1)]
    while pending:
        one, depth = pending.pop()
        if isinstance(one, dict | list):
            if depth > DEEPEST:
                raise ValueError(f"more than {DEEPEST} levels of tables and lists")
            inside = [*one, *one.values()] if isinstance(one, dict) else one
            pending += [(entry, depth + 1) for entry in inside]
        elif isinstance(one, str):
            one.encode("utf-8")
        elif isinstance(one, float) and not math.isfinite(one):
            raise ValueError(f"the number {one}, which is not finite")
        elif one is not None and not isinstance(one, int | float):
            raise ValueError(f"{one}, a {type(one).__name__}")
    return value


def check(value: Any, form: Any, where: str = "it") -> Any:
    """The value itself, if it has a form.

    Args:
        value: what was read.
        form: `Any`; a type, whose instances are meant and none of a subclass, as bool is of int,
            while a whole number will do for a float; a tensor, meaning dense ones of its shape and
            dtype; None; a set or a range, of which it is one; `{name: form}`, a table, which may
            hold more, and in which what is missing counts as None; `{type: form}`, or a range in
            the type's place, a table of any such names; `[form]`, a list of any number; a tuple of
            forms, a list or tuple of as many; a function, called as `form(value, where)`, that
            raises ValueError.
        where: name of the value, for messages.
    Raises: ValueError naming the part, what it must be, and what it is.
    """
    if form is Any:
        return value
    if isinstance(form, type):
        right = type(value) is form or (form is float and type(value) is int)
        _require(right, where, f"a {form.__name__}", value)
    elif isinstance(form, Tensor):
        right = isinstance(value, Tensor) and value.layout == strided and not value.is_meta
        right = right and (value.shape, value.dtype) == (form.shape, form.dtype)
        _require(right, where, _shown(form), value)
    elif isinstance(form, range):
        right = type(value) is int and value in form
        _require(right, where, f"from {form.start} to {form.stop - 1}", value)
    elif form is None:
        _require(value is None, where, "missing", value)
    elif isinstance(form, set):
        _require(value in list(form), where, " or ".join(sorted(map(str, form))), value)
    elif isinstance(form, list):
        _require(type(value) is list, where, "a list", value)
        for place, entry in enumerate(value):
            check(entry, form[0], f"{where}[{place}]")
    elif isinstance(form, tuple):
        right = isinstance(value, list | tuple) and len(value) == len(form)
        _require(right, where, f"{len(form)} values", value)
        for place, (entry, own) in enumerate(zip(value, form, strict=True)):
            check(entry, own, f"{where}[{place}]")
    elif isinstance(form, dict):
        _require(isinstance(value, dict), where, "a table", value)
        for name, own in form.items():
            if isinstance(name, type | range):
                for key, entry in value.items():
                    check(key, name, f"a name in {where}")
                    check(entry, own, f"{where}[{key!r}]")
            else:
                check(value.get(name), own, f"{where}[{name!r}]")
    else:
        form(value, where)
    return value


def optional(form: Any) -> Callable[[Any, str], Any]:
    """The form of what may also be None."""

    def check_if_there(value: Any, where: str) -> None:
        if value is not None:
            check(value, form, where)

    return check_if_there


def exactly(table: dict[Any, Any]) -> Callable[[Any, str], Any]:
    """The form of a table that holds these names and no others."""

    def check_exactly(value: Any, where: str) -> None:
        check(value, table, where)
        if odd := sorted(map(str, value.keys() - table.keys())):
            raise ValueError(f"{where} must have no {odd[0]!r}, which is of something else")

    return check_exactly


def _require(right: bool, where: str, wanted: str, value: Any) -> None:
    if not right:
        raise ValueError(f"{where} must be {wanted}, and is {_shown(value)}")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {tuple(value.shape)} {value.dtype} tensor"
    if value is None:
        return "missing"
    kind = type(value).__name__
    return excerpt(f"{kind} {value!r}") if isinstance(value, int | float | str) else f"a {kind}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"the number {name}, which JSON does not have")
