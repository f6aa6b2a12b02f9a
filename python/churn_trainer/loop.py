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
from churn_kernels._files import check, exactly, optional
from churn_kernels.audit.state import random_states
from churn_trainer.checkpoint import Checkpoint
from churn_trainer.config import Run
from churn_trainer.data.batches import Batches
from churn_trainer.data.dataset import Dataset
from churn_trainer.members import Members, build_members
from churn_trainer.objectives import measured_logits, measured_members, objective
from churn_trainer.schedule import learning_rate

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
    """

    number: int
    cross_entropy: Tensor
    learning_rate: float
    logits: Tensor | None
    labels: Tensor
    diverged: dict[int, str]
    history: Sequence[Any]


@dataclass(frozen=True)
class Trained:
    """What came of R runs.

    Attributes:
        members: the trained networks.
        logits: (R, N, C) float32 of the test rows, of what is measured.
        labels: (R, N) int64 of the test rows.
        history: what the callback returned, epoch by epoch.
        diverged: run's place -> what was said; its logits mean nothing.
    """

    members: Members
    logits: Tensor
    labels: Tensor
    history: list[Any]
    diverged: dict[int, str]


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
    trust: Sequence[str] = (),
    trace: Path | None = None,
) -> Trained:
    """Trains R runs, from the checkpoint where there is one.

    Every number of a step follows from the settings and the step's number: a training that is
    killed and goes on from its checkpoint ends with the same bits, on a CPU. Another number of
    processes or threads is another order of sums in matrix products, and several processes add
    their gradients: from the first step on weights and logits agree but for rounding. The epoch's
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
        trust: see `build_model`.
        trace: a file for `audit.record`, one line a step; one that is there already goes on.
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
    if checkpoint is not None:
        state = checkpoint.load(training.form(kept(training.batches.test_labels)))
        if state is not None:
            training.load_state(state)
    with training.recorded(trace):
        while training.step < training.total_steps and len(training.diverged) < len(runs):
            training.one_step()
            if training.step % training.batches.steps == 0:
                training.end_epoch(measured, on_epoch)
            if checkpoint is not None and training.time_to_save(checkpoint):
                training.save(checkpoint)
    if checkpoint is not None:
        training.save(checkpoint)  # so that writing the results can be killed too
    return Trained(
        training.members,
        training.evaluate(),
        training.batches.test_labels,
        training.history,
        training.diverged,
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

    def __post_init__(self) -> None:
        run, fabric = self.runs[0], self.fabric
        self.method, self.optimisation = run.method, run.optimisation
        rank, self.ranks = fabric.global_rank, fabric.world_size
        self.batches = Batches(self.runs, self.dataset, fabric.device, rank, self.ranks)
        shape, classes = self.batches.shape, self.dataset.classes
        self.members = build_members(self.runs, shape, classes, trust=self.trust, rank=rank)
        self.total_steps = self.optimisation.epochs * self.batches.steps
        self.ramp_steps = self.method.ramp_share * self.total_steps
        self.sgd = torch.optim.SGD(
            self.members.parameters(),
            lr=self.optimisation.learning_rate,
            momentum=self.optimisation.momentum,
            nesterov=self.optimisation.nesterov,
            weight_decay=self.optimisation.weight_decay,
        )
        self.stale = copy.deepcopy(self.members) if self.method.stale_steps else None
        self.model, self.optimizer = fabric.setup(self.members, self.sgd)
        self.recorder: audit.Recorder | None = None
        for fixed in (self.stale, self.teachers):
            if fixed is not None:
                fixed.to(fabric.device).eval().requires_grad_(False)
        self.begin_epoch()
        self.finite = torch.ones(len(self.runs), dtype=torch.bool, device=fabric.device)

    def begin_epoch(self) -> None:
        """Room for the loss of every row of an epoch, in its order; a process fills in its own."""
        rows = self.batches.train_rows.shape
        self.losses = torch.zeros(rows, device=self.fabric.device)  # (R, n)

    def one_step(self) -> None:
        """One minibatch: forward, loss with all gradients, clipping, SGD."""
        self.members.step = self.step
        rate = learning_rate(self.optimisation, self.step, self.batches.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.stale is not None and self.step % self.method.stale_steps == 0:
            self.stale.load_state_dict(self.members.state_dict())

        inputs, labels, rows = self.batches.train(self.step)
        if self.recorder is not None:
            self.recorder.observe(inputs=inputs, labels=labels)
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
        if self.recorder is not None:
            self.recorder.observe(loss=total)
        # Processes average their gradients; each loss is over the whole minibatch's rows.
        self.fabric.backward(total * (self.ranks / rows))
        norms = self.members.clip_gradients(self.optimisation.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

        predicted = measured_logits(self.method, logits.detach())
        cross_entropy = ck.regularized_cross_entropy(
            predicted.flatten(0, 1), labels.flatten(), reduction="none", mode=self.runs[0].mode
        )
        self.losses[:, self.batches.places(self.step)] = cross_entropy.view_as(labels).float()
        self.step += 1
        self.finite &= norms.isfinite().all(dim=0)

    @contextmanager
    def recorded(self, trace: Path | None) -> Iterator[None]:
        """Each step of the block is recorded, by the first process; a trace goes on from here."""
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
            block = audit.record(trace, self.members, self.sgd, resume_at=self.step or None)
            with block as self.recorder:
                yield
        except (audit.TraceError, FileNotFoundError) as error:
            raise ValueError(
                f"trace must hold every step up to {self.step}, where the training goes on, got: "
                f"{error}; delete the run's folder, or go on without a trace"
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
        logits = self.evaluate() if number in measured else None
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
                )
            )
        )

    @torch.no_grad()
    def evaluate(self) -> Tensor:
        """(R, N, C) float32 logits of the test rows, on the CPU; the processes share the work."""
        rows, block = self.batches.test_rows.shape[1], TEST_BLOCK
        logits = torch.zeros(len(self.runs), rows, self.dataset.classes, device=self.fabric.device)
        for start in range(self.fabric.global_rank * block, rows, self.ranks * block):
            part = slice(start, start + block)
            logits[:, part] = self.predict(part)
        return self._summed(logits).cpu()

    @torch.no_grad()
    def predict(self, rows: slice) -> Tensor:
        """(R, b, C) float32 logits of some test rows, of what is measured."""
        self.model.eval()
        values = self.model(self.batches.test(rows), measured_members(self.method))
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
        }

    def form(self, kept: Any) -> Callable[[Any, str], Any]:
        """What a `state` is like that can be loaded, see `check`; `kept`: an entry of `history`."""
        own = self.state()
        parameters = [one for group in self.sgd.param_groups for one in group["params"]]

        def momenta(value: Any, where: str) -> None:
            for place, slot in check(value, {range(len(parameters)): dict}, where).items():
                check(slot, {str: optional(parameters[place])}, f"{where}[{place}]")

        table = {
            "step": range(self.total_steps + 1),
            "members": exactly(own["members"]),
            "optimizer": {"state": momenta},
            "stale": None if own["stale"] is None else exactly(own["stale"]),
            "losses": own["losses"],
            "finite": own["finite"],
            "history": [kept],
            "diverged": {range(len(self.runs)): str},
        }

        def whole(value: Any, where: str) -> None:
            check(value, table, where)
            epochs = value["step"] // self.batches.steps
            if len(value["history"]) != epochs:
                raise ValueError(f"{where}['history'] must be of {epochs} epochs")

        return whole

    def load_state(self, state: dict[str, Any]) -> None:
        """The reverse of `state`, for one of that `form`."""
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
