"""The commands for many runs: `churn-train study`, `sources` and `recipes`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from churn_kernels._printable import printable
from churn_trainer.config import Run, Study
from churn_trainer.data import pinned
from churn_trainer.found import NothingFinished
from churn_trainer.methods import find_method
from churn_trainer.named_studies import find_study, study_files, write_recipes
from churn_trainer.named_studies import recipes as named_recipes
from churn_trainer.options import AcceleratorOption, CheckpointSecondsOption, TrustOption
from churn_trainer.output import check_replaceable
from churn_trainer.report_command import show_report
from churn_trainer.settings import merged, read_settings, to_mapping
from churn_trainer.sources import DEFAULT, sources_study
from churn_trainer.study import report_study, run_study
from churn_trainer.tasks import Workers
from churn_trainer.terminal import FAILED, ending, fail, print_table, progress_columns
from churn_trainer.train import Event, Options
from churn_trainer.workers import LocalWorkers, RayWorkers

RUNS, REPORT = "runs", "report"
"""Folders below a study's."""

_Runs = Annotated[int | None, typer.Option(help="Independent runs per method and split.")]
_Splits = Annotated[int | None, typer.Option(help="Random splits into training and test rows.")]
_Epochs = Annotated[int | None, typer.Option(help="Passes over the training rows.")]
_Seed = Annotated[int | None, typer.Option(help="What all randomness follows from.")]
_WorkersOption = Annotated[
    int | None,
    typer.Option(help="Stacks of runs trained at a time. Default: one a core, or one a GPU."),
]
_Ray = Annotated[
    str | None,
    typer.Option(help="Train on a Ray cluster: its address, auto, or local to start one here."),
]
_Retries = Annotated[int, typer.Option(help="How often a stack that failed is tried again.")]


def study(
    name: Annotated[
        str | None, typer.Argument(help="A study of the package, or a .toml or .json file.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="Only this one beside the first; may be repeated."),
    ] = None,
    runs: _Runs = None,
    splits: _Splits = None,
    epochs: _Epochs = None,
    seed: _Seed = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of runs and report. Default: out/NAME.")
    ] = None,
    workers: _WorkersOption = None,
    ray: _Ray = None,
    retries: _Retries = 2,
    accelerator: AcceleratorOption = "auto",
    checkpoint_seconds: CheckpointSecondsOption = 60.0,
    trust: TrustOption = None,
) -> None:
    """Train methods x splits x runs, and report accuracy and churn of every method.

    Without a name it lists the studies of the package. Options win over the file. Runs that have
    ended are not trained again, those that were killed go on; a stack of runs that fails is tried
    again and leaves the others alone.

    Ends with status 0 when all runs finished, 1 when some did not or a file could not be written,
    2 for wrong settings, 130 after Ctrl-C.

    [bold]Examples[/bold]

      churn-train study digits --method skl --method l1

      churn-train study my-study.toml --workers 4

      churn-train study cifar10-resnet56 --ray auto --accelerator cuda
    """
    with ending():
        if name is None:
            titles = {key: Study.load(path).title for key, path in study_files().items()}
            print_table(("name", "study"), list(titles.items()))
            return
        (wanted,) = pinned([_study(name, methods, runs, splits, epochs, seed)])
        out = out or Path("out") / Path(name).stem
        check_replaceable(out / REPORT)
        options = Options(
            accelerator=accelerator, checkpoint_seconds=checkpoint_seconds, trust=trust or ()
        )
        with _telling(wanted) as tell:
            run_study(
                wanted,
                out / RUNS,
                _workers(workers, ray, accelerator),
                options,
                retries=retries,
                tell=tell,
            )
        _conclude(wanted, out, [out / RUNS])


