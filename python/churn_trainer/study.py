"""A study: its runs trained, then read from their folders, measured, compared with the first."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from churn_kernels.intervals import Estimate
from churn_kernels.metrics import ChurnReport, churn_report, prediction_confidence
from churn_trainer.comparison import churn_swap_test, holm, over_splits, paired_change
from churn_trainer.config import Study, Variant
from churn_trainer.data import load_dataset
from churn_trainer.data.dataset import Dataset
from churn_trainer.output import write_atomically
from churn_trainer.run_folder import CURVES, FINISHED, RunFolder
from churn_trainer.tasks import Workers, train_all
from churn_trainer.train import Event, Options

HISTOGRAM_BINS = 20

METRICS = {
    "accuracy": "accuracy",
    "churn": "churn",
    "schurn": "SChurn",
    "churn_correct": "churn correct",
    "churn_incorrect": "churn incorrect",
    "confidence": "confidence",
    "ece": "ECE",
}
"""The metrics of the table, as `ChurnReport` and as the reader call them."""


STUDY = "study.json"
"""The study's settings, beside its runs."""


class NothingToCompare(RuntimeError):
    """The first method has runs that did not finish."""


@dataclass
class Curves:
    """Measurements along the training, one entry per measured epoch; means over splits and runs."""

    epoch: list[int] = field(default_factory=list)
    cross_entropy: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    churn: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class MethodResult:
    """What one method came to.

    Attributes:
        method: the method.
        reports: per split, over the measured member of each run, on the test rows.
        predictions: (S, R, N) predicted classes.
        histogram: (HISTOGRAM_BINS,) share of the test predictions, of all splits and runs, whose
            confidence falls into each equal bin of [0, 1].
        curves: see `Curves`.
        summary: metric -> mean with interval, for the names in `METRICS`.
        seconds: what the training took, of all runs.
    """

    method: Variant
    reports: list[ChurnReport]
    predictions: Tensor
    histogram: Tensor
    curves: Curves
    summary: dict[str, Estimate]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """A method against the study's first one, paired by split and run.

    Attributes:
        method: the method.
        change: metric -> change with interval, for the names in `METRICS`.
        p_value: exact swap test of the change in churn.
        p_holm: the same, corrected for the number of methods compared.
    """

    method: Variant
    change: dict[str, Estimate]
    p_value: float
    p_holm: float


@dataclass(frozen=True)
class StudyResult:
    """Everything a report shows.

    Attributes:
        study: its settings.
        dataset: its data.
        test_rows: N.
        results: of the methods whose runs all finished, in the study's order.
        comparisons: of each of them after the first with the first.
        diverged: method's name -> why it is not in `results`.
        seconds: from the call to the result, which is less where runs had ended before.
    """

    study: Study
    dataset: Dataset
    test_rows: int
    results: list[MethodResult]
    comparisons: list[Comparison]
    diverged: dict[str, str]
    seconds: float


def run_study(
    study: Study,
    root: Path,
    workers: Workers,
    options: Options | None = None,
    *,
    retries: int = 2,
    tell: Callable[[Event], None] = lambda event: None,
) -> StudyResult:
    """Trains the runs of a study that have not ended, then measures and compares all.

    A worker's arithmetic has one thread, so that the numbers depend neither on the number of cores
    nor on that of the workers.

    Args:
        study: what to do.
        root: folder of the runs' folders.
        workers: who trains.
        options: see `train.Options`; its `curve_points` are the study's.
        retries: how often runs that fail are tried again.
        tell: called as it goes.
    Raises:
        ValueError: a data set or model that does not exist, or a split that cannot be made.
        NothingToCompare: the first method has runs that did not finish.
    """
    started = time.perf_counter()
    write_atomically(root / STUDY, json.dumps(study.to_mapping(), indent=1).encode() + b"\n")
    options = replace(options or Options(), curve_points=study.curve_points)
    failed = train_all(study.all_runs(), root, workers, options, retries=retries, tell=tell)
    result = read_study(study, root, failed)
    return replace(result, seconds=time.perf_counter() - started)


def read_study(study: Study, root: Path, failed: dict[str, str] | None = None) -> StudyResult:
    """Measures and compares the runs of a study from their folders.

    Args:
        study: which runs.
        root: folder of the runs' folders.
        failed: run id -> what stopped it, for those that did not end.
    Raises:
        ValueError: a folder does not hold what it should.
        NothingToCompare: the first method has runs that did not finish.
    """
    started = time.perf_counter()
    missing: dict[str, str] = {}
    results = []
    for variant in study.methods:
        folders = [[RunFolder(root / run.id) for run in runs] for runs in study.runs_of(variant)]
        reason = _unfinished([folder for part in folders for folder in part], failed or {})
        if reason:
            missing[variant.name] = f"{variant.label}: {reason}"
        else:
            results.append(measure_method(variant, folders, study.level))
    first = study.methods[0]
    if first.name in missing:
        raise NothingToCompare(f"{missing[first.name]}; there is nothing to compare with")
    return StudyResult(
        study=study,
        dataset=load_dataset(study.data),
        test_rows=results[0].predictions.shape[-1],
        results=results,
        comparisons=compare(results, study.level),
        diverged=missing,
        seconds=time.perf_counter() - started,
    )


