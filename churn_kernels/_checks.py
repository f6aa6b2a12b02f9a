"""All argument checks; each message names the expected value, the actual value and the remedy."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from churn_kernels import modes
from churn_kernels._options import DIVERGENCES, REDUCTIONS, REGULARIZERS
from churn_kernels._placements import is_placed

_MODES = torch._C._TorchDispatchModeKey
_get_mode = torch._C._get_dispatch_mode

DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))

# On a GPU, checking the targets costs a host synchronisation, so it is done only on request.
_DEBUG = os.environ.get("CHURN_DEBUG", "") not in ("", "0")


class TargetError(IndexError, ValueError):
    """A target that is neither a class index in [0, C) nor `ignore_index`."""


# Scalars ------------------------------------------------------------------------------------------


def number(name: str, value: object) -> float:
    """`value` as a finite float."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a number, got a tensor; pass {name}.item() (under torch.compile from "
            f"outside the compiled function), or multiply the results of codistillation_terms by it"
        )
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}; pass a float")
    try:
        checked = float(value)
    except OverflowError:  # an int or a Fraction
        problem = f"{name} must fit in a float, got a number beyond 1.8e308"
        raise ValueError(f"{problem}; check how it was computed") from None
    if not -math.inf < checked < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {checked}; check how it was computed")
    return checked


def share_below_one(name: str, value: object) -> float:
    """`value` in [0, 1)."""
    checked = number(name, value)
    if not 0 <= checked < 1:
        raise ValueError(
            f"{name} must be in [0, 1), got {checked}; it moves weight from the cross entropy "
            f"to the regulariser, and 1 would leave nothing to learn from"
        )
    return checked


def share(name: str, value: object) -> float:
    """`value` in [0, 1]."""
    checked = number(name, value)
    if not 0 <= checked <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {checked}; it is a fraction")
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


def index(name: str, value: object) -> int:
    """`value` as an int that an int64 tensor can hold."""
    checked = integer(name, value)
    if not -(2**63) <= checked < 2**63:
        raise ValueError(
            f"{name} must fit in int64, got {checked}; pass a number outside [0, C), e.g. -100"
        )
    return checked