def sources(
    config: Annotated[
        Path | None,
        typer.Option(help="TOML or JSON file of a run's settings. Default: digits, cropped."),
    ] = None,
    runs: _Runs = None,
    splits: _Splits = None,
    epochs: _Epochs = None,
    seed: _Seed = None,
    out: Annotated[Path, typer.Option(help="Folder of runs and report.")] = Path("out/sources"),
    accelerators: Annotated[
        list[str] | None,
        typer.Option("--accelerator", help="cpu or cuda; repeat it to compare. Default: cpu."),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Threads of a process; repeated runs take turns. Default: 1 and 2."),
    ] = None,
    workers: _WorkersOption = None,
    ray: _Ray = None,
    retries: _Retries = 2,
    checkpoint_seconds: CheckpointSecondsOption = 60.0,
    trust: TrustOption = None,
) -> None:
    """Measure where churn comes from: initialisation, order, augmentation, hardware.

    Trains one recipe with every subset of its sources of randomness fixed, ten runs in each of
    five splits, and reports the table (Bhojanapalli et al. 2021, Table 1). Where everything is
    fixed, each repetition is trained by a process of its own, with another number of threads.

    Exit statuses are those of `churn-train study`.

    [bold]Examples[/bold]

      churn-train sources

      churn-train sources --config run.toml --splits 1 --accelerator cpu --accelerator cuda
    """
    with ending():
        recipe = Run.load(config) if config else DEFAULT
        given = {"optimisation": {"epochs": epochs}} if epochs is not None else {}
        recipe = Run.from_mapping(merged(recipe.to_mapping(), given))
        numbers = {"runs": runs, "splits": splits, "seed": seed}
        (recipe,) = pinned([recipe])
        wanted = sources_study(
            recipe, **{key: value for key, value in numbers.items() if value is not None}
        )
        check_replaceable(out / REPORT)
        roots = {name: out / RUNS / name for name in accelerators or ["cpu"]}
        for accelerator, root in roots.items():
            options = Options(
                accelerator=accelerator,
                checkpoint_seconds=checkpoint_seconds,
                trust=trust or (),
            )
            with _telling(wanted) as tell:
                run_study(
                    wanted,
                    root,
                    _workers(workers, ray, accelerator),
                    options,
                    retries=retries,
                    threads=threads or (1, 2),
                    tell=tell,
                )
        _conclude(wanted, out, list(roots.values()))


def recipes(
    write: Annotated[
        Path | None, typer.Option(help="Write their files into this folder, to be changed.")
    ] = None,
) -> None:
    """List the paper's recipes, which `churn-train study` trains by name.

    Their files say of each number whether it is the paper's or our choice.

    [bold]Examples[/bold]

      churn-train recipes --write recipes

      churn-train study cifar10-resnet56 --runs 5
    """
    with ending("files written so far stay", "name a folder that can be written to"):
        if write is None:
            print_table(
                ("name", "recipe"), [(name, one.title) for name, one in named_recipes().items()]
            )
            return
        for path in write_recipes(write):
            print(path)


def _study(
    name: str,
    methods: list[str] | None,
    runs: int | None,
    splits: int | None,
    epochs: int | None,
    seed: int | None,
) -> Study:
    """The study that a file and the command line describe, the command line before the file."""
    given: dict[str, Any] = {"runs": runs, "splits": splits, "seed": seed}
    given = {key: value for key, value in given.items() if value is not None}
    if epochs is not None:
        given["optimisation"] = {"epochs": epochs}
    tables = merged(read_settings(find_study(name)), given)
    wanted = Study.from_mapping(tables)
    if not methods:
        return wanted
    first, *others = wanted.methods
    known = {variant.name: to_mapping(variant) for variant in others}
    chosen = [known[one] if one in known else find_method(one).name for one in methods]
    chosen = [one for one in chosen if one != first.name]
    return Study.from_mapping({**tables, "methods": [to_mapping(first), *chosen]})


def _workers(count: int | None, ray: str | None, accelerator: str) -> Workers:
    if ray is not None:
        return RayWorkers(ray, count, gpus=int(accelerator == "cuda"))
    if count is None and accelerator != "cpu" and torch.cuda.is_available():
        count = torch.cuda.device_count()
    return LocalWorkers(_cores() if count is None else count)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _telling(study: Study) -> Iterator[Any]:
    """Shows a bar for each stack under way, and a line for what did not go as it should."""
    console = Console(stderr=True)
    names = study.own_names()
    bars: dict[str, Any] = {}
    with Progress(*progress_columns(), console=console, transient=True) as progress:

        def tell(event: Event) -> None:
            first = event.runs[0]
            if event.kind == "started":
                name = printable(names.get(first.recipe, first.method.label))
                description = f"{escape(name)} x {len(event.runs)}"
                bars[first.id] = progress.add_task(description, total=first.optimisation.epochs)
            elif event.kind == "epoch" and first.id in bars:
                progress.update(bars[first.id], completed=event.epoch)
            elif event.kind in ("skipped", "resumed", "diverged", "failed", "damaged"):
                several = f" and {len(event.runs) - 1} more" if len(event.runs) > 1 else ""
                line = f"{event.kind} {first.id}{several}  {event.detail}".rstrip()
                console.print(escape(printable(line)), highlight=False, soft_wrap=True)

        yield tell


def _conclude(wanted: Study, out: Path, roots: list[Path]) -> None:
    """The report of what was trained. Raises: typer.Exit if some of it did not finish."""
    try:
        report = report_study(wanted, *roots)
    except NothingFinished as error:
        fail(str(error), FAILED)
    show_report(report, out / REPORT)
    if report.left_out:
        raise typer.Exit(FAILED)
