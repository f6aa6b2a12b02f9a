"""The report of any finished runs: what helped, tables, figures, CSV files, a page."""

from __future__ import annotations

import itertools
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup

import churn_kernels
from churn_kernels._printable import printable
from churn_kernels.intervals import Estimate
from churn_trainer.config import Run, Study
from churn_trainer.curves import Curves, read_curves
from churn_trainer.drawing import Drawing
from churn_trainer.figures import make_figures
from churn_trainer.formats import half, percent, probability, signed, value
from churn_trainer.found import EARLIER_STUDY, STUDY, Found, NothingFinished, find_runs
from churn_trainer.outcomes import (
    METRICS,
    Comparison,
    Outcome,
    Setting,
    baseline_of,
    by_setting,
    compare,
    measure,
)
from churn_trainer.output import MARKER, replaced, write_csv
from churn_trainer.paper import CITATION
from churn_trainer.run_folder import RunFolder
from churn_trainer.svg import PALETTE, STYLE
from churn_trainer.tables import Table, heading, make_tables, setting_names, settings_of

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    Attributes:
        found: runs, and folders that are no finished run.
        outcomes: methods by setting, measured.
        comparisons: of methods with their baselines.
        curves: of methods along their training.
        tables, figures: what could be made.
        missing: a sentence for what could not, and which runs it needs.
        left_out: a sentence for each run that is in no table.
        level: coverage of the intervals.
        title: what the runs are for, or nothing.
    """

    found: Found
    outcomes: list[Outcome]
    comparisons: list[Comparison]
    curves: list[Curves]
    tables: list[Table]
    figures: list[Drawing]
    missing: list[str]
    left_out: list[str]
    level: float
    title: str = ""


def make_report(
    source: Path | Sequence[Path | RunFolder],
    level: float = 0.95,
    *,
    title: str = "",
    first: Run | None = None,
    names: Mapping[str, str] | None = None,
) -> Report:
    """Reads runs, measures and compares them, and makes what they allow.

    Args:
        source: a folder of runs' folders, the folder of one run, or several of these.
        level: coverage of the intervals, in (0, 1).
        title: what the runs are for.
        first: a run of what all others are compared with; None: in each setting its baseline.
        names: `Run.recipe` -> a method's own name; None: what studies beside the runs say.
    Raises: ValueError if there is no such folder or `level` is out of range, NothingFinished if no
        run can be read.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}; 0.95 is customary")
    found = find_runs(source)
    outcomes, unusable = measure(found.finished, _names_beside(found) if names is None else names)
    if not outcomes:
        raise NothingFinished(
            f"folder must hold a run whose logits can be read, got none: {unusable[0]}"
        )
    comparisons, uncompared = compare(outcomes, level, first)
    curves, without_curves = read_curves(outcomes)
    tables, missing_tables = make_tables(outcomes, comparisons, level)
    figures, missing_figures = make_figures(outcomes, comparisons, curves, level)
    return Report(
        found=found,
        outcomes=outcomes,
        comparisons=comparisons,
        curves=curves,
        tables=tables,
        figures=figures,
        missing=[*uncompared, *without_curves, *missing_tables, *missing_figures],
        left_out=[
            *_some(found.diverged),
            *_some([*found.damaged, *unusable]),
            *_some([f"{name} has not ended; train it to its end" for name in found.unfinished]),
        ],
        level=level,
        title=printable(title),
    )


def _names_beside(found: Found) -> dict[str, str]:
    """The names that studies, whose settings lie beside their runs, give to methods."""
    names: dict[str, str] = {}
    paths = (Path(os.path.abspath(one.folder.path)).parent for one in found.finished)
    for root in dict.fromkeys(paths):
        for path in (root / STUDY, *sorted(root.glob(EARLIER_STUDY.format("*")))):
            try:
                if path.is_file():
                    names = Study.load(path).own_names() | names
            except ValueError:
                continue  # its runs are there all the same, by their methods' names
    return names


def _some(sentences: list[str]) -> list[str]:
    """The first three; how many more there are goes with the last."""
    shown = sentences[:3]
    if len(sentences) > len(shown):
        shown[-1] += f"; and {len(sentences) - len(shown)} more like it"
    return shown


