"""Recording a training run: a hash of everything that a step changes, step after step.

What differs first between two recorded runs, `compare` finds.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from churn_kernels.audit.generators import random_states_of, state_hash
from churn_kernels.audit.hashes import Later, data_hash, tensors_hash
from churn_kernels.audit.manifest import manifest, manifest_hash
from churn_kernels.audit.parts import Contents, Part, TrainingParts
from churn_kernels.audit.state import OWN, Named, check_state
from churn_kernels.audit.trace import AGAIN, BEFORE, RANDOM, VALUE, Writer, in_round, last_states
from churn_kernels.hashing import HASH_SPEC


@dataclass(frozen=True)
class _Entry:
    """A hash or a value on its way into the trace.

    Attributes:
        name: in the trace.
        later: gives it.
        base: of what it is the state; "" for what has none, such as gradients.
        elides: left out where the state is what it was.
    """

    name: str
    later: Later
    base: str = ""
    elides: bool = False


class Recorder:
    """What `record` gives: it hashes each step of the optimizer by itself."""

    def __init__(
        self,
        writer: Writer,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Named,
        first_step: int,
    ) -> None:
        self._writer = writer
        self._state = state
        self._step = first_step
        self._entries: list[_Entry] = []
        self._observed: set[str] = set()
        self._rounds = 1  # of steps of any optimizer, in a step of the trace
        self._begin: int | None = None  # where the entries of the next step begin
        self._last = last_states(writer.kept)
        self._versions: dict[str, Any] = {}
        self._settings: dict[str, Any] = {}
        self._random: dict[str, tuple[Any, str]] = {}
        parts = TrainingParts(model, optimizer, state)
        self._tensors = parts.tensors
        self._buffers = parts.buffers
        self._parts = [parts.optimizer, *parts.others, parts.parameters]
        self._hooks = []
        for name, one in [("", optimizer), *state.items()]:
            if not isinstance(one, torch.optim.Optimizer):
                continue
            stepped = parts.named[name] if name else [parts.optimizer]
            stepped = [*stepped, *([parts.parameters] if not name or _shares(one, model) else [])]
            stepped += [
                parts.named[other][0]
                for other, module in state.items()
                if isinstance(module, nn.Module) and _shares(one, module)
            ]
            self._hooks += [
                one.register_step_pre_hook(partial(self._before_step, name)),
                one.register_step_post_hook(partial(self._after_step, name, stepped)),
            ]

    def observe(self, **values: Any) -> None:
        """Hash what the next step starts from or comes to: batch indices, inputs, the loss.

        Args:
            values: by name, in the order in which the step has them; tensors, or sequences of
                tensors, of numbers or of strings. A name may come once a step.
        Raises: ValueError for a name that the step has already.
        """
        for name, value in values.items():
            if name in self._observed or name in OWN or name in self._state:
                raise ValueError(
                    f"observe's names must be new in a step and none of "
                    f"{', '.join((*OWN, *self._state))}, got {name!r} twice; give what comes again "
                    f"another name"
                )
            if self._begin is None:
                self._look_for_changes(rehash=False)
                self._hash_buffers(BEFORE)
            self._observed.add(name)
            self._entries.append(_Entry(name, data_hash(value)))  # new in the step

    def close(self) -> None:
        """Stop recording; the file is on the disk."""
        for hook in self._hooks:
            hook.remove()
        self._writer.close()

    def start(self) -> None:
        """Write step 0: the state before the first step."""
        self._hash_random_states()
        self._hash_buffers()
        for part in self._parts:
            self._hash_after(part)
        self._finish_step()

    def resume(self, header: dict[str, Any]) -> None:
        """Write what the run goes on with, so that a generator shows only once it is drawn from."""
        self._random = {
            whose: (state, state_hash(state))
            for whose, state in random_states_of(self._tensors.gpus).items()
        }
        states = {f"{RANDOM}{whose}": found for whose, (_, found) in self._random.items()}
        self._writer.resumed(self._step, header, states)

    def _look_for_changes(self, *, rehash: bool) -> None:
        """Hash what was changed since a step.

        Args:
            rehash: also what version counters say has not: writes through `.data` pass them by.
        """
        when = ""
        if self._begin is None:
            self._begin = len(self._entries)
            when = "" if rehash else BEFORE
        self._hash_random_states(when)
        for part in self._parts:
            found = part.read()
            self._add_settings(found, BEFORE)
            changed = self._is_changed(part, found)
            if not changed and (part.counted or not rehash or not found.tensors):
                continue
            entry = self._entry(f"{part.name}{BEFORE}", found.hash(), part.name, elides=True)
            # Of what no counter saw, nobody knows when it happened.
            late = changed and not part.early
            self._entries.insert(len(self._entries) if late else self._begin, entry)
            self._begin += not late

    def _before_step(self, name: str, optimizer: torch.optim.Optimizer, *given: Any) -> None:
        self._tensors.look()
        self._look_for_changes(rehash=True)
        if _has_closure(given):
            self._hash_buffers(BEFORE)
        else:  # the forward pass has changed them
            self._hash_gradients(name, optimizer)

    def _after_step(
        self, name: str, stepped: list[Part], optimizer: torch.optim.Optimizer, *given: Any
    ) -> None:
        if _has_closure(given):  # forward and backward pass were in it
            self._tensors.look()
            self._hash_random_states()
            self._hash_gradients(name, optimizer)
        for part in stepped:
            self._hash_after(part)
        self._begin = None
        self._rounds += 1
        if not name:
            self._step += 1
            self._finish_step()

    def _hash_after(self, part: Part) -> None:
        found = part.read()
        self._add_settings(found, "")
        self._is_changed(part, found)
        self._add(part.name, found.hash(), part.name)

    def _is_changed(self, part: Part, found: Contents) -> bool:
        """Whether it was written to since it was last asked for, as far as counters tell."""
        now = found.versions()
        before, self._versions[part.name] = self._versions.get(part.name), now
        return before != now

    def _add_settings(self, found: Contents, when: str) -> None:
        for name, value in found.settings.items():
            if self._settings.get(name, self) == value:
                continue
            self._settings[name] = value
            later = partial(str, f"{VALUE}{value!r}")
            self._add(f"{name}{when}", later, name, elides=True)

    def _hash_buffers(self, when: str = "") -> None:
        """Those of the model; ahead of its forward pass only if counters say that they changed."""
        found = self._buffers.read()
        if self._is_changed(self._buffers, found) or not when:
            later = tensors_hash(found.tensors)
            self._add(f"buffers{when}", later, "buffers", elides=bool(when))

    def _hash_gradients(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        if not name:
            self._hash_buffers()
            gradients = tensors_hash((n, p.grad) for n, p in self._tensors.parameters)
            self._add("gradients", gradients)
            return
        of_groups = [p.grad for group in optimizer.param_groups for p in group["params"]]
        later = tensors_hash((f"{i}", gradient) for i, gradient in enumerate(of_groups))
        self._add(f"{name} gradients", later)

    def _hash_random_states(self, when: str = "") -> None:
        for whose, state in random_states_of(self._tensors.gpus).items():
            if whose not in self._random or self._random[whose][0] != state:
                self._random[whose] = state, state_hash(state)
                name, later = f"{RANDOM}{whose}", partial(str, self._random[whose][1])
                self._add(f"{name}{when}", later, name, elides=True)

    def _add(self, name: str, later: Later, base: str = "", elides: bool = False) -> None:
        self._entries.append(self._entry(name, later, base, elides))

    def _entry(self, name: str, later: Later, base: str, elides: bool) -> _Entry:
        name = name if name in OWN else in_round(name, self._rounds)
        return _Entry(name, later, base, elides)

    def _finish_step(self) -> None:
        hashes: dict[str, str] = {}
        for entry in self._entries:
            found = entry.later()
            if entry.elides and self._last.get(entry.base) == found:
                continue
            if entry.base:
                self._last[entry.base] = found
            name = entry.name
            while name in hashes:
                name += AGAIN
            hashes[name] = found
        self._writer.step(self._step, hashes)
        self._entries, self._observed, self._rounds = [], set(), 1


def _has_closure(given: tuple[Any, ...]) -> bool:
    """Of the arguments of a hook: whether `step`, a method, was given the function it calls."""
    args, kwargs = given
    return any(x is not None for x in (*args[1:2], kwargs.get("closure")))


def _shares(optimizer: torch.optim.Optimizer, module: nn.Module) -> bool:
    own = {id(p) for p in module.parameters()}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


@contextmanager
def record(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    state: Named | None = None,
    resume_at: int | None = None,
) -> Iterator[Recorder]:
    """Record a training run while the block lasts, one line of `path` a step of the optimizer.

        with ck.audit.record("run.trace", model, optimizer) as recorder:
            for indices, (x, y) in batches:
                recorder.observe(batch=indices)
                loss = ...
                recorder.observe(loss=loss)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Each step hashes, in the order in which it comes to them: of the random states, the optimizer's
    settings and state, what `state` names and the parameters what was changed since the step before
    (where something is observed, ahead of that, with the buffers, and again at the optimizer's
    step); what was observed; the buffers, the gradients, and after the step the parameters and the
    optimizer's state. Settings, such as the learning rate, and the numbers in a scheduler's state
    stand in the trace as they are. Nothing of the run is changed, and no random number is drawn.

    Args:
        path: the file to write; about 400 bytes a step. It must not exist yet.
        model: its parameters and buffers are hashed. Of a DTensor (FSDP2's `fully_shard`) the whole
            tensor counts, so that a trace does not show how many processes share it: all of them
            have to record, each to a file of its own, and add up 16 bytes a tensor for each hash.
        optimizer: its steps are the trace's.
        state: what else the training changes, by name, as of `snapshot`. Steps of optimizers among
            it are hashed as those of `optimizer`, in the line of its next step. Of the state of
            optimizers, before a step, PyTorch's version counters tell whether it was changed: a
            change through `.data` shows after the step.
        resume_at: a step that `path` has: go on after it, as a run does that was interrupted and
            starts again from its checkpoint of that step. Later steps are forgotten, and a line
            says what it ran on from there, and with which random states.
    Returns: a `Recorder`, to `observe` what it cannot see: batch indices, losses.
    Raises: FileExistsError if `path` exists and `resume_at` is None; TraceError if `path` cannot be
        resumed at that step by this model; ValueError for lazy modules that have not been run, and
        for what `state` cannot hold; OSError if it cannot be written.
    """
    state = state or {}
    check_state(model, state)
    found = manifest()
    header = {
        "hash_spec": HASH_SPEC,
        "tensors": recorded_tensors(model),
        "optimizer": type(optimizer).__name__,
        "state": {name: type(value).__name__ for name, value in state.items()},
        "manifest_hash": manifest_hash(found),
        "manifest": found,
    }
    path = Path(path)
    begins = resume_at is None
    writer = Writer(path, header) if begins else Writer.resume(path, header, resume_at or 0)
    recorder = Recorder(writer, model, optimizer, state, resume_at or 0)
    try:
        if begins:
            recorder.start()
        else:
            recorder.resume(header)
        yield recorder
    finally:
        recorder.close()


def recorded_tensors(model: nn.Module) -> list[list[Any]]:
    """Name, dtype and shape of everything in a model that is recorded."""
    return [
        [name, str(x.dtype), list(x.shape)]
        for name, x in (*model.named_parameters(), *model.named_buffers())
    ]
