"""What runs measured along their training, averaged over the runs of a method."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from churn_kernels._files import read_text, reading
from churn_kernels._printable import excerpt
from churn_trainer.outcomes import Outcome
from churn_trainer.run_folder import CURVES, LOGITS, RunFolder

COLUMNS = {
    "cross_entropy": "train_cross_entropy",
    "accuracy": "test_accuracy",
    "confidence": "test_confidence",
}
"""What is averaged, and what a run's file calls it."""

_WANTED = "what the run measured along its training"


@dataclass(frozen=True)
class Curves:
    """Means over splits and independent runs, (P,) float64, at the epochs all of them measured.

    Attributes:
        outcome: whose.
        epoch: (P,) int64, from 1.
        cross_entropy: of the training rows, nats.
        accuracy, confidence: of the test rows.
        churn: of the test rows, over the pairs of runs that share a split; NaN where there is none.
    """

    outcome: Outcome
    epoch: Tensor
    cross_entropy: Tensor
    accuracy: Tensor
    confidence: Tensor
    churn: Tensor


def read_curves(outcomes: Iterable[Outcome]) -> tuple[list[Curves], list[str]]:
    """The curves of every method, and a sentence for each whose files cannot be used."""
    curves: list[Curves] = []
    damaged: list[str] = []
    for outcome in outcomes:
        try:
            curves.append(_read(outcome))
        except ValueError as error:
            damaged.append(excerpt(f"{outcome.label} has no curves: {error}"))
    return curves, damaged


def _read(outcome: Outcome) -> Curves:
    splits = [
        (len(split.labels), [split.found[place].folder for place in split.clusters()[0]])
        for split in outcome.splits.values()
    ]
    tables = [_table(folder) for _, folders in splits for folder in folders]
    epochs = sorted(set.intersection(*(set(table) for table in tables)))
    if not epochs:
        raise ValueError("its runs have no measured epoch in common; train them with the same ones")
    values = torch.tensor(
        [[table[epoch] for epoch in epochs] for table in tables], dtype=torch.float64
    )  # (runs, P, columns)
    means = dict(zip(COLUMNS, values.mean(dim=0).unbind(dim=1), strict=True))
    pairs = [
        (one != other).double().mean(dim=1)
        for rows, folders in splits
        for one, other in combinations([_predicted(one, epochs, rows) for one in folders], 2)
    ]
    churn = torch.stack(pairs).mean(dim=0) if pairs else torch.full((len(epochs),), torch.nan)
    return Curves(outcome, torch.tensor(epochs), **means, churn=churn)


def _table(folder: RunFolder) -> dict[int, list[float]]:
    """Measured epoch -> its numbers, in the order of `COLUMNS`."""
    path = folder.path / CURVES
    with reading(path, _WANTED, _remedy(folder)):
        table = {
            int(row["epoch"]): [float(row[name]) for name in COLUMNS.values()]
            for row in csv.DictReader(io.StringIO(read_text(path), newline=""))
            if row["test_accuracy"]
        }
        if not table or not torch.tensor(list(table.values())).isfinite().all():
            raise ValueError("no finite numbers")
        if not 1 <= min(table) <= max(table) < 2**53:
            raise ValueError(f"epochs from {min(table)} to {max(table)}")
        return table


def _predicted(folder: RunFolder, epochs: Sequence[int], rows: int) -> Tensor:
    """(P, N) classes of the N test rows after those epochs."""
    measured, predicted = folder.predictions_along()
    with reading(folder.path / LOGITS, _WANTED, _remedy(folder)):
        if measured.ndim != 1 or predicted.shape != (len(measured), rows):
            raise ValueError(f"shapes {tuple(measured.shape)} and {tuple(predicted.shape)}")
        place = {epoch: number for number, epoch in enumerate(measured.tolist())}
        if missing := [epoch for epoch in epochs if epoch not in place]:
            raise ValueError(f"nothing of epoch {missing[0]}")
        return predicted[[place[epoch] for epoch in epochs]]


def _remedy(folder: RunFolder) -> str:
    return f"delete {folder.path} and train again"
