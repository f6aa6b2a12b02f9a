"""The command `churn-train audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from churn_kernels.audit import describe, examine, write_report
from churn_trainer.audited import training_of
from churn_trainer.config import Run
from churn_trainer.options import all_seeds, settings_command
from churn_trainer.settings import merged, read_settings
from churn_trainer.terminal import FAILED, INTERRUPTED, WRONG, fail, stdout_console


@settings_command
def audit_run(
    given: dict[str, Any],
    config: Annotated[
        Path | None, typer.Option(help="TOML or JSON file of settings; an option wins over it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Every seed that has no option of its own.")] = 0,
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
    trust: Annotated[
        list[str] | None, typer.Option(help="Package that --model may import from.")
    ] = None,
) -> None:
    """Find out where, why and how fast two trainings of one run part ways.

    Trains the run's first steps in pairs, replays a step operator by operator, puts it under
    stress, swaps suspects for deterministic twins, and follows a flip of one unit in the last
    place. `churn-audit run` does the same for a training of your own.

    Ends with status 0 when an answer was found, whatever it is, 1 when a file could not be written,
    2 for wrong settings, 130 after Ctrl-C.

    [bold]Examples[/bold]

      churn-train audit --model cnn --data-crop-padding 1

      churn-train audit --config run.toml --device cuda --out out/audit-cuda
    """
    try:
        tables = merged(read_settings(config) if config else {}, given)
        run = Run.from_mapping(merged({"seeds": all_seeds(seed)}, tables))
        build = training_of(run, trust or ())
        build(device)  # what is wrong with it shows now
        out.mkdir(parents=True, exist_ok=True)  # before minutes of work, not after
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
    except ValueError as error:
        fail(str(error), WRONG)
    except KeyboardInterrupt:
        fail("interrupted; an earlier report is as it was", INTERRUPTED)
    except OSError as error:
        fail(f"{error}; an earlier report is as it was", FAILED)
    console.print(f"\nReport: {page}", highlight=False, markup=False, soft_wrap=True)
