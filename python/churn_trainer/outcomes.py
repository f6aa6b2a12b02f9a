"""Finished runs by setting, method and split, measured and compared with the baseline."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from churn_kernels._printable import excerpt
from churn_kernels.intervals import Estimate
from churn_kernels.metrics import ChurnReport, churn_report, prediction_confidence
from churn_trainer.comparison import churn_swap_test, holm, over_splits, paired_change
from churn_trainer.config import Data, Model, Optimisation, Run, Seeds
from churn_trainer.data.hub import HUB
from churn_trainer.found import Finished
from churn_trainer.methods import BASELINE, METHODS, Method

METRICS = {
    "accuracy": "accuracy",
    "churn": "churn",
    "schurn": "SChurn",
    "churn_correct": "churn correct",
    "churn_incorrect": "churn incorrect",
    "confidence": "confidence",
    "entropy": "entropy",
    "ece": "ECE",
}
"""What is measured, as `ChurnReport` and as the reader call it; shares, but entropy in nats."""

PAIRWISE = ("churn", "schurn", "churn_correct", "churn_incorrect")
"""Those of a pair of runs; the others are of one run."""

_OWN_TEST_ROWS = (*HUB, "multi-view", "gaussian", "prototypes")
"""Data sets whose test rows no seed draws."""


@dataclass(frozen=True)
class Setting:
    """What runs share that are compared: everything but the method and the seeds."""

    data: Data
    model: Model
    optimisation: Optimisation
    device: str

    @property
    def name(self) -> str:
        """Data set and network, safe to print."""
        return excerpt(f"{self.data.name}, {self.model.name}", 80)


@dataclass(frozen=True)
class Split:
    """One method's runs on the same training and test rows.

    Attributes:
        found: R finished runs, by their seeds.
        name: what to call it: its seed, or that no seed draws it.
        report: every metric of every run and pair.
        predictions: (R, N) classes.
        confidence: (R, N) difference of the two largest probabilities.
        labels: (N,).
        digests: R, equal where all logits are, bit for bit.
    """

    found: list[Finished]
    name: str
    report: ChurnReport
    predictions: Tensor
    confidence: Tensor
    labels: Tensor
    digests: list[bytes]

    @property
    def runs(self) -> list[Run]:
        """Their settings."""
        return [one.run for one in self.found]

    def clusters(self, fixed: Sequence[str] = ()) -> list[list[int]]:
        """Runs that share the seeds `fixed` and no other that matters to them, by their places.

        Without `fixed` that is one cluster of independent runs, of which each seed is there once.
        """
        names = self.runs[0].sources
        free = [name for name in names if name not in fixed]
        found: dict[tuple[int, ...], list[int]] = {}
        # Those that share least with others first, so that no other study's runs take their place.
        common = Counter((name, getattr(run.seeds, name)) for run in self.runs for name in names)
        shared = [
            sum(common[name, getattr(run.seeds, name)] for name in names) for run in self.runs
        ]
        for place in sorted(range(len(shared)), key=shared.__getitem__):
            run = self.runs[place]
            key = tuple(getattr(run.seeds, name) for name in names if name in fixed)
            cluster = found.setdefault(key, [])
            others = [self.runs[other].seeds for other in cluster]
            if all(
                getattr(run.seeds, name) != getattr(other, name)
                for other in others
                for name in free
            ):
                cluster.append(place)
        return [sorted(cluster) for cluster in found.values()]


@dataclass(frozen=True)
class Outcome:
    """What one method came to in one setting.

    Attributes:
        setting, method: which.
        splits: by what tells the splits apart.
        name: the method's own, where a study gives it one.
    """

    setting: Setting
    method: Method
    splits: dict[Any, Split]
    name: str = ""

    @property
    def label(self) -> str:
        """What tables call the method, safe to print."""
        return excerpt(self.name or self.method.label, 80)

    @property
    def training_cost(self) -> int:
        """Models that are trained for one that is measured."""
        return self.method.members + self.method.teachers

    @property
    def inference_cost(self) -> int:
        """Models that predict together."""
        return 1 if self.method.measured == "member" else self.method.members

    @property
    def recipe(self) -> str:
        """`Run.recipe` of its runs."""
        return next(iter(self.splits.values())).runs[0].recipe

    @property
    def runs(self) -> int:
        """How many independent runs are measured, over all splits."""
        return sum(len(split.clusters()[0]) for split in self.splits.values())

    @property
    def all_runs(self) -> int:
        """How many runs there are, over all splits."""
        return sum(len(split.found) for split in self.splits.values())

    def estimate(self, metric: str, level: float, fixed: Sequence[str] = ()) -> Estimate:
        """The metric's mean over runs or pairs, with an interval; NaN where there is no pair.

        Args:
            metric: a name in `METRICS`.
            level: the interval's coverage in (0, 1).
            fixed: the seeds that the runs of a pair share, all others being different.
        """
        splits = [(split, split.clusters(fixed)) for split in self.splits.values()]
        if fixed or metric in PAIRWISE:
            splits = [one for one in splits if any(len(cluster) > 1 for cluster in one[1])]
        if not splits:
            return Estimate(*[math.nan] * 4)
        values = [_within(getattr(split.report, metric), clusters) for split, clusters in splits]
        return over_splits(values, level)

    def has_pair(self, fixed: Sequence[str] = ()) -> bool:
        """Whether two runs share exactly the seeds `fixed`."""
        return any(len(one) > 1 for split in self.splits.values() for one in split.clusters(fixed))

    def identical(self, fixed: Sequence[str]) -> list[bool]:
        """For each pair that shares exactly the seeds `fixed`: are all logits the same bits?"""
        return [
            split.digests[one] == split.digests[other]
            for split in self.splits.values()
            for cluster in split.clusters(fixed)
            for one, other in itertools.combinations(cluster, 2)
        ]

    @property
    def sources(self) -> tuple[str, ...]:
        """The seeds that draw something in its runs, but for the split's."""
        return next(iter(self.splits.values())).runs[0].sources

    def conditions(self) -> list[tuple[str, ...]]:
        """The sets of seeds that pairs of runs share, from none to all."""
        names = self.sources
        subsets = (itertools.combinations(names, size) for size in range(len(names) + 1))
        return [fixed for fixed in itertools.chain(*subsets) if self.has_pair(fixed)]


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline of its setting, paired by split and seeds.

    Attributes:
        outcome: the method.
        baseline: what it is compared with.
        pairs: runs that have a partner of the same split and seeds.
        change: metric -> change with interval.
        p_value: exact swap test of the change of churn.
        p_holm: the same, corrected for the methods compared.
    """

    outcome: Outcome
    baseline: Outcome
    pairs: int
    change: dict[str, Estimate]
    p_value: float
    p_holm: float


def measure(
    finished: Iterable[Finished], names: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Outcome], list[str]]:
    """Reads the logits, one method of one setting at a time, and measures every run and pair.

    Of a co-distilled run the logits are one member's, so no two members of a run are compared.

    Args:
        finished: the runs.
        names: `Run.recipe` -> a name of its own.
    Returns: the outcomes, by setting and in the order of the table of methods; and a sentence for
        each run whose logits cannot be used.
    """
    kinds: dict[str, list[tuple[Setting, Finished]]] = {}
    for one in finished:
        setting = Setting(one.run.data, one.run.model, one.run.optimisation, one.device)
        # By their text: settings hold free-form options, which cannot be hashed.
        kinds.setdefault(f"{setting} {one.run.method}", []).append((setting, one))
    rank = list(METHODS).index
    outcomes: list[Outcome] = []
    damaged: list[str] = []
    for members in kinds.values():
        setting, method = members[0][0], members[0][1].run.method
        if splits := _splits([one for _, one in members], damaged):
            outcome = Outcome(setting, method, splits)
            name = names.get(outcome.recipe, "")
            outcomes.append(dataclasses.replace(outcome, name=name))
    outcomes.sort(key=lambda one: (str(one.setting), rank(one.method.name), str(one.method)))
    return outcomes, damaged


def compare(
    outcomes: Sequence[Outcome], level: float, first: Run | None = None
) -> tuple[list[Comparison], list[str]]:
    """Every method against a baseline, over the seeds both have.

    Args:
        outcomes: what was measured.
        level: coverage of the intervals, in (0, 1).
        first: a run of what all others are compared with; None: in each setting its baseline.
    Returns: the comparisons, and a sentence for each setting or method where there is none.
    """
    comparisons: list[Comparison] = []
    missing: list[str] = []
    for name, baseline, methods in _compared(outcomes, first):
        others = [one for one in methods if one is not baseline]
        if baseline is None:
            remedy = (
                f"train --method {first.method.name if first else BASELINE} with the same seeds"
            )
            missing.append(f"{name}: nothing is compared, there is no baseline; {remedy}.")
            continue
        found: list[tuple[Outcome, Outcome, int, dict[str, Estimate], float]] = []
        for other in others:
            matched = _matched(other, baseline)
            if not matched:
                missing.append(
                    f"{other.setting.name}: {other.label} is not compared, no two of its runs have "
                    "the split and seeds of two of the baseline; train those."
                )
                continue
            change = {
                metric: paired_change(
                    [_at(getattr(a.report, metric), i) for a, i, _, _ in matched],
                    [_at(getattr(b.report, metric), j) for _, _, b, j in matched],
                    level,
                )
                for metric in METRICS
            }
            p_value = churn_swap_test(
                [a.predictions[i] for a, i, _, _ in matched],
                [b.predictions[j] for _, _, b, j in matched],
            )
            pairs = sum(len(i) for _, i, _, _ in matched)
            found.append((other, baseline, pairs, change, p_value))
        corrected = holm([one[-1] for one in found])
        comparisons += [Comparison(*one, p) for one, p in zip(found, corrected, strict=True)]
    return comparisons, missing


def _compared(
    outcomes: Sequence[Outcome], first: Run | None
) -> list[tuple[str, Outcome | None, list[Outcome]]]:
    """What is compared with what: a name for the comparison, the baseline, it and the others."""
    if first is None:
        return [
            (setting.name, baseline_of(methods), methods)
            for setting, methods in by_setting(outcomes)
        ]
    devices: dict[str, list[Outcome]] = {}
    for one in outcomes:
        devices.setdefault(one.setting.device, []).append(one)
    return [
        (
            device,
            next((one for one in methods if one.recipe == first.recipe), None),
            methods,
        )
        for device, methods in devices.items()
    ]


def by_setting(outcomes: Sequence[Outcome]) -> list[tuple[Setting, list[Outcome]]]:
    """The outcomes of each setting."""
    groups = itertools.groupby(outcomes, key=lambda one: str(one.setting))
    listed = [list(group) for _, group in groups]
    return [(group[0].setting, group) for group in listed]


def baseline_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The plain baseline among one setting's outcomes, else a changed one, else None."""
    baselines = [one for one in outcomes if one.method.name == BASELINE]
    plain = [one for one in baselines if one.method == METHODS[BASELINE]]
    return next(iter(plain + baselines), None)


