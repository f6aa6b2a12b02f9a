"""What was found out about files that are too many to be read at every start, until they change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from churn_kernels._files import write_atomically

SETTLED_NS = 2_000_000_000
"""Files changed less than this ago may change again within one tick of the file system's clock."""


@dataclass(frozen=True)
class Verdict:
    """What reading every row of a data set says.

    Attributes:
        content: 32 hexadecimal digits, the digest of labels and images in their order.
        broken: row -> what is wrong with it.
    """

    content: str
    broken: dict[int, str]


def state_of(files: Iterable[Path]) -> tuple[str, int]:
    """A digest that a write to any of the files changes, and when the last was, in ns.

    It covers path, device, inode, size and both times of every file: whatever writes to a file sets
    the second of these, which no program can set back.

    Raises: OSError for a file that is not there.
    """
    digest, last = hashlib.sha256(), 0
    for path in files:
        status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        numbers = (status.st_dev, status.st_ino, status.st_size, *times)
        digest.update(os.fsencode(path.absolute()) + repr(numbers).encode())
        last = max(last, *times)
    return digest.hexdigest(), last


def stamp(files: Sequence[Path], *reading: object) -> str | None:
    """A name for the files as they are, and for how they are read; None where it is not safe."""
    now = time.time_ns()
    try:
        state, last = state_of(files)
    except OSError:
        return None
    if not files or now - last < SETTLED_NS:
        return None
    return hashlib.sha256(repr((state, *reading)).encode()).hexdigest()


def recall(name: str | None) -> Verdict | None:
    """What was found out under this name, or None."""
    if name is None:
        return None
    try:
        stored = json.loads(_path(name).read_text(encoding="utf-8"))
        broken = {int(row): str(reason) for row, reason in stored["broken"].items()}
        return Verdict(str(stored["content"]), broken)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remember(name: str | None, verdict: Verdict) -> None:
    """Keeps it for `recall`, where there is a name and a folder that can be written to."""
    if name is not None:
        with contextlib.suppress(OSError):
            write_atomically(_path(name), json.dumps(asdict(verdict)).encode())


def _path(name: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "churn-kernels" / "data" / f"{name}.json"
