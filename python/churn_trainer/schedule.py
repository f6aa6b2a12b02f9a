"""The step size as a function of the step."""

from __future__ import annotations

import math

from churn_trainer.config import Optimisation


def learning_rate(settings: Optimisation, step: int, steps_per_epoch: int) -> float:
    """The step size of step `step`, from 0.

    It rises linearly over the warm-up, so that its last step has the peak, and then follows the
    schedule: constant; `step`, times `decay` at each milestone; `cosine`, peak (1 + cos(pi t)) / 2
    with t from 0 after the warm-up to 1 at the end.
    """
    warmup = settings.warmup_epochs * steps_per_epoch
    peak = settings.learning_rate
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "step":
        epoch = step // steps_per_epoch
        return peak * settings.decay ** sum(epoch >= mark for mark in settings.milestones)
    if settings.schedule == "cosine":
        progress = (step - warmup) / max(1, settings.epochs * steps_per_epoch - warmup)
        return peak * (1 + math.cos(math.pi * progress)) / 2
    return peak
