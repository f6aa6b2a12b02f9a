"""Data sets by name, and their rows for training and for testing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from churn_trainer.config import Data, Draw
from churn_trainer.data.dataset import Dataset
from churn_trainer.data.folder import load_folder
from churn_trainer.data.hub import HUB, load_hub
from churn_trainer.data.images import Pictures
from churn_trainer.data.parts import refuse_settings
from churn_trainer.data.synthetic import gaussian, multi_view, prototypes
from churn_trainer.settings import derive_seed, one_of


class _HasData(Protocol):
    @property
    def data(self) -> Data: ...


_S = TypeVar("_S", bound=_HasData)

DATASETS: dict[str, tuple[str, Callable[[Data], Dataset | Pictures]]] = {
    "digits": ("1797 handwritten digits of 8 x 8 pixels, with scikit-learn", lambda _: digits()),
    "folder": ("images in folders by class, below data.path", load_folder),
    **{
        name: (source.description, lambda data, source=source: load_hub(data, source))  # type: ignore[misc]
        for name, source in HUB.items()
    },
    "multi-view": (
        "drawn: each class has two features, some rows show one (Allen-Zhu and Li 2020)",
        lambda data: multi_view(data.synthetic),
    ),
    "gaussian": (
        "drawn: normal inputs, labels of a random network (Allen-Zhu and Li 2020, Fig. 4)",
        lambda data: gaussian(data.synthetic),
    ),
    "prototypes": (
        "drawn: noise around a point per class; for thousands of classes",
        lambda data: prototypes(data.synthetic),
    ),
}
"""Name -> (what it is, how it is loaded)."""

_OF_FILES = ("train_part", "test_part", "skip_broken", "image", "label")
"""What can be said of files."""

_FILES = {
    "folder": ("train_part", "test_part", "skip_broken"),
    **dict.fromkeys(HUB, _OF_FILES),
}
"""Those that are read from files, which may change, and what can be said of these.

