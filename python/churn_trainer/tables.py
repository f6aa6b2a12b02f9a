"""The tables of a report, some beside the numbers of Bhojanapalli et al. 2021."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from churn_kernels._printable import excerpt
from churn_kernels.intervals import Estimate
from churn_trainer.formats import probability
from churn_trainer.outcomes import METRICS, Comparison, Outcome, Setting, by_setting
from churn_trainer.paper import Printed, printed
from churn_trainer.settings import to_mapping

CHANGE = "change of churn"
_NO_SHARE = "SChurn is no share of rows and can exceed 100."

_FIVE = ("accuracy", "churn", "schurn", "churn_correct", "churn_incorrect")


@dataclass(frozen=True)
class Cell:
    """A share with its interval, beside the paper's number where it has one.

    Attributes:
        estimate: ours.
        printed: the paper's, in percent.
        note: a line below, such as a p value.
        signed: whether it is a change, shown with its sign.
    """

    estimate: Estimate
    printed: Printed | None = None
    note: str = ""
    signed: bool = False


@dataclass(frozen=True)
class Row:
    """Words that say what the row is about, and a cell or nothing for each column."""

    heads: tuple[str, ...]
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Table:
    """A table made from runs.

    Attributes:
        kind: what it shows, in a word: "methods", "weight-decay", "ensembles", "sources" or
            "calibration".
        paper: the paper's table that shows the same.
        title, caption: what it is about, and what to know to read it.
        heads: headings of the rows' words.
        columns: names of what the cells hold; `heading` adds its unit.
        rows: in the order of settings and methods.
    """

    kind: str
    paper: str
    title: str
    caption: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    rows: list[Row]

    @property
    def has_printed(self) -> bool:
        """Whether a number of the paper is in it."""
        return any(cell and cell.printed for row in self.rows for cell in row.cells)


def heading(column: str) -> str:
    """A column's name with the unit that its numbers are shown in."""
    if column == METRICS["schurn"]:
        return f"{column} \N{MULTIPLICATION SIGN} 100"  # which is no share, and can exceed 1
    return f"{column}, {'points' if column == CHANGE else '%'}"


def make_tables(
    outcomes: Sequence[Outcome], comparisons: Sequence[Comparison], level: float
) -> tuple[list[Table], list[str]]:
    """Every table that the runs allow, and a sentence for each that they do not.

    Args:
        outcomes: what was measured.
        comparisons: of these, with their baselines.
        level: coverage of the intervals, in (0, 1).
    """
    names = setting_names(outcomes)
    made = [
        _methods_table(outcomes, comparisons, names, level),
        _weight_decay_table(outcomes, level),
        _ensembles_table(outcomes, comparisons, names, level),
        _sources_table(outcomes, names, level),
        _calibration_table(outcomes, names, level),
    ]
    tables = [one for one in made if isinstance(one, Table)]
    return tables, [one for one in made if isinstance(one, str)]


