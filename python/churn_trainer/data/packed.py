"""The files that torchvision downloads: CIFAR's pickles, SVHN's .mat files, MNIST's idx files."""

from __future__ import annotations

import gzip
import io
import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from churn_trainer.config import Data
from churn_trainer.data.decode import LARGEST_FILE, explained, read_file
from churn_trainer.data.images import Pictures
from churn_trainer.data.parts import refuse_settings
from churn_trainer.settings import one_of

Rows = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""(N, 1 or 3, height, width) images and (N,) labels."""


@dataclass(frozen=True)
class Packed:
    """How a data set is stored.

    Attributes:
        folder: where torchvision puts it, below the folder that it is given.
        parts: part -> files, which may have another ending in `read`.
        labels: columns of the Hugging Face Hub's version -> what the files call them.
        read: (file, what it calls the labels) -> rows. Raises: ValueError for another file.
    """

    folder: str
    parts: Mapping[str, tuple[str, ...]]
    labels: Mapping[str, str]
    read: Callable[[Path, str], Rows]


def load_packed(
    data: Data, folder: Path, size: int, train: str, test: str, label: str
) -> Pictures | None:
    """The data set `data.name` from such files in or below `folder`; None where there are none.

    Raises: ValueError for a part or column there is not, a missing file, or one that does not hold
    what it should.
    """
    packed = PACKED.get(data.name)
    if packed is None:
        return None
    names = [name for files in packed.parts.values() for name in files]
    places = (folder, folder / packed.folder, folder / Path(packed.folder).name)
    place = next(
        (place for place in places if any(_find(place, name) is not None for name in names)), None
    )
    if place is None:
        return None
    refuse_settings(data, ("image",), f"torchvision's files, as in {place}")
    one_of("data.label", label, packed.labels)
    images, labels, files = [], [], []
    for setting, part in (("data.train_part", train), ("data.test_part", test)):
        one_of(setting, part, packed.parts)
        paths = [_present(place, name) for name in packed.parts[part]]
        files += paths
        rows = [_read(packed, path, label) for path in paths]
        images.append(np.concatenate([pictures for pictures, _ in rows]))
        labels.append(np.concatenate([classes for _, classes in rows]))
    pixels, numbers = np.concatenate(images), np.concatenate(labels).tolist()

    def name(row: int) -> str:
        start = len(labels[0])
        return f"row {row} of {train}" if row < start else f"row {row - start} of {test}"

    return Pictures(
        title=str(place),
        labels=numbers,
        classes=max(numbers) + 1,
        size=size,
        read=lambda row: _portable(pixels[row]),
        name=name,
        test_start=len(labels[0]),
        skip_broken=bool(data.skip_broken),
        files=lambda: files,
    )


def _present(place: Path, name: str) -> Path:
    path = _find(place, name)
    if path is None:
        raise ValueError(f"{place} must hold {name}, got a folder without it; download it again")
    return path


def _read(packed: Packed, path: Path, label: str) -> Rows:
    try:
        images, labels = packed.read(path, packed.labels[label])
    except Exception as error:  # a stranger's file leads its reader to any of them
        raise ValueError(
            f"{path} must be the file that torchvision downloads, got "
            f"{explained(error)}; download it again"
        ) from None
    if len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"{path} must hold a label for each image, got {len(labels)} for {len(images)}; "
            "download it again"
        )
    return images, labels


def _portable(image: NDArray[np.uint8]) -> bytes:
    """A (1 or 3, height, width) image as a PGM or PPM file."""
    channels, height, width = image.shape
    kind = "P5" if channels == 1 else "P6"
    return f"{kind} {width} {height} 255\n".encode() + image.transpose(1, 2, 0).tobytes()


def _find(place: Path, name: str) -> Path | None:
    """A file by one of the names under which it is passed on, or packed with gzip."""
    dotted = name.replace("-idx", ".idx")
    names = (name, dotted, f"{name}.gz", f"{dotted}.gz")
    return next((place / one for one in names if (place / one).is_file()), None)


# CIFAR --------------------------------------------------------------------------------------------


class _Type:
    """Stands for `numpy.dtype` in a pickle."""

    def __init__(self, code: Any, *_: Any):
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes have not."""