def flag(name: str, value: object) -> bool:
    """`value` as a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}; pass bool({name})")
    return value


def choice(name: str, value: object, choices: Mapping[str, int]) -> str:
    """`value` as the name of one of the choices."""
    if not isinstance(value, str) or value not in choices:
        names = ", ".join(repr(name) for name in choices)
        raise ValueError(f"{name} must be one of {names}, got {value!r}; pass one of these names")
    return str(value)


def top_k(name: str, value: object) -> int | None:
    """A number of classes >= 1, or None for all of them."""
    if value is None:
        return None
    checked = integer(name, value)
    if checked < 1:
        raise ValueError(f"{name} must be at least 1, got {checked}; pass None for all classes")
    return checked


def top_k_fits(k: int, classes: int) -> None:
    """`top_k` <= C."""
    if k > classes:
        raise ValueError(
            f"top_k must be at most the number of classes C = {classes}, got {k}; "
            f"pass None for all classes"
        )


def squared_temperature(name: str, value: object) -> float:
    """A temperature whose square, a factor of the distillation term, is finite and > 0."""
    checked = positive(name, value)
    if not 0 < checked * checked < math.inf:
        raise ValueError(
            f"{name} squared must be finite and > 0, got {checked}; 1 leaves the logits as they are"
        )
    return checked


# The losses' options by name: each check returns the value to store.
OPTIONS: dict[str, Callable[[str, object], Any]] = {
    "alpha": share_below_one,
    "beta": weight,
    "regularizer": lambda name, value: choice(name, value, REGULARIZERS),
    "top_k": top_k,
    "renormalize_top_k": flag,
    "divergence": lambda name, value: choice(name, value, DIVERGENCES),
    "label_smoothing": share,
    "ignore_index": index,
    "temperature": positive,
    "reduction": lambda name, value: choice(name, value, REDUCTIONS),
    "mode": lambda _, value: modes.optional(value),
    "return_terms": flag,
}


def option(name: str, value: object) -> Any:
    """The value of the loss option `name`, checked."""
    return OPTIONS[name](name, value)


# Tensors ------------------------------------------------------------------------------------------


def summand(name: str, value: object) -> Tensor:
    """`value` as a tensor of a dtype that exact sums take."""
    wants = f"{name} must be a float32, float16 or bfloat16 tensor"
    if not isinstance(value, Tensor):
        raise TypeError(f"{wants}, got {type(value).__name__}; pass torch.tensor({name})")
    dense(name, value)
    if value.dtype not in DTYPES or value.dtype == torch.float64:
        remedy = f"{name}.real and {name}.imag" if value.is_complex() else f"{name}.float()"
        raise TypeError(f"{wants}, got {value.dtype}; pass {remedy}")
    return value


def models(name: str, logits: Sequence[Tensor] | Tensor) -> tuple[list[Tensor], torch.Size | None]:
    """The logits of K models in the form the ops take, and the original shape of their rows.

    Returns: K tensors (N, C), or one (K, N, C) in a list; None for rows (N,), or the shape (...) of
        logits (..., C).
    """
    if isinstance(logits, Tensor):
        dense(name, logits)
        if logits.dim() != 3:
            raise ValueError(
                f"{name} must be a sequence of (N, C) tensors or one (K, N, C) tensor, got "
                f"one tensor of shape {tuple(logits.shape)}; pass [{name}] for a single model, "
                f"list({name}) for K models of logits (..., C), with the classes in the last "
                f"dimension: for (N, C, H, W) pass [{name}.movedim(1, -1)]"
            )
        if logits.shape[0] == 0:
            raise ValueError(
                f"{name} must hold at least one model, got shape {tuple(logits.shape)}; "
                f"stack the models along dimension 0"
            )
        _supported(name, logits)
        return [logits], None
    first = sequence(name, logits)[0]
    one_model(f"{name}[0]", first)
    shape, dtype, device = first.shape, first.dtype, first.device
    for other in logits[1:]:
        if (
            not isinstance(other, Tensor)
            or other.layout is not _STRIDED
            or other.is_nested
            or other.shape != shape
            or other.dtype != dtype
            or other.device != device
        ):
            _raise_mismatch(name, logits)
    return rows(*logits)


def sequence(name: str, logits: Sequence[Tensor]) -> Sequence[Tensor]:
    """A non-empty list or tuple."""
    if type(logits) is not list and not isinstance(logits, (list, tuple)):
        raise TypeError(
            f"{name} must be a list or tuple of (N, C) tensors or one (K, N, C) tensor, got "
            f"{type(logits).__name__}; pass list({name})"
        )
    if not logits:
        raise ValueError(
            f"{name} must hold at least one model, got an empty sequence; pass [model(x), ...]"
        )
    return logits


def one_model(name: str, logits: object) -> None:
    """One model's logits: a floating-point (N, C) or (..., C) tensor with C >= 1."""
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"{name} must be a tensor of shape (N, C), got {type(logits).__name__}; "
            f"pass the model's output"
        )
    dense(name, logits)
    if logits.dim() < 2:
        raise ValueError(
            f"{name} must have shape (N, C) or (..., C), got {tuple(logits.shape)}; for one row of "
            f"classes pass {name}[None]{_SINGLE_LOGIT}"
        )
    _supported(name, logits)


def rows(*logits: Tensor) -> tuple[list[Tensor], torch.Size | None]:
    """Checked logits (..., C) in the form `models` returns: views where possible, else copies.

    DTensors are returned unchanged: each process flattens its local tensor (`_dtensor`).
    """
    if logits[0].dim() == 2:
        return list(logits), None
    batch = logits[0].shape[:-1]
    if any(map(is_placed, logits)):
        return list(logits), batch
    return [tensor.flatten(0, -2) for tensor in logits], batch


_STRIDED = torch.strided
_SINGLE_LOGIT = (
    ", for the single logit z (N,) of a binary classifier torch.stack([torch.zeros_like(z), z], -1)"
)


