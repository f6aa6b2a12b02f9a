"""The parts of a training's state, each hashed by itself; settings stand for themselves."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from churn_kernels.audit.hashes import (
    Later,
    NamedTensors,
    hash_of_both,
    optimizer_settings,
    optimizer_state,
    sorted_out,
)
from churn_kernels.audit.state import Named, contents, loose_parameters

_LONGEST = 60  # characters; what is longer than that is hashed
_NUMBERS = (bool, int, float, complex, str, type(None))


@dataclass(frozen=True)
class Contents:
    """What a part is.

    Attributes:
        settings: numbers and short strings, and lists of them, by name.
        tensors: by name.
        rest: other data, as text.
    """

    settings: dict[str, Any]
    tensors: NamedTensors
    rest: list[tuple[str, str]] = field(default_factory=list)

    def hash(self) -> Later:
        """128 bits of tensors and rest."""
        return hash_of_both(self.tensors, self.rest)

    def versions(self) -> Any:
        """What is equal only if no operator wrote to a tensor, and the rest is the same."""
        return [_version(x) for _, x in self.tensors], self.rest


@dataclass(frozen=True)
class Part:
    """Something that is hashed by itself.

    Attributes:
        name: in the trace.
        read: gives what it is.
        counted: whether PyTorch's version counters are trusted to tell that it has not changed.
        early: whether what changes it, between two steps, does before the forward pass.
    """

    name: str
    read: Callable[[], Contents]
    counted: bool = False
    early: bool = False


class ModelTensors:
    """The tensors of a model by name, as of the last look: to walk through modules takes time.

    Attributes:
        parameters, buffers: by name, each tensor once.
        gpus: that they lie on.

    Args:
        model: whose they are.
        loose: parameters besides those of the model.
    """

    def __init__(self, model: nn.Module, loose: Iterable[Tensor] = ()) -> None:
        self._model = model
        self._loose = [(f"parameter {i}", x) for i, x in enumerate(loose)]
        self.parameters: NamedTensors = []
        self.buffers: NamedTensors = []
        self.gpus: set[torch.device] = set()
        self.look()

    def look(self) -> None:
        """Walk through the modules."""
        self.parameters, self.buffers = [], []
        seen: set[int] = set()
        for path, module in self._model.named_modules():
            prefix = f"{path}." if path else ""
            for held, found in (
                (module._parameters, self.parameters),
                (module._buffers, self.buffers),
            ):
                for name, x in held.items():
                    if x is not None and id(x) not in seen:
                        seen.add(id(x))
                        found.append((prefix + name, x))
        self.parameters += self._loose
        self.gpus = {x.device for _, x in (*self.parameters, *self.buffers) if x.is_cuda}


class TrainingParts:
    """All parts of a training.

    Attributes:
        tensors: the model's, and what its optimizer changes besides.
        optimizer, parameters, buffers: its own.
        named: by the names of the objects: two of a model, parameters first; an optimizer's own,
            and the parameters that no model has; one of anything else.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Named) -> None:
        modules = [model, *(x for x in state.values() if isinstance(x, nn.Module))]
        self.tensors = ModelTensors(model, loose_parameters(optimizer, modules))
        self.optimizer = _of_optimizer("optimizer", optimizer, "")
        self.parameters = _of_parameters("parameters", lambda: self.tensors.parameters)
        self.buffers = Part("buffers", lambda: Contents({}, self.tensors.buffers))
        self.named = {name: _parts_of(name, value, modules) for name, value in state.items()}

    @property
    def others(self) -> list[Part]:
        """Those of named objects."""
        return [part for parts in self.named.values() for part in parts]


def _parts_of(name: str, value: Any, modules: list[nn.Module]) -> list[Part]:
    if isinstance(value, nn.Module):
        return [
            _of_parameters(name, value.named_parameters),
            Part(f"{name} buffers", lambda: Contents({}, list(value.named_buffers()))),
        ]
    if isinstance(value, torch.optim.Optimizer):
        parts = [_of_optimizer(name, value, name)]
        loose = [(f"{i}", p) for i, p in enumerate(loose_parameters(value, modules))]
        return parts + ([_of_parameters(f"{name} parameters", lambda: loose)] if loose else [])

    def read() -> Contents:
        found = contents(value)
        settings, left = _split(name, found) if isinstance(found, dict) else ({}, found)
        return Contents(settings, *sorted_out(left))

    return [Part(name, read)]


def _of_parameters(name: str, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> Part:
    return Part(name, lambda: Contents({}, list(tensors())), early=True)


def _of_optimizer(name: str, optimizer: torch.optim.Optimizer, prefix: str) -> Part:
    def read() -> Contents:
        settings, odd = _split(prefix, optimizer_settings(optimizer))
        return Contents(settings, *sorted_out([optimizer_state(optimizer), odd]))

    return Part(name, read, counted=True)


def _split(name: str, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of some values can stand for itself, and what a hash has to stand for."""
    settings, left = {}, {}
    for key, value in values.items():
        if (
            isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu"
        ) or isinstance(value, np.generic):
            value = value.item()
        if _is_short(value):
            settings[f"{name} {key}" if name else key] = value
        else:
            left[key] = value
    return settings, left


def _is_short(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(x, _NUMBERS) for x in value) and len(repr(value)) <= _LONGEST
    return isinstance(value, _NUMBERS) and len(repr(value)) <= _LONGEST


def _version(x: Tensor) -> Any:
    """What changes whenever an operator writes to a tensor; of what cannot tell, always."""
    if type(x) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(x):
        return object()
    try:
        return id(x), x.data_ptr(), x._version
    except RuntimeError:  # of inference mode, or without memory of its own
        return object()
