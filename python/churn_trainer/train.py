"""Trains runs into their folders: what is finished stays, what was killed goes on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import churn_kernels as ck
from churn_kernels._files import check, exactly, optional, read_bytes, write_atomically
from churn_kernels.metrics import expected_calibration_error, prediction_confidence
from churn_trainer.checkpoint import Checkpoint
from churn_trainer.config import Run, measured_epochs
from churn_trainer.data import hold_out, load_dataset, pinned, split_rows
from churn_trainer.data.batches import check_minibatch, fewest_rows
from churn_trainer.data.dataset import Dataset
from churn_trainer.loop import Epoch, Resumed, Trained, fit, make_fabric
from churn_trainer.members import Members, build_members, check_network, stackable
from churn_trainer.run_folder import CHECKPOINT, CONFIG, DIVERGED, FINISHED, TRACE, RunFolder
from churn_trainer.settings import at_least, fingerprint, not_negative, one_of
from churn_trainer.tensorboard import TensorBoard

_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": lambda logits, labels: (logits.argmax(dim=-1) == labels).double().mean(),
    "cross_entropy": lambda logits, labels: ck.regularized_cross_entropy(logits, labels),
    "confidence": lambda logits, _: prediction_confidence(logits).mean(),
    "entropy": lambda logits, _: ck.softmax_entropy(logits),
    "ece": lambda logits, labels: expected_calibration_error(logits, labels),
}

MEASURED = tuple(_METRICS)
"""What `measure` measures."""

VALIDATED = ("accuracy", "cross_entropy")
"""What the curves say of the validation rows."""

MOST_DEVICES = max(16, 4 * (os.cpu_count() or 1))
"""Processes of one training on this machine: more would wait for each other."""

RUNS_TOGETHER = 100
"""Most runs in one stack."""


@dataclass(frozen=True)
class Event:
    """What `train` tells as it goes.

    Attributes:
        kind: `runs` have "started", "resumed" from a checkpoint, ended an "epoch", "finished",
            "diverged", were "skipped" because they had ended before, or "failed" in a study (see
            `tasks`); or a file of theirs is "damaged", and they go on without it.
        runs: which.
        epoch: its number, from 1.
        detail: more about it.
    """

    kind: str
    runs: Sequence[Run]
    epoch: int = 0
    detail: str = ""


@dataclass(frozen=True)
class Options:
    """How runs are trained, which changes no number but the last bits of another device's.

    Attributes:
        accelerator: "cpu", "cuda" or "auto".
        devices: devices on this machine, one process each.
        curve_points: how many times a training is measured on the test rows.
        checkpoint_seconds: time between two checkpoints; 0: after every step.
        tensorboard: also write TensorBoard's event files.
        trace: record a hash of every step (`churn_kernels.audit.record`); a stack's is in the
            folder of its first run.
        trust: packages whose code a model may be.
        keep_checkpoint: leave the last checkpoint of runs that end, from which longer ones go on
            (`Optimisation.go_on_from`).
    """

    accelerator: str = "cpu"
    devices: int = 1
    curve_points: int = 20
    checkpoint_seconds: float = 60.0
    tensorboard: bool = False
    trace: bool = False
    trust: Sequence[str] = ()
    keep_checkpoint: bool = False

    def __post_init__(self) -> None:
        one_of("accelerator", self.accelerator, ("cpu", "cuda", "auto"))
        at_least("devices", self.devices, 1, "1 trains in this process", MOST_DEVICES)
        at_least("curve_points", self.curve_points, 1, "the last point is the trained model")
        not_negative("checkpoint_seconds", self.checkpoint_seconds, "0 saves after every step")


def train(
    runs: Iterable[Run],
    root: Path,
    options: Options | None = None,
    tell: Callable[[Event], None] = lambda event: None,
) -> list[RunFolder]:
    """Trains each run that has not ended yet, into `root` / its id.

    What it needs, its teachers and the shorter run that it goes on from, is trained before it.

    Runs that differ in their seeds only are trained in one stack where their networks allow it. A
    run that diverges is recorded as such, and the others go on.

    Args:
        runs: what to train. Runs that are there twice are trained once. Their ids come to cover
            the data's content (`data.pinned`).
        root: folder of the runs' folders; of several hosts, one they share.
        options: see `Options`.
        tell: called as it goes, in the first process.
    Returns: the folders of `runs`, in their order.
    Raises:
        ValueError: settings, data, a model, a checkpoint or a folder that is not as it should be.
        Busy: another process is training one of the runs.
        OSError: a file cannot be written; what was finished stays.
    """
    options, runs = options or Options(), pinned(runs)
    kinds = kinds_of(runs)
    if taken_up(kinds):
        sizes = stack_sizes(unfinished(kinds, root), options.trust, options.devices)
        check_shorter_runs(kinds, root, sizes)
    return train_pinned(runs, root, options, tell)


def train_pinned(
    runs: Sequence[Run], root: Path, options: Options, tell: Callable[[Event], None]
) -> list[RunFolder]:
    """`train`, of runs whose data's content is filled in: their files are not read for it again."""
    kinds = kinds_of(runs)
    for kind in kinds:
        keep = options.keep_checkpoint or not taken_up(kinds).isdisjoint(run.id for run in kind)
        _train_kind(kind, root, replace(options, keep_checkpoint=keep), tell)
    return [RunFolder(root / run.id) for run in runs]


