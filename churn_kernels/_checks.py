"""Every check of an argument; each message says what is wanted, what came and what to do."""

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))

# Where raising for a wrong target would cost a host synchronisation (a GPU), it is done only on
# request.
_DEBUG = os.environ.get("CHURN_DEBUG", "") not in ("", "0")


class TargetError(IndexError, ValueError):
    """A target that is neither a class index in [0, C) nor `ignore_index`."""


# Scalars ------------------------------------------------------------------------------------------


def number(name: str, value: object) -> float:
    """`value` as a finite float."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number, got a tensor; pass {name}.item()")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}; pass a float")
    checked = float(value)
    if not -math.inf < checked < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {checked}; check how it was computed")
    return checked


def share(name: str, value: object, *, below_one: bool = False) -> float:
    """`value` in [0, 1], or in [0, 1)."""
    checked = number(name, value)
    if below_one and not 0 <= checked < 1:
        raise ValueError(
            f"{name} must be in [0, 1), got {checked}; it moves weight from the cross entropy "
            f"to the regulariser, and 1 would leave nothing to learn from"
        )
    if not 0 <= checked <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {checked}; it is a share")
    return checked


def weight(name: str, value: object) -> float:
    """`value` >= 0."""
    checked = number(name, value)
    if checked < 0:
        raise ValueError(f"{name} must be >= 0, got {checked}; 0 switches the term off")
    return checked


def positive(name: str, value: object) -> float:
    """`value` > 0."""
    checked = number(name, value)
    if checked <= 0:
        raise ValueError(f"{name} must be > 0, got {checked}; 1 leaves the logits as they are")
    return checked


def integer(name: str, value: object) -> int:
    """`value` as an int."""
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be an int, got a tensor; pass {name}.item()")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {value!r}; pass int({name})")
    return int(value)


def flag(name: str, value: object) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}; pass bool({name})")
    return value


def choice(name: str, value: object, choices: Mapping[str, int]) -> int:
    """The code of the choice named `value`."""
    if not isinstance(value, str) or value not in choices:
        names = ", ".join(repr(name) for name in choices)
        raise ValueError(f"{name} must be one of {names}, got {value!r}; pass one of these names")
    return choices[value]


def top_k(value: object) -> int:
    """A number of classes >= 1; None is all of them, as 0."""
    if value is None:
        return 0
    checked = integer("top_k", value)
    if checked < 1:
        raise ValueError(f"top_k must be at least 1, got {checked}; pass None for all classes")
    return checked


def top_k_fits(k: int, classes: int) -> None:
    """`top_k` <= C."""
    if k > classes:
        raise ValueError(
            f"top_k must be at most the number of classes C = {classes}, got {k}; "
            f"pass None for all classes"
        )


# Tensors ------------------------------------------------------------------------------------------


def summand(name: str, value: object) -> Tensor:
    """`value` as a tensor of a dtype that exact sums take."""
    wants = f"{name} must be a float32, float16 or bfloat16 tensor"
    if not isinstance(value, Tensor):
        raise TypeError(f"{wants}, got {type(value).__name__}; pass torch.tensor({name})")
    if value.dtype not in DTYPES or value.dtype == torch.float64:
        remedy = f"{name}.real and {name}.imag" if value.is_complex() else f"{name}.float()"
        raise TypeError(f"{wants}, got {value.dtype}; pass {remedy}")
    return value


def models(name: str, logits: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """The logits of K models as the ops take them: K tensors (N, C), or one (K, N, C) in a list."""
    if isinstance(logits, Tensor):
        if logits.dim() != 3:
            raise ValueError(
                f"{name} must be a sequence of (N, C) tensors or one (K, N, C) tensor, got "
                f"one tensor of shape {tuple(logits.shape)}; pass [{name}] for a single model"
            )
        if logits.shape[0] == 0:
            raise ValueError(
                f"{name} must hold at least one model, got shape {tuple(logits.shape)}; "
                f"stack the models along dimension 0"
            )
        _supported(name, logits)
        return [logits]
    if type(logits) is not list and not isinstance(logits, (list, tuple)):
        raise TypeError(
            f"{name} must be a list or tuple of (N, C) tensors or one (K, N, C) tensor, got "
            f"{type(logits).__name__}; pass list({name})"
        )
    if not logits:
        raise ValueError(
            f"{name} must hold at least one model, got an empty sequence; pass [model(x), ...]"
        )
    first = logits[0]
    matrix(f"{name}[0]", first)
    shape, dtype, device = first.shape, first.dtype, first.device
    for other in logits[1:]:
        if (
            not isinstance(other, Tensor)
            or other.shape != shape
            or other.dtype != dtype
            or other.device != device
        ):
            _differs(name, logits)
    return list(logits)


def matrix(name: str, logits: object) -> None:
    """One model's logits: a floating-point (N, C) tensor with C >= 1."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name} must be a tensor of shape (N, C), got {type(logits).__name__}; "
            f"pass the model's output"
        )
    if logits.dim() != 2:
        raise ValueError(
            f"{name} must have shape (N, C), got {tuple(logits.shape)}; "
            f"rows are examples and columns are classes: for (B, T, C) pass logits.flatten(0, 1), "
            f"for (N, C, 1) logits.squeeze(-1)"
        )
    _supported(name, logits)


