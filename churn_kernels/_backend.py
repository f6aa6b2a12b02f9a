"""Selects the backend of each call, and reports what was built.

| backend | computes with | takes |
|---|---|---|
| `"triton"` | the Triton kernels | CUDA tensors; CPU tensors with TRITON_INTERPRET=1 |
| `"cpu"` | the compiled kernel | CPU tensors |
| `"reference"` | float64 PyTorch, slow, differentiable twice | tensors of any device |

`"cuda"` is reserved for a compiled GPU backend; it is not part of this version.

By default a CPU tensor goes to `"cpu"`, a CUDA tensor to `"triton"`, and either to `"reference"` if
that kernel is not available; each fallback warns once and says what is missing. The environment
variable CHURN_BACKEND selects a backend for the process, and is read when the package is imported.
So is TRITON_INTERPRET, with which Triton runs its kernels in Python.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from churn_kernels import (
    _autograd,
    _blocks,
    _checks,
    _class_shards,
    _constants,
    _ops,
    modes,
    reference,
)
from churn_kernels._inference import saveable_in_graph
from churn_kernels._ops import BUILD_COMMAND, OpSet
from churn_kernels._options import LossOptions

BACKENDS = ("cpu", "cuda", "triton", "reference")

# The strongest mode of each backend: PyTorch's own reductions may depend on the batch's shape.
_KEEPS = {"cpu": "exact", "triton": "exact", "reference": "run_to_run"}

# The oldest GPU generation whose instructions the Triton kernels are tested for.
OLDEST_GPU = (8, 0)

# The Triton kernels are unrolled over the models: with more, compilation would take minutes.
MOST_TRITON_MODELS = 8

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _load() -> dict[str, OpSet]:
    """The ops of every usable backend. Importing Triton is slow, so only if it can be used."""
    found = {}
    if (torch.cuda.is_available() or _INTERPRETED) and _ops.triton_missing() is None:
        found["triton"] = _autograd.differentiable(_ops.triton())
    if _ops.COMPILED is not None:
        found["cpu"] = _autograd.differentiable(_ops.COMPILED)
    return found


_OPS = _load()


def available_backends() -> tuple[str, ...]:
    """The backends that can be used here: some of "triton", "cpu" and "reference"."""
    return (*_OPS, "reference")


def _remedy(name: str) -> str:
    """How to make a backend available, for an error message."""
    if name == "cpu":
        return f"build the library with `{BUILD_COMMAND}`, or"
    if name == "cuda":
        return "this version does not have it, GPUs use 'triton';"
    missing = _ops.triton_missing()
    if missing is not None:
        return f"{missing};"
    return "PyTorch sees no CUDA device, and TRITON_INTERPRET=1 was not set before the import;"


def _usable(name: object) -> str:
    """`name`, if it is a backend that can be used here."""
    usable = ", ".join(repr(backend) for backend in available_backends())
    if not isinstance(name, str) or name not in BACKENDS:
        names = ", ".join(repr(backend) for backend in BACKENDS)
        raise ValueError(f"backend must be one of {names}, got {name!r}; available here: {usable}")
    if name not in available_backends():
        raise ValueError(
            f"backend {name!r} is not available; {_remedy(name)} "
            f"choose one of those available: {usable}"
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


# The backend of calls outside `backend` blocks; None: selected by the tensors' device.
_chosen: str | None = _from_environment()
_warned_devices: set[str] = set()

if _chosen is None and not _ops.LOADED:
    warnings.warn(
        f"the compiled library of churn_kernels is missing, losses run on the slow reference; "
        f"build it with `{BUILD_COMMAND}`",
        RuntimeWarning,
        stacklevel=2,
    )


def backend(name: str) -> AbstractContextManager[None]:
    """A block that uses the backend `name`, for the thread and asyncio task that opens it.

    Tasks created in the block inherit it; threads started in it do not, except those in which
    autograd runs a backward pass.

    Args:
        name: one of `available_backends()`.
    Raises: ValueError for a backend that does not exist or was not built, before the block begins.
    """
    return _blocks.block(backend=_usable(name))


def _gpu_problem(index: int) -> str | None:
    """Why CUDA device `index` cannot run the Triton kernels; None if it can."""
    if "triton" not in _OPS:
        return _ops.triton_missing() or "PyTorch saw no CUDA device when the package was imported"
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < OLDEST_GPU:
        needed = ".".join(map(str, OLDEST_GPU))
        return f"the kernels need a GPU of compute capability {needed} or later"
    return None


# Set directly: torch.compiler.assume_constant_result would import the compiler, which takes as long
# as importing PyTorch itself.
_gpu_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _pick(logits: Tensor, models: int, chosen: str | None) -> str:
    """The backend of a call; `chosen` is the choice of a block or the process."""
    if logits.is_cpu:
        if chosen == "triton" and not _INTERPRETED:
            raise ValueError(
                "backend 'triton' takes CUDA tensors, got logits on cpu; pass "
                "logits.cuda(), or set TRITON_INTERPRET=1 before the import to run it on the CPU"
            )
        if chosen == "triton" and models > MOST_TRITON_MODELS:
            raise ValueError(f"backend 'triton' {_too_many(models)}; choose backend 'cpu'")
        return chosen or ("cpu" if "cpu" in _OPS else "reference")
    if chosen == "reference":
        return "reference"
    if chosen == "cpu":
        raise ValueError(
            f"backend 'cpu' takes CPU tensors, got logits on {logits.device}; "
            f"pass logits.cpu(), or choose backend 'reference'"
        )
    device = logits.device.type
    if device != "cuda":
        problem: str | None = f"churn_kernels has no kernel for {device} tensors"
    elif models > MOST_TRITON_MODELS:
        problem = f"backend 'triton' {_too_many(models)}"
    else:
        problem = _gpu_problem(logits.device.index)
    if problem is None:
        return "triton"
    if chosen == "triton":
        raise ValueError(
            f"backend 'triton' cannot take logits on {logits.device}: {problem}; "
            f"choose backend 'reference'"
        )
    _warn_of_fallback(device, problem)
    return "reference"


def _too_many(models: int) -> str:
    return f"takes at most {MOST_TRITON_MODELS} models, teachers included, got {models}"


def _warn_of_fallback(device: str, problem: str) -> None:
    if device in _warned_devices:
        return
    _warned_devices.add(device)
    warnings.warn(
        f"losses of {device} tensors run on the slow reference: {problem}; "
        f'choose it with `with churn_kernels.backend("reference")` to silence this',
        RuntimeWarning,
        stacklevel=7,
    )


def evaluate(
    logits: Sequence[Tensor],
    batch: Sequence[int] | None,
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    mode: str | None,
    with_terms: bool,
    share: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Check what depends on the tensors, pick a backend, and compute the loss and the terms.

    Args:
        logits: checked, K tensors (N, C) or one (K, N, C).
        batch: the original shape of the rows, if not (N,); the target has it too.
        target, class_weight: as the user passed them.
        options: checked, except for what depends on the tensors' shapes.
        share: makes ops for all rows from the ops for some of them and the exact sum's
            (`_row_shards`).
    Returns: the loss as `options.reduction` says, by row (N,) or (N, terms), and the terms, if
        requested.
    """
    block = _blocks.choices()
    chosen = block.backend or _chosen
    exchange = _class_shards.exchange_of(block)
    if exchange is not None:
        evaluate_shard = _evaluate_shard
        if torch.compiler.is_compiling():  # it calls collectives
            evaluate_shard = torch.compiler.disable(_evaluate_shard)
        return evaluate_shard(
            logits,
            batch,
            target,
            class_weight,
            options,
            mode,
            with_terms,
            chosen,
            exchange,
            share,
        )
    first = logits[0]
    if not first.is_cpu:
        _checks.has_values("logits", first)
    if target is not None:
        _checks.several_classes(first.shape[-1], batch)
        target = _checks.target(target, first, batch)
    name = _pick(first, len(logits) if first.dim() == 2 else first.shape[0], chosen)
    if mode is None:
        mode = modes.chosen(block)
    if mode is not None:
        modes.check(mode, _KEEPS[name], name)
    if mode == "exact":
        if first.dtype == torch.float64:
            raise ValueError(
                "mode 'exact' takes float32, float16 or bfloat16 logits, got float64; "
                "pass logits.float(), or mode='invariant'"
            )
        _checks.exact_rows(first.shape[-2])
    if class_weight is not None:
        class_weight = _checks.class_weight(class_weight, first, first.shape[-1])
    if options.top_k:
        _checks.top_k_fits(options.top_k, first.shape[-1])
    if name == "reference":
        if torch.compiler.is_compiling():
            logits, target, class_weight = saveable_in_graph(logits, target, class_weight)
        return reference.loss(logits, target, class_weight, options)
    strength = modes.MODES.index(mode or modes.torch_mode())
    if strength:
        options = options._replace(mode=strength)
    if share is not None:
        ops = share(_OPS[name], _OPS[name])
        return _autograd.evaluate_by_rows(ops, logits, target, class_weight, options, with_terms)
    return _autograd.evaluate(_OPS[name], logits, target, class_weight, options, with_terms)


