"""The command `churn-train audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from churn_kernels.audit import describe, examine, write_report
from churn_trainer.audited import training_of
from churn_trainer.data import pinned
from churn_trainer.options import (
    ConfigOption,
    SeedOption,
    TrustOption,
    runs_of,
    settings_command,
)
from churn_trainer.output import check_folder
from churn_trainer.terminal import INTERRUPTED, ending, stdout_console


@settings_command
def audit_run(
    given: dict[str, Any],
    config: ConfigOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="Folder of audit.html and audit.json.")] = Path(
        "out/audit"
    ),
    device: Annotated[str, typer.Option(help="Where it is trained: cpu or cuda.")] = "cpu",
    replays: Annotated[int, typer.Option(min=2, help="Replays of one step.")] = 20,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs of trainings per measurement.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each pair.")] = 10,
    amplify_steps: Annotated[
        int, typer.Option(min=1, help="Steps over which a flipped last bit is followed.")
    ] = 100,
    trust: TrustOption = None,
) -> None:
    """Find out where, why and how fast two trainings of one run differ.

    Trains the run's first steps in pairs, replays a step operator by operator, puts it under
    stress, swaps suspects for deterministic twins, and follows a flip of one unit in the last
    place. `churn-audit run` does the same for a training of your own.

    Ends with status 0 when an answer was found, whatever it is, 1 when a file could not be written,
    2 for wrong settings, 130 after Ctrl-C; what was found until then is told all the same.

    [bold]Examples[/bold]

      churn-train audit --model cnn --data-crop-padding 1

      churn-train audit --config run.toml --device cuda --out out/audit-cuda
    """
    unchanged = "an earlier report is as it was"
    with ending(unchanged, unchanged):
        (run,) = pinned(runs_of(given, config, seed))
        check_folder(out)  # before minutes of work, not after
        build = training_of(run, trust or ())
        build(device)  # what is wrong with it shows now
        found = examine(
            build,
            device=device,
            replays=replays,
            pairs=pairs,
            steps=steps,
            amplify_steps=amplify_steps,
            tell=lambda what: typer.echo(what, err=True),
        )
        console = stdout_console()
        console.print(describe(found, run.id), highlight=False, markup=False, soft_wrap=True)
        page = write_report(found, run.id, out)
    console.print(f"\nReport: {page}", highlight=False, markup=False, soft_wrap=True)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)
