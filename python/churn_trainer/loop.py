"""The training loop: R runs that share all settings but their seeds, trained as one."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import churn_kernels as ck
from churn_kernels import audit
from churn_kernels.audit.generators import random_states
from churn_trainer.best import Best
from churn_trainer.checkpoint import Checkpoint
from churn_trainer.config import Run
from churn_trainer.data.batches import Batches, fewest_rows
from churn_trainer.data.dataset import Dataset
from churn_trainer.members import Members, build_members
from churn_trainer.objectives import measured_logits, measured_members, objective
from churn_trainer.optimizers import make_optimizer
from churn_trainer.schedule import learning_rate
from churn_trainer.state import state_form
from churn_trainer.surroundings import THREADS, differences, surroundings, threads_kept

if TYPE_CHECKING:
    from lightning_fabric import Fabric

TEST_BLOCK = 1024
"""Test rows of each run that go through the networks at a time."""


@dataclass(frozen=True)
class Epoch:
    """What a callback sees after an epoch.

    Attributes:
        number: of the epoch, from 1.
        cross_entropy: (R,) float64 of the training rows, of what is measured: the mean of what each
            row had in its step, summed exactly. Its bits follow from the rows' float32 values, and
            not from how many processes or threads there are.
        learning_rate: of its last step.
        logits: (R, N, C) of the test rows, of what is measured; None between measured epochs.
        labels: (R, N) of the test rows.
        diverged: run's place -> what was said.
        history: what the callback returned for the epochs before.
        validation: (R, V, C) logits and (R, V) labels of the validation rows; None without any.
    """

    number: int
    cross_entropy: Tensor
    learning_rate: float
    logits: Tensor | None
    labels: Tensor
    diverged: dict[int, str]
    history: Sequence[Any]
    validation: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Resumed:
    """Where a training went on from a checkpoint.

    Attributes:
        step: the step after which it did.
        changed: a clause for each thing that decides bits and is another one since.
        restored: the same of the threads, whose number is what it was.
    """

    step: int
    changed: Sequence[str]
    restored: str = ""

    @property
    def sentence(self) -> str:
        """What became of it."""
        said = [f"after step {self.step}"] + [self.restored] * bool(self.restored)
        if self.changed:
            said.append(f"its bits may be others from here on: {', '.join(self.changed)}")
        return "; ".join(said)


@dataclass(frozen=True)
class Trained:
    """What came of R runs.

    Attributes:
        members: the trained networks.
        logits: (R, N, C) float32 of the test rows, of what is measured.
        labels: (R, N) int64 of the test rows.
        history: what the callback returned, epoch by epoch.
        diverged: run's place -> what was said; its logits mean nothing.
        best_epochs: run's place -> the epoch whose weights these are, where validation rows chose.
        threads: how many computed.
        resumed: each time that it went on from a checkpoint.
    """

    members: Members
    logits: Tensor
    labels: Tensor
    history: list[Any]
    diverged: dict[int, str]
    best_epochs: dict[int, int]
    threads: int
    resumed: list[Resumed]


def make_fabric(precision: Any = "32-true", accelerator: str = "cpu", devices: int = 1) -> Fabric:
    """Lightning's `Fabric`, launched: one process, or one of several that torchrun started.

    Args:
        precision: of the networks' arithmetic, in Lightning's words.
        accelerator: "cpu", "cuda", or "auto".
        devices: processes on this machine; each has a device.
    Raises: ValueError if the machine has no such devices.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    strategy = "ddp" if devices > 1 else "auto"
    try:
        fabric = Fabric(
            accelerator=accelerator, devices=devices, precision=precision, strategy=strategy
        )
    except (RuntimeError, MisconfigurationException) as error:
        raise ValueError(
            f"accelerator must be one of this machine's, with {devices} devices, got "
            f"{accelerator!r}: {error}; cpu is always there"
        ) from None
    fabric.launch()
    return fabric


