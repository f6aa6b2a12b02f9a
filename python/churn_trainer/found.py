"""The runs below a folder: what finished, and in one sentence each what did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from churn_kernels._printable import excerpt
from churn_trainer.config import Run
from churn_trainer.run_folder import CONFIG, DIVERGED, METRICS, RunFolder

STUDY = "study.json"
"""A study's settings, beside the folders of its runs."""

EARLIER_STUDY = "study-{}.json"
"""Those of an earlier study in the same folder, which may name methods that the last does not."""


class NothingFinished(ValueError):
    """There is no finished run to report."""


@dataclass(frozen=True)
class Finished:
    """A run that finished.

    Attributes:
        run: its settings.
        folder: where its logits are.
        device: the kind of device it was trained on, "cpu" or "cuda".
        threads: how many computed, or None where its folder does not say.
    """

    run: Run
    folder: RunFolder
    device: str
    threads: int | None = None


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

    @property
    def count(self) -> int:
        """All runs, finished or not."""
        lost = (*self.diverged, *self.damaged, *self.unfinished)
        return len(self.finished) + len(lost)


def find_runs(source: Path | Sequence[Path | RunFolder]) -> Found:
    """Reads settings and status of every run; a folder that cannot be read stops no other.

    Args:
        source: a folder that holds the runs' folders, the folder of one run, or several of these.
    Raises: ValueError if there is no such folder, NothingFinished if no run in any finished.
    """
    sources = [source] if isinstance(source, Path) else list(source)
    found = Found()
    folders = {folder.path.resolve(): folder for one in sources for folder in _folders(one)}
    for folder in folders.values():
        try:
            _sort_in(folder, found)
        except (ValueError, OSError) as error:
            found.damaged.append(excerpt(str(error)))
    if not found.finished:
        counts = (
            f"{len(found.unfinished)} not ended, {len(found.diverged)} diverged, "
            f"{len(found.damaged)} damaged"
        )
        first = f" ({found.damaged[0]})" if found.damaged else ""
        names = [str(_path(one)) for one in sources]
        shown = ", ".join(names[:3] + ["..."] * (len(names) > 3))
        raise NothingFinished(
            f"folder must hold a run that finished, got {shown} with {counts}{first}; train one "
            "with `churn-train train --out FOLDER`"
        )
    return found


def _folders(source: Path | RunFolder) -> list[RunFolder]:
    if isinstance(source, RunFolder):
        return [source]
    if not source.is_dir():
        raise ValueError(
            f"{source} is not a run folder; pass the --out folder of churn-train train"
        )
    if (source / CONFIG).exists() or (source / METRICS).exists():
        return [RunFolder(source)]
    inside = {found.parent for name in (CONFIG, METRICS) for found in source.glob(f"*/{name}")}
    return [RunFolder(folder) for folder in sorted(inside)]


def _path(source: Path | RunFolder) -> Path:
    return source.path if isinstance(source, RunFolder) else source


def _sort_in(folder: RunFolder, found: Found) -> None:
    run = folder.run() if folder.path.exists() else None
    if run is None or not folder.done:
        found.unfinished.append(excerpt(folder.path.name))
        return
    metrics = folder.metrics()
    if metrics["status"] == DIVERGED:
        message = f"{folder.path.name} diverged: {metrics.get('message', '')}; it is in no table"
        found.diverged.append(excerpt(message))
        return
    environment = metrics.get("environment") or {}
    device = excerpt(environment.get("device") or "cpu", 10).split(":")[0]
    found.finished.append(Finished(run, folder, device, environment.get("threads")))