def _evaluate_shard(
    logits: Sequence[Tensor],
    batch: Sequence[int] | None,
    target: Tensor | None,
    class_weight: Tensor | None,
    options: LossOptions,
    mode: str | None,
    with_terms: bool,
    chosen: str | None,
    exchange: _class_shards.Exchange,
    share: Callable[..., Any] | None,
) -> tuple[Tensor, Tensor]:
    """As `evaluate`, for logits that hold some of the classes. Always computes in exact mode."""
    try:
        _check_shard(logits, class_weight, mode, chosen)
        if target is not None:
            target = _checks.target(target, logits[0], batch)
    except Exception:
        _class_shards.report_rejection(exchange)  # the other ranks are waiting for this one
        raise
    options = options._replace(mode=modes.EXACT)
    ops: Any = _class_shards.ShardOps(exchange)
    if share is not None:
        ops = share(ops, _OPS["cpu"])
    loss, terms = _autograd.evaluate_by_rows(ops, logits, target, class_weight, options, with_terms)
    _class_shards.store_exchange(exchange, loss)
    return loss, terms


def _check_shard(
    logits: Sequence[Tensor], class_weight: Tensor | None, mode: str | None, chosen: str | None
) -> None:
    """Check what one process can know about its arguments, except for the target."""
    first = logits[0]
    if mode is not None:
        modes.check(mode)
    wants = "class_parallel takes CPU tensors, and runs on backend 'cpu'"
    if not first.is_cpu:
        _checks.has_values("logits", first)
        raise ValueError(f"{wants}, got logits on {first.device}; pass logits.cpu()")
    name = _pick(first, len(logits) if first.dim() == 2 else first.shape[0], chosen)
    if name != "cpu":
        raise ValueError(f"{wants}, got backend '{name}'; choose 'cpu', or build the library")
    if first.dtype == torch.float64:
        raise ValueError(
            "class_parallel takes float32, float16 or bfloat16 logits, got float64; "
            "pass logits.float()"
        )
    _checks.exact_rows(first.shape[-2])
    if class_weight is not None:
        _checks.class_weight(class_weight, first, None)


