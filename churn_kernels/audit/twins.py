"""Deterministic twins: what takes the place of a suspect, so that what it causes goes away."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from churn_kernels.audit.log import written_tensors
from churn_kernels.audit.pairs import Around
from churn_kernels.audit.settings import (
    cublas_workspace,
    deterministic_algorithms,
    deterministic_cudnn,
    onednn,
    thread_count,
)
from churn_kernels.modes import reduction_mode

_Call = tuple[str, tuple[torch.Size, ...], int]


class Pins:
    """Operators whose outputs are recorded on side 0, and take the place of others' on side 1.

    Call it with the side, or with the number of a replay, for the block that a step runs in: 0
    records anew, every other number gets what was recorded, the n-th call with inputs of a shape
    what the n-th had. A call that side 0 did not make keeps its own outputs.

    What a pinned operator returns follows from nothing on side 1: neither its own race nor any
    other difference in its inputs passes through it. A divergence with pins in place is thus a
    lower bound of one whose operators repeat their bits and still depend on their inputs.

    Args:
        names: of operators, as `Operation` has them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.outputs: dict[_Call, list[Tensor]] = {}

    def __call__(self, side: int, model: nn.Module | None = None) -> "_Pinned":
        """The block of a side or replay."""
        if side == 0:
            self.outputs = {}
        return _Pinned(self, side == 0)


class _Pinned(TorchDispatchMode):
    def __init__(self, pins: Pins, records: bool) -> None:
        super().__init__()
        self._pins, self._records = pins, records
        self._calls: Counter[Any] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if str(func) not in self._pins.names:
            return result
        outputs = written_tensors(func, args, kwargs, result)
        given = tuple(x.shape for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        call = str(func), given, self._calls[str(func), given]
        self._calls[str(func), given] += 1
        if self._records:
            self._pins.outputs[call] = [x.detach().clone() for x in outputs]
        for x, recorded in zip(outputs, self._pins.outputs.get(call, outputs), strict=True):
            if x.shape == recorded.shape:
                x.detach().copy_(recorded)
        return result


class _InParts:
    """A module's forward, of a batch in parts."""

    def __init__(self, module: nn.Module, parts: int) -> None:
        self.before = module.__dict__.get("forward")
        self.whole = module.forward
        if isinstance(self.before, _InParts):  # the innermost block decides
            self.whole = self.before.whole
        self.dimensions = (
            2 if isinstance(module, nn.Linear) else module.get_parameter("weight").ndim
        )
        self.parts = parts

    def __call__(self, x: Tensor) -> Tensor:
        parts = min(self.parts, len(x)) if x.ndim >= self.dimensions else 1
        if parts < 2:
            return self.whole(x)
        return torch.cat([self.whole(part) for part in x.tensor_split(parts)])


def splittable(model: nn.Module) -> list[nn.Module]:
    """The modules that `in_parts` gives a batch in parts."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [module for module in model.modules() if isinstance(module, kinds)]


@contextmanager
def in_parts(model: nn.Module, parts: int = 2) -> Iterator[None]:
    """A block in which linear layers and convolutions compute a batch in parts.

    PyTorch's own modules of these: a model that calls `torch.nn.functional` computes as ever.
    """
    patched = splittable(model)
    for module in patched:
        module.__dict__["forward"] = _InParts(module, parts)
    try:
        yield
    finally:
        for module in patched:
            before = module.__dict__.pop("forward").before
            if before is not None:
                module.__dict__["forward"] = before


def _setting(enter: Callable[[], AbstractContextManager[Any]]) -> Around:
    return lambda side, model: enter()


TWINS: dict[str, Around] = {
    "threads": _setting(lambda: thread_count(1)),
    "onednn": _setting(lambda: onednn(False)),
    "batch": lambda side, model: in_parts(model),
    "deterministic algorithms": _setting(lambda: deterministic_algorithms(True)),
    "exact mode": _setting(lambda: reduction_mode("exact")),
    "cudnn": _setting(deterministic_cudnn),
    "cublas workspace": _setting(cublas_workspace),
}
"""The twin of a suspect, by its name: the block that both sides of a pair take a step in.

"threads": one thread. "onednn": PyTorch's own kernels. "batch": linear layers and convolutions
compute batches in the same two parts. "deterministic algorithms": PyTorch's switch. "exact mode":
of this library's losses. "cudnn": deterministic, without benchmarks. "cublas workspace": one of
its own for each stream. Operators are pinned: `Pins`.
"""


def missing_twins() -> dict[str, str]:
    """The suspects that are not here, and why."""
    found: dict[str, str] = {}
    if not torch.cuda.is_available():
        found |= dict.fromkeys(("cudnn", "cublas workspace"), "there is no CUDA device")
    if not torch.backends.mkldnn.is_available():
        found["onednn"] = "PyTorch was built without it"
    return found


def two_parts(side: int, model: nn.Module) -> AbstractContextManager[None]:
    """Side 1 computes batches in two parts, side 0 as they are."""
    return in_parts(model) if side else nullcontext()
