"""Worker backends: local processes or Ray."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from churn_trainer.run_folder import Busy
from churn_trainer.settings import at_least
from churn_trainer.tasks import Ended, Task
from churn_trainer.train import Event, Options

PRELOADED = [
    "churn_trainer.server",
    "churn_trainer.tasks",
    "lightning_fabric",
    "sklearn.datasets",
    "sklearn.model_selection",
]
"""What is imported once, for all processes."""


WAITING = "OMP_WAIT_POLICY"
"""OpenMP's variable that says whether a thread without work spins or sleeps."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""CUDA's variable that names the GPUs which a process sees."""


def visible_gpus() -> list[str]:
    """This machine's GPUs that this process may use, as CUDA's variable names them."""
    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


class _Working(NamedTuple):
    task: Task
    process: ForkServerProcess
    gpu: str | None


class LocalWorkers:
    """One process a task, several at a time; a killed one takes nothing with it but its task.

    A process on a GPU sees one GPU alone, that which the fewest others use. Processes end with
    their parent, however it ends.

    Args:
        count: processes at a time.
        gpus: names of the GPUs for tasks that are not for the CPU; None: see `visible_gpus`.
    Raises: ValueError if `count` is below 1.
    """

    def __init__(self, count: int, gpus: Sequence[str] | None = None):
        at_least("workers", count, 1, "leave it out for all cores")
        self.count, self.gpus = count, visible_gpus() if gpus is None else gpus
        # Forked from a server that has imported torch and never computed: quick and safe.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._running: dict[Connection, _Working] = {}

    def start(self, task: Task, root: Path, options: Options) -> None:
        """Has a new process do the task."""
        gpu = self._least_used_gpu() if options.accelerator != "cpu" else None
        _ensure_server()
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_in_process, args=(task, root, options, theirs, gpu), daemon=True
        )
        process.start()
        theirs.close()
        self._running[ours] = _Working(task, process, gpu)

    def wait(self) -> Iterator[tuple[Task, Event | Ended]]:
        """What the running tasks have told since; waits until there is something."""
        for ready in wait(list(self._running)):
            assert isinstance(ready, Connection)
            task, process, _ = self._running[ready]
            try:
                told = ready.recv()
            except (EOFError, OSError):  # OSError: it died in the middle of a message
                process.join()
                told = Ended(_death(process.exitcode))
            if isinstance(told, Ended):
                del self._running[ready]
                ready.close()
                process.join()
            yield task, told

    def stop(self) -> None:
        """Kills every process; their runs go on from their checkpoints."""
        for connection, (_, process, _) in self._running.items():
            process.kill()
            process.join()
            connection.close()
        self._running.clear()

    def _least_used_gpu(self) -> str | None:
        used = Counter(working.gpu for working in self._running.values())
        return min(self.gpus, key=lambda gpu: used[gpu], default=None)


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


def _ensure_server() -> None:
    """Starts the server of processes, unless it runs, so that none of their threads spins.

    Processes share the cores: a thread that spins until there is work takes one from the others.
    """
    added = WAITING not in os.environ
    os.environ.setdefault(WAITING, "PASSIVE")
    try:
        forkserver.ensure_running()
    finally:
        if added:
            del os.environ[WAITING]


def _in_process(
    task: Task, root: Path, options: Options, pipe: Connection, gpu: str | None
) -> None:
    """A process of `LocalWorkers`. Ctrl-C is its parent's to answer; without one it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ[VISIBLE] = gpu  # before the first use of CUDA, which reads it once
    try:
        pipe.send(_attempt(task, root, options, pipe.send))
    except BrokenPipeError:
        os._exit(1)


def _end_with_parent() -> None:
    """Ends this process as soon as its parent has, in the middle of whatever it does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _collected(task: Task, root: Path, options: Options) -> list[Event | Ended]:
    """A task of `RayWorkers`: all it told, without the epochs."""
    told: list[Event | Ended] = []
    ended = _attempt(
        task, root, options, lambda event: told.append(event) if event.kind != "epoch" else None
    )
    return [*told, ended]


def _death(status: int | None) -> str:
    if status == -signal.SIGKILL:
        return "its process was killed by SIGKILL, which is what a system does without memory"
    if status is not None and status < 0:
        return f"its process was killed by signal {-status} ({signal.strsignal(-status)})"
    return f"its process ended with status {status}"