def write_report(
    source: Path | Sequence[Path | RunFolder],
    out: Path,
    *,
    level: float = 0.95,
    command: str = "",
) -> Path:
    """Makes the report of finished runs and writes it whole, or, where anything stops it, not.

    Args:
        source: a folder of runs' folders, the folder of one run, or several of these.
        out: the report's folder; an earlier report there is replaced.
        level: coverage of the intervals, in (0, 1).
        command: the command line, recorded in the report.
    Returns: the path of the HTML page.
    Raises:
        ValueError: no run can be read, or `level` is out of range.
        OSError: a file cannot be written; an earlier report stays.
    """
    return save_report(make_report(source, level), out, command=command)


def save_report(report: Report, out: Path, *, command: str = "") -> Path:
    """Writes a report that was made. Arguments, result and errors are those of `write_report`."""
    facts = _facts(report, command)
    with replaced(out) as folder:
        write_csv(folder / MARKER, ("name", "value"), facts.items())
        write_csv(folder / "runs.csv", _RUN_COLUMNS, _run_rows(report))
        write_csv(folder / "pairs.csv", _PAIR_COLUMNS, _pair_rows(report))
        write_csv(folder / "curves.csv", _CURVE_COLUMNS, _curve_rows(report))
        write_csv(folder / "comparisons.csv", _COMPARISON_COLUMNS, _comparison_rows(report))
        for table in report.tables:
            columns = (*table.heads, *_CELL_COLUMNS)
            write_csv(folder / f"table-{table.kind}.csv", columns, _table_rows(table))
        for drawing in report.figures:
            with mpl.rc_context(STYLE):
                for kind in ("png", "svg"):
                    drawing.figure.savefig(folder / f"{drawing.name}.{kind}", dpi=160)
        (folder / PAGE).write_text(render_page(report, facts), encoding="utf-8")
    return out / PAGE


def headlines(report: Report) -> list[str]:
    """For each baseline what lowers its churn most, how far, at what cost; or that nothing does.

    What helped is a change whose interval leaves out zero, and which the corrected test confirms.
    """
    places = {str(setting): where for setting, where in _settings(report)}
    compared: dict[int, list[Comparison]] = {}
    for one in report.comparisons:
        compared.setdefault(id(one.baseline), []).append(one)
    said = [
        sentence
        for ones in compared.values()
        for sentence in _headline(ones, places[str(ones[0].baseline.setting)], report.level)
    ]
    if said:
        return said
    first = _first(report.outcomes)
    if first is None:
        return ["Churn needs two trainings: there is no second one of the same method and split."]
    churn = _with_half(first.estimate("churn", report.level))
    return [f"Two trainings of the {first.label} disagree on {churn} % of the test rows."]


def _headline(compared: list[Comparison], where: str, level: float) -> list[str]:
    base = compared[0].baseline
    churn = base.estimate("churn", level)
    helped = [one for one in compared if one.change["churn"].high < 0 and one.p_holm <= 1 - level]
    if not helped:
        known = any(one.change["churn"].high == one.change["churn"].high for one in compared)
        tried = "the one method" if len(compared) == 1 else f"none of {len(compared)} methods"
        says = "is not shown to help" if len(compared) == 1 else "is shown to help"
        if not known:
            tried, says = "there are too few runs", "to tell whether a method helps"
        return [f"{where}Churn is {_with_half(churn)} % with the {base.label}; {tried} {says}."]
    best = min(helped, key=lambda one: one.change["churn"].mean)
    said = [
        f"{where}Churn falls from {value(churn)} % to "
        f"{value(best.outcome.estimate('churn', level))} % with {best.outcome.label} "
        f"({_points(best.change['churn'])}), {_cost(best)}.",
        f"{where}Accuracy changes by {_points(best.change['accuracy'])} with it.",
    ]
    cheaper = [one for one in helped if _relative_cost(one) < _relative_cost(best)]
    if cheaper:
        other = min(cheaper, key=lambda one: (_relative_cost(one), one.change["churn"].mean))
        points = _points(other.change["churn"])
        said[1] += f" {_cost(other).capitalize()}, {other.outcome.label} changes churn by {points}."
    return said


