"""The compiled ops: loading their library, and the shapes they return, for torch.compile.

The ops are declared in csrc/ops.cpp. They take `LossOptions` field by field; `_autograd` is their
only caller.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from churn_kernels._checks import TargetError
from churn_kernels._options import (
    DIVERGENCES,
    NO_REGULARIZER,
    REDUCTIONS,
    ROW_TERMS,
    WANT_GRADIENTS,
    WANT_STATS,
    WANT_TERMS,
    LossOptions,
    pair_count,
)

LIBRARY = Path(__file__).with_name("libchurn_kernels.so")


def _load() -> bool:
    if not LIBRARY.exists():
        return False
    torch.ops.load_library(str(LIBRARY))
    return True


LOADED = _load()


def stats_width(options: LossOptions, models: int) -> int:
    """Row statistics that `loss` saves for `loss_backward`, in float64 values a row.

    A model's: maximum, mass, moment (of its top k, if that is regularised) and classes not at -inf;
    its mass at the temperature; the threshold, last tie and mass of its top k. A pair's: two sums
    of the divergences that need them.
    """
    per_model = 4
    if options.temperature != 1.0:
        per_model += 1
    if options.top_k > 0 and options.regularizer != NO_REGULARIZER:
        per_model += 3
    per_pair = 2 if options.divergence in (DIVERGENCES["skl"], DIVERGENCES["l1"]) else 0
    return per_model * models + per_pair * pair_count(models - options.teachers, options.teachers)


def raise_target_error(error: Exception) -> None:
    """Raise the op's complaint about a target as a TargetError; leave any other alone."""
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


def _fake_loss(
    logits: Sequence[Tensor], target: Tensor | None, class_weight: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
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
    stats = (rows, stats_width(options, models)) if want & WANT_STATS else (0,)
    terms = 5 * students + pairs + 1 if want & WANT_TERMS else 0
    return (
        first.new_empty(shape, dtype=dtype),
        first.new_empty(stats, dtype=torch.float64),
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


def _fake_scale_(gradients: Sequence[Tensor], upstream: Tensor) -> None:
    return None


if LOADED:
    torch.library.register_fake("churn_kernels::loss", _fake_loss)
    torch.library.register_fake("churn_kernels::loss_backward", _fake_loss_backward)
    torch.library.register_fake("churn_kernels::scale_", _fake_scale_)
    loss = torch.ops.churn_kernels.loss.default
    loss_backward = torch.ops.churn_kernels.loss_backward.default
    scale_ = torch.ops.churn_kernels.scale_.default
