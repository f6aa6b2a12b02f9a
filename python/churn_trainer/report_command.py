"""The command `churn-train report`, and how a report is shown in the terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text

from churn_trainer.formats import half, percent, signed, value
from churn_trainer.output import check_replaceable
from churn_trainer.report import Report, headlines, make_report, save_report, verdicts
from churn_trainer.tables import Cell, Table, heading
from churn_trainer.terminal import WIDE, ending, stdout_console


def report_runs(
    folder: Annotated[Path, typer.Argument(help="Folder of runs, as `train --out` was given.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report. Default: FOLDER/report.")
    ] = None,
    level: Annotated[float, typer.Option(help="Coverage of the intervals, in (0, 1).")] = 0.95,
) -> None:
    """Report what lowers churn in finished runs, and what it costs.

    Reads every run below FOLDER, whatever was trained, compares methods with the baseline of the
    same split and seeds, and writes one HTML page with PNG, SVG and CSV files beside it. What the
    runs do not allow is named, with the runs it needs. Damaged and unfinished runs are named and
    left out.

    Ends with status 0 when the report was written, 1 when a file could not be written, 2 for a
    wrong folder or setting, 130 after Ctrl-C; the earlier report stays unless the new one is whole.

    [bold]Examples[/bold]

      churn-train report out/runs

      churn-train report out/runs --out out/report --level 0.9
    """
    target = out or folder / "report"
    with ending(
        f"no report was written to {target}",
        f"no report was written to {target}, an earlier one is as it was; make room or name "
        "another folder with --out",
    ):
        check_replaceable(target)
        report = make_report(folder, level)
        show_report(report, target)
    for sentence in report.missing:
        stdout_console().print(sentence, highlight=False, markup=False, style="dim", soft_wrap=True)


def show_report(report: Report, target: Path) -> None:
    """Writes a report to its folder, and prints its tables, its verdicts and where it is.

    Raises: OSError if a file cannot be written; an earlier report stays.
    """
    page = save_report(report, target, command=shlex.join(["churn-train", *sys.argv[1:]]))
    console = stdout_console()
    for table in terminal_tables(report, narrow=console.width < WIDE):
        console.print(table)
        console.print()
    for sentence in (*verdicts(report), "", *headlines(report)):
        console.print(sentence, highlight=False, markup=False)
    for sentence in report.left_out:
        console.print(f"Left out: {sentence}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\nReport: {page}", highlight=False, markup=False, soft_wrap=True)


def terminal_tables(report: Report, *, narrow: bool = False) -> list[TerminalTable]:
    """The tables in percent, with intervals; `narrow` puts those on lines of their own."""
    return [_terminal(table, report.level, narrow) for table in report.tables]


def _terminal(table: Table, level: float, narrow: bool) -> TerminalTable:
    shown = TerminalTable(
        box=box.SIMPLE_HEAD,
        padding=(0, 0) if narrow else (0, 1),
        pad_edge=False,
        show_edge=False,
        title=table.title,
        caption=f"± half of the {percent(level)} interval",
        title_justify="left",
        caption_justify="left",
    )
    for name in table.heads:
        shown.add_column(Text(name))
    for name in table.columns:
        shown.add_column(Text(heading(name)), justify="right")
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
