"""Who does tasks: processes of this machine, or Ray's on any number of machines."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from churn_trainer.run_folder import Busy
from churn_trainer.settings import at_least
from churn_trainer.tasks import Ended, Task
from churn_trainer.train import Event, Options

PRELOADED = ["churn_trainer.tasks", "lightning_fabric"]
"""What is imported once, for all processes."""


class LocalWorkers:
    """One process a task, several at a time; a killed one takes nothing with it but its task.

    Args:
        count: processes at a time.
    Raises: ValueError if `count` is below 1.
    """

    def __init__(self, count: int):
        at_least("workers", count, 1, "leave it out for all cores")
        self.count = count
        # Forked from a server that has imported torch and never computed: quick and safe.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._running: dict[Connection, tuple[Task, ForkServerProcess]] = {}

    def start(self, task: Task, root: Path, options: Options) -> None:
        """Has a new process do the task."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_in_process, args=(task, root, options, theirs), daemon=True
        )
        process.start()
        theirs.close()
        self._running[ours] = task, process

    def wait(self) -> Iterator[tuple[Task, Event | Ended]]:
        """What the running tasks have told since; waits until there is something."""
        for ready in wait(list(self._running)):
            assert isinstance(ready, Connection)
            task, process = self._running[ready]
            try:
                told = ready.recv()
            except EOFError:
                process.join()
                told = Ended(_death(process.exitcode))
            if isinstance(told, Ended):
                del self._running[ready]
                ready.close()
                process.join()
            yield task, told

    def stop(self) -> None:
        """Kills every process; their runs go on from their checkpoints."""
        for connection, (_, process) in self._running.items():
            process.kill()
            process.join()
            connection.close()
        self._running.clear()


class RayWorkers:
    """Ray's workers: tasks go to any machine of a cluster that sees the folder of the runs.

    Args:
        address: of a running cluster, "auto" for the one of this machine, or "local" to start one.
        count: tasks at a time; None: as many as the cluster has CPUs, or GPUs where they are used.
        gpus: of a task, 0 or 1.
    Raises: ValueError if Ray is not installed, there is no such cluster, or `count` is below 1.
    """

    def __init__(self, address: str, count: int | None = None, gpus: int = 0):
        try:
            import ray
        except ImportError:
            raise ValueError(
                "ray must be installed to spread a study over machines, got no such package; "
                "pip install 'churn-kernels[ray]', or leave --ray out"
            ) from None
        if count is not None:
            at_least("workers", count, 1, "leave it out for all of the cluster's")
        self._ray: Any = ray
        cpus = count if address == "local" else None
        try:
            ray.init(address=address, num_cpus=cpus, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"ray must be the address of a running cluster, got {address!r}: {error}; "
                "'local' starts one on this machine"
            ) from None
        available = ray.cluster_resources().get("GPU" if gpus else "CPU", 1)
        self.count = count or max(1, int(available))
        # Retries are the caller's, who counts and tells them.
        self._remote = ray.remote(max_retries=0, num_gpus=gpus)(_collected)
        self._running: dict[Any, Task] = {}

    def start(self, task: Task, root: Path, options: Options) -> None:
        """Hands the task to the cluster, all of whose machines see `root` at the same place."""
        remote = self._remote.options(num_cpus=min(task.threads, self.count))
        self._running[remote.remote(task, root.absolute(), options)] = task

    def wait(self) -> Iterator[tuple[Task, Event | Ended]]:
        """What the tasks that ended have told; waits until there is one."""
        for reference in self._ray.wait(list(self._running), num_returns=1)[0]:
            task = self._running.pop(reference)
            try:
                told = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                reason = str(error).strip().partition("\n")[0]
                told = [Ended(f"its worker died: {type(error).__name__}, {reason}")]
            for one in told:
                yield task, one

    def stop(self) -> None:
        """Kills what is under way, and leaves the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        self._ray.shutdown()


def _attempt(task: Task, root: Path, options: Options, tell: Callable[[Event], None]) -> Ended:
    """Does the task. Wrong settings and files stay wrong; what else went wrong may not."""

    def of_this_task(event: Event) -> None:
        if event.kind != "skipped":  # teachers, and what an earlier attempt finished
            tell(event)

    try:
        task.train(root, options, of_this_task)
    except BrokenPipeError:
        raise
    except ValueError as error:
        return Ended(str(error), again=False)
    except (OSError, Busy) as error:
        return Ended(str(error))
    except Exception as error:
        traceback.print_exc()
        return Ended(f"{type(error).__name__}: {error}")
    return Ended()


def _in_process(task: Task, root: Path, options: Options, pipe: Connection) -> None:
    """A process of `LocalWorkers`. Ctrl-C is its parent's to answer; without one it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pipe.send(_attempt(task, root, options, pipe.send))
    except BrokenPipeError:
        os._exit(1)


def _collected(task: Task, root: Path, options: Options) -> list[Event | Ended]:
    """A task of `RayWorkers`: all it told, without the epochs."""
    told: list[Event | Ended] = []
    ended = _attempt(
        task, root, options, lambda event: told.append(event) if event.kind != "epoch" else None
    )
    return [*told, ended]


def _death(status: int | None) -> str:
    if status is not None and status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    return f"its process ended with status {status}"
