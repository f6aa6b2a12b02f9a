"""Data sets that are drawn: multi-view and Gaussian (Allen-Zhu and Li 2020), and many classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from churn_trainer.config import Synthetic
from churn_trainer.data.dataset import Dataset
from churn_trainer.settings import check_memory, derive_seed


def multi_view(settings: Synthetic) -> Dataset:
    """Each class has two orthonormal features; a row shows both, or one (Allen-Zhu and Li 2020).

    An input has P patches of d numbers. Each feature of the row's class that it shows lies in two
    patches of its own, with strength uniform in [1, 2) over the two together. Every other patch
    holds one feature of another class, with strength uniform in [0, `off_class`). All numbers carry
    normal noise of deviation `noise` / sqrt(d), so that a patch's noise has the norm `noise`.

    Raises: ValueError unless the 2 C features fit into d dimensions.
    """
    classes, dimension = settings.classes, settings.dimension
    if dimension < 2 * classes:
        raise ValueError(
            f"synthetic.dimension must be at least {2 * classes}, two orthogonal features for each "
            f"of {classes} classes, got {dimension}; raise it or lower synthetic.classes"
        )
    generator = _generator(settings, settings.patches)
    basis = torch.linalg.qr(torch.randn(dimension, 2 * classes, generator=generator)).Q.T
    features = basis.reshape(classes, 2, dimension)

    def draw(rows: int, labels: Tensor) -> Tensor:
        places = torch.rand(rows, settings.patches, generator=generator).argsort(dim=1)
        others = torch.randint(1, classes, (rows, settings.patches), generator=generator)
        view = torch.randint(2, (rows, settings.patches), generator=generator)
        weak = torch.rand(rows, settings.patches, 1, generator=generator) * settings.off_class
        patches = weak * features[(labels[:, None] + others) % classes, view]
        strength = 1 + torch.rand(rows, 2, generator=generator)
        parts = torch.rand(rows, 2, generator=generator)
        strengths = torch.stack([strength * parts, strength * (1 - parts)], dim=2)  # (rows, 2, 2)
        single = torch.rand(rows, generator=generator) < settings.single_view_share
        hidden = torch.randint(2, (rows,), generator=generator)
        strengths[torch.arange(rows)[single], hidden[single]] = 0
        own = (strengths[..., None] * features[labels][:, :, None]).flatten(1, 2)  # (rows, 4, d)
        patches.scatter_(1, places[:, :4, None].expand(-1, -1, dimension), own)
        noise = torch.randn(patches.shape, generator=generator)
        return patches + noise * (settings.noise / dimension**0.5)

    return _dataset("multi-view", settings, generator, draw)


def gaussian(settings: Synthetic) -> Dataset:
    """Normal inputs, labelled by a random network of one hidden layer (Allen-Zhu and Li, Fig. 4).

    The label is the largest of the network's outputs, to each of which normal noise of deviation
    `noise` times the outputs' own is added.
    """
    generator = _generator(settings)
    rows = settings.train_rows + settings.test_rows
    inputs = torch.randn(rows, settings.dimension, generator=generator)
    hidden = torch.randn(settings.dimension, 4 * settings.classes, generator=generator)
    outputs = (inputs @ hidden).relu() @ torch.randn(
        4 * settings.classes, settings.classes, generator=generator
    )
    outputs = (outputs - outputs.mean(dim=0)) / outputs.std(dim=0)
    noise = torch.randn(outputs.shape, generator=generator) * settings.noise
    return _in_memory("Gaussian inputs", settings, inputs, (outputs + noise).argmax(dim=1))


def prototypes(settings: Synthetic) -> Dataset:
    """Class c's inputs are a normal point of its own plus normal noise of deviation `noise`."""
    generator = _generator(settings)
    points = torch.randn(settings.classes, settings.dimension, generator=generator)

    def draw(rows: int, labels: Tensor) -> Tensor:
        noise = torch.randn(rows, settings.dimension, generator=generator)
        return points[labels] + settings.noise * noise

    return _dataset("prototypes", settings, generator, draw)


def _generator(settings: Synthetic, patches: int = 1) -> Generator:
    """What the set is drawn from. Raises: ValueError if it does not fit into memory."""
    rows = max(settings.train_rows + settings.test_rows, settings.classes)
    remedy = "lower synthetic.train_rows, test_rows, classes or dimension"
    check_memory("the data that are drawn", 4 * rows * patches * settings.dimension, remedy)
    return Generator().manual_seed(derive_seed(settings.seed))


def _dataset(
    title: str, settings: Synthetic, generator: Generator, draw: Callable[[int, Tensor], Tensor]
) -> Dataset:
    """Labels that are equally frequent, as far as the rows go, and their inputs."""
    parts = []
    for rows in (settings.train_rows, settings.test_rows):
        order = torch.randperm(rows, generator=generator)
        parts.append(order % settings.classes)
    labels = torch.cat(parts)
    return _in_memory(title, settings, draw(len(labels), labels), labels)


def _in_memory(title: str, settings: Synthetic, inputs: Tensor, labels: Tensor) -> Dataset:
    return Dataset(
        title=f"{title} ({settings.classes} classes, drawn)",
        labels=labels,
        classes=settings.classes,
        shape=tuple(inputs.shape[1:]),
        fetch=inputs.__getitem__,
        is_image=False,
        per_pixel=True,
        test_start=settings.train_rows,
    )
