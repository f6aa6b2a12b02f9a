"""Recording a training run: a hash of everything that a step changes, step after step.

What differs first between two recorded runs, `compare` finds.
"""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from churn_kernels.audit.manifest import manifest, manifest_hash
from churn_kernels.audit.trace import Writer
from churn_kernels.hashing import HASH_SPEC, check, is_dense, tensor_hash, words_of

# What a recorder hashes by itself, in the order in which a step comes to it.
_OWN = ("random state", "buffers", "gradients", "parameters", "optimizer")

# Gives a hash of which a GPU may still be computing the words, and waits for them.
Later = Callable[[], str]


class Recorder:
    """What `record` gives: it hashes each step of the optimizer by itself."""

    def __init__(
        self,
        writer: Writer,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        first_step: int,
    ) -> None:
        self._writer = writer
        self._model = model
        self._optimizer = optimizer
        self._step = first_step
        self._hashes: dict[str, Later] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def observe(self, **values: Any) -> None:
        """Hash what the next step starts from or comes to: batch indices, inputs, the loss.

        Args:
            values: by name, in the order in which the step has them; tensors, or sequences of
                tensors, of numbers or of strings. A name may come once a step.
        Raises: ValueError for a name that the step has already.
        """
        for name, value in values.items():
            if name in self._hashes or name in _OWN:
                raise ValueError(
                    f"observe's names must be new in a step and none of {', '.join(_OWN)}, got "
                    f"{name!r} twice; give what comes again another name"
                )
            self._hashes[name] = _hash_of(value)

    def close(self) -> None:
        """Stop recording; the file is on the disk."""
        for hook in self._hooks:
            hook.remove()
        self._writer.close()

    def start(self) -> None:
        """Write step 0: the state before the first step."""
        self._hash_surroundings()
        self._finish_step()

    def _before_step(self, *_: Any) -> None:
        self._hash_surroundings()
        self._hashes["gradients"] = tensors_hash(
            (name, p.grad) for name, p in self._model.named_parameters()
        )

    def _after_step(self, *_: Any) -> None:
        self._step += 1
        self._finish_step()

    def _hash_surroundings(self) -> None:
        self._hashes["random state"] = partial(str, random_state_hash(self._model))
        self._hashes["buffers"] = tensors_hash(self._model.named_buffers())

    def _finish_step(self) -> None:
        self._hashes["parameters"] = tensors_hash(self._model.named_parameters())
        self._hashes["optimizer"] = optimizer_hash(self._optimizer)
        self._writer.step(self._step, {name: later() for name, later in self._hashes.items()})
        self._hashes = {}


