"""A study: its runs trained by workers, then reported from their folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from churn_kernels._files import make_folder, read_bytes, write_atomically
from churn_trainer.config import Study
from churn_trainer.data import filled_in
from churn_trainer.found import EARLIER_STUDY, STUDY
from churn_trainer.report import Report, make_report
from churn_trainer.run_folder import RunFolder
from churn_trainer.tasks import Workers, train_all
from churn_trainer.train import Event, Options


def run_study(
    study: Study,
    root: Path,
    workers: Workers,
    options: Options | None = None,
    *,
    retries: int = 2,
    threads: Sequence[int] = (1,),
    tell: Callable[[Event], None] = lambda event: None,
) -> None:
    """Trains the runs of a study that have not ended.

    A worker's arithmetic has a number of threads that `threads` fixes, so that the numbers depend
    neither on the number of cores nor on that of the workers.

    Args:
        study: what to do.
        root: folder of the runs' folders.
        workers: who trains.
        options: see `train.Options`; its `curve_points` are the study's.
        retries: how often runs that fail are tried again.
        threads: see `tasks.make_tasks`.
        tell: called as it goes.
    Raises: ValueError for a data set or model that does not exist, a split that cannot be made, or
        a `root` that is a symbolic link.
    """
    make_folder(root)
    (study,) = filled_in([study])
    _write_settings(study, root)
    options = replace(options or Options(), curve_points=study.curve_points)
    train_all(study.all_runs(), root, workers, options, retries=retries, threads=threads, tell=tell)


def _write_settings(study: Study, root: Path) -> None:
    """Writes them beside the runs; an earlier study's stay, for the names of its methods."""
    path = root / STUDY
    content = json.dumps(study.to_mapping(), indent=1).encode() + b"\n"
    before = read_bytes(path) if path.is_file() else content
    digest = hashlib.sha256(before).hexdigest()[:8]
    kept = None if before == content else root / EARLIER_STUDY.format(digest)
    write_atomically(path, content, kept)


def report_study(study: Study, *roots: Path) -> Report:
    """Measures the finished runs of a study, and compares its methods with the first.

    Args:
        study: which runs.
        roots: folders of the runs' folders, one for each device where there are several.
    Raises: NothingFinished if no run finished, ValueError if the data are not there any more.
    """
    (study,) = filled_in([study])
    folders = [RunFolder(root / run.id) for root in roots for run in study.all_runs()]
    first = study.run(study.methods[0], 0, 0)
    return make_report(
        folders, study.level, title=study.title, first=first, names=study.own_names()
    )