def _relative_cost(one: Comparison) -> float:
    return one.outcome.training_cost / one.baseline.training_cost


def _cost(one: Comparison) -> str:
    """What the method costs, in units of the baseline's."""
    training = _relative_cost(one)
    inference = one.outcome.inference_cost / one.baseline.inference_cost
    times = {1.0: "at no more", 2.0: "at twice the"}
    cost = f"{times.get(training, f'at {training:g} times the')} training"
    return cost if inference == 1 else f"{cost} and {inference:g} times the prediction"


def _points(change: Estimate) -> str:
    return f"{signed(change)} {half(change)} points"


def _with_half(number: Estimate) -> str:
    return f"{value(number)} {half(number)}".strip()


def verdicts(report: Report) -> list[str]:
    """What the intervals allow to be said about churn, and what is left with every seed fixed."""
    places = {str(setting): where for setting, where in _settings(report)}
    return [
        *(
            _verdict(one, places[str(one.outcome.setting)], report.level)
            for one in report.comparisons
        ),
        *(
            _same_seeds(one, places[str(one.setting)], report.level)
            for one in report.outcomes
            if one.has_pair(one.sources)
        ),
    ]


_ORDER = (
    *("methods", "confidence", "weights", "weight-decay", "ensembles", "sources", "calibration"),
    *("pairs", "curves", "examples"),
)
"""The page's parts after what helped, by their kinds."""


