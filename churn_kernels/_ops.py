"""The ops: loading them, and their fakes for torch.compile.

Two sets with the same signatures: the compiled ones, declared in csrc/ops.cpp, and those on Triton,
declared here. The loss ops take `LossOptions` field by field; each set has a second loss for
torch.compile, which takes its weights as tensors. `_autograd` is their only caller.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from churn_kernels._checks import TargetError
from churn_kernels._constants import CONSTANTS
from churn_kernels._options import (
    DIVERGENCES,
    NO_REGULARIZER,
    REDUCTIONS,
    ROW_TERMS,
    WANT_GRADIENTS,
    WANT_STATS,
    WANT_TERMS,
    WEIGHTS,
    LossOptions,
    pair_count,
)

LIBRARY = Path(__file__).with_name("libchurn_kernels.so")
BUILD_COMMAND = "pip install --no-build-isolation ."
OLDEST_TRITON = (3, 6)
INSTALL_TRITON = "`pip install 'triton>=3.6'`"


def _load() -> bool:
    if not LIBRARY.exists():
        return False
    torch.ops.load_library(str(LIBRARY))
    return True


LOADED = _load()

_libraries: list[Any] = []


def stats_width(options: LossOptions, models: int) -> int:
    """Number of float64 statistics per row that `loss` saves for `loss_backward`.

    The kernel that processed the row. Per model: maximum, mass, moment (of the top k, if those are
    regularised) and classes not at -inf; the mass at the temperature; the threshold, last tie and
    mass of the top k. Per pair: three sums of symmetric KL, two of L1.
    """
    per_model = 4
    if options.temperature != 1.0:
        per_model += 1
    if options.top_k > 0 and options.regularizer != NO_REGULARIZER:
        per_model += 3
    per_pair = {DIVERGENCES["skl"]: 3, DIVERGENCES["l1"]: 2}.get(options.divergence, 0)
    return (
        1 + per_model * models + per_pair * pair_count(models - options.teachers, options.teachers)
    )


def raise_target_error(error: Exception) -> None:
    """Raise the op's error about a target as a TargetError; return for any other error."""
    message = str(error).partition("\n")[0]
    start = message.find("target must hold class indices")
    if start >= 0:
        raise TargetError(message[start:]) from None


def _shape(logits: Sequence[Tensor]) -> tuple[int, int, int]:
    """(M, N, C) of a list of M tensors (N, C), or of one (M, N, C) tensor."""
    first = logits[0]
    if first.dim() == 3:
        return first.shape[0], first.shape[1], first.shape[2]
    return len(logits), first.shape[0], first.shape[1]


def _gradient_like(logits: Sequence[Tensor], options: LossOptions) -> list[Tensor]:
    students = logits[: len(logits) - options.teachers]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in students]


class OpSet(NamedTuple):
    """The ops of one backend."""

    loss: Any
    loss_backward: Any
    scale_: Any
    exact_words: Any
    exact_round: Any
    hash_words: Any
    loss_tensor_weights: Any = None
    """The loss of `with_tensor_weights`."""
    loss_in_transforms: Any = None
    """The loss, differentiable, for torch.func under torch.compile; see `_autograd`."""


