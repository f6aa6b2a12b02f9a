"""Folders of image files by class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from churn_trainer.config import Data
from churn_trainer.data.decode import SUFFIXES, read_file
from churn_trainer.data.images import Pictures
from churn_trainer.data.parts import (
    WORDS,
    check_apart,
    check_different,
    folders_in,
    folders_named,
    is_visible,
)


def load_folder(data: Data) -> Pictures:
    """Images below `data.path`: CLASS/FILE, or train/CLASS/FILE beside test/ (val/, validation/).

    Raises: ValueError if there is no such folder, it holds no images by class, its two parts do
    not have the same classes or share a file, or `data.image_size` is not said.
    """
    root = Path(data.path)
    if not data.path or not root.is_dir():
        got = f"{data.path!r}, which is no folder" if data.path else "none"
        raise ValueError(
            f"data.path (--data-path) must be a folder of images, got {got}; name the folder that "
            f"holds a folder per class"
        )
    if not data.image_size:
        raise ValueError(
            "data.image_size must be above 0 for a folder, got 0; say the pixels a side"
        )
    train, test = find_parts(root, data)
    if test is None and not data.train_part:
        _check_not_parts(root)
    return folder_pictures(data, train, test, str(root), data.image_size)


def find_parts(root: Path, data: Data, test: str = "test") -> tuple[Path, Path | None]:
    """The folders of the training and test part; `root` and None where it has no parts.

    A training part "." says that it has none, whatever its folders are called.

    Args:
        root: where they are.
        data: `train_part` and `test_part`, where they are not to be found by their names.
        test: what the test part is called, before others.
    Raises: ValueError if one is missing, or several folders could be one.
    """
    if data.train_part == "." and not data.test_part:
        return root, None
    train_folder = _part(root, data.train_part, "data.train_part", ("train",))
    test_folder = _part(root, data.test_part, "data.test_part", (test, "test", "validation"))
    if train_folder is None and test_folder is None:
        return root, None
    if train_folder is None or test_folder is None:
        names = ", ".join(word for part in ("test", "validation") for word in WORDS[part])
        raise ValueError(
            f"data.path must have train/ and one of {names}, or neither, got {root}; move the "
            "classes' folders into them, or name them with data.train_part and data.test_part; a "
            "training part '.' says that all are classes"
        )
    check_different(str(train_folder), str(test_folder))
    return train_folder, test_folder


def folder_pictures(data: Data, train: Path, test: Path | None, title: str, size: int) -> Pictures:
    """The images in the folders of one or two parts. Raises: ValueError, as `load_folder`."""
    files, labels, classes = _by_class(train)
    test_start = 0
    if test is not None:
        more, more_labels, test_classes = _by_class(test)
        if classes != test_classes:
            odd = sorted(set(classes) ^ set(test_classes))
            raise ValueError(
                f"{train} and {test} must have the same classes, got {len(classes)} and "
                f"{len(test_classes)}; in one only: {', '.join(odd[:5])}; mend them, or choose "
                "others with data.train_part and data.test_part"
            )
        check_apart(files, more, "remove it from one")
        test_start, files, labels = len(files), files + more, labels + more_labels
    return Pictures(
        title=title,
        labels=labels,
        classes=len(classes),
        size=size,
        read=lambda row: read_file(files[row]),
        name=lambda row: str(files[row]),
        test_start=test_start,
        skip_broken=bool(data.skip_broken),
        files=lambda: files,
    )


def _part(root: Path, chosen: str | None, setting: str, parts: tuple[str, ...]) -> Path | None:
    if chosen is not None:
        if not (root / chosen).is_dir():
            names = ", ".join(sorted(folder.name for folder in folders_in(root)))
            raise ValueError(
                f"{setting} must be a folder of {root}, got {chosen!r}; it has {names}"
            )
        return root / chosen
    for part in parts:
        folders = folders_named(root, part)
        if len(folders) > 1:
            names = " and ".join(folder.name for folder in folders)
            raise ValueError(
                f"{root} must have one folder for a part, got {names}; say which with {setting}"
            )
        if folders:
            return folders[0]
    return None


def _check_not_parts(root: Path) -> None:
    """Raises ValueError if what should be classes looks like parts by names of their own.

    Parts hold no images themselves, but the same folders, one a class.
    """
    inside = []
    for folder in folders_in(root):
        if any(entry.suffix.lower() in SUFFIXES for entry in folder.iterdir()):
            return
        inside.append({below.name for below in folders_in(folder)})
    shared = sorted(set.intersection(*inside)) if len(inside) > 1 else []
    if len(shared) > 1:
        names = ", ".join(sorted(folder.name for folder in folders_in(root))[:5])
        raise ValueError(
            f"the folders of {root} must be classes, got {names}, each with {shared[0]!r} and "
            f"{shared[1]!r} in it, like parts; name two with data.train_part and data.test_part, "
            "or say data.train_part '.' if they are classes"
        )


def _by_class(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """Files, their labels, and the classes in the order of their names."""
    classes = sorted(entry.name for entry in folders_in(folder))
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(_images_below(folder / name))
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


def _images_below(folder: Path) -> Iterator[Path]:
    """Image files by their suffixes, links to nothing among them; each folder is entered once."""
    entered: set[Path] = set()

    def enter(path: Path) -> bool:
        real = path.resolve()
        new = real not in entered
        entered.add(real)
        return new

    def fail(error: OSError) -> None:
        raise error

    enter(folder)
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        parent = Path(place)
        folders[:] = [name for name in sorted(folders) if is_visible(name) and enter(parent / name)]
        for name in names:
            path = parent / name
            if is_visible(name) and path.suffix.lower() in SUFFIXES:
                yield path