class _Array:
    """Stands for `numpy.ndarray` in a pickle: numpy trusts what it unpickles, this does not."""

    def __init__(self, *_: Any):
        self.rows: NDArray[np.uint8] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_column, content = state
        if kind.code not in (b"u1", "u1") or not isinstance(content, bytes):
            raise ValueError(f"an array of {kind.code!r}, not of bytes")
        rows = np.frombuffer(content, np.uint8)
        self.rows = rows.reshape(shape[::-1]).T if by_column else rows.reshape(shape)


def _latin1(text: str, encoding: str) -> bytes:
    """Stands for `codecs.encode`, by which older protocols store bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes encoded by {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle._Unpickler):
    """Reads plain values and arrays of bytes; whatever else a pickle calls is refused.

    The one in Python: of a few hostile bytes that in C fills the memory.
    """

    _STANDINS: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._STANDINS[module, name]
        except KeyError:
            raise ValueError(f"a pickle that calls {module}.{name}, which is not run") from None


def _cifar(path: Path, label: str) -> Rows:
    batch = _Unpickler(io.BytesIO(read_file(path)), encoding="bytes").load()
    named = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    images, labels = named["data"].rows.reshape(-1, 3, 32, 32), named[label]
    if not all(type(one) is int and 0 <= one < 100 for one in labels):
        raise ValueError("labels that are no whole numbers from 0 to 99")
    return images, np.array(labels, np.int64)


# SVHN and MNIST -----------------------------------------------------------------------------------


def _svhn(path: Path, label: str) -> Rows:
    from scipy.io import loadmat

    arrays = loadmat(path, variable_names=["X", label])
    images, labels = arrays["X"], arrays[label].reshape(-1).astype(np.int64)
    if images.dtype != np.uint8 or images.shape[:3] != (32, 32, 3):
        raise ValueError(f"X of {images.dtype} and shape {images.shape}, not (32, 32, 3, N) bytes")
    if labels.min() < 1 or labels.max() > 10:
        raise ValueError(f"labels {labels.min()} to {labels.max()}, not 1 to 10")
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels % 10  # 10 is the digit 0


def _mnist(path: Path, label: str) -> Rows:
    name = path.name.replace("images", label).replace("idx3", "idx1")
    beside = _find(path.parent, name.removesuffix(".gz").replace(".idx", "-idx"))
    if beside is None:
        raise ValueError(f"no {name} beside it")
    images = _idx(path, 3)
    return images[:, None], _idx(beside, 1).astype(np.int64)


def _idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An array of bytes: two zeros, 8 for bytes, the number of dimensions, these, the content."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        header = file.read(4 + 4 * dimensions)
        if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"no idx file of bytes in {dimensions} dimensions")
        shape = tuple(np.frombuffer(header, ">u4", offset=4).tolist())
        if math.prod(shape) > LARGEST_FILE:
            raise ValueError(f"shape {shape}, of more than {LARGEST_FILE} bytes")
        content = file.read(math.prod(shape) + 1)  # what a bomb has beyond stays packed
    if len(content) != math.prod(shape):
        raise ValueError(f"{path.name} of another length than its shape {shape} says")
    return np.frombuffer(content, np.uint8).reshape(shape)


_CIFAR_10 = tuple(f"data_batch_{number}" for number in range(1, 6))
_IDX = {"train": ("train-images-idx3-ubyte",), "test": ("t10k-images-idx3-ubyte",)}

PACKED = {
    "cifar10": Packed(
        "cifar-10-batches-py",
        {"train": _CIFAR_10, "test": ("test_batch",)},
        {"label": "labels"},
        _cifar,
    ),
    "cifar100": Packed(
        "cifar-100-python",
        {"train": ("train",), "test": ("test",)},
        {"fine_label": "fine_labels", "coarse_label": "coarse_labels"},
        _cifar,
    ),
    "svhn": Packed(
        "SVHN",
        {part: (f"{part}_32x32.mat",) for part in ("train", "test", "extra")},
        {"label": "y"},
        _svhn,
    ),
    "mnist": Packed("MNIST/raw", _IDX, {"label": "labels"}, _mnist),
    "fashion-mnist": Packed("FashionMNIST/raw", _IDX, {"label": "labels"}, _mnist),
}
"""Data set -> how it is stored."""
