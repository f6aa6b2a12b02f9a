"""A run's training in steps that an audit can repeat."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from churn_kernels.audit import Training
from churn_trainer.config import Run
from churn_trainer.data import load_dataset
from churn_trainer.loop import TEST_BLOCK, Loop, make_fabric
from churn_trainer.settings import one_of


def training_of(run: Run, trust: Sequence[str] = ()) -> Callable[[str], Training]:
    """What `churn_kernels.audit.examine` and `churn-audit run` take: it builds a run's training.

    Args:
        run: its settings, of a method without teachers or stale partners: the state of a step is
            that of the model and the optimizer. At most `TEST_BLOCK` test rows are predicted.
        trust: see `models.build_model`.
    Raises: ValueError for another method.
    """
    if run.method.teachers or run.method.stale_steps or run.optimisation.go_on_from:
        raise ValueError(
            f"method must be one without teachers or stale partners, got {run.method.name}, and "
            f"go_on_from empty, got {list(run.optimisation.go_on_from)}; audit what it is made from"
        )
    dataset, rows = load_dataset(run.data), slice(TEST_BLOCK)

    def build(device: str) -> Training:
        one_of("device", device, ("cpu", "cuda"))
        fabric = make_fabric(run.optimisation.precision, device)
        loop = Loop([run], dataset, fabric, None, trust)

        def step(number: int) -> None:
            loop.step = number - 1
            loop.begin_epoch()  # what other steps noted is no part of this one
            loop.one_step()

        tested = loop.batches.test_rows[:, rows]
        return Training(
            loop.members, loop.bare_optimizer, step, predict=lambda: loop.predict(tested)[0]
        )

    return build
