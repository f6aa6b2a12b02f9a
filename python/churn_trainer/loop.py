"""The training loop: all runs of a method, over all splits, in one batched model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from churn_kernels import codistillation_loss
from churn_trainer.config import Draw, Study
from churn_trainer.data import Splits
from churn_trainer.methods import Method
from churn_trainer.models import BatchedMLP
from churn_trainer.optim import ClippedSGD


class TrainingDiverged(ArithmeticError):
    """A loss is no longer finite."""


@dataclass(frozen=True)
class Epoch:
    """What a callback sees after epoch `number`, from 1: the model and its training loss."""

    number: int
    model: BatchedMLP
    cross_entropy: float


def fit(
    method: Method,
    splits: Splits,
    study: Study,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> BatchedMLP:
    """Trains `study.splits x study.runs` independent runs of a method.

    A run's initialisation and minibatch order follow from its own seeds, the same for every
    method. The members of a co-distilled run differ in their initialisation and share minibatches.

    Args:
        method: the objective.
        splits: S splits.
        study: runs, widths, seeds and training settings.
        on_epoch: called after each epoch; what it raises ends the training.
    Returns: the models in the order member, split, run: the measured members come first.
    Raises: TrainingDiverged if a loss stops being finite.
    """
    training, (count, rows, width) = study.training, splits.train_features.shape
    where = [(split, run) for split in range(count) for run in range(study.runs)]
    split_of = torch.tensor([split for split, _ in where])[:, None]
    model = BatchedMLP(
        (width, *study.hidden, splits.classes),
        [
            study.seed_for(Draw.INITIALISATION, *run, member)
            for member in range(method.members)
            for run in where
        ],
    )
    optimizer = ClippedSGD(model.parameters(), training)
    orders = [torch.Generator().manual_seed(study.seed_for(Draw.ORDER, *run)) for run in where]
    starts = range(0, rows, training.batch_rows)
    ramp_steps = training.ramp_share * training.epochs * len(starts)

    for epoch in range(training.epochs):
        order = torch.stack([torch.randperm(rows, generator=generator) for generator in orders])
        labels = splits.train_labels[split_of, order]  # (runs, n)
        features = splits.train_features[split_of, order].repeat(method.members, 1, 1)
        cross_entropy = torch.zeros(())
        for step, start in enumerate(starts, start=epoch * len(starts)):
            batch = slice(start, start + training.batch_rows)
            logits = model(features[:, batch])  # (members * runs, B, C)
            target = labels[:, batch].flatten()  # (runs * B,)
            # Runs share no weights: summed over their rows, each gets the gradient it has alone.
            total, terms = codistillation_loss(
                logits.view(method.members, -1, splits.classes),
                target,
                reduction="sum",
                return_terms=True,
                **method.loss_options(step / ramp_steps),
            )
            optimizer.step(total * (len(where) / len(target)))
            cross_entropy += terms.cross_entropy.mean() * (len(target) / labels.numel())
        if not cross_entropy.isfinite():
            raise TrainingDiverged(f"the loss of {method.label} diverged in epoch {epoch + 1}")
        on_epoch(Epoch(epoch + 1, model, float(cross_entropy)))
    return model
