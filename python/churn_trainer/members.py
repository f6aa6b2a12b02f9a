"""Many networks as one module: stacked where they can be, else one after the other."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from typing_extensions import override

from churn_kernels._files import check, exactly
from churn_kernels.audit.generators import random_state_hash
from churn_kernels.audit.hashes import tensors_hash
from churn_trainer.config import Draw, Run
from churn_trainer.models import NETWORKS, build_model, check_logits, count_weights
from churn_trainer.settings import check_memory, derive_seed

STACKED_PARAMETERS = 1_000_000
"""Networks with more parameters than this fill a device alone, and are not stacked."""

EVALUATED_ROWS = 16_384
"""Rows of all networks of a stack that are evaluated at a time: what lies between fits a cache."""

_GENERATOR = threading.Lock()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """The global generators of torch, NumPy and Python start from `seed` inside the block.

    After it they go on as before. One thread at a time: the generators belong to the process.
    """
    devices = [device] if device is not None and device.type == "cuda" else []
    with _GENERATOR, torch.random.fork_rng(devices=devices):
        of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002


class Members(nn.Module):
    """The K members of each of R runs: M = K R networks of one shape, in the order member, run.

    Attributes:
        members: K.
        runs: R.
        step: number of the training step, which dropout follows from.
        part: number of the part of the step's minibatch, which dropout follows from too.
    """

    def __init__(self, members: int, runs: int):
        super().__init__()
        self.members, self.runs, self.step, self.part = members, runs, 0, 0

    def forward(self, inputs: Tensor, members: int | None = None) -> Tensor:
        """(R, B, *shape) -> (k, R, B, C): all members of a run see the same inputs.

        Args:
            inputs: each run's.
            members: how many members, from the first; None: all.
        """
        raise NotImplementedError

    def clip_gradients(self, norm: float) -> Tensor:
        """Scales each network's gradient to a norm of at most `norm`; returns the norms (K, R)."""
        raise NotImplementedError

    def weights(self, member: int, run: int) -> dict[str, Tensor]:
        """One network's parameters and buffers, copied to the CPU, under its own names."""
        raise NotImplementedError

    def load_weights(self, member: int, run: int, weights: dict[str, Tensor]) -> None:
        """The reverse of `weights`. Raises: ValueError if the names or shapes are others."""
        raise NotImplementedError


