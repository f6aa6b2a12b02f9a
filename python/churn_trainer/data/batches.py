"""Minibatches of many runs at once, each a function of the step's number alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from churn_kernels._splitmix import mixed, shifted, signed
from churn_trainer.config import Data, Draw, Optimisation, Run
from churn_trainer.data import hold_out, split_rows
from churn_trainer.data.dataset import Dataset
from churn_trainer.settings import check_memory, derive_seed

STATISTICS_ROWS = 10_000
"""Mean and deviation are taken over at most this many training rows, evenly spaced."""


class Minibatch(NamedTuple):
    """What one process sees of a minibatch."""

    inputs: Tensor
    """(R, B, *shape), standardised."""
    labels: Tensor
    """(R, B) int64."""
    rows: int
    """Rows of each run's whole minibatch, over all processes."""


class Batches:
    """The minibatches and the test rows of R runs that share all settings but their seeds.

    The rows of a step follow from the order's seed and the step's number, crops and flips of a row
    from (augmentation's seed, epoch, row): nothing has to be remembered to go on from any step.

    Args:
        runs: the R runs.
        dataset: their data.
        device: where the batches are to be.
        rank, ranks: each of several processes takes every `ranks`-th row of a minibatch.

    Attributes:
        train_rows, test_rows: (R, n) and (R, N) rows of the data set.
        validation_rows: (R, V), kept out of the training rows.
        steps: minibatches an epoch.
        epoch_rows: rows that an epoch trains on.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        dataset: Dataset,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.runs, self.dataset, self.device = runs, dataset, device
        self.rank, self.ranks = rank, ranks
        self.data, self.optimisation = runs[0].data, runs[0].optimisation
        self.batch_rows = self.optimisation.batch_rows
        splits = {}
        for seed in dict.fromkeys(run.seeds.split for run in runs):
            train, test = split_rows(dataset, self.data, seed)
            kept, held = hold_out(dataset, train, self.data.validation_rows, seed)
            splits[seed] = kept, test, held
        moments = {seed: self._moments(train) for seed, (train, _, _) in splits.items()}
        seeds = [run.seeds.split for run in runs]
        self.train_rows = torch.stack([splits[seed][0] for seed in seeds])
        self.test_rows = torch.stack([splits[seed][1] for seed in seeds])
        self.validation_rows = torch.stack([splits[seed][2] for seed in seeds])
        self.mean = torch.stack([moments[seed][0] for seed in seeds])[:, None].to(device)
        self.scale = torch.stack([moments[seed][1] for seed in seeds])[:, None].to(device)
        sizes = minibatch_sizes(self.train_rows.shape[1], self.optimisation)
        self.steps, self.epoch_rows = sizes.steps, sizes.rows
        self._epoch, self._order = -1, self.train_rows
        self._thread = None if dataset.in_memory else ThreadPoolExecutor(1, "minibatches")
        self._ahead: tuple[int, Future[Minibatch]] | None = None

    def train(self, step: int) -> Minibatch:
        """This process's share of minibatch `step`, from 0, counted through all epochs.

        Images that are not in memory are read one minibatch ahead, while the model works.
        """
        if self._thread is None:
            return self._train(step)
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._train, step)
        batch = self._ahead[1].result()
        self._ahead = step + 1, self._thread.submit(self._train, step + 1)
        return batch

    def _train(self, step: int) -> Minibatch:
        epoch = step // self.steps
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        own = self._order[:, self.places(step)]
        inputs = self._fetch(own)
        if self.data.crop_size or self.data.crop_padding or self.data.flip:
            seeds = torch.tensor([[run.seeds.augmentation] for run in self.runs])
            draws = hash_integers(seeds, torch.tensor(epoch), own).to(self.device)
            images = augment(inputs.flatten(0, 1), draws.flatten(), self.data)
            inputs = images.unflatten(0, own.shape)
        labels = self.dataset.labels[own].to(self.device)
        return Minibatch(self._standardised(inputs), labels, self.rows(step))

    def places(self, step: int) -> slice:
        """Where this process's share of minibatch `step` lies in the epoch's order of rows."""
        start = step % self.steps * self.batch_rows
        return slice(start + self.rank, start + self.rows(step), self.ranks)

    def rows(self, step: int) -> int:
        """Rows of each run's whole minibatch `step`: an epoch's last may have fewer."""
        start = step % self.steps * self.batch_rows
        return min(self.batch_rows, self.epoch_rows - start)

    def parts(self, step: int) -> int:
        """Parts of minibatch `step` that go through the network one after the other."""
        return parts_of(self.rows(step), self.optimisation.accumulate, self.ranks)

    def held_out(self, rows: Tensor) -> Tensor:
        """Inputs of rows (R, b) that do not train; cut to the middle where training crops."""
        inputs = self._fetch(rows)
        if self.data.crop_size:
            top, left = ((side - self.data.crop_size) // 2 for side in inputs.shape[-2:])
            size = self.data.crop_size
            if top < 0 or left < 0:
                pad = max(-top, -left)
                inputs = torch.nn.functional.pad(inputs, (pad,) * 4)
                top, left = top + pad, left + pad
            inputs = inputs[..., top : top + size, left : left + size]
        return self._standardised(inputs)

    @property
    def test_labels(self) -> Tensor:
        """(R, N) int64, on the CPU."""
        return self.dataset.labels[self.test_rows]

    @property
    def validation_labels(self) -> Tensor:
        """(R, V) int64, on the CPU."""
        return self.dataset.labels[self.validation_rows]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input as the model sees it."""
        if not self.data.crop_size:
            return self.dataset.shape
        return (self.dataset.shape[0], self.data.crop_size, self.data.crop_size)

    def _fetch(self, rows: Tensor) -> Tensor:
        return self.dataset.fetch(rows.flatten()).unflatten(0, rows.shape).to(self.device)

    def _standardised(self, inputs: Tensor) -> Tensor:
        return (inputs.float() - self.mean) / self.scale

    def _shuffled(self, epoch: int) -> Tensor:
        """(R, n) training rows in the order of an epoch."""
        seeds = [derive_seed(run.seeds.order, Draw.ORDER, epoch) for run in self.runs]
        orders = [
            torch.randperm(self.train_rows.shape[1], generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return self.train_rows.gather(1, torch.stack(orders))

    def _moments(self, train: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the training inputs, per number or per channel of an image."""
        some = train[:: math.ceil(len(train) / STATISTICS_ROWS)]
        inputs = self.dataset.fetch(some).float()
        over = (0,) if self.dataset.per_pixel else (0, 2, 3)
        return moments(inputs, over)


class Sizes(NamedTuple):
    """The minibatches of an epoch."""

    steps: int
    rows: int
    """Rows that train."""
    smallest: int
    """Rows of the smallest minibatch."""


def minibatch_sizes(rows: int, optimisation: Optimisation) -> Sizes:
    """The minibatches of an epoch over `rows` training rows.

    Raises: ValueError if they do not fill one, and what does not is to be dropped.
    """
    whole, rest = divmod(rows, optimisation.batch_rows)
    if optimisation.drop_last and not whole:
        raise ValueError(
            f"batch_rows must be at most the {rows} training rows with drop_last, got "
            f"{optimisation.batch_rows}; no minibatch would be left"
        )
    if not rest or optimisation.drop_last:
        return Sizes(whole, whole * optimisation.batch_rows, optimisation.batch_rows)
    return Sizes(whole + 1, rows, rest)


def parts_of(rows: int, accumulate: int, ranks: int = 1) -> int:
    """Parts of a minibatch of `rows` rows over all processes: each has a row in every part."""
    return max(1, min(accumulate, rows // ranks))


def check_minibatch(run: Run, dataset: Dataset, rows: int) -> None:
    """Raises ValueError if a minibatch, padded for its crops, does not fit into memory."""
    values = math.prod(side + 2 * run.data.crop_padding for side in dataset.shape[1:])
    count = min(run.optimisation.batch_rows, rows) * dataset.shape[0] * values
    check_memory("a minibatch", 4 * count, "lower batch_rows, or the size of the images")


def fewest_rows(rows: int, optimisation: Optimisation, ranks: int = 1) -> int:
    """Rows of the smallest pass of a training on `rows` rows: some process's part of a minibatch.

    Raises: ValueError as `minibatch_sizes`.
    """
    sizes = minibatch_sizes(rows, optimisation)
    minibatches = (min(optimisation.batch_rows, rows), sizes.smallest)
    return min(
        size // ranks // parts_of(size, optimisation.accumulate, ranks) for size in minibatches
    )


def moments(inputs: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over some dimensions; a deviation of 0 is given as 1.

    The first dimension is dropped, the others of `over` keep the size 1.
    """
    mean = inputs.mean(dim=over, keepdim=True)[0]
    deviation = inputs.std(dim=over, correction=0, keepdim=True)[0]
    return mean, torch.where(deviation > 0, deviation, 1.0)


# Augmentation -------------------------------------------------------------------------------------


def augment(images: Tensor, draws: Tensor, data: Data) -> Tensor:
    """A random crop of each padded image, mirrored or not; images in, images out.

    Args:
        images: (B, channels, height, width), any dtype.
        draws: (B,) int64, what each image's crop and flip follow from.
        data: crop_padding, crop_size (0: as large as the image) and flip.
    """
    padded = torch.nn.functional.pad(images, (data.crop_padding,) * 4)
    height, width = (data.crop_size or side for side in images.shape[2:])
    # Three numbers below 2^32 an image; the bias of a remainder is below its limit / 2^32.
    which = torch.arange(3, device=images.device)[:, None]
    first, second, third = shifted(hash_integers(draws, which), 32)
    top = first % (padded.shape[2] - height + 1)
    left = second % (padded.shape[3] - width + 1)
    across = torch.arange(width, device=images.device)
    if data.flip:
        mirrored = (third % 2)[:, None].bool()
        across = torch.where(mirrored, across.flip(0), across)
    rows = top[:, None] + torch.arange(height, device=images.device)  # (B, height)
    columns = left[:, None] + across  # (B, width)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def hash_integers(*values: Tensor) -> Tensor:
    """int64 tensors, broadcast, to one whose 64 bits look random: splitmix64's mixing of each.

    Equal values give equal bits on every device; a value's neighbours in the batch play no part.
    """
    state = torch.zeros((), dtype=torch.int64)
    for value in values:
        state = mixed((state ^ value) + _GOLDEN)
    return state


_GOLDEN = signed(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
