"""A study: every method over the same splits and seeds, measured and compared with the first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from churn_kernels.intervals import Estimate
from churn_kernels.metrics import ChurnReport, churn_report, prediction_confidence
from churn_trainer.comparison import churn_swap_test, holm, over_splits, paired_change
from churn_trainer.config import Study
from churn_trainer.data import DATASETS, Dataset, Splits, make_splits
from churn_trainer.loop import Epoch, TrainingDiverged, fit
from churn_trainer.methods import Method, find_method
from churn_trainer.models import BatchedMLP

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


class Interrupted(Exception):
    """The study was asked to stop."""


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
        seconds: what the training took.
    """

    method: Method
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

    method: Method
    change: dict[str, Estimate]
    p_value: float
    p_holm: float


@dataclass(frozen=True)
class StudyResult:
    """Everything a report shows."""

    study: Study
    dataset: Dataset
    test_rows: int
    results: list[MethodResult]
    comparisons: list[Comparison]
    diverged: dict[str, str]
    seconds: float


def run_study(
    study: Study,
    *,
    workers: int = 1,
    on_epoch: Callable[[str, int], None] = lambda method, epoch: None,
    stop: threading.Event | None = None,
) -> StudyResult:
    """Trains and measures every method of a study.

    Each method is trained by one thread with one-threaded arithmetic, so that the numbers depend
    neither on the number of cores nor on `workers`.

    Args:
        study: what to do.
        workers: methods trained at a time.
        on_epoch: called with the method's name and the epoch's number, from the worker threads.
        stop: once set, the study raises `Interrupted` at the next epoch.
    Raises:
        ValueError: a data set or method that does not exist, or a split that cannot be made.
        Interrupted: `stop` was set.
        TrainingDiverged: the first method diverged, and with it what the others are compared with.
    """
    stop = stop or threading.Event()
    methods = [find_method(name) for name in study.methods]
    if study.dataset not in DATASETS:
        raise ValueError(
            f"dataset must be one of {', '.join(DATASETS)}, got {study.dataset!r}; "
            "no other comes with the packages"
        )
    dataset = DATASETS[study.dataset]()
    splits = make_splits(dataset, study)
    started = time.perf_counter()

    def train(method: Method) -> MethodResult | TrainingDiverged:
        def watch(epoch: Epoch) -> None:
            if stop.is_set():
                raise Interrupted
            on_epoch(method.name, epoch.number)

        torch.set_num_threads(1)
        try:
            return train_and_measure(method, splits, study, watch)
        except TrainingDiverged as error:
            return error

    # The longest first, so that no worker is left alone with one at the end.
    longest_first = sorted(methods, key=lambda method: -method.members)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        futures = {method.name: pool.submit(train, method) for method in longest_first}
        try:
            outcomes = {name: future.result() for name, future in futures.items()}
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)

    first = outcomes[methods[0].name]
    if isinstance(first, TrainingDiverged):
        raise first
    results = [
        result for method in methods if isinstance(result := outcomes[method.name], MethodResult)
    ]
    return StudyResult(
        study=study,
        dataset=dataset,
        test_rows=splits.test_labels.shape[1],
        results=results,
        comparisons=compare(results, study.level),
        diverged={
            name: str(outcome)
            for name, outcome in outcomes.items()
            if isinstance(outcome, TrainingDiverged)
        },
        seconds=time.perf_counter() - started,
    )


def train_and_measure(
    method: Method, splits: Splits, study: Study, watch: Callable[[Epoch], None]
) -> MethodResult:
    """Trains a method's runs and measures member 0 of each on the test rows.

    The other member of a co-distilled run has been pulled towards the measured one; churn is a
    question about models trained apart, so no two members of a run are ever compared.
    """
    started = time.perf_counter()
    curves = Curves()
    measured = set(study.measured_epochs())

    def on_epoch(epoch: Epoch) -> None:
        watch(epoch)
        if epoch.number in measured:
            reports = [
                churn_report(logits, labels)
                for logits, labels in measured_logits(epoch.model, splits, study.runs)
            ]
            curves.epoch.append(epoch.number)
            curves.cross_entropy.append(epoch.cross_entropy)
            for name in ("accuracy", "churn", "confidence"):
                values = [getattr(report, name) for report in reports]
                getattr(curves, name).append(over_splits(values, study.level).mean)

    model = fit(method, splits, study, on_epoch)
    logits = [logits for logits, _ in measured_logits(model, splits, study.runs)]
    reports = [churn_report(*pair) for pair in measured_logits(model, splits, study.runs)]
    confidence = torch.stack([prediction_confidence(part) for part in logits]).float()
    histogram = torch.histc(confidence, bins=HISTOGRAM_BINS, min=0, max=1)
    return MethodResult(
        method=method,
        reports=reports,
        predictions=torch.stack([part.argmax(dim=-1) for part in logits]),
        histogram=histogram / histogram.sum(),
        curves=curves,
        summary={
            name: over_splits([getattr(report, name) for report in reports], study.level)
            for name in METRICS
        },
        seconds=time.perf_counter() - started,
    )


def measured_logits(model: BatchedMLP, splits: Splits, runs: int) -> list[tuple[Tensor, Tensor]]:
    """Per split: the measured members' logits (R, N, C) on its test rows, and their labels (N,)."""
    return [
        (
            model.predict(features.expand(runs, -1, -1), slice(split * runs, (split + 1) * runs)),
            splits.test_labels[split],
        )
        for split, features in enumerate(splits.test_features)
    ]


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