def _splits(members: list[Finished], damaged: list[str]) -> dict[Any, Split]:
    by_rows: dict[Any, list[tuple[Finished, Tensor, Tensor]]] = {}
    for one in sorted(
        members, key=lambda one: (dataclasses.astuple(one.run.seeds), one.run.repeat)
    ):
        try:
            logits, labels = one.folder.logits()
            _check(one, logits, labels)
        except ValueError as error:
            damaged.append(excerpt(str(error)))
            continue
        digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
        key = (one.run.seeds.split if _drawn(one.run) else 0, digest, tuple(logits.shape))
        by_rows.setdefault(key, []).append((one, logits, labels))
    return {
        key: _split(
            runs, f"split seed {key[0]}" if _drawn(runs[0][0].run) else "the data set's own split"
        )
        for key, runs in by_rows.items()
    }


def _drawn(run: Run) -> bool:
    """Whether a seed draws its training or its test rows."""
    return bool(run.data.train_rows) or run.data.name not in _OWN_TEST_ROWS


def _check(one: Finished, logits: Tensor, labels: Tensor) -> None:
    right = (
        logits.ndim == 2
        and logits.shape[0] > 0
        and logits.shape[1] > 1
        and logits.is_floating_point()
        and labels.shape == logits.shape[:1]
        and labels.dtype == torch.int64
    )
    if not right:
        got = f"{tuple(logits.shape)} {logits.dtype} and {tuple(labels.shape)} {labels.dtype}"
    elif not logits.amax(dim=1).isfinite().all():
        got = "a row whose largest is not finite"
    elif not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        got = f"labels from {int(labels.min())} to {int(labels.max())} of {logits.shape[1]} classes"
    else:
        return
    raise ValueError(
        f"the logits of {one.folder.path} must be finite (N, C) floats and the labels (N,) "
        f"int64 in [0, C), got {got}; delete the folder and train again"
    )


