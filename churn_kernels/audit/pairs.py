"""Two replays of one training, step by step beside each other, and how far apart they are."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from churn_kernels.audit.generators import random_states
from churn_kernels.audit.replay import Build, ReplayError, Training, built, state_hashes

Around = Callable[[int, nn.Module], AbstractContextManager[Any]]
"""The block that side 0 or 1 of a pair takes a step in, by the side and its model."""

_TRIES = 1000


@dataclass(frozen=True)
class Pair:
    """Two replays of the same steps.

    Attributes:
        distances: ||theta_0 - theta_1||_2 over all parameters, in float64, before the first step
            and after each.
        churn: at the same times the share of rows whose predictions differ; empty where the
            training predicts nothing.
        step: after which anything of the state differs first; 0 before the first step, None if
            nothing does.
        what: the part of the state that does: as in a trace.
        seconds: that the steps took, of both sides.
    """

    distances: list[float]
    churn: list[float]
    step: int | None
    what: str
    seconds: float = 0.0

    @property
    def first_flip(self) -> int | None:
        """The step after which a prediction differs first; None if none does."""
        return next((n for n, share in enumerate(self.churn) if share > 0), None)


def as_they_are(side: int, model: nn.Module) -> AbstractContextManager[None]:
    """Both sides do the same."""
    return nullcontext()


def run_pair(
    build: Build,
    steps: int,
    *,
    device: str = "cpu",
    around: Around = as_they_are,
    flip: tuple[int, int] | None = None,
) -> Pair:
    """Build a training twice and run both, a step of one after the same step of the other.

    Args:
        build: builds the training; each side has random states of its own.
        steps: how many to run, from the first.
        around: the block that a side takes a step in.
        flip: (n, seed): before step n one number among the parameters of side 1, drawn by the seed,
            loses one unit in the last place.
    Raises: ReplayError as `built`, if n is no step that is run, and if no parameter can be flipped.
    """
    if flip is not None:
        check_injection(steps, flip[0], "flip[0]")
    sides: list[tuple[Training, Callable[[], None]]] = []
    for _ in range(2):
        training = built(build, device)
        sides.append((training, random_states()))
    distances: list[float] = []
    churn: list[float] = []
    parted, what = None, ""
    seconds = 0.0
    for n in range(steps + 1):
        hashes = []
        if flip and flip[0] == n:
            flip_ulp(sides[1][0].model, flip[1])
            distances[-1] = _distance(*(training.model for training, _ in sides))
        for side, (training, restore) in enumerate(sides):
            restore()
            if n:
                with around(side, training.model):
                    began = time.perf_counter()
                    training.step(n)
                    if device.startswith("cuda"):
                        torch.cuda.synchronize()
                    seconds += time.perf_counter() - began
            sides[side] = training, random_states()
            hashes.append(state_hashes(training))
        if parted is None:
            what = next((name for name in hashes[0] if hashes[0][name] != hashes[1][name]), "")
            parted = n if what else None
        distances.append(_distance(*(training.model for training, _ in sides)))
        if sides[0][0].predict:
            one, other = (_predictions(training) for training, _ in sides)
            churn.append((one != other).double().mean().item())
    return Pair(distances, churn, parted, what, seconds)


def check_injection(steps: int, inject_at: int, name: str = "inject_at") -> None:
    """Refuse a flip at a step that is not run.

    Raises: ReplayError.
    """
    if not 1 <= inject_at <= steps:
        raise ReplayError(
            f"{name} must be a step from 1 to {steps}, got {inject_at}; run more steps"
        )


def flip_ulp(model: nn.Module, seed: int) -> None:
    """Take one unit in the last place from a number among the parameters, towards zero.

    Raises: ReplayError if no number that is finite and not zero comes up.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    parameters = [p.detach() for p in model.parameters()]
    parameters = [torch.view_as_real(p) if p.is_complex() else p for p in parameters]
    parameters = [p for p in parameters if p.is_floating_point() and p.numel()]
    sizes = torch.tensor([float(p.numel()) for p in parameters], device="cpu")
    for _ in range(_TRIES if parameters else 0):
        p = parameters[int(torch.multinomial(sizes, 1, generator=generator))]
        number = torch.randint(p.numel(), (), generator=generator, device="cpu")
        place = torch.unravel_index(number, p.shape)
        if p[place].isfinite() and p[place] != 0:
            p.view(kinds[p.element_size()])[place] -= 1
            return
    raise ReplayError(
        f"model must have parameters that are finite and not zero to flip a bit of, got none in "
        f"{_TRIES} draws; flip it later in the training"
    )


def _distance(a: nn.Module, b: nn.Module) -> float:
    squares = [
        (_real(p) - _real(q)).square().sum().item()
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    ]
    return math.sqrt(sum(squares))


def _real(x: Tensor) -> Tensor:
    x = x.detach()
    return (torch.view_as_real(x) if x.is_complex() else x).to(torch.float64)


def _predictions(training: Training) -> Tensor:
    """The predicted class of each row; the training goes on as if nobody had asked."""
    assert training.predict is not None
    restore = random_states()
    modes = {module: module.training for module in training.model.modules()}
    try:
        with torch.no_grad():
            logits = training.predict()
    finally:
        restore()
        for module, mode in modes.items():
            module.training = mode
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.numel() == 0:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ReplayError(
            f"predict() must return logits of shape (N, C), got {got}; flatten what is a row"
        )
    return logits.argmax(1)