def kinds_of(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs and all that they need, once each; those that can be trained together in a list.

    What is needed comes before what needs it.
    """
    runs = list(runs)
    wanted: dict[str, Run] = {}
    kinds: dict[str, list[Run]] = {}
    levels = [[*run.needs(), run] for run in runs]
    # The first that each run needs before the second: kinds are trained in this order.
    for place in range(max(map(len, levels), default=0)):
        for level in levels:
            for run in level[place : place + 1]:
                wanted.setdefault(run.id, run)
    for run in wanted.values():
        kinds.setdefault(run.together, []).append(run)
    return list(kinds.values())


def taken_up(kinds: list[list[Run]]) -> set[str]:
    """The ids of the runs from whose end others go on."""
    return {one.id for kind in kinds for run in kind if (one := run.earlier()) is not None}


def unfinished(kinds: list[list[Run]], root: Path) -> list[list[Run]]:
    """Those of which a run has not ended."""
    return [kind for kind in kinds if not all(RunFolder(root / run.id).done for run in kind)]


def check_shorter_runs(kinds: list[list[Run]], root: Path, sizes: dict[str, int]) -> None:
    """Looks for the states that runs will go on from, before anything trains.

    Args:
        kinds: see `kinds_of`.
        root: folder of the runs' folders.
        sizes: see `stack_sizes`, of the kinds that have not ended.
    Raises: ValueError if one is neither there nor left behind by what is to be trained.
    """
    made: list[list[Run]] = []
    for kind in unfinished(kinds, root):
        for group in _stacks(kind, root, sizes[kind[0].together]):
            made.append(group)
            shorter = [one for run in group if (one := run.earlier()) and _taught(one, root)]
            if shorter and shorter not in made and not _begun(group, root):
                remedy = _train_again(root, shorter)
                _checkpoint(root, shorter, remedy=remedy).require()


def load_teachers(
    runs: Sequence[Run], root: Path, shape: tuple[int, ...], classes: int, trust: Sequence[str] = ()
) -> Members:
    """The trained members of `runs`, from their folders. Raises: ValueError if one has none."""
    members = build_members(runs, shape, classes, trust=trust)
    for place, run in enumerate(runs):
        for member, weights in enumerate(RunFolder(root / run.id).weights()):
            members.load_weights(member, place, weights)
    return members


def runs_together(run: Run, dataset: Dataset, trust: Sequence[str] = (), processes: int = 1) -> int:
    """How many runs of `run`'s settings are trained in one stack; 1 where networks allow none.

    Raises: ValueError for a split that cannot be made, and a model that cannot be made, does not
        fit the data, or cannot be trained on the smallest of its minibatches.
    """
    shape = _input_shape(run, dataset)
    rows, _ = split_rows(dataset, run.data, run.seeds.split)
    rows, _ = hold_out(dataset, rows, run.data.validation_rows, run.seeds.split)
    check_minibatch(run, dataset, len(rows))
    fewest = fewest_rows(len(rows), run.optimisation, processes)
    members = run.method.members
    network = check_network(run, shape, dataset.classes, trust, fewest=fewest, networks=members)
    return RUNS_TOGETHER if stackable(network, shape) else 1


def stack_sizes(
    kinds: Sequence[Sequence[Run]], trust: Sequence[str] = (), processes: int = 1
) -> dict[str, int]:
    """`Run.together` -> `runs_together`, for each kind; every data set is loaded once."""
    sizes: dict[str, int] = {}
    for data in dict.fromkeys(kind[0].data for kind in kinds):
        dataset = load_dataset(data)
        for kind in kinds:
            if kind[0].data == data:
                sizes[kind[0].together] = runs_together(kind[0], dataset, trust, processes)
    return sizes


def measure(logits: Tensor, labels: Tensor, names: Sequence[str] = MEASURED) -> dict[str, float]:
    """Metrics of one run on rows that do not train; cross entropy and entropy in nats.

    Args:
        logits: (N, C).
        labels: (N,) int64.
        names: which of `MEASURED`.
    """
    return {name: float(_METRICS[name](logits, labels)) for name in names}


def _train_kind(kind: list[Run], root: Path, options: Options, tell: _Tell) -> None:
    """Runs of the same settings but the seeds, as many together as their networks allow."""
    fabric = make_fabric(kind[0].optimisation.precision, options.accelerator, options.devices)
    fabric.barrier()  # all processes see the same runs as ended
    tell = tell if fabric.is_global_zero else lambda event: None
    ended = [run for run in kind if RunFolder(root / run.id).done]
    if ended:
        untraced = options.trace and not any((root / run.id / TRACE).exists() for run in ended)
        said = "ended before, without a trace; name another folder" if untraced else ""
        tell(Event("skipped", ended, detail=said))
    if len(ended) == len(kind):
        return
    dataset = load_dataset(kind[0].data)
    size = runs_together(kind[0], dataset, options.trust, fabric.world_size)
    for group in list(_stacks(kind, root, size)):
        with ExitStack() as locks:
            if fabric.is_global_zero:
                for run in group:
                    locks.enter_context(RunFolder(root / run.id).locked())
                if not _begun(group, root):  # their folders were deleted
                    _checkpoint(root, group).remove()
            fabric.barrier()
            _Group(group, dataset, root, options, tell, fabric).train()
            fabric.barrier()


def _stacks(kind: list[Run], root: Path, size: int) -> Iterator[list[Run]]:
    """The runs that are trained together: those left to do, or with a checkpoint all as before."""
    for start in range(0, len(kind), size):
        group = kind[start : start + size]
        pending = [run for run in group if not RunFolder(root / run.id).done]
        if pending:
            yield group if _checkpoint(root, group).exists else pending


def _begun(group: Sequence[Run], root: Path) -> bool:
    """Whether they have a checkpoint to go on from, and folders: deleted runs begin anew."""
    folders = any((root / run.id / CONFIG).exists() for run in group)
    return folders and _checkpoint(root, group).exists


def _taught(run: Run, root: Path) -> bool:
    """Whether its teachers, if it has any, have not diverged."""
    teacher = run.teacher()
    return teacher is None or RunFolder(root / teacher.id).status != DIVERGED


def _checkpoint(root: Path, group: Sequence[Run], **options: Any) -> Checkpoint:
    ids = [run.id for run in group]
    if len(ids) == 1:
        return Checkpoint(root / ids[0] / CHECKPOINT, ids, **options)
    return Checkpoint(root / ".together" / f"{fingerprint(ids)}.pt", ids, **options)


def _train_again(root: Path, shorter: Sequence[Run]) -> str:
    """What to do where longer runs cannot go on from these."""
    folders = str(root / shorter[0].id)
    if others := len(shorter) - 1:
        file = _checkpoint(root, shorter).path
        folders += f", the folders of the {others} trained with it, and {file}"
    return f"delete {folders}; the same command then trains what go_on_from names again"


def _input_shape(run: Run, dataset: Dataset) -> tuple[int, ...]:
    size = run.data.crop_size
    return (dataset.shape[0], size, size) if size else dataset.shape


_Tell = Callable[[Event], None]


@dataclass
class _Group:
    """Runs that are trained as one, and their folders."""

    runs: list[Run]
    dataset: Dataset
    root: Path
    options: Options
    tell: _Tell
    fabric: Any

    def train(self) -> None:
        folders = self.folders = [RunFolder(self.root / run.id) for run in self.runs]
        if self.fabric.is_global_zero:
            for folder, run in zip(folders, self.runs, strict=True):
                folder.start(run)
        teachers, untaught = self._teachers()
        if untaught:
            self._end_untaught(untaught)
            return
        self.tell(Event("started", self.runs))
        self.boards = [TensorBoard(folder.path) for folder in folders if self.options.tensorboard]
        checkpoint = self._checkpoint(self.runs)
        shorter = [run for run in (run.earlier() for run in self.runs) if run is not None]
        trace = folders[0].path / TRACE if self.options.trace else None
        if trace is not None and shorter and not checkpoint.exists:
            begun = self.root / shorter[0].id / TRACE
            if begun.exists() and self.fabric.is_global_zero:
                write_atomically(trace, read_bytes(begun))
        began = time.perf_counter()
        optimisation = self.runs[0].optimisation
        trained = fit(
            self.runs,
            self.dataset,
            fabric=self.fabric,
            teachers=teachers,
            measured=measured_epochs(optimisation.epochs, self.options.curve_points),
            on_epoch=self._on_epoch,
            kept=self._kept,
            checkpoint=checkpoint,
            earlier=self._checkpoint(shorter, _train_again(self.root, shorter))
            if shorter
            else None,
            trust=self.options.trust,
            trace=trace,
            on_resume=self._on_resume,
        )
        for board in self.boards:
            board.close()
        if self.fabric.is_global_zero:
            self._write(trained, time.perf_counter() - began)
            if self.options.keep_checkpoint:
                checkpoint.earlier.unlink(missing_ok=True)
            else:
                checkpoint.remove()

    def _checkpoint(self, runs: list[Run], remedy: str | None = None) -> Checkpoint:
        return _checkpoint(
            self.root,
            runs,
            seconds=self.options.checkpoint_seconds,
            warn=lambda sentence: self.tell(Event("damaged", runs[:1], detail=sentence)),
            remedy=remedy,
        )

    def _on_resume(self, resumed: Resumed) -> None:
        self.tell(Event("resumed", self.runs, detail=resumed.sentence))

    def _teachers(self) -> tuple[Members | None, list[Run]]:
        """The group's teachers, and those of its runs that have none because they diverged."""
        teachers = [teacher for run in self.runs if (teacher := run.teacher()) is not None]
        untaught = [
            run
            for run, teacher in zip(self.runs, teachers, strict=False)
            if RunFolder(self.root / teacher.id).status != FINISHED
        ]
        if not teachers or untaught:
            return None, untaught
        shape = _input_shape(self.runs[0], self.dataset)
        return load_teachers(
            teachers, self.root, shape, self.dataset.classes, self.options.trust
        ), []

    def _end_untaught(self, untaught: list[Run]) -> None:
        """Records the runs whose teachers diverged, and trains the others by themselves."""
        if self.fabric.is_global_zero:
            for run in untaught:
                self._diverged(run, RunFolder(self.root / run.id), "its teachers diverged")
        self.runs = [run for run in self.runs if run not in untaught]
        self.fabric.barrier()
        if self.runs:
            self.train()

    def _on_epoch(self, epoch: Epoch) -> tuple[list[dict[str, Any]], Tensor | None]:
        """One row of curves for each run, and (R, N) the classes predicted, where measured."""
        rows = []
        for place in range(len(self.runs)):
            row: dict[str, Any] = {
                "epoch": epoch.number,
                "learning_rate": epoch.learning_rate,
                "train_cross_entropy": float(epoch.cross_entropy[place]),
            }
            test: dict[str, float] = {}
            validation: dict[str, float] = {}
            if place not in epoch.diverged:
                if epoch.logits is not None:
                    test = measure(epoch.logits[place], epoch.labels[place])
                if epoch.validation is not None:
                    logits, labels = epoch.validation
                    validation = measure(logits[place], labels[place], VALIDATED)
            row |= {f"test_{name}": test.get(name, "") for name in MEASURED}
            if epoch.validation is not None:
                row |= {f"validation_{name}": validation.get(name, "") for name in VALIDATED}
            rows.append(row)
        if self.fabric.is_global_zero:
            for board, row in zip(self.boards, rows, strict=False):
                board.write(row)
            if len(self.runs) == 1 and epoch.logits is not None:  # one flush to the disk, not 100
                earlier = [row for (row,), _ in epoch.history]
                self.folders[0].write_curves([*earlier, rows[0]])
        mean = float(epoch.cross_entropy.mean())
        self.tell(Event("epoch", self.runs, epoch.number, f"cross entropy {mean:.4f}"))
        return rows, None if epoch.logits is None else epoch.logits.argmax(dim=-1)

    def _kept(self, labels: Tensor) -> Any:
        """The form of what `_on_epoch` returns, see `churn_kernels._files.check`."""

        def measured(value: Any, where: str) -> None:
            check(value, {""} if value == "" else float, where)

        row: dict[str, Any] = {"epoch": int, "learning_rate": float, "train_cross_entropy": float}
        row |= {f"test_{name}": measured for name in MEASURED}
        if self.runs[0].data.validation_rows:
            row |= {f"validation_{name}": measured for name in VALIDATED}
        return (exactly(row),) * len(self.runs), optional(labels)

    def _write(self, trained: Trained, seconds: float) -> None:
        measured = [
            number for number, (_, seen) in enumerate(trained.history, 1) if seen is not None
        ]
        for place, (run, folder) in enumerate(zip(self.runs, self.folders, strict=True)):
            if folder.done:
                continue  # written before the others' writing was killed
            folder.write_curves([rows[place] for rows, _ in trained.history])
            if place in trained.diverged:
                self._diverged(run, folder, trained.diverged[place], trained)
                continue
            logits, labels = trained.logits[place], trained.labels[place]
            weights = [
                trained.members.weights(member, place) for member in range(run.method.members)
            ]
            test = measure(logits, labels)
            metrics = {
                "test": test,
                "test_rows": len(labels),
                "environment": self._environment(seconds, trained),
            }
            if place in trained.best_epochs:
                metrics["epoch"] = trained.best_epochs[place]
            along = {number: trained.history[number - 1][1][place] for number in measured}
            folder.finish(metrics, logits, labels, weights, along)
            self.tell(Event("finished", [run], detail=f"accuracy {test['accuracy']:.2%}"))

    def _diverged(
        self, run: Run, folder: RunFolder, message: str, trained: Trained | None = None
    ) -> None:
        folder.end(DIVERGED, {"message": message, "environment": self._environment(0.0, trained)})
        self.tell(Event("diverged", [run], detail=message))

    def _environment(self, seconds: float, trained: Trained | None) -> dict[str, Any]:
        return {
            "seconds": round(seconds, 3),
            "runs_together": len(self.runs),
            "processes": self.fabric.world_size,
            "device": str(self.fabric.device),
            "threads": torch.get_num_threads() if trained is None else trained.threads,
            "resumed": [] if trained is None else [one.sentence for one in trained.resumed],
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "churn-kernels": metadata.version("churn-kernels"),
            "reduction_mode": self.runs[0].mode or ck.get_reduction_mode(),
        }
