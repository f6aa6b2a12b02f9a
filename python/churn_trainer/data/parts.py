"""Which part of a data set a folder or file is, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from churn_trainer.config import Data
from churn_trainer.data.decode import SUFFIXES

WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val"),
}
"""Part -> the words that name it, in any case."""

_FOREIGN = frozenset({"__MACOSX", "@eaDir"})
"""Folders that systems put beside the data."""


def is_visible(name: str) -> bool:
    """Whether a file or folder is part of the data, not of a notebook, editor or system."""
    return not name.startswith(".") and name not in _FOREIGN


def parts_in(path: Path, parts: Sequence[str]) -> set[str]:
    """Those of `parts` that a file's relative path names: by its own name, else its folders'.

    A name has a part's word only as a whole: "latest" is no "test".
    """
    for name in (path.stem, *(folder.name for folder in path.parents)):
        named = {part for part in parts if any(_has(name, word) for word in _words(part))}
        if named:
            return named
    return set()


def folders_named(root: Path, part: str) -> list[Path]:
    """The folders below `root` that bear a part's name and nothing else, in any case."""
    return sorted(folder for folder in folders_in(root) if folder.name.lower() in _words(part))


def folders_in(root: Path) -> list[Path]:
    """The visible folders right below `root`. Raises: ValueError for a link to nothing."""
    entries = [entry for entry in root.iterdir() if is_visible(entry.name)]
    for entry in entries:
        if entry.is_symlink() and not entry.exists() and entry.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{entry} must lead to a folder, got a broken link; mend or remove it")
    return [entry for entry in entries if entry.is_dir()]


def check_apart(train: Iterable[Path], test: Iterable[Path], remedy: str) -> None:
    """Raises ValueError if a file is in both parts, by whatever links or names."""
    known = {key for path in train if (key := _identity(path)) is not None}
    for path in test:
        if _identity(path) in known:
            raise ValueError(
                f"the training and the test part must share no file, got {path} in both; {remedy}"
            )


def check_different(train: str, test: str) -> None:
    """Raises ValueError if both parts have one name."""
    if train == test:
        raise ValueError(
            f"data.test_part must be another part than data.train_part, got {test!r} for both; "
            "name two parts"
        )


def refuse_settings(data: Data, names: Iterable[str], source: str) -> None:
    """Raises ValueError if one of these settings was given, for which `source` has no use."""
    for name in names:
        if (value := getattr(data, name)) is not None:
            raise ValueError(f"data.{name} must be left out of {source}, got {value!r}; drop it")


def _words(part: str) -> tuple[str, ...]:
    word = part.lower()
    return next((words for words in WORDS.values() if word in words), (word,))


def _has(name: str, word: str) -> bool:
    return re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", name.lower()) is not None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:  # a link to nothing is named when it is read
        return None
    return status.st_dev, status.st_ino