def setting_names(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """str(setting) -> data set and network, with what tells settings of one name apart."""
    settings = [setting for setting, _ in by_setting(outcomes)]
    flat = [_flat(to_mapping(setting)) for setting in settings]
    names = {}
    for setting, mine in zip(settings, flat, strict=True):
        alike = [
            other for one, other in zip(settings, flat, strict=True) if one.name == setting.name
        ]
        keys = sorted({key for other in alike for key in other})
        differing = [key for key in keys if len({other.get(key) for other in alike}) > 1]
        words = [f"{key.split('.')[-1]} {mine.get(key, '')}".strip() for key in differing]
        names[str(setting)] = excerpt(", ".join([setting.name, *words]), 120)
    return names


def settings_of(setting: Setting) -> dict[str, str]:
    """Every number and name of a setting, by its dotted name, safe to print."""
    flat = _flat(to_mapping(setting))
    return {excerpt(name, 80): excerpt(text, 200) for name, text in flat.items()}


def _flat(table: Mapping[str, Any], path: str = "") -> dict[str, str]:
    """Nested tables as dotted names with their values as text."""
    flat: dict[str, str] = {}
    for name, value in table.items():
        inner = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            flat |= _flat(value, inner)
        else:
            flat[inner] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _sources_table(
    outcomes: Sequence[Outcome], names: Mapping[str, str], level: float
) -> Table | str:
    rows = []
    for one in outcomes:
        conditions = one.conditions()
        if not any(conditions):
            continue
        for fixed in conditions:
            everything = len(fixed) == len(one.sources)
            shown = "everything" if everything else ", ".join(fixed) or "nothing"
            rest = tuple(name for name in one.sources if name != "initialisation")
            condition = f"{one.setting.device}: {'order' if fixed == rest else shown}"
            identical = one.identical(fixed)
            pairs = f"{sum(identical)} of {len(identical)}"
            heads = (names[str(one.setting)], one.label, one.setting.device, shown, pairs)
            cells = _cells(one, ("accuracy", "churn", "schurn"), level, 1, condition, fixed)
            rows.append(Row(heads, cells))
    if not rows:
        return (
            "Sources of churn need runs that share some seeds and not "
            "others, such as two with the same --seed-initialisation and their own --seed-order, "
            "or two of the same seeds with --repeat 0 and 1."
        )
    return Table(
        kind="sources",
        paper="Table 1",
        title="Sources of churn",
        caption=(
            "Runs of a pair share the seeds that are held fixed, and no other. Churn that is left "
            "when everything is fixed comes from the machine. Pairs are identical where all logits "
            f"are the same bits. {_NO_SHARE}"
        ),
        heads=("data, network", "method", "device", "held fixed", "identical pairs"),
        columns=_columns(("accuracy", "churn", "schurn")),
        rows=rows,
    )


def _methods_table(
    outcomes: Sequence[Outcome],
    comparisons: Sequence[Comparison],
    names: Mapping[str, str],
    level: float,
) -> Table | str:
    rows = []
    for one in outcomes:
        if one.method.measured == "ensemble" or not one.has_pair():
            continue
        heads = (names[str(one.setting)], one.label, f"{one.training_cost}x", str(one.runs))
        rows.append(Row(heads, (*_cells(one, _FIVE, level, 2), _change(one, comparisons))))
    if not rows:
        return (
            "Accuracy and churn of every method need two runs of one method on the same "
            "split that share no other seed, such as --seed-split 0 --seed 1 and --seed-split 0 "
            "--seed 2."
        )
    return Table(
        kind="methods",
        paper="Table 2",
        title="Accuracy and churn of every method",
        caption=(
            "One member of a co-distilled pair is measured. The change of churn is paired with the "
            "baseline of the same split and seeds; p is its exact swap test after Holm's "
            f"correction over the methods compared. {_NO_SHARE}"
        ),
        heads=("data, network", "method", "training cost", "runs"),
        columns=(*_columns(_FIVE), CHANGE),
        rows=rows,
    )


def _weight_decay_table(outcomes: Sequence[Outcome], level: float) -> Table | str:
    families: dict[str, list[Outcome]] = {}
    for one in outcomes:
        plain = dataclasses.replace(one.setting.optimisation, weight_decay=0.0)
        setting = dataclasses.replace(one.setting, optimisation=plain)
        if one.has_pair():
            families.setdefault(f"{setting} {one.method}", []).append(one)
    rows = []
    for family in families.values():
        if len(family) < 2:
            continue
        for one in sorted(family, key=lambda one: one.setting.optimisation.weight_decay):
            decay = one.setting.optimisation.weight_decay
            condition = {0.0: "0", 1e-4: "1e-4"}.get(decay, "")
            heads = (one.setting.name, one.label, f"{decay:g}")
            rows.append(Row(heads, _cells(one, ("accuracy", "churn"), level, 3, condition)))
    if not rows:
        return (
            "Weight decay needs runs of one method and split that differ "
            "in --weight-decay, such as 0 and 0.0001, two of each."
        )
    return Table(
        kind="weight-decay",
        paper="Table 3",
        title="With and without weight decay",
        caption="Everything but the weight decay is the same within a method.",
        heads=("data, network", "method", "weight decay"),
        columns=_columns(("accuracy", "churn")),
        rows=rows,
    )


def _calibration_table(
    outcomes: Sequence[Outcome], names: Mapping[str, str], level: float
) -> Table:
    return Table(
        kind="calibration",
        paper="Table 4",
        title="Calibration",
        caption=(
            "Expected calibration error over 15 bins of equal width, and confidence, the mean "
            "difference of the two largest probabilities."
        ),
        heads=("data, network", "method", "runs"),
        columns=_columns(("ece", "confidence")),
        rows=[
            Row(
                (names[str(one.setting)], one.label, str(one.runs)),
                _cells(one, ("ece", "confidence"), level, 4),
            )
            for one in outcomes
        ],
    )


def _ensembles_table(
    outcomes: Sequence[Outcome],
    comparisons: Sequence[Comparison],
    names: Mapping[str, str],
    level: float,
) -> Table | str:
    rows = []
    for setting, methods in by_setting(outcomes):
        paired = [one for one in methods if one.has_pair()]
        if not any(one.method.measured == "ensemble" for one in paired):
            continue
        for one in paired:
            costs = (f"{one.training_cost}x", f"{one.inference_cost}x")
            heads = (names[str(setting)], one.label, *costs)
            rows.append(Row(heads, (*_cells(one, _FIVE, level, 6), _change(one, comparisons))))
    if not rows:
        return "Ensembles and their cost need two runs of --method 2-ensemble on one split."
    return Table(
        kind="ensembles",
        paper="Table 6",
        title="Ensembles and their cost",
        caption=f"Cost in trainings, and in models that predict. {_NO_SHARE}",
        heads=("data, network", "method", "training cost", "inference cost"),
        columns=(*_columns(_FIVE), CHANGE),
        rows=rows,
    )


def _cells(
    one: Outcome,
    metrics: Iterable[str],
    level: float,
    table: int,
    condition: str = "",
    fixed: Sequence[str] = (),
) -> tuple[Cell | None, ...]:
    data, model = one.setting.data.name, one.setting.model.name
    cells = []
    for metric in metrics:
        estimate = one.estimate(metric, level, fixed)
        beside = printed(table, data, model, one.method.name, metric, condition)
        empty = math.isnan(estimate.mean) and beside is None
        cells.append(None if empty else Cell(estimate, beside))
    return tuple(cells)


def _change(one: Outcome, comparisons: Sequence[Comparison]) -> Cell | None:
    """The change of churn from the baseline, where it was compared."""
    for compared in comparisons:
        if compared.outcome is one:
            note = f"p {probability(compared.p_holm)}"
            return Cell(compared.change["churn"], note=note, signed=True)
    return None


def _columns(metrics: Iterable[str]) -> tuple[str, ...]:
    return tuple(METRICS[metric] for metric in metrics)
