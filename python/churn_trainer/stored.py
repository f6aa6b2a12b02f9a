"""Tensors and arrays as files that know whether they are still what was written.

Both kinds are zip archives. The comment at an archive's end, which every reader skips, holds the
SHA-256 of all before it, so that `torch.load` and `numpy.load` read the files as ever. Files that
were written before there were checksums have no comment, and are read without one.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from churn_kernels._files import check, read_bytes, reading, write_atomically

_NAME = b"sha256 "
_DIGITS = 64
_END = b"PK\x05\x06"
"""What the last record of a zip archive begins with."""

_END_BYTES = 22
"""Of that record, if no comment follows."""


def save_tensors(path: Path, content: Any, earlier: Path | None = None) -> None:
    """Tensors and plain values as a file of torch's; arguments as `write_atomically`'s."""
    archive = io.BytesIO()
    torch.save(content, archive)
    write_atomically(path, _sealed(archive), earlier)


def load_tensors(path: Path, remedy: str, form: Any = Any) -> Any:
    """What `save_tensors` wrote, on the CPU. Classes and functions in the file are refused.

    Args:
        path: the file.
        remedy: what to do if it holds anything else.
        form: of the content, see `check`.
    Raises: ValueError with `remedy` if the file is damaged, or holds anything else.
    """
    with reading(path, "tensors and plain values", remedy):
        archive = _unsealed(read_bytes(path))
        return check(torch.load(archive, map_location="cpu", weights_only=True), form)


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Arrays by name as NumPy's .npz, written atomically."""
    archive = io.BytesIO()
    np.savez(archive, **arrays)
    write_atomically(path, _sealed(archive))


def load_arrays(path: Path, names: tuple[str, ...], remedy: str) -> list[Tensor]:
    """Arrays of numbers by name, as tensors.

    Raises: ValueError with `remedy` if the file is missing or damaged, or lacks one of them.
    """
    with reading(path, f"the arrays {' and '.join(names)}", remedy):
        archive = _unsealed(read_bytes(path))
        with np.load(archive, allow_pickle=False) as arrays:
            return [torch.from_numpy(arrays[name]) for name in names]


def _sealed(archive: io.BytesIO) -> memoryview:
    """A zip archive without a comment, to which one is added that holds its checksum."""
    length = struct.pack("<H", len(_NAME) + _DIGITS)  # the comment's, the record's last field
    archive.seek(-len(length), io.SEEK_END)
    archive.write(length + _NAME)
    digest = hashlib.sha256(archive.getbuffer()).hexdigest()
    archive.write(digest.encode())
    return archive.getbuffer()


def _unsealed(archive: bytes) -> io.BytesIO:
    """The archive, to be read. Raises: ValueError if it has a checksum that is not its own."""
    if archive[-_END_BYTES:][: len(_END)] != _END:
        content, digest = memoryview(archive)[:-_DIGITS], archive[-_DIGITS:]
        if hashlib.sha256(content).hexdigest().encode() != digest:
            raise ValueError("a file that is damaged, for its checksum is that of another")
    return io.BytesIO(archive)
