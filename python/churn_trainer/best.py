"""The epoch of each run that does best on its validation rows, and the weights it had then."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import churn_kernels as ck
from churn_trainer.members import Members

LAST = "last"


@dataclass
class Best:
    """What of R runs is kept.

    Attributes:
        by: "cross_entropy" or "accuracy" on the validation rows, or "last": nothing is compared.
        epochs: run's place -> its best epoch, from 1; of several that are as good the first.
        scores: run's place -> how good that was; less is better.
        weights: run's place -> its members' weights at that time.
    """

    by: str
    epochs: dict[int, int] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    weights: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)

    def see(self, epoch: int, logits: Tensor, labels: Tensor, members: Members) -> None:
        """Keeps the weights of the runs that have never been better.

        Args:
            epoch: its number.
            logits: (R, V, C) of the validation rows.
            labels: (R, V).
            members: the networks as they are now.
        """
        if self.by == LAST:
            return
        if self.by == "accuracy":
            scores = (logits.argmax(dim=-1) != labels).double().mean(dim=1)
        else:
            losses = ck.regularized_cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="none"
            )
            scores = losses.view_as(labels).double().mean(dim=1)
        for run, score in enumerate(scores.tolist()):
            if score < self.scores.get(run, math.inf):
                self.epochs[run], self.scores[run] = epoch, score
                self.weights[run] = [members.weights(one, run) for one in range(members.members)]

    def restore(self, members: Members) -> None:
        """Gives the networks the weights that were best."""
        for run, weights in self.weights.items():
            for member, own in enumerate(weights):
                members.load_weights(member, run, own)

    def state(self) -> dict[str, Any]:
        """What `load_state` takes, tensors and plain values."""
        return {"epochs": self.epochs, "scores": self.scores, "weights": self.weights}

    def load_state(self, state: dict[str, Any]) -> None:
        """The reverse of `state`."""
        self.epochs, self.scores = state["epochs"], state["scores"]
        self.weights = state["weights"]
