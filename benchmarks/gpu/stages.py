"""Commands that run one after another or side by side, each until its deadline at the latest."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Exit status of a process whose GPU context a case has broken: start it again for the cases left.
BROKEN_CONTEXT = 75
# What a stage is sent at its deadline: pytest then still says what it found.
STOP = signal.SIGINT

PASSED, FAILED, STOPPED = "passed", "failed", "stopped at its deadline"

# What a record keeps of the end of a failing stage's output.
OUTPUT_CHARACTERS = 6000
# How long a stage that did not keep its deadline may take to follow each signal.
GRACE = 2.0
POLL = 0.05


class Deadline:
    """A point in time, so many seconds from now."""

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

    `journal`: where it writes one; it is then started again after a case that was its end, for the
    cases left. `required`: where False, how it ends is no fault of the run.
    """

    name: str
    command: list[str]
    journal: Path | None = None
    required: bool = True

    def log(self, folder: Path) -> Path:
        return folder / f"{self.name.replace(' ', '-')}.log"


class _Running:
    """A stage under way: its process, in a session of its own so that its children end with it."""

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
        """Whether it is over; a process that died in one of its cases is started for the others."""
        status = self.process.poll()
        if status is None:
            return False
        died = status == BROKEN_CONTEXT or status < 0
        # One that dies before it begins a case would do so for ever.
        if died and self._journal() != self._journal_before:
            self._start()
            return False
        return True

    def kill(self) -> None:
        """End it and its children: asked first, so that it can write what it has."""
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
        # One that keeps a journal ends by itself when asked to, with a status that means something.
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
    """Run stages side by side until the required ones have ended, or for so many seconds.

    Returns: what became of each, in their order.
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
    """Names of the stages whose end is a fault of the run."""
    return [o["name"] for o in outcomes if o["required"] and o["status"] != PASSED]
