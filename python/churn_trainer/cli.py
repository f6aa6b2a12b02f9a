"""The command line: `churn-trainer digits` trains, measures and reports."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from churn_trainer.config import Study, Training
from churn_trainer.loop import TrainingDiverged
from churn_trainer.methods import BASELINE, METHODS, find_method
from churn_trainer.output import check_replaceable
from churn_trainer.report import terminal_table, verdicts, write_report
from churn_trainer.study import StudyResult, run_study

app = typer.Typer(
    help="Train the same model again and again, and measure how much its predictions change.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_WIDE = 150
"""Columns in which the table has its intervals beside the means."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it."""


@app.command()
def digits(
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="Method to train beside the baseline; may be repeated. Default: all."
        ),
    ] = None,
    runs: Annotated[int, typer.Option(help="Independent runs per method and split.")] = 10,
    splits: Annotated[int, typer.Option(help="Random splits into training and test rows.")] = 8,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows.")] = 100,
    train_rows: Annotated[int, typer.Option(help="Training rows of a split.")] = 300,
    seed: Annotated[int, typer.Option(help="What all randomness follows from.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("out/digits"),
    workers: Annotated[
        int | None,
        typer.Option(help="Methods trained at a time. Default: one per core. Changes no number."),
    ] = None,
) -> None:
    """Train on scikit-learn's handwritten digits and report accuracy and churn of every method."""
    try:
        names = [find_method(name).name for name in methods or METHODS]
        study = Study(
            dataset="digits",
            methods=(BASELINE, *(name for name in names if name != BASELINE)),
            runs=runs,
            splits=splits,
            train_rows=train_rows,
            seed=seed,
            training=Training(epochs=epochs),
        )
        if workers is not None and workers < 1:
            raise ValueError(
                f"workers must be at least 1, got {workers}; leave it out for all cores"
            )
        check_replaceable(out)
        _run(study, out, workers or _cores())
    except ValueError as error:
        _fail(str(error), 2)
    except TrainingDiverged as error:
        _fail(f"{error}; there is nothing to compare with", 1)
    except KeyboardInterrupt:
        _fail(f"interrupted; no report was written to {out}", INTERRUPTED)
    except OSError as error:
        _fail(f"no report was written to {out}: {error}", 1)


@app.command("methods")
def list_methods() -> None:
    """List the methods there are."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "method", "source", "models", "alpha", "beta", "ramp"):
        table.add_column(heading)
    for method in METHODS.values():
        weights = (f"{weight:g}" if weight else "" for weight in (method.alpha, method.beta))
        table.add_row(
            method.name, method.label, method.source, str(method.members), *weights, method.ramp
        )
    _console().print(table)


def _run(study: Study, out: Path, workers: int) -> None:
    console = _console()
    result = _with_progress(study, workers, console)
    page = write_report(result, out, shlex.join(["churn-trainer", *sys.argv[1:]]))
    console.print(terminal_table(result, narrow=console.width < _WIDE))
    for sentence in verdicts(result):
        console.print(f"  {sentence}", highlight=False)
    console.print(f"\nReport: {page}  ({result.seconds:.0f} s)", highlight=False, soft_wrap=True)


def _with_progress(study: Study, workers: int, console: Console) -> StudyResult:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    stop = threading.Event()
    with Progress(*columns, console=console, transient=True) as progress:
        tasks = {
            name: progress.add_task(METHODS[name].label, total=study.training.epochs, start=False)
            for name in study.methods
        }

        def advance(method: str, epoch: int) -> None:
            if epoch == 1:
                progress.start_task(tasks[method])
            progress.update(tasks[method], completed=epoch)

        return run_study(study, workers=workers, on_epoch=advance, stop=stop)


def _console() -> Console:
    # A pipe or a log has no width of its own: give the table the room it needs.
    return Console() if sys.stdout.isatty() else Console(width=_WIDE)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"[red]error:[/red] {message}", highlight=False)
    raise typer.Exit(status)
