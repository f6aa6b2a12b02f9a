"""What a run leaves behind: a folder of plain files that studies and reports read."""

from __future__ import annotations

import fcntl
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from churn_kernels._files import (
    check,
    make_folder,
    open_lock,
    optional,
    parse_json,
    read_text,
    reading,
    write_atomically,
)
from churn_trainer.config import Run
from churn_trainer.output import csv_text
from churn_trainer.stored import load_arrays, load_tensors, save_arrays, save_tensors

CONFIG, METRICS, LOGITS, CURVES = "config.json", "metrics.json", "logits.npz", "curves.csv"
WEIGHTS, CHECKPOINT, TRACE, LOCK = "weights.pt", "checkpoint.pt", "steps.trace", ".lock"

FINISHED, DIVERGED = "finished", "diverged"


_METRICS = {
    "status": {FINISHED, DIVERGED},
    "message": optional(str),
    "test": optional({str: float}),
    "test_rows": optional(int),
    "environment": optional({"device": optional(str), "threads": optional(int)}),
}
"""What `metrics.json` holds."""


class Busy(RuntimeError):
    """Another process is training this run."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `metrics.json`, written last, says that it is complete."""

    path: Path

    @property
    def done(self) -> bool:
        """Whether the run has ended: it finished, or it diverged."""
        return (self.path / METRICS).is_file()

    @property
    def status(self) -> str:
        """`finished`, `diverged`, or `started`."""
        return self.metrics()["status"] if self.done else "started"

    def start(self, run: Run) -> None:
        """Writes the settings. Raises: ValueError if those of another run are there."""
        content = json.dumps(run.to_mapping(), indent=1).encode() + b"\n"
        if (self.path / CONFIG).exists() and self.run() != run:
            raise ValueError(
                f"{self.path} must be the folder of the run {run.id}, got that of {self.run().id}; "
                "its settings were changed: delete the folder"
            )
        write_atomically(self.path / CONFIG, content)

    def run(self) -> Run:
        """The settings. Raises: ValueError if they are not there or not right."""
        return Run.load(self.path / CONFIG)

    def metrics(self) -> dict[str, Any]:
        """What was measured on the test rows, `status`, `message`, and the environment."""
        if not self.done:
            raise ValueError(f"{self.path} must hold a run that has ended; train it")
        path = self.path / METRICS
        with reading(path, "the metrics of a run", "delete it"):
            return check(parse_json(read_text(path)), _METRICS)

    def logits(self) -> tuple[Tensor, Tensor]:
        """(N, C) float32 logits of what the run predicts on its test rows, and (N,) int64 labels.

        Raises: ValueError if the file is missing or holds anything but these two arrays.
        """
        logits, labels = self._arrays("logits", "labels")
        return logits, labels

    def predictions_along(self) -> tuple[Tensor, Tensor]:
        """(P,) the epochs that were measured, from 1, and (P, N) the classes predicted after each.

        Raises: ValueError if the file is missing or holds anything but these arrays.
        """
        epochs, predicted = self._arrays("epochs", "predicted")
        return epochs, predicted

    def _arrays(self, *names: str) -> list[Tensor]:
        return load_arrays(self.path / LOGITS, names, f"delete {self.path} and train again")

    def weights(self) -> list[dict[str, Tensor]]:
        """Each member's state dict. Raises: ValueError if the file holds anything else."""
        remedy = f"delete {self.path} and train again"
        members = self.run().method.members
        return load_tensors(self.path / WEIGHTS, remedy, ({str: Tensor},) * members)

    def write_curves(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The epochs so far, one row for each."""
        text = csv_text(list(rows[0]) if rows else [], [list(row.values()) for row in rows])
        write_atomically(self.path / CURVES, text.encode())

    def finish(
        self,
        metrics: Mapping[str, Any],
        logits: Tensor,
        labels: Tensor,
        weights: Sequence[dict[str, Tensor]],
        along: Mapping[int, Tensor],
    ) -> None:
        """Writes a finished run's files, the metrics last.

        Args:
            metrics: see `metrics`.
            logits, labels: see `logits`.
            weights: see `weights`.
            along: epoch -> (N,) the classes predicted after it.
        """
        save_tensors(self.path / WEIGHTS, list(weights))
        kind = np.min_scalar_type(logits.shape[1] - 1)
        predicted = np.stack([classes.numpy() for classes in along.values()]).astype(kind)
        arrays = {
            "logits": logits.numpy(),
            "labels": labels.numpy(),
            "epochs": np.array(list(along)),
            "predicted": predicted,
        }
        save_arrays(self.path / LOGITS, arrays)
        self.end(FINISHED, metrics)

    def end(self, status: str, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics, which mark the run as ended."""
        content = json.dumps({"status": status, **metrics}, indent=1, allow_nan=False)
        write_atomically(self.path / METRICS, content.encode() + b"\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else trains this run inside the block; a killed process lets go.

        Raises: Busy if somebody does; ValueError if a symbolic link takes the place of the folder
            or of the lock.
        """
        make_folder(self.path)
        with open_lock(self.path / LOCK) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(
                    f"{self.path} must be trained by one process, got a second; wait for the first"
                ) from None
            yield


def read_runs(root: Path) -> list[RunFolder]:
    """The folders of the runs below `root` that finished, by name; warns of unreadable ones."""
    finished = []
    for path in sorted(root.glob(f"*/{METRICS}")):
        folder = RunFolder(path.parent)
        try:
            if folder.status == FINISHED:
                finished.append(folder)
        except ValueError as error:
            warnings.warn(str(error), stacklevel=2)
    return finished
