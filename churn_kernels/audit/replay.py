"""Trainings that can be run again, and the replay of the step in which two of them first differ."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from churn_kernels.audit.blame import misfit
from churn_kernels.audit.compare import Comparison
from churn_kernels.audit.generators import random_state_hash
from churn_kernels.audit.hashes import data_hash, tensors_hash
from churn_kernels.audit.log import FilledMemory, OperatorLog
from churn_kernels.audit.operators import AroundReplay, Finding, first_difference, with_outside
from churn_kernels.audit.outside import changed_outside
from churn_kernels.audit.parts import TrainingParts
from churn_kernels.audit.record import recorded_tensors
from churn_kernels.audit.settings import as_recorded
from churn_kernels.audit.state import Named, check_state, snapshot
from churn_kernels.audit.trace import last_states


class ReplayError(ValueError):
    """A target that cannot be imported or built, or a replay that cannot be."""


@dataclass(frozen=True)
class Training:
    """A training that can be run again.

    Attributes:
        model, optimizer: as they are before the first step.
        step: step(n) runs the n-th step, counting from 1: forward, backward, optimizer. What it
            does follows from n, the model, the optimizer, `state` and the global random states
            alone, so it picks its batch by n, or from an iterator in `state`.
        predict: returns the logits, (N, C), of rows that stay the same; None: the audit compares no
            predictions.
        resume: resume(n) loads the nearest checkpoint before step n, random states included, and
            returns the number of the last step it has seen; None: replays begin at step 1.
        state: what else a step changes, by name, as of `snapshot`: other models and optimizers,
            schedulers, `GradScaler`s, averages of the weights, iterators.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[int], Any]
    predict: Callable[[], Tensor] | None = None
    resume: Callable[[int], int] | None = None
    state: Named = field(default_factory=dict)


Build = Callable[[str], Training]
"""What a target is: build(device) seeds the random states and makes a `Training` there."""