def render_page(report: Report, facts: dict[str, Any]) -> str:
    """The HTML page: one file, no external resource, no script; every text escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("churn_trainer"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        value=value, half=half, signed=signed, heading=heading, unbroken=_unbroken
    )
    environment.tests["table"] = lambda part: isinstance(part, Table)
    parts: list[Table | Drawing] = [*report.tables, *report.figures]
    first, *others = headlines(report)
    return environment.get_template("report.html.j2").render(
        report=report,
        level=percent(report.level),
        verdicts=verdicts(report),
        facts=facts,
        headline=first,
        others=others,
        changes=[one for one in report.figures if one.kind == "changes"],
        parts=[one for kind in _ORDER for one in parts if one.kind == kind],
        svg=Markup,  # Matplotlib has escaped the texts in it
        citation=CITATION,
        palette=PALETTE,
    )


def _unbroken(sentence: str) -> str:
    """A sentence whose lines do not end within a number and its interval."""
    return sentence.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def _verdict(one: Comparison, where: str, level: float) -> str:
    change, label = one.change["churn"], one.outcome.label
    if math.isnan(change.high):
        return (
            f"{where}{label} changes churn by {signed(change)} points; {one.pairs} pairs of "
            "runs are too few for an interval."
        )
    p_value = f"p {probability(one.p_holm)}"
    if change.low <= 0 <= change.high:
        numbers = f"{signed(change)} {half(change)} points, {p_value}"
        return f"{where}{label} shows no change of churn ({numbers})."
    says = "lowers" if change.high < 0 else "raises"
    doubt = "" if one.p_holm <= 1 - level else ", which the corrected test does not confirm"
    numbers = f"{value(abs(change.mean))} {half(change)} points"
    return f"{where}{label} {says} churn by {numbers} ({p_value}{doubt})."


def _same_seeds(one: Outcome, where: str, level: float) -> str:
    churn, identical = one.estimate("churn", level, one.sources), one.identical(one.sources)
    threads = sorted(
        {
            split.found[place].threads or 0
            for split in one.splits.values()
            for cluster in split.clusters(one.sources)
            for place in cluster
            if len(cluster) > 1
        }
    )
    trained = f"; trained with {' or '.join(map(str, threads))} threads" if all(threads) else ""
    return (
        f"{where}{one.label} with every seed the same, on {one.setting.device}: churn "
        f"{value(churn)} %, {sum(identical)} of {len(identical)} pairs of runs have the same "
        f"logits bit for bit{trained}."
    )


def _first(outcomes: list[Outcome]) -> Outcome | None:
    """What the page begins with where nothing is compared: a method of which there is a pair."""
    paired = [one for one in outcomes if one.has_pair()]
    return baseline_of(paired) or next(iter(paired), None)


def _facts(report: Report, command: str) -> dict[str, Any]:
    build = churn_kernels.build_info()
    return {
        "command": printable(command),
        "runs": len(report.found.finished),
        "left_out": report.found.count - sum(one.all_runs for one in report.outcomes),
        "level": report.level,
        **{
            f"{where}{name}": text
            for setting, where in _settings(report)
            for name, text in settings_of(setting).items()
        },
        "backend": os.environ.get("CHURN_BACKEND") or churn_kernels.available_backends()[0],
        "cpu_isa": build.get("cpu_isa", ""),
        "build": build.get("git_commit", ""),
        **{
            package: metadata.version(package)
            for package in ("churn-kernels", "torch", "numpy", "matplotlib")
        },
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _settings(report: Report) -> list[tuple[Setting, str]]:
    """Every setting, and where there are several a name to put before what belongs to it."""
    settings = [setting for setting, _ in by_setting(report.outcomes)]
    names = setting_names(report.outcomes)
    return [(one, f"{names[str(one)]}: " if len(settings) > 1 else "") for one in settings]


# CSV ----------------------------------------------------------------------------------------------

_RUN_METRICS = ("accuracy", "confidence", "entropy", "ece")
_RUN_COLUMNS = ("data_network", "method", "run", *_RUN_METRICS)
_CELL_COLUMNS = ("column", "mean", "low", "high", "paper_mean", "paper_spread")
_PAIR_METRICS = (
    *("churn", "schurn", "churn_correct", "churn_incorrect"),
    *("negative_flips", "certified_agreement"),
)
_PAIR_COLUMNS = ("data_network", "method", "run", "other_run", *_PAIR_METRICS)
_CURVE_METRICS = ("cross_entropy", "accuracy", "churn", "confidence")
_CURVE_COLUMNS = ("data_network", "method", "epoch", *_CURVE_METRICS)
_COMPARISON_COLUMNS = (
    *("data_network", "method", "pairs", "metric"),
    *("change", "low", "high", "p_value", "p_holm"),
)


def _run_rows(report: Report) -> Iterable[Sequence[Any]]:
    names = setting_names(report.outcomes)
    for one in report.outcomes:
        for split in one.splits.values():
            columns = [getattr(split.report, metric).tolist() for metric in _RUN_METRICS]
            for run, *values in zip(split.runs, *columns, strict=True):
                yield names[str(one.setting)], one.label, printable(run.id), *values


def _pair_rows(report: Report) -> Iterable[Sequence[Any]]:
    names = setting_names(report.outcomes)
    for one in report.outcomes:
        for split in one.splits.values():
            matrices = [getattr(split.report, metric).tolist() for metric in _PAIR_METRICS]
            for i, j in itertools.permutations(range(len(split.runs)), 2):
                runs = (printable(split.runs[place].id) for place in (i, j))
                yield names[str(one.setting)], one.label, *runs, *(each[i][j] for each in matrices)


def _curve_rows(report: Report) -> Iterable[Sequence[Any]]:
    names = setting_names(report.outcomes)
    for curves in report.curves:
        heads = names[str(curves.outcome.setting)], curves.outcome.label
        columns = (getattr(curves, name).tolist() for name in ("epoch", *_CURVE_METRICS))
        for values in zip(*columns, strict=True):
            yield *heads, *values


def _comparison_rows(report: Report) -> Iterable[Sequence[Any]]:
    names = setting_names(report.outcomes)
    for one in report.comparisons:
        heads = (names[str(one.outcome.setting)], one.outcome.label, one.pairs)
        for metric in METRICS:
            tests = (one.p_value, one.p_holm) if metric == "churn" else ("", "")
            yield *heads, metric, *one.change[metric][:3], *tests


def _table_rows(table: Table) -> Iterable[Sequence[Any]]:
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            if cell is not None:
                ours = (100 * number for number in cell.estimate[:3])
                yield *row.heads, column, *ours, *(cell.printed or ("", ""))
