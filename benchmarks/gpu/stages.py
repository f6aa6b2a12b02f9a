"""Runs commands one after another or in parallel, each with a deadline."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Exit status of a process whose GPU context is broken: restart it for the remaining cases.
BROKEN_CONTEXT = 75
# The signal for a stage at its deadline: pytest then still reports its results.
STOP = signal.SIGINT

PASSED, FAILED, STOPPED = "passed", "failed", "stopped at its deadline"

# Length of a failing stage's output tail in the record.
OUTPUT_CHARACTERS = 6000
# Seconds that a stage past its deadline may take to react to each signal.
GRACE = 2.0
POLL = 0.05


class Deadline:
    """A point in time, this many seconds from now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self._clock())

    @property
    def passed(self) -> bool:
        return self.left() == 0.0


class Stage(NamedTuple):
    """A command with a name.

    `journal`: the journal that it writes, if any; it is then restarted for the remaining cases
    after a case that crashed it. `required`: if False, its failure does not fail the run.
    """

    name: str
    command: list[str]
    journal: Path | None = None
    required: bool = True

    def log(self, folder: Path) -> Path:
        return folder / f"{self.name.replace(' ', '-')}.log"


class _Running:
    """A running stage: its process, in its own session so that its children end with it."""

    def __init__(self, stage: Stage, folder: Path, environment: dict[str, str], root: Path) -> None:
        self.stage, self._environment, self._root = stage, environment, root
        self._log = stage.log(folder)
        self._log.write_text(f"$ {shlex.join(stage.command)}\n")
        self._begin = time.monotonic()
        self._start()

    def _start(self) -> None:
        self._journal_before = self._journal()
        with self._log.open("ab") as output:
            self.process = subprocess.Popen(
                self.stage.command,
                cwd=self._root,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _journal(self) -> str:
        path = self.stage.journal
        return path.read_text() if path is not None and path.exists() else ""

    def ended(self) -> bool:
        """Whether it is over; a process that died in a case is restarted for the others."""
        status = self.process.poll()
        if status is None:
            return False
        died = status == BROKEN_CONTEXT or status < 0
        # A process that dies before it begins a case would do so forever.
        if died and self._journal() != self._journal_before:
            self._start()
            return False
        return True

    def kill(self) -> None:
        """End it and its children, by a request first, so that it can write its results."""
        for how in (STOP, signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, how)
            except ProcessLookupError:
                break
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()

    def outcome(self, stopped: bool = False) -> dict[str, Any]:
        status = self.process.returncode
        # A stage with a journal ends by itself on request, with a meaningful status.
        stopped = stopped and (status < 0 or self.stage.journal is None)
        verdict = PASSED if status == 0 else STOPPED if stopped else FAILED
        text = self._log.read_text(errors="replace").replace(f"{self._root}{os.sep}", "")
        return {
            "name": self.stage.name,
            "status": verdict,
            "required": self.stage.required,
            "exit_status": status,
            "seconds": round(time.monotonic() - self._begin, 1),
            "output": "" if verdict == PASSED else text[-OUTPUT_CHARACTERS:],
        }


def run(
    stages: Sequence[Stage], seconds: float, folder: Path, environment: dict[str, str], root: Path
) -> list[dict[str, Any]]:
    """Run stages in parallel until the required ones have ended, or for this many seconds.

    Returns: the outcome of each, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(seconds)
    running: list[_Running] = []
    outcomes: dict[str, dict[str, Any]] = {}
    try:
        for stage in stages:
            running.append(_Running(stage, folder, environment, root))
        while not deadline.passed:
            for one in running:
                if one.stage.name not in outcomes and one.ended():
                    outcomes[one.stage.name] = one.outcome()
            if all(one.stage.name in outcomes for one in running if one.stage.required):
                break
            time.sleep(POLL)
    finally:
        for one in running:
            if one.stage.name not in outcomes:
                one.kill()
                outcomes[one.stage.name] = one.outcome(stopped=True)
    return [outcomes[stage.name] for stage in stages]


def failed(outcomes: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the stages that fail the run."""
    return [o["name"] for o in outcomes if o["required"] and o["status"] != PASSED]
