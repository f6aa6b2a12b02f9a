"""Where churn comes from: Table 1 of Bhojanapalli et al. 2021 for any data, model and method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path

import torch

from churn_kernels.intervals import Estimate
from churn_trainer.comparison import over_splits
from churn_trainer.config import SOURCES, Data, Run, Study, Variant
from churn_trainer.run_folder import FINISHED, RunFolder
from churn_trainer.study import measure_method

DEFAULT = Run(data=Data(crop_padding=1))
"""Digits, cropped at random by a pixel either way, so that augmentation is a source too."""


@dataclass(frozen=True)
class SourcesRow:
    """One column of the paper's table.

    Attributes:
        platform: the device that trained.
        same: the sources of randomness that the runs share.
        summary: accuracy, churn and SChurn with intervals.
        pairs: pairs of runs that were compared, in all splits.
        identical_pairs: those whose logits are the same bit for bit.
        threads: numbers of threads that the runs were trained with.
    """

    platform: str
    same: frozenset[str]
    summary: dict[str, Estimate]
    pairs: int
    identical_pairs: int
    threads: frozenset[int]


def drawn_sources(run: Run) -> tuple[str, ...]:
    """The sources of randomness that a run draws from: a seed that nothing reads is none."""
    used = {
        "initialisation": True,
        "order": True,
        "augmentation": bool(run.data.crop_padding or run.data.crop_size or run.data.flip),
        "dropout": run.model.dropout > 0,
    }
    return tuple(source for source in SOURCES if used[source])


def sources_study(run: Run, runs: int = 10, splits: int = 5, seed: int = 0) -> Study:
    """Every subset of the sources fixed, nothing first and everything last.

    Args:
        run: settings of every run, but the seeds.
        runs: independent runs per split and subset.
        splits: random splits of the data, each with runs of its own.
        seed: what all randomness follows from.
    """
    drawn = drawn_sources(run)
    subsets = chain.from_iterable(combinations(drawn, size) for size in range(len(drawn) + 1))
    unused = tuple(source for source in SOURCES if source not in drawn)
    variants = [
        Variant(run.method, name="+".join(subset) or "nothing", fixed=(*subset, *unused))
        for subset in subsets
    ]
    return Study(
        methods=tuple(variants),
        title="Where churn comes from: which sources of randomness the runs share",
        data=run.data,
        model=run.model,
        optimisation=run.optimisation,
        runs=runs,
        splits=splits,
        seed=seed,
        curve_points=1,
    )


def read_sources(study: Study, root: Path) -> list[SourcesRow]:
    """The table of a finished `sources_study`, from its runs' folders.

    Raises: ValueError if a run did not finish, or a folder does not hold what it should.
    """
    return [_row(study, variant, root) for variant in study.methods]


def _row(study: Study, variant: Variant, root: Path) -> SourcesRow:
    folders = [[RunFolder(root / run.id) for run in runs] for runs in study.runs_of(variant)]
    for folder in chain.from_iterable(folders):
        if folder.status != FINISHED:
            raise ValueError(
                f"every run must have finished for the table, got {folder.path.name} that has "
                f"{folder.status}; see its metrics.json, and give the same command again"
            )
    measured = measure_method(variant, folders, study.level)
    reports = measured.reports
    drawn = drawn_sources(study.run(variant, 0, 0))
    environments = [folder.metrics()["environment"] for folder in chain.from_iterable(folders)]
    identical = [_identical_pairs(part) for part in folders]
    return SourcesRow(
        platform=environments[0]["device"],
        same=frozenset(variant.fixed) & frozenset(drawn),
        summary={
            name: over_splits([getattr(report, name) for report in reports], study.level)
            for name in ("accuracy", "churn", "schurn")
        },
        pairs=study.splits * study.runs * (study.runs - 1) // 2,
        identical_pairs=sum(identical),
        threads=frozenset(one["threads"] for one in environments),
    )


def _identical_pairs(folders: Sequence[RunFolder]) -> int:
    # As int32, NaN and the sign of zero count too.
    bits = [folder.logits()[0].view(torch.int32) for folder in folders]
    return sum(torch.equal(one, other) for one, other in combinations(bits, 2))
