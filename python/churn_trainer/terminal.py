"""What every command shows in the terminal, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from churn_kernels._printable import printable
from churn_trainer.run_folder import Busy

FAILED, WRONG, INTERRUPTED = 1, 2, 130
"""Exit statuses: runs did not finish or a file could not be written; wrong settings; Ctrl-C."""

WIDE = 170
"""Columns in which a table has its intervals beside the means."""


def stdout_console() -> Console:
    """The terminal, or a pipe or log with the room that a table needs."""
    return Console() if sys.stdout.isatty() else Console(width=WIDE)


def print_table(headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns of plain text under their headings."""
    table = Table(*headings, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    stdout_console().print(table)


def progress_columns() -> tuple[ProgressColumn, ...]:
    """What is under way, how far, since when."""
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )


def fail(message: str, status: int) -> NoReturn:
    """Ends the command with a message and a status."""
    Console(stderr=True, soft_wrap=True).print(
        f"[red]error:[/red] {escape(printable(message))}", highlight=False
    )
    raise typer.Exit(status)


@contextmanager
def ending(
    interrupted: str = "the same command goes on from what is there",
    failed: str = "finished runs are kept; rerun the command to resume",
) -> Iterator[None]:
    """What goes wrong in the block ends the command with a message and a status.

    Args:
        interrupted: what is left after Ctrl-C, and how to go on.
        failed: the same, where a file could not be written.
    """
    try:
        yield
    except (ValueError, Busy) as error:
        fail(str(error), WRONG)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error).partition("\n")[0] or "no more"
        fail(f"memory must hold models and minibatches, got: {reason}; make them smaller", WRONG)
    except KeyboardInterrupt:
        fail(f"interrupted; {interrupted}", INTERRUPTED)
    except OSError as error:
        fail(f"{error}; {failed}", FAILED)