def _supported(name: str, logits: Tensor) -> None:
    if logits.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {_short(logits.dtype)}; "
            f"pass {name}.float()"
        )
    if logits.shape[-1] == 0:
        raise ValueError(
            f"{name} must have at least one class, got shape {tuple(logits.shape)}; "
            f"the last dimension holds the classes"
        )


def _differs(name: str, logits: Sequence[Any]) -> None:
    """Raise for the first model whose tensor does not match the first one's."""
    first = logits[0]
    for k, other in enumerate(logits):
        matrix(f"{name}[{k}]", other)
        same(f"{name}[{k}]", other, f"{name}[0]", first)


def same(name: str, value: Any, reference_name: str, reference: Any) -> None:
    """`value` has the reference's shape, dtype and device."""
    if value.shape != reference.shape:
        raise ValueError(
            f"{name} must have the shape of {reference_name}, {tuple(reference.shape)}, got "
            f"{tuple(value.shape)}; all models must see the same rows and classes"
        )
    if value.dtype != reference.dtype:
        raise TypeError(
            f"{name} must have the dtype of {reference_name}, {_short(reference.dtype)}, got "
            f"{_short(value.dtype)}; pass {name}.to({reference_name}.dtype)"
        )
    if value.device != reference.device:
        raise ValueError(
            f"{name} must be on the device of {reference_name}, {reference.device}, got "
            f"{value.device}; pass {name}.to({reference_name}.device)"
        )


def exact_rows(rows: int) -> None:
    """Rows whose losses an exact sum holds before it carries."""
    if rows >= 2**31:
        raise ValueError(
            f"mode 'exact' takes fewer than 2^31 = {2**31} rows a call, got {rows}; split the "
            f"batch, and add up the rows' losses with ExactSum"
        )


def target(value: object, rows: int, device: torch.device) -> None:
    """Class indices: an int64 tensor (N,) on the logits' device, of any values."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"target must be an int64 tensor of shape ({rows},), got {type(value).__name__}; "
            f"pass torch.as_tensor(target)"
        )
    if value.dtype != torch.int64:
        remedy = (
            "pass class indices; class probabilities are not supported"
            if value.is_floating_point()
            else "pass target.long()"
        )
        raise TypeError(f"target must be int64 class indices, got {_short(value.dtype)}; {remedy}")
    if value.dim() != 1 or value.shape[0] != rows:
        raise ValueError(
            f"target must have shape ({rows},), one class for each row of the logits, got "
            f"{tuple(value.shape)}; for a one-hot target pass "
            f"target.argmax(1), for (N, 1) target.squeeze(1)"
        )
    if value.device != device:
        raise ValueError(
            f"target must be on the logits' device, {device}, got {value.device}; "
            f"pass target.to(logits.device)"
        )


def target_given(value: object) -> None:
    """A loss that is about the target has one."""
    if value is None:
        raise TypeError(
            "target must be an int64 tensor of class indices, got None; "
            "for the regulariser alone call softmax_entropy or uniform_skl"
        )


def class_weight(value: object, logits: Tensor, classes: int | None) -> Tensor:
    """The weights of C classes in the dtype the losses are computed in; None: of any number."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"class_weight must be a tensor of shape ({classes or 'C'},), got "
            f"{type(value).__name__}; "
            f"pass torch.as_tensor(class_weight)"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"class_weight must be floating point, got {_short(value.dtype)}; "
            f"pass class_weight.float()"
        )
    if value.dim() != 1 or classes not in (None, value.shape[0]):
        raise ValueError(
            f"class_weight must have shape ({classes or 'C'},), one weight for each class, got "
            f"{tuple(value.shape)}; list the weights in the order of the classes"
        )
    if value.device != logits.device:
        raise ValueError(
            f"class_weight must be on the logits' device, {logits.device}, got {value.device}; "
            f"pass class_weight.to(logits.device)"
        )
    if value.requires_grad:
        raise ValueError(
            "class_weight must not require a gradient, the loss has none for it; "
            "pass class_weight.detach()"
        )
    return value.to(torch.float64 if logits.dtype == torch.float64 else torch.float32).contiguous()


def target_range(value: Tensor, classes: int, ignore_index: int) -> None:
    """Every target is a class or `ignore_index`; on a GPU only with CHURN_DEBUG=1."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return  # the values are not there to look at
    if not value.is_cpu and not _DEBUG:
        return
    wrong = ((value < 0) | (value >= classes)) & (value != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise TargetError(
            f"target must hold class indices in [0, {classes}), got {int(value[row])} "
            f"at row {row}; pass ignore_index for rows without a label"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
