"""The report of any finished runs: verdicts, the paper's tables and figures, CSV files, a page."""

from __future__ import annotations

import csv
import math
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from markupsafe import Markup
from rich.table import Table as TerminalTable
from rich.text import Text

import churn_kernels
from churn_trainer.figures import Drawing, make_figures
from churn_trainer.formats import half, percent, probability, signed, value
from churn_trainer.found import Found, find_runs, printable
from churn_trainer.outcomes import METRICS, Comparison, Outcome, compare, measure
from churn_trainer.output import MARKER, replaced
from churn_trainer.paper import CITATION
from churn_trainer.run_folder import RunFolder
from churn_trainer.svg import PALETTE, SERIES, STYLE
from churn_trainer.tables import Cell, Table, make_tables, setting_names
from churn_trainer.terminal import estimates_table

PAGE = "report.html"


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    Attributes:
        found: runs, and folders that are no finished run.
        outcomes: methods by setting, measured.
        comparisons: of methods with their baselines.
        tables, figures: what could be made.
        missing: a sentence for what could not, and which runs it needs.
        left_out: a sentence for each run that is in no table.
        level: coverage of the intervals.
    """

    found: Found
    outcomes: list[Outcome]
    comparisons: list[Comparison]
    tables: list[Table]
    figures: list[Drawing]
    missing: list[str]
    left_out: list[str]
    level: float


def make_report(source: Path | Sequence[Path | RunFolder], level: float = 0.95) -> Report:
    """Reads runs, measures and compares them, and makes what they allow.

    Args:
        source: a folder of runs' folders, the folder of one run, or several of these.
        level: coverage of the intervals, in (0, 1).
    Raises: ValueError if no run can be read, or `level` is out of range.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}; 0.95 is customary")
    found = find_runs(source)
    outcomes, unusable = measure(found.finished)
    if not outcomes:
        raise ValueError(
            f"folder must hold a run whose logits can be read, got none: {unusable[0]}"
        )
    comparisons, uncompared = compare(outcomes, level)
    tables, missing_tables = make_tables(outcomes, comparisons, level)
    figures, missing_figures = make_figures(outcomes, comparisons, level)
    return Report(
        found=found,
        outcomes=outcomes,
        comparisons=comparisons,
        tables=tables,
        figures=figures,
        missing=[*uncompared, *missing_tables, *missing_figures],
        left_out=[
            *found.diverged,
            *found.damaged,
            *unusable,
            *(f"{name} has not ended; train it to its end" for name in found.unfinished),
        ],
        level=level,
    )


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
        _write_csv(folder / MARKER, ("name", "value"), facts.items())
        _write_csv(folder / "runs.csv", _RUN_COLUMNS, _run_rows(report))
        _write_csv(folder / "comparisons.csv", _COMPARISON_COLUMNS, _comparison_rows(report))
        for table in report.tables:
            columns = (*table.heads, *_CELL_COLUMNS)
            _write_csv(folder / f"table-{table.number}.csv", columns, _table_rows(table))
        for drawing in report.figures:
            with mpl.rc_context(STYLE):
                for kind in ("png", "svg"):
                    drawing.figure.savefig(folder / f"{drawing.name}.{kind}", dpi=160)
        (folder / PAGE).write_text(render_page(report, facts), encoding="utf-8")
    return out / PAGE


def verdicts(report: Report) -> list[str]:
    """One sentence for each comparison: what its interval allows to be said about churn."""
    names = setting_names(report.outcomes)
    return [
        _verdict(one, names[str(one.outcome.setting)], report.level) for one in report.comparisons
    ]


def terminal_tables(report: Report, *, narrow: bool = False) -> list[TerminalTable]:
    """The tables in percent, with intervals; `narrow` puts those on lines of their own."""
    return [_terminal(table, report.level, narrow) for table in report.tables]


def render_page(report: Report, facts: dict[str, Any]) -> str:
    """The HTML page: one file, no external resource, no script; every text escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("churn_trainer"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(value=value, half=half, signed=signed)
    return environment.get_template("report.html.j2").render(
        report=report,
        level=percent(report.level),
        verdicts=verdicts(report),
        facts=facts,
        # Matplotlib has escaped the texts in them.
        drawings=[(one, Markup(one.page)) for one in report.figures],
        citation=CITATION,
        palette=PALETTE,
        series=len(SERIES),
    )


def _verdict(one: Comparison, setting: str, level: float) -> str:
    change, label = one.change["churn"], one.outcome.label
    if math.isnan(change.high):
        return (
            f"{setting}: {label} changes churn by {signed(change)} points; {one.pairs} pairs of "
            "runs are too few for an interval."
        )
    p_value = f"p {probability(one.p_holm)}"
    if change.low <= 0 <= change.high:
        numbers = f"{signed(change)} {half(change)} points, {p_value}"
        return f"{setting}: {label} shows no change of churn ({numbers})."
    says = "lowers" if change.high < 0 else "raises"
    doubt = "" if one.p_holm <= 1 - level else ", which the corrected test does not confirm"
    numbers = f"{value(abs(change.mean))} {half(change)} points"
    return f"{setting}: {label} {says} churn by {numbers} ({p_value}{doubt})."


def _facts(report: Report, command: str) -> dict[str, Any]:
    build = churn_kernels.build_info()
    return {
        "command": printable(command),
        "runs": len(report.found.finished),
        "left_out": len(report.left_out),
        "level": report.level,
        "backend": os.environ.get("CHURN_BACKEND") or churn_kernels.available_backends()[0],
        "build": build.get("git_commit", ""),
        **{
            package: metadata.version(package)
            for package in ("churn-kernels", "torch", "numpy", "matplotlib")
        },
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _terminal(table: Table, level: float, narrow: bool) -> TerminalTable:
    shown = estimates_table(
        f"Table {table.number}: {table.title}, %",
        f"± half of the {percent(level)} interval",
        narrow=narrow,
    )
    for name in table.heads:
        shown.add_column(Text(name))
    for name in table.columns:
        shown.add_column(Text(name), justify="right")
    for row in table.rows:
        cells = [_terminal_cell(cell, "\n" if narrow else " ") for cell in row.cells]
        shown.add_row(*map(Text, row.heads), *cells)
    return shown


def _terminal_cell(cell: Cell | None, separator: str) -> Text:
    if cell is None:
        return Text()
    text = Text(signed(cell.estimate) if cell.signed else value(cell.estimate), no_wrap=True)
    text.append(separator).append(half(cell.estimate), style="dim")
    if cell.printed:
        text.append(f"\npaper {cell.printed.mean:.2f}", style="dim")
    return text


# CSV ----------------------------------------------------------------------------------------------

_RUN_METRICS = ("accuracy", "confidence", "entropy", "ece")
_RUN_COLUMNS = ("data_network", "method", "run", *_RUN_METRICS)
_CELL_COLUMNS = ("column", "mean", "low", "high", "paper_mean", "paper_spread")
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


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
