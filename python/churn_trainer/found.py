"""The runs below a folder: what finished, and in one sentence each what did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from churn_trainer.config import Run
from churn_trainer.run_folder import CONFIG, DIVERGED, METRICS, RunFolder


@dataclass(frozen=True)
class Finished:
    """A run that finished.

    Attributes:
        run: its settings.
        folder: where its logits are.
        device: the kind of device it was trained on, "cpu" or "cuda".
    """

    run: Run
    folder: RunFolder
    device: str


@dataclass(frozen=True)
class Found:
    """What `find_runs` found.

    Attributes:
        finished: the runs to report.
        diverged: a sentence for each run that diverged.
        damaged: a sentence for each folder that cannot be read.
        unfinished: folders whose run has not ended.
    """

    finished: list[Finished] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)


def find_runs(source: Path | Sequence[Path | RunFolder]) -> Found:
    """Reads settings and status of every run; a folder that cannot be read stops no other.

    Args:
        source: a folder that holds the runs' folders, the folder of one run, or several of these.
    Raises: ValueError if there is no such folder, or no finished run in any.
    """
    sources = [source] if isinstance(source, Path) else list(source)
    found = Found()
    folders = {folder.path.resolve(): folder for one in sources for folder in _folders(one)}
    for folder in folders.values():
        try:
            _sort_in(folder, found)
        except ValueError as error:
            found.damaged.append(printable(str(error)))
    if not found.finished:
        counts = (
            f"{len(found.unfinished)} not ended, {len(found.diverged)} diverged, "
            f"{len(found.damaged)} damaged"
        )
        first = f" ({found.damaged[0]})" if found.damaged else ""
        raise ValueError(
            f"folder must hold a run that finished, got {', '.join(map(str, map(_path, sources)))} "
            f"with {counts}{first}; train one with `churn-train train --out FOLDER`"
        )
    return found


def printable(text: str, most: int = 300) -> str:
    """`text` on one line without control characters, cut to `most` characters.

    Settings come from files that anybody may have written, and go to terminals and figures.
    """
    clean = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return clean if len(clean) <= most else clean[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _folders(source: Path | RunFolder) -> list[RunFolder]:
    path = _path(source)
    if not path.is_dir():
        raise ValueError(
            f"folder must be one that holds runs, got {path}, which is none; "
            "name what `churn-train train --out` was given"
        )
    if (path / CONFIG).exists() or (path / METRICS).exists():
        return [RunFolder(path)]
    inside = {found.parent for name in (CONFIG, METRICS) for found in path.glob(f"*/{name}")}
    return [RunFolder(folder) for folder in sorted(inside)]


def _path(source: Path | RunFolder) -> Path:
    return source.path if isinstance(source, RunFolder) else source


def _sort_in(folder: RunFolder, found: Found) -> None:
    run = folder.run()
    if not folder.done:
        found.unfinished.append(printable(folder.path.name))
        return
    metrics = folder.metrics()
    if metrics["status"] == DIVERGED:
        message = f"{folder.path.name} diverged: {metrics.get('message', '')}; it is in no table"
        found.diverged.append(printable(message))
        return
    environment = metrics.get("environment")
    device = environment.get("device", "cpu") if isinstance(environment, dict) else "cpu"
    found.finished.append(Finished(run, folder, printable(str(device).split(":")[0], 10)))
