"""What a step starts from, besides its number: checked, read, kept and brought back."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from churn_kernels.audit.generators import random_states
from churn_kernels.audit.iterators import Rewindable, rewindable_loader
from churn_kernels.hashing import is_dense

Named = Mapping[str, Any]
"""Objects that a training changes besides its model and optimizer, by the names they are given."""

Restore = Callable[[], None]

_SEQUENCE_ITERATORS: tuple[Any, ...] = (type(iter([])), type(iter(())))

OWN = ("random state", "buffers", "gradients", "parameters", "optimizer")
"""What a recorder hashes by itself: names that nothing else may have."""


def check_state(model: nn.Module, state: Named) -> None:
    """Refuse what cannot be hashed or brought back.

    Raises: ValueError for a lazy module that has not been run, for a name that is taken, and for an
        object that has no state to load.
    """
    for name, module in [("model", model), *_of_kind(state, nn.Module)]:
        tensors = (*module.named_parameters(), *module.named_buffers())
        lazy = [n for n, x in tensors if is_lazy(x)]
        if lazy:
            raise ValueError(
                f"{name} must have parameters with a shape, got lazy modules that have not been "
                f"run: {', '.join(lazy)}; call it once on a batch before"
            )
    for name, value in state.items():
        if not isinstance(name, str) or name in OWN or not name:
            raise ValueError(f"state's names must be none of {', '.join(OWN)}, got {name!r}")
        if _keeper(value) is None:
            raise ValueError(
                f"state must hold objects with state_dict and load_state_dict, tensors, random "
                f"number generators and iterators that can be set back, got {name!r}, "
                f"{_kind(value)}; {_remedy(value)}"
            )


def loose_parameters(
    optimizer: torch.optim.Optimizer, modules: Iterable[nn.Module]
) -> list[Tensor]:
    """What an optimizer changes that no module has."""
    known = {id(x) for module in modules for x in module.parameters()}
    return [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]


def _of_kind(state: Named, kind: Any) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in state.items() if isinstance(value, kind)]


def _kind(value: Any) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")


def _remedy(value: Any) -> str:
    if isinstance(value, Iterator) or hasattr(value, "__iter__"):
        return "iterate over churn_kernels.audit.Rewindable of it, and name that"
    return "give it both, or make what it holds follow from the number of the step"


def contents(value: Any) -> Any:
    """What state an object is in, as data; see `check_state` for what it may be."""
    if isinstance(value, nn.Module):
        return dict((*value.named_parameters(), *value.named_buffers()))
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Rewindable):
        return {"position": value.position}
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.RandomState):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if rewindable_loader(value) is not None:
        return {"position": value._num_yielded}
    if hasattr(value, "state_dict"):
        return value.state_dict()
    return {"position": value.__reduce__()[-1]}


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Named | None = None
) -> Restore:
    """A function that brings a training and the random states back to what they are.

    For `find_operator`, where a copy of the state fits into memory.

    Args:
        model: parameters, all buffers, gradients, and whether its modules are in training mode.
        optimizer: its state and settings.
        state: what else a step changes, by name: other models and optimizers, schedulers,
            `GradScaler`s, averages of the weights and whatever has `state_dict` and
            `load_state_dict`; tensors; random number generators; iterators of a list or a tuple,
            those of a `DataLoader`, and any other in a `Rewindable`.
    Raises: ValueError for lazy modules that have not been run, and for what cannot be brought back.
    """
    state = state or {}
    check_state(model, state)
    everything = {"model": model, "optimizer": optimizer, **state}
    modules = [module for _, module in _of_kind(everything, nn.Module)]
    optimizers = [one for _, one in _of_kind(everything, torch.optim.Optimizer)]
    loose = [p for one in optimizers for p in loose_parameters(one, modules)]
    restores = [_keep_tensors(loose), *(_kept(value) for value in everything.values())]
    restores.append(random_states())

    def restore() -> None:
        for one in restores:
            one()

    return restore


def copied(data: Any) -> Any:
    """Data with tensors of its own; functions and what they are bound to stay what they are."""

    def leaf(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().clone()
        return x if callable(x) else copy.deepcopy(x)

    return tree_map(leaf, data)


def can_be_kept(value: Any) -> bool:
    """Whether an object has a state that can be brought back."""
    return _keeper(value) is not None


def _kept(value: Any) -> Restore:
    keeper = _keeper(value)
    assert keeper is not None
    return keeper(value)


def _keeper(value: Any) -> Callable[[Any], Restore] | None:
    """How to keep an object; None if it cannot be brought back."""
    if isinstance(value, nn.Module):
        return _keep_module
    if isinstance(value, Tensor):
        return lambda x: _keep_tensors([x])
    if isinstance(value, Rewindable):
        return Rewindable.mark
    if isinstance(value, torch.Generator):
        return lambda g: _later(g.set_state, g.get_state())
    if isinstance(value, random.Random):
        return lambda g: _later(g.setstate, g.getstate())
    if isinstance(value, np.random.RandomState):
        return lambda g: _later(g.set_state, g.get_state())
    if isinstance(value, np.random.Generator):
        return _keep_bit_generator
    if rewindable_loader(value) is not None:
        return _keep_loader
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return _keep_state_dict
    if isinstance(value, _SEQUENCE_ITERATORS) and isinstance(value.__reduce__()[-1], int):
        return lambda it: _later(it.__setstate__, it.__reduce__()[-1])
    return None


def _later(put: Callable[[Any], Any], value: Any) -> Restore:
    def restore() -> None:
        put(value)

    return restore


def _keep_state_dict(value: Any) -> Restore:
    saved = copied(value.state_dict())

    def restore() -> None:
        value.load_state_dict(copied(saved))

    return restore


def _keep_bit_generator(generator: np.random.Generator) -> Restore:
    saved = copy.deepcopy(generator.bit_generator.state)

    def restore() -> None:
        generator.bit_generator.state = saved

    return restore


def _keep_loader(loader: Any) -> Restore:
    rewindable, count = rewindable_loader(loader), loader._num_yielded
    assert rewindable is not None
    rewind = rewindable.mark()

    def restore() -> None:
        rewind()
        loader._num_yielded = count

    return restore


def _keep_tensors(tensors: list[Tensor]) -> Restore:
    """In place, with gradients; what has no plain memory is not written to by a step."""
    saved = [
        (x, x.detach().clone(), None if x.grad is None else x.grad.clone(), x.requires_grad)
        for x in tensors
        if is_dense(x)
    ]

    def restore() -> None:
        with torch.no_grad():
            for x, value, gradient, requires_grad in saved:
                x.detach().copy_(value)
                if x.is_leaf:
                    x.requires_grad_(requires_grad)
                    x.grad = None if gradient is None else gradient.clone()

    return restore


def _keep_module(model: nn.Module) -> Restore:
    """The tensors that its modules have, under the names they have, and the modules' modes."""
    places: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (held, dict(held))
        for module in model.modules()
        for held in (module._parameters, module._buffers)
    ]
    modes = [(module, module.training) for module in model.modules()]
    restore_tensors = _keep_tensors(
        [x for _, saved in places for x in saved.values() if x is not None]
    )
    extras = [
        (module, copied(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]

    def restore() -> None:
        for held, saved in places:
            held.clear()
            held.update(saved)
        for module, training in modes:
            module.training = training
        restore_tensors()
        for module, extra in extras:
            module.set_extra_state(copied(extra))

    return restore