def dense(name: str, value: Tensor) -> None:
    """A dense, strided tensor."""
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested one; pass torch.cat({name}.unbind()), "
            f"which concatenates the rows of its parts, for every tensor of the call"
        )
    if value.layout is not _STRIDED:
        raise TypeError(
            f"{name} must be a dense tensor, got one of layout {_short(value.layout)}; "
            f"pass {name}.to_dense()"
        )


def _supported(name: str, logits: Tensor) -> None:
    if logits.dtype not in DTYPES:
        remedy = "dequantize" if logits.is_quantized else "float"
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {_short(logits.dtype)}; "
            f"pass {name}.{remedy}()"
        )
    if logits.shape[-1] == 0:
        raise ValueError(
            f"{name} must have at least one class, got shape {tuple(logits.shape)}; "
            f"the last dimension holds the classes"
        )


def has_values(name: str, logits: Tensor) -> None:
    """Not meta tensors: they have shapes but no data, so a loss of them would train nothing."""
    if logits.is_meta:
        raise ValueError(
            f"{name} must hold data, got a tensor on the meta device, which has none; allocate the "
            f"model with model.to_empty(device='cpu'), and load its weights"
        )


def several_classes(classes: int, batch: Sequence[int] | None = None) -> None:
    """A target needs two classes: with one, every softmax is 1 and every gradient is 0."""
    if classes == 1:
        other = "" if batch is None else "; for classes in dimension 1 pass logits.movedim(1, -1)"
        raise ValueError(
            "logits must have at least 2 classes if there is a target, got C = 1, whose "
            "probability is always 1; for the single logit z (N, 1) of a binary "
            f"classifier pass torch.cat([torch.zeros_like(z), z], -1){other}"
        )


def _raise_mismatch(name: str, logits: Sequence[Any]) -> None:
    """Raise for the first model whose tensor does not match the first one's."""
    first = logits[0]
    for k, other in enumerate(logits):
        one_model(f"{name}[{k}]", other)
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
    """A number of rows that an exact sum can hold without a carry."""
    if rows >= 2**31:
        raise ValueError(
            f"mode 'exact' takes fewer than 2^31 = {2**31} rows per call, got {rows}; split the "
            f"batch, and add the rows' losses with ExactSum"
        )


