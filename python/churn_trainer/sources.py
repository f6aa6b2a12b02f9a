"""Where churn comes from: Table 1 of Bhojanapalli et al. 2021 for any data, model and method."""

from __future__ import annotations

from itertools import chain, combinations

from churn_trainer.config import SOURCES, Data, Run, Study, Variant

DEFAULT = Run(data=Data(crop_padding=1))
"""Digits, cropped at random by a pixel either way, so that augmentation is a source too."""


def sources_study(run: Run, runs: int = 10, splits: int = 5, seed: int = 0) -> Study:
    """Every subset of the sources fixed, nothing first and everything last.

    Args:
        run: settings of every run, but the seeds.
        runs: independent runs per split and subset.
        splits: random splits of the data, each with runs of its own.
        seed: what all randomness follows from.
    """
    subsets = chain.from_iterable(
        combinations(run.sources, size) for size in range(len(run.sources) + 1)
    )
    unused = tuple(source for source in SOURCES if source not in run.sources)
    variants = [
        Variant(run.method, name="+".join(subset) or run.method.name, fixed=(*subset, *unused))
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
