"""The command line: `churn-train train` trains runs; `study_cli` has the commands for many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from churn_kernels._printable import printable
from churn_trainer.audit_command import audit_run
from churn_trainer.config import Run
from churn_trainer.data import DATASETS
from churn_trainer.methods import METHODS
from churn_trainer.models import NETWORKS
from churn_trainer.options import (
    AcceleratorOption,
    CheckpointSecondsOption,
    ConfigOption,
    SeedOption,
    TrustOption,
    runs_of,
    settings_command,
)
from churn_trainer.output import check_folder
from churn_trainer.report_command import report_runs
from churn_trainer.run_folder import FINISHED
from churn_trainer.settings import to_toml
from churn_trainer.study_cli import recipes, sources, study
from churn_trainer.terminal import FAILED, ending, print_table, progress_columns
from churn_trainer.train import Event, Options, train

app = typer.Typer(
    rich_markup_mode="rich",
    help="Train the same model again and again, and measure how much its predictions change.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("study")(study)
app.command("sources")(sources)
app.command("recipes")(recipes)


@app.command("train")
@settings_command
def train_runs(
    given: dict[str, Any],
    config: ConfigOption = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs' folders.")] = Path("out/runs"),
    seed: SeedOption = 0,
    runs: Annotated[
        int, typer.Option(help="Runs on one split, with all other seeds one higher each.")
    ] = 1,
    show: Annotated[bool, typer.Option(help="Print the settings as TOML and stop.")] = False,
    accelerator: AcceleratorOption = "auto",
    devices: Annotated[int, typer.Option(help="Devices on this machine, one process each.")] = 1,
    curve_points: Annotated[int, typer.Option(help="Measurements along the training.")] = 20,
    checkpoint_seconds: CheckpointSecondsOption = 60.0,
    tensorboard: Annotated[bool, typer.Option(help="Also write TensorBoard's files.")] = False,
    trace: Annotated[
        bool, typer.Option(help="Record every step, for `churn-audit diff` of two trainings.")
    ] = False,
    keep_checkpoint: Annotated[
        bool, typer.Option(help="Leave the last checkpoint of a run that ends, for --go-on-from.")
    ] = True,
    trust: TrustOption = None,
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

      churn-train train --config run.toml --epochs 40 --go-on-from 20

      torchrun --nproc-per-node 8 -m churn_trainer train --devices 8 --data imagenet
    """
    with ending():
        wanted = runs_of(given, config, seed, runs)
        if show:
            print(to_toml(wanted[0]), end="")
            return
        check_folder(out)
        options = Options(
            accelerator=accelerator,
            devices=devices,
            curve_points=curve_points,
            checkpoint_seconds=checkpoint_seconds,
            tensorboard=tensorboard,
            trace=trace,
            trust=trust or (),
            keep_checkpoint=keep_checkpoint,
        )
        with _telling(wanted) as tell:
            folders = train(wanted, out, options, tell)
        if any(folder.status != FINISHED for folder in folders):
            raise typer.Exit(FAILED)


app.command("report")(report_runs)
app.command("audit")(audit_run)


@app.command("methods")
def list_methods() -> None:
    """List the methods there are."""
    rows = []
    for method in METHODS.values():
        weights = (f"{weight:g}" if weight else "" for weight in (method.alpha, method.beta))
        rows.append(
            (method.name, method.label, method.source, str(method.members), *weights, method.ramp)
        )
    print_table(("name", "method", "source", "models", "alpha", "beta", "ramp"), rows)


@app.command("data")
def list_data() -> None:
    """List the data sets there are."""
    print_table(("name", "data set"), [(name, entry[0]) for name, entry in DATASETS.items()])


@app.command("models")
def list_models() -> None:
    """List the networks there are; timm's and your own join them."""
    rows = [(name, entry[0]) for name, entry in NETWORKS.items()]
    rows.append(("timm:NAME", "any network of timm, where it is installed"))
    rows.append(("package.module:Name", "yours, called with shape and classes; see --trust"))
    print_table(("name", "network"), rows)


@contextmanager
def _telling(wanted: list[Run]) -> Iterator[Any]:
    """A `tell` for `train` that shows a bar for each kind of run and a line for each that ended."""
    console = Console(stderr=True)
    epochs = wanted[0].optimisation.epochs
    bars: dict[str, Any] = {}
    with Progress(*progress_columns(), console=console, transient=True) as progress:

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
                    console.print(escape(printable(line)), highlight=False, soft_wrap=True)

        yield tell
