"""The command `churn-train report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from churn_trainer.output import check_replaceable
from churn_trainer.report import make_report, save_report, terminal_tables, verdicts

_WIDE = 170
"""Columns in which a table has its intervals beside the means."""


def report_runs(
    folder: Annotated[Path, typer.Argument(help="Folder of runs, as `train --out` was given.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report. Default: FOLDER/report.")
    ] = None,
    level: Annotated[float, typer.Option(help="Coverage of the intervals, in (0, 1).")] = 0.95,
) -> None:
    """Report accuracy and churn of finished runs, with the paper's tables and figures.

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
    try:
        check_replaceable(target)
        report = make_report(folder, level)
        page = save_report(report, target, command=shlex.join(["churn-train", *sys.argv[1:]]))
    except ValueError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail(f"interrupted; no report was written to {target}", 130)
    except OSError as error:
        _fail(
            f"no report was written to {target}: {error}; make room or name another folder with "
            "--out, an earlier report is as it was",
            1,
        )
    console = Console() if sys.stdout.isatty() else Console(width=_WIDE)
    for sentence in verdicts(report):
        console.print(sentence, highlight=False, markup=False)
    for table in terminal_tables(report, narrow=console.width < _WIDE):
        console.print()
        console.print(table)
    for sentence in (*report.missing, *report.left_out):
        console.print(sentence, highlight=False, markup=False, style="dim", soft_wrap=True)
    console.print(f"\nReport: {page}", highlight=False, markup=False, soft_wrap=True)


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(
        f"[red]error:[/red] {escape(message)}", highlight=False
    )
    raise typer.Exit(status)
