"""The optimizers there are, by name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from churn_trainer.config import Optimisation


def make_optimizer(settings: Optimisation, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """One of torch's, whose state a checkpoint holds; the loop sets its step size."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            amsgrad=settings.amsgrad,
        )
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )
