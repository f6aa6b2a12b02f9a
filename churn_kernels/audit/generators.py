"""The random number generators that a process shares: their states, hashed and brought back."""

import hashlib
import random
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor


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


def random_states_of(tensors: Iterable[Tensor]) -> dict[str, bytes]:
    """The states of Python's and NumPy's generators, and of PyTorch's, by whose they are.

    Of the latter those of the CPU and of the GPUs that the tensors lie on: what other GPUs a
    machine has does not show.
    """
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the generator that others draw from
    gpus = {x.device for x in tensors if x.is_cuda}
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(gpu) for gpu in sorted(gpus, key=lambda gpu: gpu.index)]
    return {
        "Python": repr(random.getstate()).encode(),
        "NumPy": f"{kind}{rest}".encode() + np.asarray(keys).tobytes(),
        "PyTorch": b"".join(state.numpy().tobytes() for state in states),
    }


def bytes_hash(data: bytes) -> str:
    """128 bits of a random state."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def random_state_hash(model: torch.nn.Module) -> str:
    """128 bits of all the random states that a model may draw from."""
    states = random_states_of((*model.parameters(), *model.buffers()))
    return bytes_hash(b"".join(states.values()))