def fit(
    runs: Sequence[Run],
    dataset: Dataset,
    *,
    fabric: Fabric | None = None,
    teachers: Members | None = None,
    measured: Sequence[int] = (),
    on_epoch: Callable[[Epoch], Any] = lambda epoch: None,
    kept: Callable[[Tensor], Any] = lambda labels: Any,
    checkpoint: Checkpoint | None = None,
    earlier: Checkpoint | None = None,
    trust: Sequence[str] = (),
    trace: Path | None = None,
    on_resume: Callable[[Resumed], None] = lambda resumed: None,
) -> Trained:
    """Trains R runs, from the checkpoint where there is one.

    Every number of a step follows from the settings and the step's number: a training that is
    killed and goes on from its checkpoint ends with the same bits, on a CPU. It goes on with as
    many threads as it began with, for another number is another order of sums in matrix products;
    what else decides bits and cannot be brought back, such as the processor's instructions and
    torch's version, is compared, and `on_resume` is told. Several processes add their gradients:
    from the first step on weights and logits agree with those of one but for rounding. The epoch's
    cross entropy adds nothing to that: of the same rows' values it has the same bits.

    Args:
        runs: of the same settings but the seeds.
        dataset: their data.
        fabric: see `make_fabric`; None: the CPU, one process.
        teachers: trained members that are distilled, for the same R runs.
        measured: epochs (from 1) after which the test rows are measured.
        on_epoch: called after each epoch; what it returns is kept, what it raises ends it all.
        kept: called with (R, N) labels of the test rows; the form of what `on_epoch` returns, see
            `churn_kernels._files.check`.
        checkpoint: where the state is saved.
        earlier: the end of the shorter runs from which these go on, where they have not begun.
        trust: see `build_model`.
        trace: a file for `audit.record`, one line a step; one that is there already goes on.
        on_resume: called before the first step that follows a checkpoint.
    Raises:
        ValueError: runs that cannot be trained together, a model that does not fit the data, a
            checkpoint of something else.
    """
    kinds = {run.together for run in runs}
    if len(kinds) != 1:
        raise ValueError(
            f"runs must share all settings but the seeds, got {len(kinds)} kinds; train each alone"
        )
    fabric = fabric or make_fabric(runs[0].optimisation.precision)
    training = Loop(runs, dataset, fabric, teachers, trust)
    with threads_kept():
        form = state_form(training, kept(training.batches.test_labels))
        source, state = checkpoint, None if checkpoint is None else checkpoint.load(form)
        if state is None and earlier is not None:
            earlier.require()
            source, state = earlier, earlier.load(form)
        if state is not None:
            on_resume(training.load_state(state))
        with training.recorded(trace, "" if source is None else source.remedy):
            while training.step < training.total_steps and len(training.diverged) < len(runs):
                training.one_step()
                if training.step % training.batches.steps == 0:
                    training.end_epoch(measured, on_epoch)
                if checkpoint is not None and training.time_to_save(checkpoint):
                    training.save(checkpoint)
        if checkpoint is not None:
            training.save(checkpoint)  # so that writing the results can be killed too
        training.best.restore(training.members)
        return Trained(
            training.members,
            training.evaluate(training.batches.test_rows),
            training.batches.test_labels,
            training.history,
            training.diverged,
            training.best.epochs,
            torch.get_num_threads(),
            training.resumed,
        )


