"""The optimiser of many models at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from churn_trainer.config import Training


class ClippedSGD:
    """SGD with momentum over stacked models, v = momentum v + c g, w = w - learning_rate v.

    c scales each model's gradient, over all its parameters, to a norm of at most `clip_norm`.
    """

    def __init__(self, parameters: Iterable[Tensor], training: Training):
        self.parameters = list(parameters)
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.training = training

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`."""
        gradients = torch.autograd.grad(loss, self.parameters)
        norms = torch.stack([torch.linalg.vector_norm(part, dim=(1, 2)) for part in gradients])
        norm = torch.linalg.vector_norm(norms, dim=0)
        scale = (self.training.clip_norm / norm).clamp(max=1)[:, None, None]
        with torch.no_grad():
            for parameter, velocity, gradient in zip(
                self.parameters, self.velocities, gradients, strict=True
            ):
                velocity.mul_(self.training.momentum).addcmul_(gradient, scale)
                parameter.add_(velocity, alpha=-self.training.learning_rate)
