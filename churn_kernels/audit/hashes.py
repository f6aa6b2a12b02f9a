"""Hashes of what a training changes: tensors by name, an optimizer's state, any data."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from churn_kernels.hashing import check, is_dense, tensor_hash, words_of

Later = Callable[[], str]
"""Gives a hash of which a GPU may still be computing the words, and waits for them."""

NamedTensors = list[tuple[str, Tensor]]

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, np.generic)


def tensors_hash(tensors: Iterable[tuple[str, Tensor | None]]) -> Later:
    """128 bits of named tensors in their order; None where one is not there."""
    kinds = []
    by_device: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for name, x in tensors:
        if x is None:
            kinds.append(f"{name}\0none\0")
            continue
        check(x)
        if not is_dense(x):
            kinds.append(f"{name}\0{tensor_hash(x)}\0")
            continue
        places, dense = by_device.setdefault(_device_of(x), ([], []))
        places.append(len(kinds))
        dense.append(x)
        kinds.append(f"{name}\0{_kind(x.dtype, x.shape)}\0")
    digest = hashlib.blake2b("".join(kinds).encode(), digest_size=16)
    words = [(places, words_of(dense)) for places, dense in by_device.values()]
    return partial(_finished, digest, words)


@cache
def _kind(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{dtype}{tuple(shape)}"


def _device_of(x: Tensor) -> torch.device:
    """Tensors of one device are hashed at once."""
    return x.device


def _finished(digest: "hashlib.blake2b", words: list[tuple[list[int], Tensor]]) -> str:
    """The words in the order of their tensors, whatever devices these lie on."""
    if words:
        places = np.concatenate([places for places, _ in words])
        rows = np.concatenate([of_device.cpu().numpy() for _, of_device in words])
        digest.update(rows[places.argsort()].tobytes())
    return digest.hexdigest()


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state, by the order of its parameters."""
    return {
        f"{g}.{i}": optimizer.state[parameter]
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
        if parameter in optimizer.state
    }


def optimizer_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The options of an optimizer's groups, by the names that people give them."""
    groups = optimizer.param_groups
    return {
        _setting(key) + (f" of group {g}" if len(groups) > 1 else ""): value
        for g, group in enumerate(groups)
        for key, value in group.items()
        if key != "params"
    }


def _setting(key: str) -> str:
    return "learning rate" if key == "lr" else key.replace("_", " ")


def sorted_out(value: Any, name: str = "") -> tuple[NamedTensors, list[tuple[str, str]]]:
    """The tensors in any data, and the rest as text that is the same in every process."""
    tensors: NamedTensors = []
    rest: list[tuple[str, str]] = []
    _sort_out(name, value, tensors, rest)
    return tensors, rest


def _sort_out(name: str, value: Any, tensors: NamedTensors, rest: list[tuple[str, str]]) -> None:
    if isinstance(value, Tensor):
        tensors.append((name, value))
    elif isinstance(value, dict):
        rest.append((name, f"{len(value)} by name"))
        for key, item in value.items():
            _sort_out(f"{name}.{key}", item, tensors, rest)
    elif isinstance(value, list | tuple):
        if all(isinstance(item, _PLAIN) for item in value):
            rest.append((name, repr(value)))
            return
        for i, item in enumerate(value):
            _sort_out(f"{name}.{i}", item, tensors, rest)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        rest.append((name, f"{value.dtype}{value.shape}{value.tobytes().hex()}"))
    elif isinstance(value, Mapping):
        _sort_out(name, dict(value), tensors, rest)
    elif isinstance(value, set | frozenset):
        rest.append((name, repr(sorted(map(repr, value)))))
    elif isinstance(value, _PLAIN):
        rest.append((name, repr(value)))
    else:  # its representation may hold an address
        kind = value if callable(value) and hasattr(value, "__qualname__") else type(value)
        rest.append((name, f"{kind.__module__}.{kind.__qualname__}"))


def data_hash(value: Any) -> Later:
    """128 bits of any data: its tensors, and what else there is."""
    return hash_of_both(*sorted_out(value))


def hash_of_both(tensors: NamedTensors, rest: list[tuple[str, str]]) -> Later:
    """Of tensors, and of what else there is, by its text."""
    later = tensors_hash(tensors)
    head = repr(rest).encode()
    return lambda: hashlib.blake2b(head + later().encode(), digest_size=16).hexdigest()