def _split(members: list[tuple[Finished, Tensor, Tensor]], name: str) -> Split:
    logits, labels = [one[1] for one in members], members[0][2]
    return Split(
        found=[one[0] for one in members],
        name=name,
        report=_report(logits, labels),
        predictions=torch.stack([one.argmax(dim=-1) for one in logits]),
        confidence=torch.stack([prediction_confidence(one).float() for one in logits]),
        labels=labels,
        digests=[hashlib.sha256(one.numpy().tobytes()).digest() for one in logits],
    )


def _report(logits: list[Tensor], labels: Tensor) -> ChurnReport:
    if len(logits) > 1:
        return churn_report(logits, labels)
    # One run is compared with itself, and keeps its own row.
    twice = churn_report(logits * 2, labels)
    own: dict[str, Any] = {name: _at(value, [0]) for name, value in twice.metrics().items()}
    return dataclasses.replace(twice, **own)


def _matched(other: Outcome, baseline: Outcome) -> list[tuple[Split, list[int], Split, list[int]]]:
    """Per split the places of independent runs, at least two, that both have the seeds of."""
    matched = []
    for key, split in other.splits.items():
        if (partner := baseline.splits.get(key)) is None:
            continue
        seeds: dict[tuple[Seeds, int], int] = {
            (run.seeds, run.repeat): place for place, run in enumerate(partner.runs)
        }
        pairs = [
            (place, seeds[run.seeds, run.repeat])
            for place in split.clusters()[0]
            if (run := split.runs[place]) and (run.seeds, run.repeat) in seeds
        ]
        if len(pairs) > 1:
            matched.append((split, [i for i, _ in pairs], partner, [j for _, j in pairs]))
    return matched


def _within(values: Tensor, clusters: list[list[int]]) -> Tensor:
    """The metric of the runs in clusters; pairs across clusters become NaN."""
    if any(len(cluster) > 1 for cluster in clusters):
        clusters = [cluster for cluster in clusters if len(cluster) > 1]
    places = [place for cluster in clusters for place in cluster]
    chosen = _at(values, places)
    if values.ndim == 1:
        return chosen
    number = torch.tensor([n for n, cluster in enumerate(clusters) for _ in cluster])
    return chosen.masked_fill(number[:, None] != number, torch.nan)


def _at(values: Tensor, places: Sequence[int]) -> Tensor:
    chosen = values[list(places)]
    return chosen if values.ndim == 1 else chosen[:, list(places)]
