"""Image files: squares of one size out of pictures of any, and folders of them by class."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from churn_trainer.config import Data
from churn_trainer.data.dataset import Dataset

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"})
TEST_FOLDERS = ("test", "val", "validation")
IN_MEMORY_BYTES = 1 << 30
"""Images that take no more than this together are read once; others at each use."""


def to_square(image: Image.Image, size: int) -> np.ndarray[Any, Any]:
    """(3, size, size) uint8: the shorter side scaled to `size`, the middle cut out, in RGB.

    An image that is `size` x `size` keeps its pixels.
    """
    image = image.convert("RGB")
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).transpose(2, 0, 1)


def image_fetch(
    count: int, size: int, open_image: Callable[[int], Image.Image]
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """`Dataset.fetch` and `in_memory`, for pictures that `open_image` opens by their number."""
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="images")

    def read(rows: Sequence[int]) -> Tensor:
        squares = pool.map(lambda row: to_square(open_image(row), size), rows)
        return torch.from_numpy(np.stack(list(squares)))

    if count * 3 * size * size <= IN_MEMORY_BYTES:
        everything = read(range(count))
        pool.shutdown()
        return everything.__getitem__, True
    return lambda rows: read(rows.tolist()), False


def load_folder(data: Data) -> Dataset:
    """Images below `data.path`: CLASS/FILE, or train/CLASS/FILE beside test/ (val/, validation/).

    Raises: ValueError if there is no such folder, it holds no images by class, its two parts do
    not have the same classes, or `data.image_size` is not said.
    """
    root = Path(data.path)
    if not data.path or not root.is_dir():
        raise ValueError(
            f"data.path must be a folder of images, got {data.path!r}; it needs a folder per class"
        )
    if not data.image_size:
        raise ValueError(
            "data.image_size must be above 0 for a folder, got 0; say the pixels a side"
        )
    train = root / "train" if (root / "train").is_dir() else root
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if (train == root) != (test is None):
        raise ValueError(
            f"data.path must have train/ and one of {', '.join(TEST_FOLDERS)}, or neither, got "
            f"{root}; move the classes' folders into them"
        )
    files, labels, classes = _by_class(train)
    test_start = 0
    if test is not None:
        more, more_labels, test_classes = _by_class(test)
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise ValueError(
                f"{train} and {test} must have the same classes, got {len(classes)} and "
                f"{len(test_classes)}; in one only: {', '.join(odd[:5])}"
            )
        test_start, files, labels = len(files), files + more, labels + more_labels
    size = data.image_size
    fetch, in_memory = image_fetch(len(files), size, lambda row: _open(files[row]))
    return Dataset(
        title=f"{root.name} ({size} x {size} pixels, {len(classes)} classes)",
        labels=torch.tensor(labels),
        classes=len(classes),
        shape=(3, size, size),
        fetch=fetch,
        in_memory=in_memory,
        is_image=True,
        test_start=test_start,
    )


def _by_class(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, their labels, and the classes in the order of their names."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not own:
            raise ValueError(
                f"every folder of {folder} must hold images of its class, got none in {name!r}; "
                f"it looks for {', '.join(sorted(SUFFIXES))}"
            )
        files += own
        labels += [label] * len(own)
    if len(classes) < 2:
        raise ValueError(
            f"{folder} must have a folder for each of two classes or more, got {len(classes)}; "
            "is it the right one?"
        )
    return files, labels, classes


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError:
        raise ValueError(f"{path} must be an image, got something else; remove the file") from None
