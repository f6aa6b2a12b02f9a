"""Data sets that come with their packages, and their random splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from churn_trainer.config import Draw, Study


@dataclass(frozen=True)
class Dataset:
    """Labelled rows: features (N, F) float32 and labels (N,) int64 in [0, classes)."""

    title: str
    features: Tensor
    labels: Tensor
    classes: int


@dataclass(frozen=True)
class Splits:
    """S splits of a data set, features standardised with their own training rows' statistics.

    Attributes:
        train_features: (S, n, F) float32.
        train_labels: (S, n) int64.
        test_features: (S, N - n, F) float32.
        test_labels: (S, N - n) int64.
        classes: C.
    """

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor
    classes: int


def digits() -> Dataset:
    """1797 scanned handwritten digits of 8 x 8 pixels (UCI; bundled with scikit-learn)."""
    bundled = load_digits()
    return Dataset(
        title="handwritten digits (8 x 8 pixels, 10 classes)",
        features=torch.from_numpy(bundled.data.astype(np.float32)),
        labels=torch.from_numpy(bundled.target.astype(np.int64)),
        classes=len(bundled.target_names),
    )


DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits}


def make_splits(dataset: Dataset, study: Study) -> Splits:
    """The study's random splits, stratified by label, each split from its own seed.

    Raises: ValueError if `train_rows` leaves a class without training rows or without test rows.
    """
    rows = len(dataset.labels)
    if not dataset.classes <= study.train_rows <= rows - dataset.classes:
        raise ValueError(
            f"train_rows must be in [{dataset.classes}, {rows - dataset.classes}], got "
            f"{study.train_rows}; every class needs rows on both sides of the {rows}-row split"
        )
    parts = [
        _split(dataset, study.train_rows, study.seed_for(Draw.SPLIT, split))
        for split in range(study.splits)
    ]
    stacked = [torch.stack(tensors) for tensors in zip(*parts, strict=True)]
    return Splits(stacked[0], stacked[1], stacked[2], stacked[3], dataset.classes)


def standardise(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Each (N, F) tensor minus the training rows' mean over their standard deviation, per feature.

    A feature that is constant over the training rows is only centred.
    """
    deviation = train.std(dim=0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    return tuple((rows - train.mean(dim=0)) / scale for rows in (train, *others))


def _split(dataset: Dataset, train_rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    train, test = train_test_split(
        np.arange(len(dataset.labels)),
        train_size=train_rows,
        stratify=dataset.labels.numpy(),
        random_state=seed % 2**32,
    )
    train_features, test_features = standardise(dataset.features[train], dataset.features[test])
    return train_features, dataset.labels[train], test_features, dataset.labels[test]