class Stacked(Members):
    """Every parameter has a leading dimension of M networks; one batched operation a layer.

    A lone network is a stack of one: batched products of these sizes are computed by one thread,
    and a lone run's bits do not depend on the number of threads as a matrix product's may.
    """

    def __init__(self, networks: Sequence[nn.Module], members: int, runs: int):
        super().__init__(members, runs)
        parameters, buffers = stack_module_state(list(networks))
        self.stacked = nn.ParameterList(
            nn.Parameter(values, values.requires_grad) for values in parameters.values()
        )
        self.constants = nn.ParameterList(
            nn.Parameter(buffer, requires_grad=False) for buffer in buffers.values()
        )
        # A tensor that a network has under several names is stacked once, under the first.
        order = {name: place for place, name in enumerate((*parameters, *buffers))}
        network = networks[0]
        named = [
            *network.named_parameters(remove_duplicate=False),
            *network.named_buffers(remove_duplicate=False),
        ]
        first = {id(tensor): order[name] for name, tensor in named if name in order}
        self.places = {name: first[id(tensor)] for name, tensor in named}
        self.saved = [name for name in network.state_dict() if name in self.places]
        # In a list, so that it is no submodule: only its code is used.
        self.skeleton = [copy.deepcopy(networks[0]).to("meta")]

    @override
    def forward(self, inputs: Tensor, members: int | None = None) -> Tensor:
        count = self.members if members is None else members
        state = [values[: count * self.runs] for values in self._values()]

        def one(state: list[Tensor], inputs: Tensor) -> Tensor:
            named = {name: state[place] for name, place in self.places.items()}
            return functional_call(self.skeleton[0], named, (inputs,))

        rows = inputs.repeat(count, *[1] * (inputs.dim() - 1))
        networks = None if self.training else max(1, EVALUATED_ROWS // inputs.shape[1])
        logits = vmap(one, chunk_size=networks)(state, rows)
        return logits.unflatten(0, (count, self.runs))

    @override
    def train(self, mode: bool = True) -> Self:
        self.skeleton[0].train(mode)
        return super().train(mode)

    @override
    def clip_gradients(self, norm: float) -> Tensor:
        gradients = [parameter.grad for parameter in self.stacked if parameter.grad is not None]
        parts = [torch.linalg.vector_norm(part.flatten(1), dim=1) for part in gradients]
        norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        if norm:
            scale = (norm / norms).clamp(max=1)
            for gradient in gradients:
                gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
        return norms.view(self.members, self.runs)

    @override
    def weights(self, member: int, run: int) -> dict[str, Tensor]:
        place = member * self.runs + run
        values = self._values()
        return {
            name: values[self.places[name]][place].detach().cpu().clone() for name in self.saved
        }

    @override
    def load_weights(self, member: int, run: int, weights: dict[str, Tensor]) -> None:
        _check_weights(self.weights(member, run), weights)
        values = self._values()
        with torch.no_grad():
            for name in self.saved:
                values[self.places[name]][member * self.runs + run].copy_(weights[name])

    def _values(self) -> list[Tensor]:
        return [*self.stacked, *self.constants]


class Separate(Members):
    """Networks of their own, one after the other: with batch norm, dropout, or many parameters.

    Args:
        networks: the M networks.
        members, runs: K and R.
        seeds: of what each run draws in a pass, such as dropout; None: nothing.
        rank: this process among several, whose dropout is its own.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        members: int,
        runs: int,
        seeds: Sequence[int] | None = None,
        rank: int = 0,
    ):
        super().__init__(members, runs)
        self.networks = nn.ModuleList(networks)
        self.seeds, self.rank = seeds, rank

    @override
    def forward(self, inputs: Tensor, members: int | None = None) -> Tensor:
        count = self.members if members is None else members
        logits = [
            torch.stack([self._logits(member, run, inputs[run]) for run in range(self.runs)])
            for member in range(count)
        ]
        return torch.stack(logits)

    @override
    def clip_gradients(self, norm: float) -> Tensor:
        norms = [
            nn.utils.clip_grad_norm_(network.parameters(), norm or float("inf"))
            for network in self.networks
        ]
        return torch.stack(norms).view(self.members, self.runs)

    @override
    def weights(self, member: int, run: int) -> dict[str, Tensor]:
        state = self._network(member, run).state_dict()
        return {name: values.detach().cpu().clone() for name, values in state.items()}

    @override
    def load_weights(self, member: int, run: int, weights: dict[str, Tensor]) -> None:
        _check_weights(self.weights(member, run), weights)
        self._network(member, run).load_state_dict(weights)

    def _network(self, member: int, run: int) -> nn.Module:
        return self.networks[member * self.runs + run]

    def _logits(self, member: int, run: int, inputs: Tensor) -> Tensor:
        network = self._network(member, run)
        if self.seeds is None:
            return network(inputs)
        place = (self.step, member, self.rank, *([self.part] if self.part else []))
        seed = derive_seed(self.seeds[run], Draw.DROPOUT, *place)
        with seeded(seed, inputs.device):
            return network(inputs)


def build_members(
    runs: Sequence[Run],
    shape: tuple[int, ...],
    classes: int,
    *,
    trust: Sequence[str] = (),
    rank: int = 0,
    fewest: int = 2,
) -> Members:
    """The members of R runs that share all settings but their seeds, newly initialised.

    A network follows from its run's initialisation seed and its number alone: the k-th member of
    two methods starts alike. A student's number comes after those of its teachers.

    Args:
        runs: the R runs.
        shape: of one input.
        classes: C.
        trust: see `build_model`.
        rank: see `Separate`.
        fewest: see `check_network`.
    Raises: ValueError as `check_network`.
    """
    method = runs[0].method
    check_network(
        runs[0], shape, classes, trust, fewest=fewest, networks=method.members * len(runs)
    )
    networks = [
        _initialised(run, method.teachers + member, shape, classes, trust)
        for member in range(method.members)
        for run in runs
    ]
    if stackable(networks[0], shape):
        return Stacked(networks, method.members, len(runs))
    seeds = [run.seeds.dropout for run in runs]
    random = runs[0].model.name not in NETWORKS or _has_dropout(networks[0])
    return Separate(networks, method.members, len(runs), seeds if random else None, rank)


def check_network(
    run: Run,
    shape: tuple[int, ...],
    classes: int,
    trust: Sequence[str] = (),
    *,
    fewest: int = 2,
    networks: int = 1,
) -> nn.Module:
    """A network of the run, newly initialised, of which everything that can be wrong was tried.

    Args:
        run, shape, classes, trust: see `build_members`.
        fewest: rows of the training's smallest pass.
        networks: how many of them there are to be.
    Raises: ValueError if there is no such model, it does not fit the data or memory, two of the
        same seed differ, or it cannot be trained on so few rows.
    """
    if run.method.top_k > classes:
        raise ValueError(
            f"method.top_k must be at most {classes}, the classes of {run.data.name}, got "
            f"{run.method.top_k}; 0 takes all"
        )
    held = 4 if run.optimisation.optimizer == "adamw" else 3  # weights, gradients, averages
    weights = count_weights(run.model, shape, classes)
    remedy = "choose a smaller model, or train fewer at a time"
    check_memory("the models' weights and gradients", 4.0 * held * networks * weights, remedy)
    network = _initialised(run, 0, shape, classes, trust)
    if run.model.name not in NETWORKS:
        _check_equal(run.model.name, network, _initialised(run, 0, shape, classes, trust))
    with seeded(0):
        check_logits(run.model.name, network, shape, classes, fewest)
    return network


def _initialised(
    run: Run, place: int, shape: tuple[int, ...], classes: int, trust: Sequence[str]
) -> nn.Module:
    with seeded(derive_seed(run.seeds.initialisation, Draw.INITIALISATION, place)):
        return build_model(run.model, shape, classes, trust)


def stackable(network: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether `torch.func` can compute it in a stack: small, no running statistics, nothing drawn.

    What else it may not do, such as to branch on its values, shows when it is tried on zeros.
    """
    normalised = any(
        isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
        for module in network.modules()
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    if normalised or _has_dropout(network) or parameters > STACKED_PARAMETERS:
        return False
    with seeded(0):
        before = random_state_hash(network)
        try:
            Stacked([network], 1, 1)(torch.zeros(1, 2, *shape))
        except Exception:  # of anybody's code, in a place that it was not written for
            return False
        return random_state_hash(network) == before


def _has_dropout(network: nn.Module) -> bool:
    return any(
        isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        for module in network.modules()
    )


def _check_equal(name: str, first: nn.Module, second: nn.Module) -> None:
    others = second.state_dict()
    for key, value in first.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        one, other = (tensors_hash([(key, values)])() for values in (value, others.get(key)))
        if one != other:
            raise ValueError(
                f"model {name} must have the same first weights whenever it is made from the same "
                f"seed, got others in {key}; draw them from torch's, NumPy's or Python's global "
                "generator, which the trainer seeds"
            )


def _check_weights(own: dict[str, Tensor], weights: Any) -> None:
    """Raises ValueError unless the names and shapes are the network's own.

    A floating-point dtype may be another: loading converts, as a teacher trained in another
    precision needs.
    """

    def fits(name: str) -> Callable[[Any, str], Any]:
        def form(value: Any, where: str) -> Any:
            expected = own[name]
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and expected.is_floating_point()
            ):
                expected = expected.to(value.dtype)
            return check(value, expected, where)

        return form

    try:
        check(weights, exactly({name: fits(name) for name in own}), "weights")
    except ValueError as error:
        raise ValueError(
            f"weights must be those of the run's model, got others, first {error}; they come from "
            "another model or another version of it"
        ) from None