def _fake_loss(
    statistics: Callable[..., Tensor],
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The outputs of `loss`; `statistics` makes the backend's saved row statistics."""
    options, want = LossOptions(*arguments[:-1]), arguments[-1]
    models, rows, _ = _shape(logits)
    students = models - options.teachers
    pairs = pair_count(students, options.teachers)
    first = logits[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    shape: tuple[int, ...] = ()
    if options.reduction == REDUCTIONS["none"]:
        shape = (rows,)
    elif options.reduction == ROW_TERMS:
        shape = (rows, 2 * students + pairs)
    terms = 5 * students + pairs + 1 if want & WANT_TERMS else 0
    return (
        first.new_empty(shape, dtype=dtype),
        statistics(first, rows, models, target, class_weight, options, want),
        first.new_empty((terms,), dtype=dtype),
        _gradient_like(logits, options) if want & WANT_GRADIENTS else [],
    )


def _fake_loss_backward(
    logits: Sequence[Tensor],
    target: Tensor | None,
    class_weight: Tensor | None,
    stats: Tensor,
    upstream: Tensor,
    *options: Any,
) -> list[Tensor]:
    return _gradient_like(logits, LossOptions(*options))


def _fake_scale_(gradients: Sequence[Tensor], upstream: Tensor, exact: bool) -> None:
    return None


def _fake_exact_words(x: Tensor) -> Tensor:
    return x.new_empty((CONSTANTS.kSumWords,), dtype=torch.int64)


def _fake_exact_round(words: Tensor) -> Tensor:
    return words.new_empty((), dtype=torch.float32)


def _fake_hash_words(
    pieces: Sequence[Tensor], first: Sequence[int], run: Sequence[int], step: Sequence[int]
) -> Tensor:
    return pieces[0].new_empty((len(pieces), CONSTANTS.kHashWords), dtype=torch.int64)


def _compiled_stats(
    first: Tensor, rows: int, models: int, target: Any, weight: Any, options: LossOptions, want: int
) -> Tensor:
    shape = (rows, stats_width(options, models)) if want & WANT_STATS else (0,)
    return first.new_empty(shape, dtype=torch.float64)


def _op_set(prefix: str, statistics: Callable[..., Tensor]) -> OpSet:
    """The ops `churn_kernels::<prefix>loss` and so on, with their fakes registered."""
    torch.library.register_fake(
        f"churn_kernels::{prefix}loss",
        lambda *arguments: _fake_loss(statistics, *arguments),
    )
    torch.library.register_fake(f"churn_kernels::{prefix}loss_backward", _fake_loss_backward)
    torch.library.register_fake(f"churn_kernels::{prefix}scale_", _fake_scale_)
    torch.library.register_fake(f"churn_kernels::{prefix}exact_words", _fake_exact_words)
    torch.library.register_fake(f"churn_kernels::{prefix}exact_round", _fake_exact_round)
    torch.library.register_fake(f"churn_kernels::{prefix}hash_words", _fake_hash_words)
    namespace = torch.ops.churn_kernels
    return OpSet(
        getattr(namespace, f"{prefix}loss").default,
        getattr(namespace, f"{prefix}loss_backward").default,
        getattr(namespace, f"{prefix}scale_").default,
        getattr(namespace, f"{prefix}exact_words").default,
        getattr(namespace, f"{prefix}exact_round").default,
        getattr(namespace, f"{prefix}hash_words").default,
    )


def with_tensor_weights(ops: OpSet) -> OpSet:
    """The same ops with their weights as float64 CPU tensors (), None for 0.

    torch.compile treats numbers as constants, and tensors as inputs that may change. The ops read
    the weights at run time, so they cannot be part of a CUDA graph.
    """
    library = torch.library.Library("churn_kernels", "FRAGMENT")
    _libraries.append(library)  # an op exists as long as the library that declared it
    return ops._replace(
        loss=_with_tensor_weights(library, ops.loss),
        loss_backward=_with_tensor_weights(library, ops.loss_backward),
    )


def _with_tensor_weights(library: Any, op: Any) -> Any:
    """A new op that differs from `op` only in its name and the type of its weights."""
    names = [argument.name for argument in op._schema.arguments]

    def with_numbers(number: Callable[[Tensor | None], float]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            named = zip(names, arguments, strict=True)
            return op(*(number(value) if name in WEIGHTS else value for name, value in named))

        return call

    name = f"{op._opname}_tensor_weights"
    signature = str(op._schema).partition("(")[2]
    for weight in WEIGHTS:
        signature = signature.replace(f"float {weight}", f"Tensor? {weight}")
    library.define(f"{name}({signature}", tags=(torch.Tag.cudagraph_unsafe,))
    compute = with_numbers(lambda weight: 0.0 if weight is None else weight.item())
    library.impl(name, compute, "CompositeExplicitAutograd")
    fake = with_numbers(lambda weight: float(weight is not None))
    torch.library.register_fake(f"churn_kernels::{name}", fake, lib=library)
    return getattr(torch.ops.churn_kernels, name).default


COMPILED = _op_set("", _compiled_stats) if LOADED else None


def triton_missing() -> str | None:
    """What the Triton ops lack here, with the remedy; None if they can be used."""
    if find_spec("triton") is None:
        return f"Triton is not installed: {INSTALL_TRITON}"
    if CONSTANTS is None:
        return (
            "the compiled library, whose constants the Triton kernels use, was not built: "
            f"`{BUILD_COMMAND}`"
        )
    found = version("triton")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TRITON:
        return f"Triton {found} is too old: {INSTALL_TRITON}"
    return None


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, preceded by the argument checks of the compiled op with its name."""
    check = getattr(torch.ops.churn_kernels, f"check_{function.__name__}").default

    def call(*arguments: Any) -> Any:
        check(*arguments)
        return function(*arguments)

    return call


@cache
def triton() -> OpSet:
    """The ops on Triton, which the first call imports."""
    launch = import_module("churn_kernels.triton.launch")
    exact_sum = import_module("churn_kernels.triton.exact_sum")
    hashing = import_module("churn_kernels.triton.hashing")
    kinds = {float: "float", int: "int", bool: "bool"}
    options = ", ".join(
        f"{kinds[kind]} {name}" for name, kind in LossOptions.__annotations__.items()
    )
    inputs = "Tensor[] logits, Tensor? target, Tensor? class_weight"
    results = "(Tensor, Tensor, Tensor, Tensor[])"
    library = torch.library.Library("churn_kernels", "FRAGMENT")
    library.define(f"triton_loss({inputs}, {options}, int want) -> {results}")
    library.define(
        f"triton_loss_backward({inputs}, Tensor stats, Tensor upstream, {options}) -> Tensor[]"
    )
    library.define("triton_scale_(Tensor(a!)[] gradients, Tensor upstream, bool exact) -> ()")
    library.define("triton_exact_words(Tensor x) -> Tensor")
    library.define("triton_exact_round(Tensor words) -> Tensor")
    library.define(
        "triton_hash_words(Tensor[] pieces, int[] first, int[] run, int[] step) -> Tensor"
    )
    functions = (
        launch.loss,
        launch.loss_backward,
        launch.scale_,
        exact_sum.exact_words,
        exact_sum.exact_round,
        hashing.hash_words,
    )
    for function in functions:
        for device in ("CUDA", "CPU"):  # CPU tensors are for Triton's interpreter
            library.impl(f"triton_{function.__name__}", _checked(function), device)
    _libraries.append(library)
    return _op_set("triton_", launch.fake_record)