def measure_method(
    variant: Variant, folders: Sequence[Sequence[RunFolder]], level: float
) -> MethodResult:
    """Measures a method's finished runs on their test rows.

    Members of one run have been trained together, and at most one of them is measured; churn is a
    question about models trained apart.

    Args:
        variant: the method.
        folders: of its runs, split by split.
        level: coverage of the intervals.
    Raises: ValueError if a folder does not hold what it should.
    """
    reports, predictions = [], []
    histogram = torch.zeros(HISTOGRAM_BINS)
    for part in folders:
        logits, labels = zip(*(folder.logits() for folder in part), strict=True)
        reports.append(churn_report(logits, labels[0]))
        predictions.append(torch.stack([run.argmax(dim=-1) for run in logits]))
        for run in logits:
            confidence = prediction_confidence(run).float()
            histogram += torch.histc(confidence, bins=HISTOGRAM_BINS, min=0, max=1)
    seconds = [folder.metrics()["environment"] for part in folders for folder in part]
    return MethodResult(
        method=variant,
        reports=reports,
        predictions=torch.stack(predictions),
        histogram=histogram / histogram.sum(),
        curves=_curves(folders),
        summary={
            name: over_splits([getattr(report, name) for report in reports], level)
            for name in METRICS
        },
        seconds=sum(one["seconds"] / one["runs_together"] for one in seconds),
    )


def _unfinished(folders: Sequence[RunFolder], failed: dict[str, str]) -> str:
    """What to say of a method some of whose runs did not finish; nothing if all did."""
    bad = [folder for folder in folders if folder.status != FINISHED]
    if not bad:
        return ""
    first = bad[0]
    if first.done:
        reason = f"{first.status}: {first.metrics().get('message', '')}"
    else:
        reason = failed.get(first.path.name, "it was not trained")
    return (
        f"{len(bad)} of {len(folders)} runs did not finish, the first {first.path.name}, {reason}"
    )


def _curves(folders: Sequence[Sequence[RunFolder]]) -> Curves:
    """Means over splits and runs, and over pairs of runs of a split, at the measured epochs."""
    tables = [_curve_table(folder) for part in folders for folder in part]
    epochs = [epoch for epoch, row in tables[0].items() if row["test_accuracy"]]

    def mean(column: str) -> list[float]:
        values = [[float(table[epoch][column]) for table in tables] for epoch in epochs]
        return torch.tensor(values, dtype=torch.float64).mean(dim=1).tolist()

    churn = torch.stack([_churn_along(part) for part in folders]).mean(dim=0)
    return Curves(
        epoch=epochs,
        cross_entropy=mean("train_cross_entropy"),
        accuracy=mean("test_accuracy"),
        churn=churn.tolist(),
        confidence=mean("test_confidence"),
    )


def _curve_table(folder: RunFolder) -> dict[int, dict[str, str]]:
    path = folder.path / CURVES
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return {int(row["epoch"]): row for row in csv.DictReader(file)}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} must hold a run's curves, got: {error}; delete {folder.path} and train again"
        ) from None


def _churn_along(folders: Sequence[RunFolder]) -> Tensor:
    """(P,) mean churn of the pairs of runs, float64, after each measured epoch."""
    runs = torch.stack([folder.predictions_along()[1] for folder in folders])  # (R, P, N)
    count = len(runs)
    differ = torch.zeros(runs.shape[1], dtype=torch.float64)
    for place in range(count - 1):
        differ += (runs[place] != runs[place + 1 :]).double().mean(dim=-1).sum(dim=0)
    return differ / (count * (count - 1) / 2)


def compare(results: Sequence[MethodResult], level: float) -> list[Comparison]:
    """Every result after the first against the first."""
    baseline, *others = results

    def change(result: MethodResult, name: str) -> Estimate:
        return paired_change(
            [getattr(report, name) for report in result.reports],
            [getattr(report, name) for report in baseline.reports],
            level,
        )

    p_values = [churn_swap_test(other.predictions, baseline.predictions) for other in others]
    return [
        Comparison(other.method, {name: change(other, name) for name in METRICS}, p_value, p_holm)
        for other, p_value, p_holm in zip(others, p_values, holm(p_values), strict=True)
    ]
