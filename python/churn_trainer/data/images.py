"""Many labelled image files as a data set: read, checked before training, named by content."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from churn_kernels._printable import excerpt
from churn_trainer.data.dataset import Dataset
from churn_trainer.data.decode import open_image, to_square
from churn_trainer.data.verdicts import Verdict, recall, remember, stamp

IN_MEMORY_BYTES = 1 << 30
"""Images that take no more than this together are read once; others at each use."""

MOST_NAMED = 100
"""Broken images that one message names."""

_BLOCK = 64
"""Rows that a thread reads at a time, when all are read."""

_Take = Callable[[int, np.ndarray[Any, Any]], None]


@dataclass(frozen=True)
class Pictures:
    """N encoded images and their labels, those of the training part first.

    Attributes:
        title: what a reader calls them.
        labels: of each, in [0, classes); None where it has none.
        classes: C.
        size: side of the squares they are brought to.
        read: the bytes of one image's file. Raises: OSError or ValueError that says what is wrong.
        name: what a reader finds a row by.
        test_start: as `Dataset.test_start`.
        skip_broken: leave out what cannot be used, rather than refuse all.
        files: everything that `read` reads, where known.
        column: which images of these files, where they hold several.
    """

    title: str
    labels: Sequence[int | None]
    classes: int
    size: int
    read: Callable[[int], bytes]
    name: Callable[[int], str]
    test_start: int = 0
    skip_broken: bool = False
    files: Callable[[], Sequence[Path]] = field(default=tuple)
    column: str = ""

    @property
    def in_memory(self) -> bool:
        """Whether the squares are kept, once read."""
        return len(self.labels) * 3 * self.size**2 <= IN_MEMORY_BYTES

    @property
    def content(self) -> str:
        """`Verdict.content`: two data sets that train alike have one, wherever they are."""
        return self._survey(None).content if self.in_memory else self._verdict.content

    def load(self) -> Dataset:
        """The data set, every image of which has been decoded once.

        Raises: ValueError naming the files or rows that cannot be used, unless they are to be left
        out, and where nothing else is left.
        """
        if self.in_memory:
            shape = (len(self.labels), 3, self.size, self.size)
            squares = np.empty(shape, np.uint8)
            verdict = self._survey(squares.__setitem__)
            rows = self._usable(verdict)
            kept = torch.from_numpy(squares if len(rows) == len(squares) else squares[rows])
            fetch: Callable[[Tensor], Tensor] = kept.__getitem__
        else:
            verdict = self._verdict
            rows = self._usable(verdict)
            pool = _pool()

            def fetch(places: Tensor) -> Tensor:
                wanted = [rows[place] for place in places.tolist()]
                return torch.from_numpy(np.stack(list(pool.map(self._square, wanted))))

        about = f"{self.size} x {self.size} pixels, {self.classes} classes"
        missing = f", {len(verdict.broken)} left out" if verdict.broken else ""
        return Dataset(
            title=f"{self.title} ({about}{missing})",
            labels=torch.tensor([self.labels[row] for row in rows]),
            classes=self.classes,
            shape=(3, self.size, self.size),
            fetch=fetch,
            in_memory=self.in_memory,
            is_image=True,
            test_start=sum(row < self.test_start for row in rows),
            content=verdict.content,
        )

    @cached_property
    def _verdict(self) -> Verdict:
        """That of every image decoded, as remembered from before."""
        reading = (PIL.__version__, self.size, self.column, self.classes, self.test_start)
        name = stamp(self.files(), *reading, self.labels)
        verdict = recall(name)
        if verdict is None:
            verdict = self._survey(lambda row, square: None)
            remember(name, verdict)
        return verdict

    def _survey(self, take: _Take | None) -> Verdict:
        """Reads every row, and decodes it where `take` takes its square."""
        digest = hashlib.sha256(struct.pack("<q", self.test_start))
        broken: dict[int, str] = {}
        count = len(self.labels)
        blocks = [range(at, min(at + _BLOCK, count)) for at in range(0, count, _BLOCK)]

        def examine(rows: range) -> list[tuple[bytes, str]]:
            return [self._examine(row, take) for row in rows]

        with _pool() as pool:
            for rows, examined in zip(blocks, pool.map(examine, blocks), strict=True):
                for row, (own, wrong) in zip(rows, examined, strict=True):
                    label = self.labels[row]
                    digest.update(struct.pack("<q", -1 if label is None else label) + own)
                    if wrong:
                        broken[row] = wrong
        return Verdict(digest.hexdigest()[:32], broken)

    def _examine(self, row: int, take: _Take | None) -> tuple[bytes, str]:
        """The digest of a row's bytes, and what is wrong with it."""
        try:
            content = self.read(row)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            return bytes(32), f"cannot be read: {reason}" if reason else str(error)
        own, wrong = hashlib.sha256(content).digest(), self._wrong_label(row)
        if take is not None and not wrong:
            try:
                take(row, to_square(open_image(content), self.size))
            except ValueError as error:
                wrong = str(error)
        return own, wrong

    def _wrong_label(self, row: int) -> str:
        label = self.labels[row]
        if label is None:
            return "has no label"
        if not 0 <= label < self.classes:
            return f"must have a label in [0, {self.classes}), got {label}"
        return ""

    def _usable(self, verdict: Verdict) -> list[int]:
        """The rows to keep."""
        if verdict.broken and not self.skip_broken:
            named = [
                excerpt(f"{self.name(row)} {wrong}")
                for row, wrong in islice(verdict.broken.items(), MOST_NAMED)
            ]
            more = len(verdict.broken) - len(named)
            named += [f"and {more} more"] * (more > 0)
            raise ValueError(
                f"{self.title} must hold images with labels, got {len(verdict.broken)} of "
                f"{len(self.labels)} that cannot be used: {'; '.join(named)}; remove or mend them, "
                "or leave them out with data.skip_broken (--data-skip-broken)"
            )
        rows = [row for row in range(len(self.labels)) if row not in verdict.broken]
        test = sum(row >= self.test_start for row in rows)
        if not rows or (self.test_start and test in (0, len(rows))):
            raise ValueError(
                f"{self.title} must have rows to train and to test on, got {len(verdict.broken)} "
                f"of {len(self.labels)} that cannot be used; choose other parts or columns"
            )
        return rows

    def _square(self, row: int) -> np.ndarray[Any, Any]:
        """Raises: ValueError naming an image that changed, OSError where a disk fails."""
        try:
            return to_square(open_image(self.read(row)), self.size)
        except (FileNotFoundError, ValueError) as error:
            reason = "is gone" if isinstance(error, FileNotFoundError) else error
            raise ValueError(
                f"{excerpt(self.name(row))} {reason}; it was changed since the training began: "
                "restore it, and the same command goes on"
            ) from None


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="images")