The others follow from their settings.
"""


def load_dataset(data: Data) -> Dataset:
    """The data set that `data` names.

    Every image is decoded once before this returns, or was when the same files were read before.

    Raises: ValueError for an unknown name, a missing package, folder or file, or files that do not
    hold what they should, or not what they held when `data.content` was filled in.
    """
    opened = _opened(data)
    dataset = opened.load() if isinstance(opened, Pictures) else opened
    _check_content(data, dataset.content)
    if (data.crop_padding or data.crop_size or data.flip) and not dataset.is_image:
        raise ValueError(
            f"data.crop_padding, crop_size and flip must be left out of {data.name}, whose inputs "
            f"of shape {dataset.shape} are no images; drop them"
        )
    if dataset.is_image and data.crop_size > min(dataset.shape[1:]) + 2 * data.crop_padding:
        raise ValueError(
            f"data.crop_size must fit into the padded image, got {data.crop_size} for inputs of "
            f"shape {dataset.shape} and crop_padding {data.crop_padding}; make it smaller"
        )
    return dataset


def pinned(settings: Iterable[_S]) -> list[_S]:
    """Runs, or studies, with `data.content`: from then on their ids are those of these very data.

    Raises: ValueError, as `load_dataset`.
    """
    return _with_content(settings, _content)


def filled_in(settings: Iterable[_S]) -> list[_S]:
    """`pinned`, without reading data whose content is given, which `load_dataset` compares."""
    return _with_content(settings, lambda data: data.content or _content(data))


def _with_content(settings: Iterable[_S], content: Callable[[Data], str | None]) -> list[_S]:
    settings = list(settings)
    contents = {data: content(data) for data in dict.fromkeys(one.data for one in settings)}
    return [
        dataclasses.replace(  # type: ignore[type-var]
            one, data=dataclasses.replace(one.data, content=contents[one.data])
        )
        for one in settings
    ]


def _opened(data: Data) -> Dataset | Pictures:
    one_of("data.name", data.name, DATASETS, "`churn-train data` describes them")
    own = _FILES.get(data.name, ())
    others = [name for name in _OF_FILES if name not in own]
    refuse_settings(data, others, f"{data.name}, which has no such thing")
    try:
        return DATASETS[data.name][1](data)
    except OSError as error:
        raise ValueError(
            f"the data set {data.name} must be readable, got: {error}; mend what it names"
        ) from None


def _content(data: Data) -> str | None:
    content = _opened(data).content if data.name in _FILES else None
    _check_content(data, content)
    return content


def _check_content(data: Data, content: str | None) -> None:
    if data.content is not None and data.content != content:
        raise ValueError(
            f"data.content must be that of {data.path or data.name}, {content}, got "
            f"{data.content}; the data are not those that the settings were written for: restore "
            "them, or leave data.content out"
        )


def split_rows(dataset: Dataset, data: Data, seed: int) -> tuple[Tensor, Tensor]:
    """The rows to train on and those to test on, ascending.

    A data set with test rows of its own keeps them; of the others all that do not train test.
    Random rows are drawn by class, so that each has its share.

    Raises: ValueError if `train_rows` leaves a class without rows on either side.
    """
    rows = len(dataset.labels)
    pool = np.arange(dataset.test_start or rows)
    count = data.train_rows or (0 if dataset.test_start else dataset.default_rows)
    if not count:
        return torch.arange(dataset.test_start), torch.arange(dataset.test_start, rows)
    if not dataset.classes <= count <= len(pool) - dataset.classes:
        raise ValueError(
            f"train_rows must be in [{dataset.classes}, {len(pool) - dataset.classes}], got "
            f"{count}; every class needs rows on both sides of the {len(pool)}-row split"
        )
    remedy = "remove classes of a single row, or train on all rows with train_rows = 0"
    drawn = derive_seed(seed, Draw.SPLIT)
    train, rest = _by_class(dataset, pool, drawn, f"train_rows {count}", remedy, train_size=count)
    return train, torch.arange(dataset.test_start, rows) if dataset.test_start else rest


def hold_out(dataset: Dataset, rows: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The training rows without `count` of them, drawn at random by class, and those; ascending.

    Raises: ValueError if that leaves a class without rows on either side.
    """
    if not count:
        return rows, rows[:0]
    if not dataset.classes <= count <= len(rows) - dataset.classes:
        raise ValueError(
            f"validation_rows must be 0 or in [{dataset.classes}, {len(rows) - dataset.classes}], "
            f"got {count}; every class needs rows on both sides of the {len(rows)} training rows"
        )
    remedy, drawn = "take more training rows", derive_seed(seed, Draw.SPLIT, 1)
    return _by_class(
        dataset, rows.numpy(), drawn, f"validation_rows {count}", remedy, test_size=count
    )


def _by_class(
    dataset: Dataset, rows: np.ndarray, seed: int, setting: str, remedy: str, **size: int
) -> tuple[Tensor, Tensor]:
    """Rows split at random, each class in proportion; both parts ascending."""
    from sklearn.model_selection import train_test_split  # takes a second, which most can save

    labels = dataset.labels[torch.from_numpy(rows)].numpy()
    try:
        parts = train_test_split(rows, stratify=labels, random_state=seed % 2**32, **size)
    except ValueError as error:
        raise ValueError(
            f"{setting} must leave every class rows on both sides, got: {error}; {remedy}"
        ) from None
    first, second = (torch.from_numpy(np.sort(part)) for part in parts)
    return first, second


def digits() -> Dataset:
    """1797 scanned handwritten digits of 8 x 8 pixels (UCI; bundled with scikit-learn)."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = torch.from_numpy(bundled.images.astype(np.float32))[:, None]
    return Dataset(
        title="handwritten digits (8 x 8 pixels, 10 classes)",
        labels=torch.from_numpy(bundled.target.astype(np.int64)),
        classes=len(bundled.target_names),
        shape=(1, 8, 8),
        fetch=images.__getitem__,
        is_image=True,
        per_pixel=True,
        default_rows=300,
    )
