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
from churn_trainer.config import Study, measured_epochs
from churn_trainer.data import load_dataset
from churn_trainer.data.dataset import Dataset
from churn_trainer.loop import Epoch, Trained, TrainingDiverged, fit
from churn_trainer.methods import Method

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
    methods = study.methods
    dataset = load_dataset(study.data)
    started = time.perf_counter()

    def train(method: Method) -> MethodResult | TrainingDiverged:
        def watch(epoch: Epoch) -> None:
            if stop.is_set():
                raise Interrupted
            on_epoch(method.name, epoch.number)

        torch.set_num_threads(1)
        try:
            return train_and_measure(method, dataset, study, watch)
        except TrainingDiverged as error:
            return error

    # The longest first, so that no worker is left alone with one at the end.
    longest_first = sorted(methods, key=lambda method: -method.members - method.teachers)
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
        test_rows=results[0].predictions.shape[-1],
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
    method: Method, dataset: Dataset, study: Study, watch: Callable[[Epoch], None]
) -> MethodResult:
    """Trains a method's runs over all splits as one stack, and measures each on its test rows.

    The other members of a co-distilled run have been pulled towards the measured one; churn is a
    question about models trained apart, so no two members of a run are ever compared.

    Raises: TrainingDiverged if one of the runs diverged.
    """
    started = time.perf_counter()
    curves = Curves()

    def on_epoch(epoch: Epoch) -> None:
        watch(epoch)
        _raise_diverged(method, epoch.diverged)
        if epoch.logits is not None:
            reports = _by_split(study, epoch.logits, epoch.labels)
            curves.epoch.append(epoch.number)
            curves.cross_entropy.append(float(epoch.cross_entropy.mean()))
            for name in ("accuracy", "churn", "confidence"):
                values = [getattr(report, name) for report in reports]
                getattr(curves, name).append(over_splits(values, study.level).mean)

    trained = _train_runs(method, dataset, study, on_epoch)
    reports = _by_split(study, trained.logits, trained.labels)
    confidence = prediction_confidence(trained.logits.flatten(0, 1)).float()
    histogram = torch.histc(confidence, bins=HISTOGRAM_BINS, min=0, max=1)
    return MethodResult(
        method=method,
        reports=reports,
        predictions=trained.logits.argmax(dim=-1).unflatten(0, (study.splits, study.runs)),
        histogram=histogram / histogram.sum(),
        curves=curves,
        summary={
            name: over_splits([getattr(report, name) for report in reports], study.level)
            for name in METRICS
        },
        seconds=time.perf_counter() - started,
    )


def _train_runs(
    method: Method, dataset: Dataset, study: Study, on_epoch: Callable[[Epoch], None]
) -> Trained:
    """The method's runs in the order split, run, and before them their teachers."""
    places = [(split, run) for split in range(study.splits) for run in range(study.runs)]
    teachers = None
    if (teacher := method.teacher()) is not None:
        taught = fit([study.run(teacher, *place) for place in places], dataset)
        _raise_diverged(teacher, taught.diverged)
        teachers = taught.members
    return fit(
        [study.run(method, *place) for place in places],
        dataset,
        teachers=teachers,
        measured=measured_epochs(study.optimisation.epochs, study.curve_points),
        on_epoch=on_epoch,
    )


def _by_split(study: Study, logits: Tensor, labels: Tensor) -> list[ChurnReport]:
    """One report a split, over its runs: from (S * R, N, C) logits and (S * R, N) labels."""
    parts = zip(logits.split(study.runs), labels[:: study.runs], strict=True)
    return [churn_report(runs, target) for runs, target in parts]


def _raise_diverged(method: Method, diverged: dict[int, str]) -> None:
    if diverged:
        place, message = next(iter(diverged.items()))
        raise TrainingDiverged(f"{method.label} diverged: {message} (run {place})")


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
