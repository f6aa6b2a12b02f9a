"""The one place that picks what computes a loss, and that says what was built.

| backend | computes | takes |
|---|---|---|
| `"cpu"` | the compiled kernel | CPU tensors |
| `"reference"` | float64 PyTorch, slow, differentiable twice | tensors of any device |

`"cuda"` and `"triton"` are names of the GPU backends; they are not part of this version.

Without a choice a CPU tensor goes to `"cpu"`, or to `"reference"` where the library was not built,
and a tensor on another device to `"reference"`; each fallback warns once. The environment variable
CHURN_BACKEND makes the choice for a process, and is read when the package is imported.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from churn_kernels import _autograd, _checks, _ops, modes, reference
from churn_kernels._options import LossOptions

BACKENDS = ("cpu", "cuda", "triton", "reference")
BUILD_COMMAND = "pip install --no-build-isolation ."

# The strongest mode a backend keeps: PyTorch's own reductions may depend on the batch's shape.
_KEEPS = {"cpu": "invariant", "reference": "run_to_run"}


def available_backends() -> tuple[str, ...]:
    """The backends that can be used here, fastest first: some of "cpu" and "reference"."""
    return ("cpu", "reference") if _ops.LOADED else ("reference",)


def _usable(name: object) -> str:
    """`name`, if it is a backend that can be used here."""
    usable = ", ".join(repr(backend) for backend in available_backends())
    if not isinstance(name, str) or name not in BACKENDS:
        names = ", ".join(repr(backend) for backend in BACKENDS)
        raise ValueError(f"backend must be one of {names}, got {name!r}; available here: {usable}")
    if name not in available_backends():
        remedy = (
            f"build the library with `{BUILD_COMMAND}`, or"
            if name == "cpu"
            else "this version has no such kernel yet;"
        )
        raise ValueError(
            f"backend {name!r} is not available; {remedy} choose one of those available: {usable}"
        )
    return name


def _from_environment() -> str | None:
    name = os.environ.get("CHURN_BACKEND")
    if not name:
        return None
    try:
        return _usable(name)
    except ValueError as error:
        raise ValueError(f"CHURN_BACKEND={name}: {error}") from None


_chosen: str | None = _from_environment()
_warned_devices: set[str] = set()

if _chosen is None and not _ops.LOADED:
    warnings.warn(
        f"the compiled library of churn_kernels is missing, losses run on the slow reference; "
        f"build it with `{BUILD_COMMAND}`",
        RuntimeWarning,
        stacklevel=2,
    )


@contextmanager
def backend(name: str) -> Iterator[None]:
    """A block in which the process uses the backend `name`; the choice before comes back after it.

    Args:
        name: one of `available_backends()`.
    Raises: ValueError for a backend that does not exist or was not built, before the block begins.
    """
    global _chosen
    before, _chosen = _chosen, _usable(name)
    try:
        yield
    finally:
        _chosen = before


def _pick(logits: Tensor) -> str:
    if logits.is_cpu:
        return _chosen or ("cpu" if _ops.LOADED else "reference")
    if _chosen == "cpu":
        raise ValueError(
            f"backend 'cpu' takes CPU tensors, got logits on {logits.device}; "
            f"pass logits.cpu(), or choose backend 'reference'"
        )
    device = logits.device.type
    if _chosen is None and device not in _warned_devices:
        _warned_devices.add(device)
        warnings.warn(
            f"churn_kernels has no kernel for {device} tensors yet, their losses run on the slow "
            f"reference; "
            f'choose it with `with churn_kernels.backend("reference")` to silence this',
            RuntimeWarning,
            stacklevel=4,
        )
    return "reference"


def evaluate(
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    mode: str | None,
    with_terms: bool,
) -> tuple[Tensor, Tensor]:
    """Check what depends on the tensors, pick a backend, and compute the loss and the terms.

    Args:
        logits: checked, K tensors (N, C) or one (K, N, C).
        target, class_weight: as the user passed them.
        options: checked, but for what depends on the tensors' shapes.
    Returns: the loss as `options.reduction` says, and the terms, if they were asked for.
    """
    first = logits[0]
    if target is not None:
        _checks.target(target, first.shape[-2], first.device)
    if class_weight is not None:
        class_weight = _checks.class_weight(class_weight, first)
    if options.top_k:
        _checks.top_k_fits(options.top_k, first.shape[-1])
    name = _pick(first)
    if mode is None:
        mode = modes.default
    if mode is not None:
        modes.check(mode, _KEEPS[name], name)
    if name == "cpu":
        return _autograd.evaluate(logits, target, class_weight, options, with_terms)
    return reference.loss(logits, target, class_weight, options)


def build_info() -> dict[str, Any]:
    """Facts about the compiled library: compiler, flags, instruction sets.

    Returns: `{"built": False, "build_command": ...}` where it was not built.
    """
    if find_spec("churn_kernels._C") is None:
        return {"built": False, "build_command": BUILD_COMMAND}
    return {"built": True, **import_module("churn_kernels._C").build_info()}
