"""A run's training in steps that an audit can repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from churn_kernels.audit import Training
from churn_trainer.config import Run
from churn_trainer.data import load_dataset
from churn_trainer.loop import Loop, make_fabric


def training_of(run: Run, trust: Sequence[str] = ()) -> Callable[[str], Training]:
    """What `churn_kernels.audit.examine` and `churn-audit run` take: it builds a run's training.

    Args:
        run: its settings, of a method without teachers.
        trust: see `models.build_model`.
    Raises: ValueError for a method that learns from teachers.
    """
    if run.method.teachers:
        raise ValueError(
            f"method must be one without teachers, got {run.method.name}; audit what teaches it"
        )
    dataset = load_dataset(run.data)

    def build(device: str) -> Training:
        accelerator = device.partition(":")[0]
        fabric = make_fabric(run.optimisation.precision, accelerator)
        loop = Loop([run], dataset, fabric, None, trust)

        def step(number: int) -> None:
            loop.step = number - 1
            loop.begin_epoch()  # what other steps noted is no part of this one
            loop.one_step()

        return Training(loop.members, loop.sgd, step, predict=lambda: loop.evaluate()[0])

    return build
