"""What the state of a training is like, so that a file that holds anything else is damage."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from churn_kernels._files import check, exactly, optional
from churn_trainer.surroundings import THREADS

if TYPE_CHECKING:
    from churn_trainer.loop import Loop

MOST_THREADS = 4096


def state_form(loop: Loop, kept: Any) -> Callable[[Any, str], Any]:
    """What a `Loop.state` is like that can be loaded, see `churn_kernels._files.check`.

    Args:
        loop: the training.
        kept: the form of an entry of its history.
    """
    own, runs = loop.state(), range(len(loop.runs))
    groups = loop.bare_optimizer.param_groups
    parameters = [one for group in groups for one in group["params"]]

    def averages(value: Any, where: str) -> None:
        for place, slot in check(value, {range(len(parameters)): dict}, where).items():
            counted = {"step": optional(torch.zeros(()))}  # of AdamW
            others = {name: entry for name, entry in slot.items() if name not in counted}
            check(slot, counted, f"{where}[{place}]")
            check(others, {str: optional(parameters[place])}, f"{where}[{place}]")

    weights = exactly(loop.members.weights(0, 0))
    table = {
        "step": range(loop.total_steps + 1),
        "members": exactly(own["members"]),
        "optimizer": {"state": averages},
        "stale": None if own["stale"] is None else exactly(own["stale"]),
        "losses": own["losses"],
        "finite": own["finite"],
        "history": [kept],
        "diverged": {runs: str},
        # Earlier versions did not have these.
        "best": optional(
            {
                "epochs": {runs: range(1, loop.optimisation.epochs + 1)},
                "scores": {runs: float},
                "weights": {runs: (weights,) * loop.members.members},
            }
        ),
        "surroundings": optional({THREADS: range(1, MOST_THREADS + 1), str: Any}),
        "resumed": optional([(range(loop.total_steps + 1), [str], str)]),
    }

    def whole(value: Any, where: str) -> None:
        check(value, table, where)
        epochs = value["step"] // loop.batches.steps
        if len(value["history"]) != epochs:
            raise ValueError(f"{where}['history'] must be of {epochs} epochs")

    return whole
