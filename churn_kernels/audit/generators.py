"""The random number generators that a process shares: their states, hashed and brought back."""

import hashlib
import random
from collections.abc import Callable, Iterable
from typing import Any

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


def random_states_of(gpus: Iterable[torch.device]) -> dict[str, Any]:
    """The states of Python's and NumPy's generators, and of PyTorch's, by whose they are.

    Of the latter those of the CPU and of some GPUs: what others a machine has does not show.
    """
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the generator that others draw from
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(gpu) for gpu in sorted(gpus, key=lambda gpu: gpu.index)]
    return {
        "Python": random.getstate(),
        "NumPy": (kind, np.asarray(keys).tobytes(), rest),
        "PyTorch": b"".join(state.numpy().tobytes() for state in states),
    }


def state_hash(state: Any) -> str:
    """128 bits of a random state, or of several."""
    return hashlib.blake2b(repr(state).encode(), digest_size=16).hexdigest()


def random_state_hash(model: nn.Module) -> str:
    """128 bits of all the random states that a model may draw from."""
    gpus = {x.device for x in (*model.parameters(), *model.buffers()) if x.is_cuda}
    return state_hash(random_states_of(gpus))
