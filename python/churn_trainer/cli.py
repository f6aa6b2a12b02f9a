"""The command line: `churn-train train` trains runs, `churn-train digits` a whole study."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from churn_trainer.config import Data, Optimisation, Run, Study
from churn_trainer.data import DATASETS
from churn_trainer.loop import TrainingDiverged
from churn_trainer.methods import BASELINE, DIGITS_METHODS, METHODS, find_method
from churn_trainer.models import NETWORKS
from churn_trainer.options import all_seeds, settings_command
from churn_trainer.output import check_replaceable
from churn_trainer.report import terminal_table, verdicts, write_report
from churn_trainer.run_folder import FINISHED, Busy
from churn_trainer.settings import merged, read_settings, to_toml
from churn_trainer.study import StudyResult, run_study
from churn_trainer.train import Event, Options, train

app = typer.Typer(
    rich_markup_mode="rich",
    help="Train the same model again and again, and measure how much its predictions change.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_WIDE = 150
"""Columns in which the table has its intervals beside the means."""

FAILED, WRONG, INTERRUPTED = 1, 2, 130
"""Exit statuses: a run diverged or a file could not be written; wrong settings; Ctrl-C."""


@app.command("train")
@settings_command
def train_runs(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="TOML or JSON file of settings; an option wins over it.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs' folders.")] = Path("out/runs"),
    seed: Annotated[int, typer.Option(help="Every seed that has no option of its own.")] = 0,
    runs: Annotated[int, typer.Option(help="Runs, with seeds one higher each.")] = 1,
    show: Annotated[bool, typer.Option(help="Print the settings as TOML and stop.")] = False,
    accelerator: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    devices: Annotated[int, typer.Option(help="Devices on this machine, one process each.")] = 1,
    curve_points: Annotated[int, typer.Option(help="Measurements along the training.")] = 20,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="Time between checkpoints; 0: one after every step.")
    ] = 60.0,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard's files.")] = False,
    trust: Annotated[
        list[str] | None, typer.Option(help="Package that --model may import from.")
    ] = None,
) -> None:
    """Train runs, each into a folder of its own with its settings, metrics and test logits.

    A run is data, model, method, optimisation and seeds; its folder is named by them. A run that
    has ended is not trained again, one that was killed goes on from its checkpoint.

    Ends with status 0 when all runs finished, 1 when one diverged or a file could not be written,
    2 for wrong settings, 130 after Ctrl-C.

    [bold]Examples[/bold]

      churn-train train --method skl --runs 5

      churn-train train --data cifar10 --model resnet56 --method skl-entropy --data-flip

      churn-train train --config run.toml --epochs 20 --show

      torchrun --nproc-per-node 8 -m churn_trainer train --devices 8 --data imagenet
    """
    try:
        wanted = _wanted(given, config, seed, runs)
        if show:
            print(to_toml(wanted[0]), end="")
            return
        options = Options(
            accelerator=accelerator,
            devices=devices,
            curve_points=curve_points,
            checkpoint_seconds=checkpoint_seconds,
            tensorboard=tensorboard,
            trust=trust or (),
        )
        with _telling(wanted) as tell:
            folders = train(wanted, out, options, tell)
    except (ValueError, Busy) as error:
        _fail(str(error), WRONG)
    except KeyboardInterrupt:
        _fail("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)
    except OSError as error:
        _fail(f"{error}; what was finished stays, the same command goes on", FAILED)
    if any(folder.status != FINISHED for folder in folders):
        raise typer.Exit(FAILED)


@app.command()
def digits(
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="Method to train beside the baseline; may be repeated. Default: seven."
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
        chosen = [find_method(name) for name in methods or DIGITS_METHODS]
        study = Study(
            methods=(METHODS[BASELINE], *(one for one in chosen if one.name != BASELINE)),
            data=Data(train_rows=train_rows),
            runs=runs,
            splits=splits,
            seed=seed,
            optimisation=Optimisation(epochs=epochs),
        )
        if workers is not None and workers < 1:
            raise ValueError(
                f"workers must be at least 1, got {workers}; leave it out for all cores"
            )
        check_replaceable(out)
        _run(study, out, workers or _cores())
    except ValueError as error:
        _fail(str(error), WRONG)
    except TrainingDiverged as error:
        _fail(f"{error}; there is nothing to compare with", FAILED)
    except KeyboardInterrupt:
        _fail(f"interrupted; no report was written to {out}", INTERRUPTED)
    except OSError as error:
        _fail(f"no report was written to {out}: {error}", FAILED)


@app.command("methods")
def list_methods() -> None:
    """List the methods there are."""
    rows = []
    for method in METHODS.values():
        weights = (f"{weight:g}" if weight else "" for weight in (method.alpha, method.beta))
        rows.append(
            (method.name, method.label, method.source, str(method.members), *weights, method.ramp)
        )
    _print_table(("name", "method", "source", "models", "alpha", "beta", "ramp"), rows)


@app.command("data")
def list_data() -> None:
    """List the data sets there are."""
    _print_table(("name", "data set"), [(name, entry[0]) for name, entry in DATASETS.items()])


@app.command("models")
def list_models() -> None:
    """List the networks there are; timm's and your own join them."""
    rows = [(name, entry[0]) for name, entry in NETWORKS.items()]
    rows.append(("timm:NAME", "any network of timm, where it is installed"))
    rows.append(("package.module:Name", "yours, called with shape and classes; see --trust"))
    _print_table(("name", "network"), rows)


