"""Image sets of the Hugging Face Hub, or of a local folder in its formats, through `datasets`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from churn_trainer.config import Data
from churn_trainer.data.dataset import Dataset
from churn_trainer.data.images import image_fetch

REACHED_SECONDS = 5.0
"""Time in which the Hub has to answer."""

INSTALL = "pip install 'churn-kernels[trainer]'"


@dataclass(frozen=True)
class Source:
    """Where a data set is and what its columns are called.

    Attributes:
        description: what it is.
        path: name on the Hub; "" where there is none and `data.path` must say.
        image_size: side in pixels; 0 where `data.image_size` must say.
        classes: how many there are; 0 for as many as the files have.
        image, label: columns.
        configuration: which of several variants on the Hub.
        train, test: names of its parts.
    """

    description: str
    path: str
    image_size: int
    classes: int
    image: str = "image"
    label: str = "label"
    configuration: str | None = None
    train: str = "train"
    test: str = "test"


HUB: dict[str, Source] = {
    "cifar10": Source("CIFAR-10: 32 x 32 pixels", "uoft-cs/cifar10", 32, 10, image="img"),
    "cifar100": Source(
        "CIFAR-100: 32 x 32 pixels", "uoft-cs/cifar100", 32, 100, image="img", label="fine_label"
    ),
    "svhn": Source(
        "Street View House Numbers: 32 x 32 pixels",
        "ufldl-stanford/svhn",
        32,
        10,
        configuration="cropped_digits",
    ),
    "imagenet": Source(
        "ImageNet 2012 (the Hub asks for an account)",
        "ILSVRC/imagenet-1k",
        256,
        1000,
        test="validation",
    ),
    "inaturalist2018": Source(
        "iNaturalist 2018; data.path says where", "", 256, 8142, test="validation"
    ),
    "huggingface": Source(
        "any image set with columns image and label; data.path says which", "", 0, 0
    ),
}


def load_hub(data: Data, source: Source) -> Dataset:
    """The data set from `data.path`, a local folder or a name on the Hub, or from its usual place.

    A local folder holds what `datasets.Dataset.save_to_disk` wrote, or Parquet files whose names
    say train and test. Scripts are never run.

    Raises: ValueError if `datasets` is not installed, the data set cannot be had, or it does not
    have the parts, columns or number of classes it should.
    """
    path = data.path or source.path
    if not path:
        raise ValueError(
            f"data.path must name a folder or a data set on the Hub for {data.name}, got ''; "
            "it has no usual place"
        )
    size = data.image_size or source.image_size
    if not size:
        raise ValueError(f"data.image_size must be above 0 for {data.name}, got 0; say the pixels")
    parts = _parts(path, source)
    for part in (source.train, source.test):
        if part not in parts:
            raise ValueError(f"{path} must have the part {part!r}, got {sorted(parts)}; rename it")
    train, test = parts[source.train], parts[source.test]
    classes = _classes(path, train, source)
    labels = torch.tensor(list(train[source.label]) + list(test[source.label]))

    def open_image(row: int) -> Image.Image:
        part, place = (train, row) if row < len(train) else (test, row - len(train))
        return part[place][source.image]

    fetch, in_memory = image_fetch(len(labels), size, open_image)
    return Dataset(
        title=f"{data.name} ({size} x {size} pixels, {classes} classes)",
        labels=labels,
        classes=classes,
        shape=(3, size, size),
        fetch=fetch,
        in_memory=in_memory,
        is_image=True,
        test_start=len(train),
    )


def _parts(path: str, source: Source) -> Any:
    """The data set's parts by name, from disk or from the Hub."""
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"data set {path} needs the package datasets, which is not installed; {INSTALL}"
        ) from None
    folder, files = Path(path), {}
    on_disk = (folder / "dataset_dict.json").is_file()
    if folder.is_dir() and not on_disk:
        variant = folder / (source.configuration or "")
        below = variant if variant.is_dir() else folder
        files = {
            part: sorted(map(str, below.rglob(f"*{part}*.parquet")))
            for part in (source.train, source.test)
        }
        if not all(files.values()):
            raise ValueError(
                f"{path} must hold dataset_dict.json, or Parquet files named *{source.train}* and "
                f"*{source.test}*, got neither; is it the right folder?"
            )
    try:
        if on_disk:
            return library.load_from_disk(path)
        if files:
            return library.load_dataset("parquet", data_files=files)
        configuration = source.configuration if path == source.path else None
        with _without_retries(library):
            return library.load_dataset(path, configuration)
    except Exception as error:  # the library's own, the network's, the files'
        raise ValueError(
            f"data set {path!r} must be a folder or a name on the Hub that can be read, got "
            f"{type(error).__name__}: {error}; check the name and the connection, or download it "
            "elsewhere and name its folder (--data-path)"
        ) from None


@contextmanager
def _without_retries(library: Any) -> Iterator[None]:
    """Where the Hub cannot be reached, reads what an earlier download stored, and fails at once."""
    hub = importlib.import_module("huggingface_hub")
    switches = ((library.config, "HF_HUB_OFFLINE"), (hub.constants, "HF_HUB_OFFLINE"))
    before = [getattr(place, name) for place, name in switches]
    try:
        hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=REACHED_SECONDS)
    except Exception:  # of whichever library it speaks HTTP with
        for place, name in switches:
            setattr(place, name, True)
    try:
        yield
    finally:
        for (place, name), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _classes(path: str, part: Any, source: Source) -> int:
    for column in (source.image, source.label):
        if column not in part.column_names:
            raise ValueError(
                f"{path} must have a column {column!r}, got {part.column_names}; rename it"
            )
    feature = part.features[source.label]
    classes = getattr(feature, "num_classes", None) or int(max(part[source.label])) + 1
    if source.classes and classes != source.classes:
        raise ValueError(
            f"{path} must have {source.classes} classes, got {classes}; is it the right data set?"
        )
    return classes
