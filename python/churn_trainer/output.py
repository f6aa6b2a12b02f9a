"""Files and folders that are either complete or not there: nobody reads a half-written one."""

from __future__ import annotations

import csv
import ctypes
import fcntl
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from churn_kernels._files import refuse_link

MARKER = "settings.csv"
"""The file by which an earlier report is told from somebody's own folder."""

_EARLIER = "-earlier"

_FORMULA = ("=", "+", "-", "@", "\t")
"""What a cell begins with that a spreadsheet would compute."""


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV, whose text no spreadsheet takes for a formula.

    Args:
        columns: names of the columns.
        rows: numbers as numbers, which stay as they are; text that begins like a formula gets an
            apostrophe before it, as a spreadsheet's own user would write it, and a carriage return,
            which would end the row, becomes a space.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_plain(cell) for cell in row] for row in (columns, *rows))
    return text.getvalue()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes `csv_text` into a folder that nobody sees yet. Raises: OSError (full disk)."""
    path.write_text(csv_text(columns, rows), encoding="utf-8", newline="")


def _plain(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    text = cell.replace("\r", " ")
    return f"'{text}" if text.startswith(_FORMULA) else text


def check_folder(target: Path) -> None:
    """Raises ValueError unless `target` is a folder to write into, or one can be made there."""
    path = target.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise ValueError(f"out must be a folder, got the file {there}; name a new folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"out must be in a folder that you may write to, got {target}, and {there} is none; "
            "name a folder of your own"
        )


def check_replaceable(target: Path) -> None:
    """Raises unless a report may be written to `target`: a new folder, an empty one, or a report.

    Raises: ValueError if `target` is a symbolic link or holds anything else, or nothing can be
        written beside it.
    """
    refuse_link(target)
    if target.is_dir() and not (target / MARKER).is_file() and any(target.iterdir()):
        raise ValueError(
            f"out must be a new folder or an earlier report, got {target}, which holds other "
            "files; name a new folder"
        )
    check_folder(target.absolute().parent if target.is_dir() else target)


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Yields a new empty folder that takes `target`'s place when the block ends without an error.

    Whatever ends the block early, Ctrl-C included, leaves `target` as it was. The folder lies
    beside `target`, on one file system with it, so that taking its place is a rename: on Linux one
    that exchanges the two, so that even a process killed in the middle leaves the old folder or
    the new one. What a killed process left beside `target` is removed by the next.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
    with ExitStack() as locks:
        with _locked(target.parent):
            _sweep(target)
            scratch.mkdir()
            locks.enter_context(_locked(scratch))
        try:
            yield scratch
            with _locked(target.parent):
                _take_place(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _take_place(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
    elif not _exchange(scratch, target):
        earlier = scratch.with_name(scratch.name + _EARLIER)
        target.rename(earlier)
        try:
            scratch.rename(target)
        except BaseException:
            earlier.rename(target)
            raise
        shutil.rmtree(earlier, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot (Linux's renameat2 can)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    names = os.fsencode(one), os.fsencode(other)
    return bool(rename(working_folder, names[0], working_folder, names[1], exchange) == 0)


def _sweep(target: Path) -> None:
    """Puts back or removes what killed processes left beside `target`; living ones hold a lock."""
    left = re.compile(rf"\.{re.escape(target.name)}-[0-9a-f]{{12}}({_EARLIER})?")
    for folder in [path for path in target.parent.iterdir() if left.fullmatch(path.name)]:
        if folder.is_symlink():  # none of ours, and what it leads to is not ours to lock
            continue
        if folder.name.endswith(_EARLIER) and not target.exists():
            folder.rename(target)
            continue
        with suppress(BlockingIOError), _locked(folder, fcntl.LOCK_NB):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _locked(folder: Path, how: int = 0) -> Iterator[None]:
    """Holds the folder's lock inside the block; a killed process lets go."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(handle)