@contextmanager
def record(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
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

    Each step hashes, in the order in which it comes to them: what was observed, the states of the
    random number generators and the buffers before the optimizer's step, the gradients, the
    parameters after it, and the optimizer's state and settings. Nothing of the run is changed, and
    no random number is drawn.

    Args:
        path: the file to write; about 400 bytes a step. It must not exist yet.
        model: its parameters and buffers are hashed. Of a DTensor (FSDP2's `fully_shard`) the whole
            tensor counts, so that a trace does not show how many processes share it: all of them
            have to record, each to a file of its own, and add up 16 bytes a tensor and step.
        optimizer: its steps are the trace's.
        resume_at: a step that `path` has: go on after it, as a run does that was interrupted and
            starts again from its checkpoint of that step. Later steps are forgotten, and a line
            says what it ran on from there.
    Returns: a `Recorder`, to `observe` what it cannot see: batch indices, losses.
    Raises: FileExistsError if `path` exists and `resume_at` is None; TraceError if `path` cannot be
        resumed at that step by this model; OSError if it cannot be written.
    """
    found = manifest()
    header = {
        "hash_spec": HASH_SPEC,
        "tensors": recorded_tensors(model),
        "optimizer": type(optimizer).__name__,
        "manifest_hash": manifest_hash(found),
        "manifest": found,
    }
    path = Path(path)
    begins = resume_at is None
    writer = Writer(path, header) if begins else Writer.resume(path, header, resume_at or 0)
    recorder = Recorder(writer, model, optimizer, resume_at or 0)
    try:
        if begins:
            recorder.start()
        yield recorder
    finally:
        recorder.close()


def recorded_tensors(model: torch.nn.Module) -> list[list[Any]]:
    """Name, dtype and shape of everything in a model that is recorded."""
    return [
        [name, str(x.dtype), list(x.shape)]
        for name, x in (*model.named_parameters(), *model.named_buffers())
    ]


def tensors_hash(tensors: Iterable[tuple[str, Tensor | None]]) -> Later:
    """128 bits of named tensors in their order; None where one is not there."""
    kinds = []
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for name, x in tensors:
        if x is None:
            kinds.append(f"{name}\0none\0")
            continue
        check(x)
        if not is_dense(x):
            kinds.append(f"{name}\0{tensor_hash(x)}\0")
            continue
        by_device.setdefault(_device_of(x), []).append((len(kinds), x))
        kinds.append(f"{name}\0{x.dtype}{tuple(x.shape)}\0")
    digest = hashlib.blake2b("".join(kinds).encode(), digest_size=16)
    words = []
    for several in by_device.values():
        places, dense = zip(*several, strict=True)
        words.append((places, words_of(dense)))
    return partial(_finished, digest, words)


def _device_of(x: Tensor) -> torch.device:
    """Tensors of one device are hashed at once."""
    return x.device


def _finished(digest: "hashlib.blake2b", words: list[tuple[tuple[int, ...], Tensor]]) -> str:
    """The words in the order of their tensors, whatever devices these lie on."""
    by_place = {
        place: row
        for places, of_device in words
        for place, row in zip(places, of_device.cpu().numpy(), strict=True)
    }
    for place in sorted(by_place):
        digest.update(by_place[place].tobytes())
    return digest.hexdigest()


def optimizer_hash(optimizer: torch.optim.Optimizer) -> Later:
    """128 bits of an optimizer's state, by the order of its parameters, and of its settings."""
    tensors: list[tuple[str, Tensor | None]] = []
    rest: list[Any] = []
    for g, group in enumerate(optimizer.param_groups):
        for key, setting in group.items():
            if key != "params":
                _sort_out(f"{g}.{key}", setting, tensors, rest)
        for i, parameter in enumerate(group["params"]):
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                _sort_out(f"{g}.{i}.{key}", value, tensors, rest)
    return _hash_of_both(tensors, rest)


def _hash_of_both(tensors: list[tuple[str, Tensor | None]], rest: list[Any]) -> Later:
    """Of tensors, and of what else there is, by its representation."""
    later = tensors_hash(tensors)
    head = repr(rest).encode()
    return lambda: hashlib.blake2b(head + later().encode(), digest_size=16).hexdigest()


def random_state_hash(model: torch.nn.Module) -> str:
    """128 bits of the states of Python's and NumPy's generators, and of PyTorch's.

    Of the latter those of the CPU and of the GPUs that the model lies on: what other GPUs a machine
    has does not show.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(random.getstate()).encode())
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the generator that others draw from
    digest.update(f"{kind}{rest}".encode())
    digest.update(np.asarray(keys).tobytes())
    gpus = {x.device for x in (*model.parameters(), *model.buffers()) if x.is_cuda}
    states = [torch.get_rng_state()]
    states += [torch.cuda.get_rng_state(gpu) for gpu in sorted(gpus, key=lambda gpu: gpu.index)]
    for state in states:
        digest.update(state.numpy().tobytes())
    return digest.hexdigest()


def _sort_out(
    name: str, value: Any, tensors: list[tuple[str, Tensor | None]], rest: list[Any]
) -> None:
    """A value that is a tensor to the tensors, any other by its representation to the rest."""
    if isinstance(value, Tensor):
        tensors.append((name, value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _sort_out(f"{name}.{key}", item, tensors, rest)
    elif isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
        for i, item in enumerate(value):
            _sort_out(f"{name}.{i}", item, tensors, rest)
    else:
        rest.append((name, value))


def _hash_of(value: Any) -> Later:
    tensors: list[tuple[str, Tensor | None]] = []
    rest: list[Any] = []
    _sort_out("", value, tensors, rest)
    return _hash_of_both(tensors, rest)
