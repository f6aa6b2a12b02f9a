"""Runs cases one by one until a deadline, and writes each to disk before the next begins.

So the results survive a crash, and a restarted process resumes after the case that crashed the last
one.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.stages import BROKEN_CONTEXT, STOP, Deadline


class Case(NamedTuple):
    """A measurement: its description in the record, and the function that runs it."""

    facts: dict[str, Any]
    run: Callable[[], dict[str, Any]]

    @property
    def name(self) -> str:
        return " ".join(map(str, self.facts.values()))


class Journal:
    """The entries of the finished cases, and the names of the remaining ones, in a JSON file.

    An entry is the case's description with its results, or `absent` (a package that it needs is
    not importable), or `failed` (why).

    Args:
        path: the file; cases that it holds already count as done.
        cases: all cases.
    """

    def __init__(self, path: Path, cases: Sequence[Case]) -> None:
        self._path, self._cases = path, cases
        content = json.loads(path.read_text()) if path.exists() else {}
        self.entries: list[dict[str, Any]] = content.get("entries", [])
        names = {case.name for case in cases}
        self._done = names - set(content["left_out"]) if content else set()
        if running := content.get("running"):  # its process died
            self._end(running["name"], running["facts"] | {"failed": "its process ended"})
        self._write()

    @property
    def left_out(self) -> list[str]:
        return [case.name for case in self._cases if case.name not in self._done]

    def has(self, case: Case) -> bool:
        return case.name in self._done

    def begin(self, case: Case) -> None:
        self._write({"name": case.name, "facts": case.facts})

    def end(self, case: Case, result: dict[str, Any]) -> None:
        self._end(case.name, case.facts | result)

    def give_up(self) -> None:
        """Drop the running case."""
        self._write()

    def _end(self, name: str, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        self._done.add(name)
        self._write()

    def _write(self, running: dict[str, Any] | None = None) -> None:
        content = {"entries": self.entries, "left_out": self.left_out, "running": running}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".tmp")
        beside.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(beside, self._path)  # atomic: a kill while writing leaves the old file


class _Stopped(BaseException):
    """The signal to stop; not an Exception, so that cases do not record it as a failure."""


@contextmanager
def _stopped_by_signal() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _Stopped

    before = signal.signal(STOP, stop)
    try:
        yield
    finally:
        signal.signal(STOP, before)


def _context_works(device: str) -> bool:
    """Whether the GPU still works: an illegal access breaks it for the whole process."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _outcome(case: Case) -> dict[str, Any]:
    try:
        return case.run()
    except ImportError as error:
        return {"absent": str(error)}
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except Exception as error:  # a peer may fail in any way; go on with the others
        first = next(iter(str(error).strip().splitlines()), "")
        return {"failed": f"{type(error).__name__}: {first[:500]}"}


def work(cases: Sequence[Case], journal: Journal, deadline: Deadline, device: str) -> int:
    """Run the cases missing from the journal, until the deadline or the signal to stop.

    Returns: 0, or `BROKEN_CONTEXT`.
    """
    try:
        with _stopped_by_signal():
            for case in cases:
                if journal.has(case):
                    continue
                if deadline.passed:
                    break
                journal.begin(case)
                result = _outcome(case)
                journal.end(case, result)
                if "failed" in result:
                    print(f"{case.name}: {result['failed']}", flush=True)
                    if not _context_works(device):
                        return BROKEN_CONTEXT
    except _Stopped:
        journal.give_up()
    return 0