def load_target(target: str) -> Build:
    """Import the function that builds a training.

    Args:
        target: "package.module:function" or "path/to/file.py:function". Its module is run, as any
            import does, with the current folder among the places it imports from.
    Raises: ReplayError if there is no such function. What the module itself raises comes through.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ReplayError(
            f"target must be package.module:function or path/to/file.py:function, got {target!r}; "
            f"name the function that builds the training"
        )
    _import_from(os.getcwd())
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module_of_name(place)
    build = getattr(module, name, None)
    if not callable(build):
        raise ReplayError(
            f"target must name a function of {place}, got {name!r}, which is "
            f"{'not there' if build is None else type(build).__name__}; define {name}(device)"
        )
    if takes := misfit(build, "cpu"):
        raise ReplayError(
            f"target must name a function of one argument, the device's name, got {name}{takes}; "
            f"define {name}(device)"
        )
    return build


def _import_from(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _module_of_name(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that the target itself imports
        raise ReplayError(
            f"target must name a module that can be imported from {os.getcwd()}, got {name!r}; "
            f"check its spelling, or name its file"
        ) from None


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise ReplayError(f"target must name a file that exists, got {path}; check the path")
    loaded = getattr(sys.modules.get(path.stem), "__file__", None)
    if loaded and os.path.exists(loaded) and path.samefile(loaded):
        return sys.modules[path.stem]  # what it registers, such as operators, comes once
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    known = sys.modules.setdefault(path.stem, module)  # where dataclasses and pickle look for it
    _import_from(str(path.parent.absolute()))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if known is module:  # half of it; the next attempt starts anew
            sys.modules.pop(path.stem, None)
        raise
    return module


def built(build: Build, device: str, before: int = 1) -> Training:
    """A training on a device, as it is before a step.

    Raises: ReplayError if it is no `Training`, if its models are lazy and have not been run, if its
        `state` cannot be brought back, or if its `resume` goes too far.
    """
    with FilledMemory():  # buffers of `torch.empty` are equal, too
        training = build(device)
    if not isinstance(training, Training):
        raise ReplayError(
            f"target must return a churn_kernels.audit.Training, got {type(training).__name__}; "
            f"return Training(model, optimizer, step)"
        )
    _check(training)
    try:
        check_state(training.model, training.state)
    except ValueError as error:
        raise ReplayError(str(error)) from None
    done = training.resume(before) if training.resume else 0
    if not isinstance(done, int) or not 0 <= done < before:
        raise ReplayError(
            f"resume({before}) must return a step from 0 to {before - 1}, got {done}; load a "
            f"checkpoint from before the step"
        )
    for n in range(done + 1, before):
        training.step(n)
    return training


def _check(training: Training) -> None:
    """Refuse what is not of the kinds that `Training` names.

    Raises: ReplayError.
    """
    for name, kind in (("model", nn.Module), ("optimizer", torch.optim.Optimizer)):
        if not isinstance(value := getattr(training, name), kind):
            raise ReplayError(
                f"Training.{name} must be a torch {kind.__name__}, got {type(value).__name__}; "
                f"return Training(model, optimizer, step)"
            )
    for name, arguments in (("step", (1,)), ("predict", ()), ("resume", (1,))):
        function = getattr(training, name)
        if function is None and name != "step":
            continue
        takes = misfit(function, *arguments) if callable(function) else type(function).__name__
        if takes:
            wanted = "a function of the step's number" if arguments else "a function of nothing"
            raise ReplayError(
                f"Training.{name} must be {wanted}, got {takes}; define it as "
                f"{name}({'n' if arguments else ''})"
            )


def state_hashes(training: Training) -> dict[str, str]:
    """128 bits of each part of the state, in the order in which a difference spreads."""
    parts = TrainingParts(training.model, training.optimizer, training.state)
    buffers = tensors_hash(parts.tensors.buffers)()
    hashes = {"random state": random_state_hash(training.model), "buffers": buffers}
    for part in (*parts.others, parts.parameters, parts.optimizer):
        found = part.read()
        hashes[part.name] = found.hash()()
        if found.settings:
            hashes[f"{part.name} settings"] = data_hash(found.settings)()
    return hashes


def find_in_step(
    trainings: Sequence[Training],
    step: int,
    *,
    replays: int,
    around: AroundReplay = nullcontext,
) -> Finding:
    """`find_operator` for a step of one training, or of two that take turns on two devices.

    Args:
        trainings: one, or two of the same model; the second takes on the state of the first.
        step: its number; the trainings are in the state before it.
        replays, around: as of `find_operator`.
    """
    first, *others = trainings
    for other in others:
        other.model.load_state_dict(first.model.state_dict())
        other.optimizer.load_state_dict(first.optimizer.state_dict())
        for name, value in first.state.items():
            if isinstance(value, nn.Module | torch.optim.Optimizer):
                other.state[name].load_state_dict(value.state_dict())
    restores = [snapshot(one.model, one.optimizer, one.state) for one in trainings]
    for training, restore in zip(trainings, restores, strict=True):
        restore()
        training.step(step)  # what is made at first use is there from now on

    def run(replay: int, keep: int, fill: int) -> OperatorLog:
        turn = replay % len(trainings)
        training = trainings[turn]
        restores[turn]()
        with around(replay), OperatorLog(training.model, keep, fill, training.state) as log:
            training.step(step)
        return log

    found = first_difference(run, replays)
    known = {"model": first.model, "optimizer": first.optimizer, **first.state}
    step_again = partial(first.step, step)
    return with_outside(found, lambda: changed_outside(first.step, step_again, restores[0], known))


@dataclass(frozen=True)
class Replayed:
    """The step in which two recorded runs first differ, run again.

    Attributes:
        step: its number.
        devices: on which it ran, in turns.
        as_recorded: whether parameters and optimizer had, before it, the bits of the traces.
        finding: what the replays showed.
    """

    step: int
    devices: tuple[str, ...]
    as_recorded: bool
    finding: Finding


def replay(
    comparison: Comparison,
    build: Build,
    *,
    devices: Sequence[str] = ("cpu",),
    replays: int = 10,
) -> Replayed:
    """Run the first step that differs again and again, and find the operator that makes it differ.

    The replays take turns with the settings that the two runs were recorded with, as far as
    `as_recorded` sets them, so that an operator that depends on one of them is found too.

    Args:
        comparison: of two traces that differ after the first step.
        build: builds the training that was recorded.
        devices: one, or two that take turns.
        replays: of the step, at least 2.
    Raises: ReplayError if the traces do not differ, or before the first step; if `build` makes
        another model; if a recorded setting cannot be taken on.
    """
    difference = comparison.difference
    if difference is None or difference.step < 1:
        found = "none" if difference is None else "one before it"
        raise ReplayError(
            f"comparison must have a difference in or after step 1 to replay, got {found}; compare "
            f"the seeds and the initialisations"
        )
    manifests = [trace.manifest(difference.step) for trace in (comparison.a, comparison.b)]
    for trace, manifest in zip((comparison.a, comparison.b), manifests, strict=True):
        try:
            with as_recorded(manifest):
                pass
        except (TypeError, ValueError, RuntimeError) as error:
            raise ReplayError(
                f"{trace.path} must hold settings that can be set, got: {error}; replay it where "
                f"it was recorded"
            ) from error
    with as_recorded(manifests[0]):
        trainings = [built(build, device, difference.step) for device in devices]
    first = trainings[0]
    tensors = recorded_tensors(first.model)
    if tensors != comparison.a.header["tensors"]:
        raise ReplayError(
            "target must build the model that was recorded, with the same names, dtypes and "
            "shapes, got another; name the function of the recorded training"
        )
    number = difference.step - 1
    recorded = [step for step in comparison.a.steps if step.number == number]
    now = state_hashes(first)
    then = last_states(recorded)
    same = all(then.get(name) == now[name] for name in ("parameters", "optimizer"))
    finding = find_in_step(
        trainings,
        difference.step,
        replays=replays,
        around=lambda replay: as_recorded(manifests[replay % 2]),
    )
    return Replayed(difference.step, tuple(devices), bool(recorded) and same, finding)
