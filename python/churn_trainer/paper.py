"""The numbers in "On the Reproducibility of Neural Network Predictions" (Bhojanapalli et al.)."""

from __future__ import annotations

import csv
from functools import cache
from importlib import resources
from typing import NamedTuple

CITATION = "Bhojanapalli et al. 2021"


class Printed(NamedTuple):
    """A number as the paper prints it, in percent: the mean over runs, and what follows its ±."""

    mean: float
    spread: float


@cache
def printed_numbers() -> dict[tuple[str, ...], Printed]:
    """(table, data, model, method, metric, condition) -> the paper's number.

    The condition is the weight decay in Table 3, and in Table 1 the device with the seeds held
    fixed; elsewhere it is empty. Table 1 is of ResNet-32 on CIFAR-10, and its columns are in the
    order of the text: nothing, initialisation, order, both. The file is `paper.csv`.
    """
    text = resources.files("churn_trainer").joinpath("paper.csv").read_text(encoding="utf-8")
    return {
        tuple(row[:6]): Printed(float(row[6]), float(row[7]))
        for row in list(csv.reader(text.splitlines()))[1:]
    }


def printed(
    table: int, data: str, model: str, method: str, metric: str, condition: str = ""
) -> Printed | None:
    """The paper's number, or None where it has none for this data set, network and method."""
    return printed_numbers().get((str(table), data, model, method, metric, condition))