def build_info() -> dict[str, Any]:
    """Facts about the compiled library.

    Returns: compiler, flags, the instruction sets that were built, `"cpu_isa"`, the one in use, and
        `"detected_cpu_isa"`, the best one this machine supports, in use unless CHURN_CPU_ISA lowers
        it; torch, commit. `{"built": False, "build_command": ...}` if it was not built.
    """
    if _constants.CONSTANTS is None or not _ops.LOADED:
        return {"built": False, "build_command": BUILD_COMMAND}
    facts = import_module("churn_kernels._C").build_info()
    return {"built": True, **facts, "cpu_isa": torch.ops.churn_kernels.cpu_isa("")}


def uses_triton(tensor: Tensor) -> bool:
    """Whether a function with a Triton and a PyTorch path should use Triton for `tensor`."""
    chosen = _blocks.choices().backend or _chosen
    if tensor.is_cpu:
        return chosen == "triton" and _INTERPRETED
    if tensor.device.type != "cuda" or chosen not in (None, "triton"):
        return False
    return _gpu_problem(tensor.device.index) is None


def hash_op(x: Tensor) -> Any:
    """The op that hashes `x`, or None if there is none; hashes are the same on every backend."""
    if uses_triton(x):
        return _OPS["triton"].hash_words
    return _OPS["cpu"].hash_words if x.is_cpu else None


def exact_ops(x: Tensor) -> OpSet:
    """The ops that sum `x` exactly; all backends give the same bits.

    Raises: RuntimeError if the ops for x's device are missing; it names the remedy.
    """
    if uses_triton(x):
        return _OPS["triton"]
    if x.is_cpu and "cpu" in _OPS:
        return _OPS["cpu"]
    if not _ops.LOADED:
        problem: str | None = "the compiled library is missing"
        remedy = f"build it with `{BUILD_COMMAND}`"
    else:
        gpu = x.device.type == "cuda"
        problem = _gpu_problem(x.device.index) if gpu else "churn_kernels has no kernel for it"
        remedy = "pass x.cpu()"
    if problem is None:
        return _OPS["triton"]
    raise RuntimeError(f"cannot sum exactly on {x.device}: {problem}; {remedy}")