def target(value: object, logits: Tensor, batch: Sequence[int] | None) -> Tensor:
    """Class indices (N,): an int64 tensor in the rows' shape, on the logits' device, of any values.

    A DTensor is returned unchanged, as in `rows`.

    Args:
        logits: those of the first model, (N, C), or of all, (K, N, C).
        batch: the original shape of the rows, if not (N,).
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"target must be an int64 tensor of shape {_rows_shape(logits, batch)}, got "
            f"{type(value).__name__}; pass torch.as_tensor(target)"
        )
    dense("target", value)
    if value.dtype != torch.int64:
        dims = 1 if batch is None else len(batch)
        remedy = "pass target.long()"
        if value.is_floating_point() and value.dim() > dims and value.shape[-1] > 1:
            remedy = (
                "pass class indices; class probabilities are not supported: for one-hot rows pass "
                "target.argmax(-1), for others distillation_loss with teacher_logits=target.log()"
            )
        raise TypeError(f"target must be int64 class indices, got {_short(value.dtype)}; {remedy}")
    if value.shape != (logits.shape[-2:-1] if batch is None else batch):
        _raise_for_shape(tuple(value.shape), logits, batch)
    if value.device != logits.device:
        raise ValueError(
            f"target must be on the logits' device, {logits.device}, got {value.device}; pass "
            f"target.to(logits.device)"
        )
    return value if batch is None or is_placed(value) else value.flatten()


def _rows_shape(logits: Tensor, batch: Sequence[int] | None) -> tuple[int, ...]:
    return (logits.shape[-2],) if batch is None else tuple(batch)


def _raise_for_shape(got: tuple[int, ...], logits: Tensor, batch: Sequence[int] | None) -> NoReturn:
    """Raise for a target whose shape is not that of the rows; guess the intent from the shapes."""
    shape = _rows_shape(logits, batch)
    stacked = batch is None and logits.dim() == 3
    full = tuple(logits.shape) if stacked else (*shape, logits.shape[-1])
    single = "[logits]" if stacked else "logits"
    wants = f"target must have shape {shape}, one class for each row of the logits"
    if stacked and got in (full[:2], (full[0] * full[1],)):
        models, rows, _ = full
        wants = (
            f"one logits tensor of shape {full} holds K = {models} models' logits of N = {rows} "
            f"rows, whose target has shape {shape}"
        )
        remedy = "for one model's logits of shape (B, T, C), and a target (B, T), pass [logits]"
    elif len(full) > 2 and got == (full[0], *full[2:]):
        remedy = (
            f"the classes are the last dimension of the logits: for (N, C, H, W), and a target "
            f"(N, H, W), pass {single.replace('logits', 'logits.movedim(1, -1)')}"
        )
    elif got == (*shape, 1):
        remedy = "pass target.squeeze(-1)"
    elif got == (*shape, logits.shape[-1]):
        remedy = "for one-hot rows pass target.argmax(-1)"
    elif len(got) == len(shape) == 1:
        remedy = f"pass {shape[0]} labels, or the logits of {got[0]} rows"
    elif math.prod(got) == math.prod(shape):
        remedy = f"pass target.reshape{shape}"
    else:
        remedy = "for a one-hot target pass target.argmax(-1), for (N, 1) target.squeeze(-1)"
    raise ValueError(f"{wants}, got {got}; {remedy}")


def target_given(value: object) -> None:
    """A target is required."""
    if value is None:
        raise TypeError(
            "target must be an int64 tensor of class indices, got None; "
            "for the regulariser alone call softmax_entropy or uniform_skl"
        )


def class_weight(value: object, logits: Tensor, classes: int | None) -> Tensor:
    """The weights of C classes (None: any number), in the dtype the losses are computed in."""
    weights = class_weights(value, classes)
    if weights.device != logits.device:
        raise ValueError(
            f"class_weight must be on the logits' device, {logits.device}, got {weights.device}; "
            f"pass class_weight.to(logits.device)"
        )
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return weights.to(dtype).contiguous()


def class_weights(value: object, classes: int | None = None) -> Tensor:
    """The weights of C classes (None: any number), on any device."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"class_weight must be a tensor of shape ({classes or 'C'},), got "
            f"{type(value).__name__}; pass torch.as_tensor(class_weight)"
        )
    dense("class_weight", value)
    if not value.is_floating_point():
        raise TypeError(
            f"class_weight must be floating point, got {_short(value.dtype)}; pass "
            f"class_weight.float()"
        )
    if value.dim() != 1 or classes not in (None, value.shape[0]):
        raise ValueError(
            f"class_weight must have shape ({classes or 'C'},), one weight for each class, got "
            f"{tuple(value.shape)}; list the weights in the order of the classes"
        )
    if value.requires_grad:
        raise ValueError(
            "class_weight must not require a gradient, the losses do not compute one for it; "
            "pass class_weight.detach()"
        )
    return value


def target_range(value: Tensor, classes: int, ignore_index: int) -> None:
    """Every target is a class or `ignore_index`; on a GPU only with CHURN_DEBUG=1."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return  # no values to check
    if _is_symbolic(value) or (not value.is_cpu and not _DEBUG):
        return
    wrong = ((value < 0) | (value >= classes)) & (value != ignore_index)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise TargetError(
            f"target must hold class indices in [0, {classes}), got {int(value[row])} "
            f"at row {row}; pass ignore_index for rows without a label"
        )


def _is_symbolic(value: Tensor) -> bool:
    """Whether `value` is a fake tensor, or is traced by make_fx."""
    active = map(_get_mode, (_MODES.FAKE, _MODES.PROXY))
    return isinstance(value, FakeTensor) or any(mode is not None for mode in active)


def _short(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")
