"""Files that are either complete or not there: nobody reads a half-written one."""

import os
from pathlib import Path


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