def _print_table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(*headings, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    _console().print(table)


def _wanted(given: dict[str, Any], config: Path | None, seed: int, runs: int) -> list[Run]:
    """The runs that a file and the command line describe, the command line before the file."""
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}; 1 is the default")
    tables = merged(read_settings(config) if config else {}, given)
    seeds = [{"seeds": all_seeds(seed + number)} for number in range(runs)]
    return [Run.from_mapping(merged(below, tables)) for below in seeds]


@contextmanager
def _telling(wanted: list[Run]) -> Iterator[Any]:
    """A `tell` for `train` that shows a bar for each kind of run and a line for each that ended."""
    console = Console(stderr=True)
    epochs = wanted[0].optimisation.epochs
    bars: dict[str, Any] = {}
    with Progress(*_columns(), console=console, transient=True) as progress:

        def tell(event: Event) -> None:
            key = event.runs[0].together
            name = event.runs[0].method.label
            several = f" x {len(event.runs)}" if len(event.runs) > 1 else ""
            if event.kind == "started":
                bars[key] = progress.add_task(f"{name}{several}", total=epochs)
            elif event.kind == "epoch":
                description = f"{name}{several}, {event.detail}"
                progress.update(bars[key], completed=event.epoch, description=description)
            else:
                for run in event.runs:
                    line = f"{event.kind} {run.id}  {event.detail}".rstrip()
                    console.print(escape(line), highlight=False, soft_wrap=True)

        yield tell


def _run(study: Study, out: Path, workers: int) -> None:
    console = _console()
    result = _with_progress(study, workers, console)
    page = write_report(result, out, shlex.join(["churn-train", *sys.argv[1:]]))
    console.print(terminal_table(result, narrow=console.width < _WIDE))
    for sentence in verdicts(result):
        console.print(f"  {sentence}", highlight=False)
    console.print(f"\nReport: {page}  ({result.seconds:.0f} s)", highlight=False, soft_wrap=True)


def _with_progress(study: Study, workers: int, console: Console) -> StudyResult:
    stop = threading.Event()
    with Progress(*_columns(), console=console, transient=True) as progress:
        tasks = {
            method.name: progress.add_task(
                method.label, total=study.optimisation.epochs, start=False
            )
            for method in study.methods
        }

        def advance(method: str, epoch: int) -> None:
            if epoch == 1:
                progress.start_task(tasks[method])
            progress.update(tasks[method], completed=epoch)

        return run_study(study, workers=workers, on_epoch=advance, stop=stop)


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )


def _console() -> Console:
    # A pipe or a log has no width of its own: give the table the room it needs.
    return Console() if sys.stdout.isatty() else Console(width=_WIDE)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fail(message: str, status: int) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(
        f"[red]error:[/red] {escape(message)}", highlight=False
    )
    raise typer.Exit(status)