@dataclass
class Loop:
    """The state of a training, and one step of it; arguments are those of `fit`."""

    runs: Sequence[Run]
    dataset: Dataset
    fabric: Fabric
    teachers: Members | None
    trust: Sequence[str]
    step: int = 0
    first_step: int = 0  # of this process
    ask_at: int = 0  # the step after which the processes next ask whether to save
    history: list[Any] = field(default_factory=list)
    diverged: dict[int, str] = field(default_factory=dict)
    resumed: list[Resumed] = field(default_factory=list)

    def __post_init__(self) -> None:
        run, fabric = self.runs[0], self.fabric
        self.method, self.optimisation = run.method, run.optimisation
        rank, self.ranks = fabric.global_rank, fabric.world_size
        self.batches = Batches(self.runs, self.dataset, fabric.device, rank, self.ranks)
        shape, classes = self.batches.shape, self.dataset.classes
        rows = self.batches.train_rows.shape[1]
        self.members = build_members(
            self.runs,
            shape,
            classes,
            trust=self.trust,
            rank=rank,
            fewest=fewest_rows(rows, self.optimisation, self.ranks),
        )
        self.total_steps = self.optimisation.epochs * self.batches.steps
        self.ramp_steps = self.method.ramp_share * self.total_steps
        self.bare_optimizer = make_optimizer(self.optimisation, self.members.parameters())
        self.best = Best(self.optimisation.best)
        self.surroundings = surroundings(fabric.device, self.ranks)
        self.stale = copy.deepcopy(self.members) if self.method.stale_steps else None
        self.model, self.optimizer = fabric.setup(self.members, self.bare_optimizer)
        self.recorder: audit.Recorder | None = None
        for fixed in (self.stale, self.teachers):
            if fixed is not None:
                fixed.to(fabric.device).eval().requires_grad_(False)
        self.begin_epoch()
        self.finite = torch.ones(len(self.runs), dtype=torch.bool, device=fabric.device)

    def begin_epoch(self) -> None:
        """Room for the loss of every row of an epoch, in its order; a process fills in its own."""
        rows = len(self.runs), self.batches.epoch_rows
        self.losses = torch.zeros(rows, device=self.fabric.device)

    def one_step(self) -> None:
        """One minibatch: forward, loss with all gradients, clipping, the optimizer's step."""
        self.members.step = self.step
        rate = learning_rate(self.optimisation, self.step, self.batches.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.stale is not None and self.step % self.method.stale_steps == 0:
            self.stale.load_state_dict(self.members.state_dict())

        inputs, labels, rows = self.batches.train(self.step)
        if self.recorder is not None:
            self.recorder.observe(inputs=inputs, labels=labels)
        count = self.batches.parts(self.step)
        parts = list(zip(inputs.tensor_split(count, 1), labels.tensor_split(count, 1), strict=True))
        totals, losses = [], []
        for number, part in enumerate(parts):
            self.members.part = number
            # Processes average their gradients, once; each loss is over the whole minibatch's rows.
            with self.fabric.no_backward_sync(self.model, enabled=number < count - 1):
                total, loss = self._forward(*part)
                self.fabric.backward(total * (self.ranks / rows))
            totals.append(total.detach())
            losses.append(loss)
        if self.recorder is not None:
            self.recorder.observe(loss=totals[0] if count == 1 else totals)
        norms = self.members.clip_gradients(self.optimisation.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses[:, self.batches.places(self.step)] = torch.cat(losses, dim=1)
        self.step += 1
        self.finite &= norms.isfinite().all(dim=0)

    def _forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimised, summed over rows; (R, B) cross entropies of what is measured."""
        logits = self.model(inputs)  # (K, R, B, C)
        fixed = self.stale if self.teachers is None else self.teachers
        with torch.no_grad():
            others = None if fixed is None else fixed(inputs).flatten(1, 2)
        # Runs share no weights: summed over their rows, each gets the gradient it has alone.
        total = objective(
            self.method,
            self.step / self.ramp_steps,
            logits.flatten(1, 2),
            labels.flatten(),
            others,
            self.runs[0].mode,
        )
        predicted = measured_logits(self.method, logits.detach())
        cross_entropy = ck.regularized_cross_entropy(
            predicted.flatten(0, 1), labels.flatten(), reduction="none", mode=self.runs[0].mode
        )
        return total, cross_entropy.view_as(labels).float()

    @contextmanager
    def recorded(self, trace: Path | None, remedy: str) -> Iterator[None]:
        """Each step of the block is recorded, by the first process; a trace goes on from here.

        Raises: ValueError with `remedy` if the trace does not hold the steps before.
        """
        if trace is None or not self.fabric.is_global_zero:
            yield
            return
        if not self.step:
            trace.unlink(missing_ok=True)
        # No step draws from these, which each process seeds anew: that is no other run.
        restore = random_states()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        try:
            block = audit.record(
                trace, self.members, self.bare_optimizer, resume_at=self.step or None
            )
            with block as self.recorder:
                yield
        except (audit.TraceError, FileNotFoundError) as error:
            raise ValueError(
                f"trace must hold every step up to {self.step}, where the training goes on, got: "
                f"{error}; {remedy}, or go on without a trace"
            ) from None
        finally:
            self.recorder = None
            restore()

    def end_epoch(self, measured: Sequence[int], on_epoch: Callable[[Epoch], Any]) -> None:
        """Sums up the epoch, finds runs that diverged, and tells the callback."""
        number = self.step // self.batches.steps
        # Elsewhere than at its own rows a process holds zeros: their sum has every row's bits.
        rows = self._summed(self.losses).tolist()
        loss = torch.tensor([exact_mean(one) for one in rows], dtype=torch.float64)
        logits = self.evaluate(self.batches.test_rows) if number in measured else None
        validation = None
        if self.batches.validation_rows.shape[1]:
            held_out, labels = self.batches.validation_rows, self.batches.validation_labels
            validation = self.evaluate(held_out), labels
            self.best.see(number, *validation, self.members)
        self._find_diverged(number, loss, logits)
        self.begin_epoch()
        self.history.append(
            on_epoch(
                Epoch(
                    number,
                    loss,
                    self.optimizer.param_groups[0]["lr"],
                    logits,
                    self.batches.test_labels,
                    dict(self.diverged),
                    tuple(self.history),
                    validation,
                )
            )
        )

    @torch.no_grad()
    def evaluate(self, rows: Tensor) -> Tensor:
        """(R, N, C) float32 logits of rows (R, N), on the CPU; the processes share the work."""
        count, block = rows.shape[1], TEST_BLOCK
        logits = torch.zeros(len(self.runs), count, self.dataset.classes, device=self.fabric.device)
        for start in range(self.fabric.global_rank * block, count, self.ranks * block):
            part = slice(start, start + block)
            logits[:, part] = self.predict(rows[:, part])
        return self._summed(logits).cpu()

    @torch.no_grad()
    def predict(self, rows: Tensor) -> Tensor:
        """(R, b, C) float32 logits, of what is measured, of rows (R, b) that do not train."""
        self.members.step, self.members.part = self.step, 0
        self.model.eval()
        values = self.model(self.batches.held_out(rows), measured_members(self.method))
        self.model.train()
        return measured_logits(self.method, values.float())

    def time_to_save(self, checkpoint: Checkpoint) -> bool:
        """What the first process's clock says.

        The others wait for its answer, and a GPU with them, so they ask seldom: about as often as
        the time to the next save can be halved.
        """
        if self.ranks == 1:
            return checkpoint.due()
        if self.step < self.ask_at:
            return False
        left = int(self.fabric.broadcast(checkpoint.steps_left(self.step - self.first_step)))
        self.ask_at = self.step + max(1, left)
        return left == 0

    def save(self, checkpoint: Checkpoint) -> None:
        """Saves the state; all processes take part, the first writes. Raises: OSError."""
        state = self.state()
        if self.fabric.is_global_zero:
            checkpoint.save(state)

    def state(self) -> dict[str, Any]:
        """All that the steps to come depend on, of all processes, as tensors and plain values."""
        return {
            "step": self.step,
            "members": self.members.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "stale": None if self.stale is None else self.stale.state_dict(),
            "losses": self._summed(self.losses),
            "finite": self.finite,
            "history": self.history,
            "diverged": self.diverged,
            "best": self.best.state(),
            "surroundings": self.surroundings,
            "resumed": [(one.step, list(one.changed), one.restored) for one in self.resumed],
        }

    def load_state(self, state: dict[str, Any]) -> Resumed:
        """The reverse of `state`, of the form `state_form`, with the threads it had.

        Returns: what else decides bits and differs.
        """
        before = state.get("surroundings") or self.surroundings  # earlier versions did not say
        restored = ""
        if before[THREADS] != torch.get_num_threads():
            restored = f"threads are {before[THREADS]} as before, not {torch.get_num_threads()}"
            torch.set_num_threads(before[THREADS])
        self.surroundings = surroundings(self.fabric.device, self.ranks)
        changed = differences(before, self.surroundings)
        self.resumed = [Resumed(*one) for one in state.get("resumed") or []]
        self.resumed.append(Resumed(state["step"], changed, restored))
        if state.get("best") is not None:
            self.best.load_state(state["best"])
        self.step = self.first_step = state["step"]
        self.history = state["history"]
        self.diverged = state["diverged"]
        self.members.load_state_dict(state["members"])
        # Its settings are the run's, whatever a file says.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if self.stale is not None:
            self.stale.load_state_dict(state["stale"])
        if self.fabric.is_global_zero:  # the others' zeros add nothing
            self.losses.copy_(state["losses"])
        self.finite.copy_(state["finite"])
        return self.resumed[-1]

    def _find_diverged(self, number: int, loss: Tensor, logits: Tensor | None) -> None:
        finite = loss.isfinite() & self.finite.cpu()
        if logits is not None:
            finite &= logits.isfinite().all(dim=2).all(dim=1)
        late = 2 * number > self.optimisation.epochs
        classes = None if logits is None or not late else logits.argmax(dim=-1)
        for place in range(len(self.runs)):
            if place in self.diverged:
                continue
            if not finite[place]:
                self.diverged[place] = f"its loss or gradient is not finite, epoch {number}"
            elif classes is not None and len(classes[place].unique()) == 1:
                self.diverged[place] = (
                    f"it predicts class {int(classes[place, 0])} for every test row, epoch {number}"
                )

    def _summed(self, values: Tensor) -> Tensor:
        """Over the processes."""
        if self.ranks == 1:
            return values.clone()
        summed = self.fabric.all_reduce(values.clone(), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed


def exact_mean(values: Sequence[float]) -> float:
    """Their mean, from a sum that is rounded once and so is the same in every order.

    NaN or infinite where one of them is; there has to be one, and none is -inf.
    """
    return math.fsum(values) / len(values)
