"""Many runs as tasks: what can start when, what is tried again, what is given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch

from churn_trainer.config import Run
from churn_trainer.data import filled_in
from churn_trainer.run_folder import RunFolder
from churn_trainer.settings import at_least
from churn_trainer.train import (
    Event,
    Options,
    check_shorter_runs,
    kinds_of,
    stack_sizes,
    taken_up,
    train_pinned,
    unfinished,
)


@dataclass(frozen=True)
class Task:
    """Runs that one process trains.

    Attributes:
        number: tells it from the others.
        runs: of the same settings but the seeds, one stack of them.
        threads: of the process's arithmetic.
        after: numbers of the tasks that train what its runs need.
        keep: whether its checkpoint stays, for other runs to go on from.
    """

    number: int
    runs: tuple[Run, ...]
    threads: int = 1
    after: frozenset[int] = frozenset()
    keep: bool = False

    @property
    def cost(self) -> float:
        """How long it takes, in a unit of its own: forward and backward passes of a member."""
        method, optimisation = self.runs[0].method, self.runs[0].optimisation
        epochs = optimisation.epochs - max(optimisation.go_on_from, default=0)
        return len(self.runs) * epochs * (method.members + method.teachers / 3)

    def train(self, root: Path, options: Options, tell: Callable[[Event], None]) -> None:
        """Trains the runs that have not ended. Raises: as `train.train`."""
        torch.set_num_threads(self.threads)
        keep = self.keep or options.keep_checkpoint
        train_pinned(self.runs, root, replace(options, keep_checkpoint=keep), tell)


@dataclass(frozen=True)
class Ended:
    """How a task ended.

    Attributes:
        failure: what stopped it; None: all its runs have ended.
        again: whether another attempt may fare better.
    """

    failure: str | None = None
    again: bool = True


class Workers(Protocol):
    """Processes that do tasks, here or on other machines."""

    count: int
    """Tasks at a time."""

    def start(self, task: Task, root: Path, options: Options) -> None:
        """Has a process do the task, into `root`."""

    def wait(self) -> Iterable[tuple[Task, Event | Ended]]:
        """What the running tasks have told since; waits until there is something."""

    def stop(self) -> None:
        """Ends every process, at once."""


def make_tasks(
    runs: Sequence[Run], root: Path, options: Options, threads: Sequence[int] = (1,)
) -> list[Task]:
    """The tasks that train `runs` and what they need, without those whose runs have all ended.

    Args:
        runs: what to train.
        root: folder of the runs' folders.
        options: see `train.Options`.
        threads: of a task; repetitions of a run take turns.
    Raises: ValueError for data or a model that is not there or does not fit.
    """
    kinds = kinds_of(runs)
    tasks: list[Task] = []
    place: dict[str, int] = {}
    pending = unfinished(kinds, root)
    sizes = stack_sizes(pending, options.trust)
    check_shorter_runs(kinds, root, sizes)
    for kind in pending:
        size = sizes[kind[0].together]
        for start in range(0, len(kind), size):
            group = tuple(kind[start : start + size])
            if all(RunFolder(root / run.id).done for run in group):
                continue
            number = len(tasks)
            place |= {run.id: number for run in group}
            needed = {one.id for run in group for one in run.needs()}
            after = frozenset(place[one] for one in needed if one in place)
            keep = not taken_up(kinds).isdisjoint(run.id for run in group)
            tasks.append(Task(number, group, threads[group[0].repeat % len(threads)], after, keep))
    return tasks


def train_all(
    runs: Sequence[Run],
    root: Path,
    workers: Workers,
    options: Options,
    *,
    retries: int = 2,
    threads: Sequence[int] = (1,),
    tell: Callable[[Event], None] = lambda event: None,
) -> dict[str, str]:
    """Trains every run that has not ended, the longest first, several at a time.

    A task that fails is tried again after the others that wait, from its checkpoint; it never takes
    others with it but the students of its teachers. Whatever ends this early, Ctrl-C included, ends
    the workers; the same call goes on from what is there.

    Args:
        runs: what to train.
        root: folder of the runs' folders; of several machines, one they share.
        workers: who does it.
        options: see `train.Options`.
        retries: how often a task is tried again.
        threads: see `make_tasks`.
        tell: called as it goes.
    Returns: run id -> what stopped it, for those that did not end.
    Raises: ValueError as `make_tasks`, or if `retries` is below 0.
    """
    at_least("retries", retries, 0, "0 gives up after the first failure")
    for number in threads:
        at_least("threads", number, 1, "1 computes with one thread", 1024)
    runs = filled_in(runs)
    ended = [run for run in runs if RunFolder(root / run.id).done]
    if ended:
        tell(Event("skipped", ended))
    tasks = make_tasks(runs, root, options, threads)
    schedule = _Schedule(tasks, root, options, workers, retries, tell)
    try:
        schedule.run()
    finally:
        workers.stop()
    return schedule.failed_runs()


@dataclass
class _Schedule:
    """Which tasks wait, run, have ended, and have failed."""

    tasks: list[Task]
    root: Path
    options: Options
    workers: Workers
    retries: int
    tell: Callable[[Event], None]
    done: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    attempts: dict[int, int] = field(default_factory=dict)

    def run(self) -> None:
        self.waiting = sorted(self.tasks, key=self._length, reverse=True)
        self.running = 0
        while self.waiting or self.running:
            self._start()
            if not self.running:
                continue
            for task, told in self.workers.wait():
                if isinstance(told, Event):
                    self.tell(told)
                else:
                    self.running -= 1
                    self._end(task, told)

    def failed_runs(self) -> dict[str, str]:
        return {
            run.id: self.failed[task.number]
            for task in self.tasks
            if task.number in self.failed
            for run in task.runs
        }

    def _length(self, task: Task) -> float:
        """What is left to do from this task on: its cost and its longest students'."""
        students = (self._length(other) for other in self.tasks if task.number in other.after)
        return task.cost + max(students, default=0.0)

    def _start(self) -> None:
        for task in list(self.waiting):
            if task.after & self.failed.keys():
                self.waiting.remove(task)
                self._give_up(task, "a run that it needs failed")
            elif task.after <= self.done and self.running < self.workers.count:
                self.waiting.remove(task)
                self.running += 1
                self.attempts[task.number] = self.attempts.get(task.number, 0) + 1
                self.workers.start(task, self.root, self.options)

    def _end(self, task: Task, ended: Ended) -> None:
        if ended.failure is None:
            self.done.add(task.number)
        elif ended.again and self.attempts[task.number] <= self.retries:
            attempt = f"attempt {self.attempts[task.number]} of {self.retries + 1}"
            self.tell(Event("failed", task.runs, detail=f"{ended.failure}; {attempt}, again later"))
            self.waiting.append(task)
        else:
            self._give_up(task, ended.failure)

    def _give_up(self, task: Task, message: str) -> None:
        self.failed[task.number] = message
        self.tell(Event("failed", task.runs, detail=f"{message}; given up"))
