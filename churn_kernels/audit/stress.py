"""Settings that should not show in a bit, each switched on and off between replays of a step."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from churn_kernels.audit.operators import (
    AroundReplay,
    Differences,
    Finding,
    differences,
    find_operator,
)
from churn_kernels.audit.settings import onednn, thread_count


@dataclass(frozen=True)
class Stressed:
    """A step under one axis of stress.

    Attributes:
        axis: a name in `AXES`.
        finding: what replays with and without it showed.
    """

    axis: str
    finding: Finding


def _threads(replay: int) -> AbstractContextManager[None]:
    """One thread, or all of them."""
    return thread_count(1 if replay % 2 else max(2, torch.get_num_threads()))


def _onednn(replay: int) -> AbstractContextManager[None]:
    return onednn(torch._C._get_mkldnn_enabled() and replay % 2 == 0)


@contextmanager
def _allocator(replay: int) -> Iterator[None]:
    """Blocks held on every device, so that tensors lie at other addresses."""
    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    held = [
        torch.empty(513 + 1031 * i * replay, dtype=torch.uint8, device=device)
        for device in devices
        for i in range(16)
    ]
    yield
    del held


@contextmanager
def _contention(replay: int) -> Iterator[None]:
    """Other work at the same time: a busy thread a core, and a busy stream on every GPU."""
    if replay % 2 == 0:
        yield
        return
    done = threading.Event()

    def busy(device: str) -> None:
        # What this draws on must not be the generator or the autograd of the step.
        size = 256 if device == "cpu" else 2048  # the one fills a core, the other a GPU
        x = torch.ones(size, size, device=device)
        stream = torch.cuda.Stream(device) if device != "cpu" else None
        while not done.is_set():
            with torch.no_grad(), torch.cuda.stream(stream):
                torch.mm(x, x)
                if stream is not None:
                    stream.synchronize()

    devices = ["cpu"] * torch.get_num_threads()
    devices += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    others = [threading.Thread(target=busy, args=(device,), daemon=True) for device in devices]
    for thread in others:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in others:
            thread.join()


AXES: dict[str, AroundReplay] = {
    "nothing": nullcontext,
    "contention": _contention,
    "allocator": _allocator,
    "threads": _threads,
    "onednn": _onednn,
}
"""What `stress` switches, by name; "nothing" repeats the step as it is."""


@dataclass(frozen=True)
class Split:
    """A module whose outputs depend on the rows around a row.

    Attributes:
        module: its path.
        kind: its class.
        outputs: how its outputs for the whole batch and for parts of it differ.
    """

    module: str
    kind: str
    outputs: Differences


def split_batch(model: nn.Module, x: Tensor, parts: int = 2) -> list[Split]:
    """The modules that compute something else for a batch than for its parts.

    Args:
        model: called in evaluation mode, without gradients; its mode comes back afterwards.
        x: (N, ..) inputs, the batch first.
        parts: of the batch; N for one row at a time.
    Returns: in the order of execution the innermost modules that are given the same rows and return
        others. An empty list: every row's bits are its own.
    Raises: ValueError if there are fewer rows than parts, or fewer than two parts.
    """
    if not 2 <= parts <= len(x):
        raise ValueError(
            f"parts must be at least 2 and at most the number of rows, {len(x)}, got {parts}; "
            f"pass more rows"
        )
    whole = _calls(model, x)
    by_part = [_calls(model, part) for part in x.tensor_split(parts)]
    found = []
    for i, (name, module, given, returned) in enumerate(whole):
        calls = [calls[i] for calls in by_part if i < len(calls) and calls[i][0] == name]
        if len(calls) < parts or differences(given, torch.cat([call[2] for call in calls])):
            continue
        outputs = differences(returned, torch.cat([call[3] for call in calls]))
        if outputs:
            found.append(Split(name, type(module).__name__, outputs))
    return found


def _calls(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Path, module, input and output of each call of a module without modules of its own."""
    found: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def note(name: str, module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(returned, Tensor):
            found.append((name, module, given[0].clone(), returned.clone()))

    hooks = [
        module.register_forward_hook(
            lambda module, given, returned, name=name: note(name, module, given, returned)
        )
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return found


def stress(
    step: Callable[[], Any],
    model: nn.Module,
    restore: Callable[[], Any],
    *,
    axes: tuple[str, ...] = tuple(AXES),
    replays: int = 4,
) -> list[Stressed]:
    """Replay a step with each axis off and on, and name the first operator in which it shows.

    Args:
        step, model, restore: as of `find_operator`.
        axes: names in `AXES`. An operator that differs under "nothing" is not repeatable by itself,
            and what the other axes add to it cannot be told.
        replays: for each axis, every second one with it.
    Returns: one `Stressed` for each axis.
    Raises: ValueError for a name that is not in `AXES`.
    """
    for name in axes:
        if name not in AXES:
            raise ValueError(f"axes must be some of {', '.join(AXES)}, got {name!r}; drop it")
    return [
        Stressed(name, find_operator(step, model, restore, replays=replays, around=AXES[name]))
        for name in axes
    ]
