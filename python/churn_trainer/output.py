"""Files and folders that are either complete or not there: nobody reads a half-written one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "settings.csv"
"""The file by which an earlier report is told from somebody's own folder."""


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file by `content`: killed at any moment, it is the old one or the new one.

    One writer at a time: its scratch file has a fixed name, so that a killed one leaves no heap.

    Raises: OSError (full disk); the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        scratch.unlink(missing_ok=True)


def check_replaceable(target: Path) -> None:
    """Raises unless a report may be written to `target`: a new folder, an empty one, or a report.

    Raises: ValueError if `target` holds anything else, or nothing can be written beside it.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"out must be a folder, got the file {target}; name a new folder")
    if target.is_dir() and not (target / MARKER).is_file() and any(target.iterdir()):
        raise ValueError(
            f"out must be a new folder or an earlier report, got {target}, which holds other "
            "files; name a new folder"
        )
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"out must be where a folder can be made, got {target}, and {parent} lets nobody "
            "write; name a folder of your own"
        )


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """Yields a new empty folder that takes `target`'s place when the block ends without an error.

    Whatever ends the block early, Ctrl-C included, leaves `target` as it was. The folder lies
    beside `target`, on one file system with it, so that taking its place is a rename.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
    earlier = scratch.with_name(scratch.name + "-earlier")
    scratch.mkdir()
    try:
        yield scratch
        if target.exists():
            target.rename(earlier)
        scratch.rename(target)
    finally:
        if earlier.exists() and not target.exists():
            earlier.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)
