"""What an examination is told as: an exit status, and files."""

from pathlib import Path

from churn_kernels._files import write_atomically
from churn_kernels.audit import data
from churn_kernels.audit.examine import Examination
from churn_kernels.audit.page import page

SAME, DIFFERENT, UNUSABLE, INCONCLUSIVE, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit statuses: no difference; one; no answer; runs differ, and no replay of the step does;
Ctrl-C."""

_STATUS = {"none": SAME, "unexplained": INCONCLUSIVE}  # of a verdict; all others: DIFFERENT


def status_of(found: Examination) -> int:
    """The exit status that says what was found."""
    return INTERRUPTED if found.interrupted else _STATUS.get(found.verdict, DIFFERENT)


def json_of(found: Examination, target: str) -> str:
    """What was found as JSON; `target` is what it is called."""
    return data.as_json(data.of_examination(found, target, status_of(found)))


def write_report(found: Examination, target: str, folder: Path) -> Path:
    """Writes `audit.json` and `audit.html`, each whole or not at all.

    Args:
        found: what `examine` found.
        target: what it is called; any text.
        folder: where; it is made.
    Returns: the path of the page.
    Raises: OSError if a file cannot be written; an earlier one stays.
    """
    write_atomically(folder / "audit.json", json_of(found, target).encode() + b"\n")
    write_atomically(folder / "audit.html", page(found, target).encode())
    return folder / "audit.html"
