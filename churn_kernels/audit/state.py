"""What a step starts from, kept and brought back."""

import copy
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn


def random_states() -> Callable[[], None]:
    """A function that brings Python's, NumPy's and PyTorch's generators back to what they are."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    of_torch = torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_torch)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)

    return restore


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that brings a model, its optimizer and the random states back to what they are.

    For `find_operator`, where a copy of the state fits into memory.
    """
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    restore_random_states = random_states()

    def restore() -> None:
        of_model, of_optimizer = copy.deepcopy(state)
        model.load_state_dict(of_model)
        optimizer.load_state_dict(of_optimizer)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        restore_random_states()

    return restore
