"""Image sets of the Hugging Face Hub, or of a local folder in one of many formats."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from churn_kernels._printable import excerpt
from churn_trainer.config import Data
from churn_trainer.data.decode import explained, read_file
from churn_trainer.data.folder import find_parts, folder_pictures
from churn_trainer.data.images import Pictures
from churn_trainer.data.packed import load_packed
from churn_trainer.data.parts import (
    check_apart,
    check_different,
    is_visible,
    parts_in,
    refuse_settings,
)
from churn_trainer.data.verdicts import state_of

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
        ten_is_zero: whether a label 10 is the digit 0, in files that have no 0.
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
    ten_is_zero: bool = False


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
        ten_is_zero=True,
    ),
    "mnist": Source("MNIST: 28 x 28 pixels", "ylecun/mnist", 28, 10),
    "fashion-mnist": Source(
        "Fashion-MNIST: 28 x 28 pixels", "zalando-datasets/fashion_mnist", 28, 10
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


def load_hub(data: Data, source: Source) -> Pictures:
    """The data set from `data.path`, a local folder or a name on the Hub, or from its usual place.

    A local folder holds what `save_to_disk` wrote, Parquet files whose names say train and test,
    the files that torchvision downloads, or folders of images by class. Scripts are never run.

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
    source = replace(
        source,
        train=data.train_part or source.train,
        test=data.test_part or source.test,
        image=data.image or source.image,
        label=data.label or source.label,
        classes=0 if data.label else source.classes,
    )
    check_different(source.train, source.test)
    folder, files = Path(path), {}
    if folder.is_dir() and not _is_saved(folder):
        packed = load_packed(data, folder, size, source.train, source.test, source.label)
        if packed is not None:
            _check_classes(path, packed.classes, source)
            return packed
        files = _parquet_files(folder, source)
        if not any(files.values()):
            return _class_folders(data, folder, size, source)
    return _columns(data, path, size, source, _parts(path, source, files))


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote it by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _parquet_files(folder: Path, source: Source) -> dict[str, list[Path]]:
    """The Parquet files of each part, by the words in their names or their folders'."""
    variant = folder / (source.configuration or "")
    below = variant if variant.is_dir() else folder
    files: dict[str, list[Path]] = {source.train: [], source.test: []}
    for path in sorted(path for path in below.rglob("*") if path.suffix.lower() == ".parquet"):
        relative = path.relative_to(below)
        if all(map(is_visible, relative.parts)):
            for part in parts_in(relative, list(files)):
                files[part].append(path)
    check_apart(files[source.train], files[source.test], "name each file for one part")
    if any(files.values()) and not all(files.values()):
        raise ValueError(_wanted(folder, source))
    return files


def _wanted(folder: Path, source: Source) -> str:
    return (
        f"{folder} must hold dataset_dict.json, or Parquet files with the words {source.train} and "
        f"{source.test} in their names, torchvision's files, or folders of images by class in "
        f"{source.train}/ and {source.test}/, got neither; is it the right folder? Parts of other "
        "names are chosen with data.train_part and data.test_part"
    )


def _class_folders(data: Data, folder: Path, size: int, source: Source) -> Pictures:
    train, test = find_parts(folder, data, source.test)
    if test is None:
        raise ValueError(_wanted(folder, source))
    refuse_settings(data, ("image", "label"), f"folders of images by class, as in {folder}")
    pictures = folder_pictures(data, train, test, str(folder), size)
    _check_classes(str(folder), pictures.classes, source)
    return pictures


