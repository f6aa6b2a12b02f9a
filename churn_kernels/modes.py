"""Reduction modes: what the bits of a result may depend on besides its inputs.

| mode | guarantee |
|---|---|
| `"fast"` | none: on a GPU the last bits may vary from run to run |
| `"run_to_run"` | same machine, same call: same bits |
| `"invariant"` | as above, and a row's loss and gradient do not depend on the batch around it |
| `"exact"` | as above, and the same bits on every backend and machine |

A backend may substitute a stronger mode for a weaker one, never the reverse: a mode that it
cannot keep raises. The CPU kernel computes in `"invariant"` for each of the first three modes;
the Triton kernels use the requested mode. docs/determinism.md has the whole contract.
"""

import os
from contextlib import AbstractContextManager

import torch

from churn_kernels import _blocks

# From the weakest to the strongest.
MODES = ("fast", "run_to_run", "invariant", "exact")

# Their codes in the ops' arguments.
INVARIANT, EXACT = map(MODES.index, ("invariant", "exact"))


def check(mode: object, keeps: str = "exact", backend: str = "") -> str:
    """`mode`, if it exists and is no stronger than what the backend keeps."""
    if not isinstance(mode, str) or mode not in MODES:
        names = ", ".join(repr(name) for name in MODES)
        raise ValueError(f"mode must be one of {names}, got {mode!r}; pass one of these names")
    if MODES.index(mode) > MODES.index(keeps):
        raise NotImplementedError(
            f"the {backend} backend cannot keep mode {mode!r}; {keeps!r} is the strongest: "
            "pass that, or choose another backend"
        )
    return mode


def optional(mode: object) -> str | None:
    """`mode`, if it exists, or None."""
    return None if mode is None else check(mode)


def _from_environment() -> str | None:
    mode = os.environ.get("CHURN_REDUCTION_MODE")
    if not mode:
        return None
    try:
        return check(mode)
    except ValueError as error:
        raise ValueError(f"CHURN_REDUCTION_MODE={mode}: {error}") from None


# The process's default; None: PyTorch's determinism switch decides.
default: str | None = _from_environment()


def chosen(block: _blocks.Choices) -> str | None:
    """The mode set by these blocks or the process; None: PyTorch's determinism switch decides."""
    return default if block.mode == _blocks.UNSET else block.mode


def torch_mode() -> str:
    """The mode that corresponds to PyTorch's determinism switch."""
    return "run_to_run" if torch.are_deterministic_algorithms_enabled() else "fast"


def get_reduction_mode() -> str:
    """The reduction mode of calls that pass none, in this thread and task.

    Returns: the mode of the innermost open `reduction_mode` block; outside all blocks, the one last
    set by `set_reduction_mode` or the environment variable CHURN_REDUCTION_MODE; if unset,
    `"run_to_run"` if `torch.are_deterministic_algorithms_enabled()`, else `"fast"`.
    """
    return chosen(_blocks.choices()) or torch_mode()


def set_reduction_mode(mode: str | None) -> None:
    """Set the default reduction mode of all threads of the process; open blocks keep their own.

    Args:
        mode: "fast", "run_to_run", "invariant" or "exact"; None returns the choice to PyTorch's
            determinism switch, regardless of CHURN_REDUCTION_MODE.
    Raises: ValueError for another name.
    """
    global default
    default = optional(mode)


def reduction_mode(mode: str | None) -> AbstractContextManager[None]:
    """A block in which `mode` is the default, for the thread and asyncio task that opens it.

    Tasks created in the block inherit its mode; threads started in it do not, except those in which
    autograd runs a backward pass.

    Args:
        mode: as in `set_reduction_mode`.
    Raises: as `set_reduction_mode`, before the block begins.
    """
    return _blocks.block(mode=optional(mode))