def _parts(path: str, source: Source, files: dict[str, list[Path]]) -> Any:
    """The data set's parts by name, from disk or from the Hub."""
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"data set {path} needs the package datasets, which is not installed; {INSTALL}"
        ) from None
    _check_parquet(path for paths in files.values() for path in paths)
    try:
        if files:
            names = {part: list(map(str, paths)) for part, paths in files.items()}
            # By themselves `datasets` would know a file that it has read by its time alone.
            state, _ = state_of(path for paths in files.values() for path in paths)
            return library.load_dataset("parquet", state[:32], data_files=names)
        if Path(path).is_dir():
            saved = library.load_from_disk(path)
            return saved if isinstance(saved, dict) else {"train": saved}
        configuration = source.configuration if path == source.path else None
        with _without_retries(library):
            return library.load_dataset(path, configuration)
    except Exception as error:  # the library's own, the network's, the files'
        cause = error.__cause__ or error
        raise ValueError(
            f"data set {path!r} must be a folder or a name on the Hub that can be read, got "
            f"{explained(cause)}; check the name and the connection, or download it "
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


def _check_parquet(files: Iterable[Path]) -> None:
    """Raises ValueError naming every file that is no Parquet, was cut short, or has no rows."""
    from pyarrow import ArrowException, parquet

    broken = []
    for path in files:
        try:
            if not parquet.read_metadata(path).num_rows:
                broken.append(f"{path} (no rows)")
        except (ArrowException, OSError) as error:
            broken.append(f"{path} ({error})")
    if broken:
        raise ValueError(
            f"Parquet files must be whole ones that can be read, got {'; '.join(broken)}; download "
            "them again"
        )


def _columns(data: Data, path: str, size: int, source: Source, found: Any) -> Pictures:
    """Images and labels of two parts, as Arrow stores them: nothing is decoded by `datasets`."""
    for part, setting in ((source.train, "data.train_part"), (source.test, "data.test_part")):
        if part not in found:
            raise ValueError(
                f"{path} must have the part {part!r}, got {sorted(found)}; rename it, or name "
                f"another with {setting}"
            )
        if not len(found[part]):
            raise ValueError(f"{path} must have rows in the part {part!r}, got none; fill it")
    parts = [found[source.train], found[source.test]]
    for part in parts:
        for column, setting in ((source.image, "data.image"), (source.label, "data.label")):
            if column not in part.column_names:
                raise ValueError(
                    f"{path} must have a column {column!r}, got {part.column_names}; rename it, or "
                    f"name another with {setting}"
                )
    train, test = (part.with_format("arrow").select_columns([source.image]) for part in parts)
    for rows in (train, test):
        _check_images(path, source.image, rows.data.column(source.image).type)
    labels, classes = _labels(path, parts, source)
    _check_classes(path, classes, source)

    def place_of(row: int) -> tuple[Any, int]:
        return (train, row) if row < len(train) else (test, row - len(train))

    def read(row: int) -> bytes:
        part, place = place_of(row)
        return _content(part[place].column(0)[0].as_py())

    def name(row: int) -> str:
        part, place = place_of(row)
        return f"row {place} of {source.train if part is train else source.test}"

    def files() -> list[Path]:
        if not all(map(_is_whole, (train, test))):
            return []  # some images are elsewhere
        return [Path(file["filename"]) for rows in (train, test) for file in rows.cache_files]

    return Pictures(
        title=path,
        labels=labels,
        classes=classes,
        size=size,
        read=read,
        name=name,
        test_start=len(train),
        skip_broken=bool(data.skip_broken),
        files=files,
        column=source.image,
    )


def _check_images(path: str, column: str, kind: Any) -> None:
    """Raises ValueError unless a column of this Arrow type can hold image files."""
    from pyarrow import types

    if types.is_struct(kind):
        if any(kind.get_field_index(name) >= 0 for name in ("bytes", "path")):
            return
    elif types.is_binary(kind) or types.is_large_binary(kind):
        return
    raise ValueError(
        f"column {column!r} of {path} must hold image files, got {kind}; name another with "
        "data.image"
    )


def _content(stored: Any) -> bytes:
    """An image's file, from the bytes of a column or the path beside them."""
    if isinstance(stored, dict):
        path = stored.get("path")
        stored = stored.get("bytes")
        if stored is None and isinstance(path, str) and path:
            return read_file(Path(path))
    if not isinstance(stored, bytes):
        kind = "nothing" if stored is None else f"a {type(stored).__name__}"
        raise ValueError(f"must be the bytes of an image, got {kind}")
    return stored


def _is_whole(rows: Any) -> bool:
    """Whether every image's bytes are in the table itself."""
    from pyarrow import types

    column = rows.data.column(0)
    if types.is_struct(column.type):
        place = column.type.get_field_index("bytes")
        if place < 0:
            return False
        column = column.flatten()[place]
    return column.null_count == 0


def _labels(path: str, parts: Sequence[Any], source: Source) -> tuple[list[int | None], int]:
    """The labels of all parts, one after the other, and the number of classes.

    Texts are numbered in their order; null, and the -1 of parts without labels, are None.
    """
    column = source.label
    named = [getattr(part.features[column], "names", None) for part in parts]
    if named[0] != named[1]:
        raise ValueError(
            f"column {column!r} of {path} must name the same classes in both parts, got "
            f"{named[0]} and {named[1]}; name another with data.label"
        )
    values = [
        value
        for part in parts
        for value in part.with_format("arrow").select_columns([column])[:].column(0).to_pylist()
    ]
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, str) for value in known):
        numbers = {text: number for number, text in enumerate(sorted(set(known)))}
        if unseen := sorted(set(known) - set(values[: len(parts[0])])):
            raise ValueError(
                f"column {column!r} of {path} must have every class in the training part, got "
                f"{', '.join(map(excerpt, unseen[:5]))} in the test part alone; name "
                "another with data.label"
            )
        return [None if value is None else numbers[value] for value in values], len(numbers)
    if not known or not all(isinstance(value, int) for value in known):
        kinds = ", ".join(sorted({type(value).__name__ for value in known})) or "nothing"
        raise ValueError(
            f"column {column!r} of {path} must hold whole numbers or texts, got {kinds}; name "
            "another with data.label"
        )
    labels = [None if value is None or value < 0 else int(value) for value in values]
    if source.ten_is_zero and 10 in known and 0 not in known:
        return [0 if label == 10 else label for label in labels], 10
    classes = len(named[0]) if named[0] else max(known) + 1
    if not named[0] and classes > max(1000, len(values)):
        raise ValueError(
            f"column {column!r} of {path} must number the classes from 0, got up to {classes - 1} "
            f"in {len(values)} rows; name another with data.label"
        )
    return labels, classes


def _check_classes(path: str, classes: int, source: Source) -> None:
    if source.classes and classes != source.classes:
        raise ValueError(
            f"{path} must have {source.classes} classes, got {classes}; is it the right data set?"
        )
