"""The losses that are timed on any device, and the check that each must pass first."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import churn_kernels as ck
from benchmarks.peers import ALPHA, Loss, fused

# Largest relative error in the Euclidean norm that rounding can explain, by the result's dtype.
NORM_ERROR = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}

# Size of the blocks of the float64 reference, in elements: a whole batch would not fit a GPU.
REFERENCE_ELEMENTS = 1 << 23


class Variant(NamedTuple):
    """A loss and the logits it takes."""

    loss: Loss
    dtype: torch.dtype = torch.float32
    models: int = 2
    teachers: int = 0
    upstream: float | None = None  # the loss's own gradient; None: backward() without one


def codistillation(**options: object) -> Loss:
    return lambda logits, target: ck.codistillation_loss(
        logits, target, **{"alpha": ALPHA, **options}
    )


def distillation(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    return ck.distillation_loss(logits[0], logits[1:], target, alpha=0.5, temperature=3.0)


PAIR = Variant(fused)
VARIANTS = {
    "pair": PAIR,
    "bfloat16": Variant(fused, dtype=torch.bfloat16),
    # As with a loss scaler, without which most of these gradients underflow.
    "float16": Variant(fused, dtype=torch.float16, upstream=65536.0),
    "float64": Variant(fused, dtype=torch.float64),
    "one model": Variant(fused, models=1),
    "three models": Variant(fused, models=3),
    "top_k=10": Variant(codistillation(top_k=10)),
    "uniform_skl": Variant(codistillation(regularizer="uniform_skl", alpha=0.01)),
    "l1": Variant(codistillation(divergence="l1")),
    "ce": Variant(codistillation(divergence="ce")),
    "temperature=3": Variant(codistillation(temperature=3.0)),
    "reduction none": Variant(codistillation(reduction="none"), upstream=1.0),
    "return_terms": Variant(lambda *batch: codistillation(return_terms=True)(*batch)[0]),
    "distillation": Variant(distillation, teachers=1),
}


def expectation(
    loss: Loss, logits: Sequence[Tensor], target: Tensor, upstream: float | None = None
) -> list[Tensor]:
    """The float64 loss, and its gradients for the logits that require one.

    Computed in blocks of rows, so `loss` must be a mean over equally weighted rows, or per row.
    """
    rows = max(1, REFERENCE_ELEMENTS // logits[0].shape[1])
    losses, gradients = [], []
    for *wide, labels in zip(*(z.detach().split(rows) for z in (*logits, target)), strict=True):
        block = [
            part.double().requires_grad_(z.requires_grad)
            for part, z in zip(wide, logits, strict=True)
        ]
        with ck.backend("reference"):
            value = loss(block, labels)
        share = 1.0 if value.dim() else len(labels) / len(target)
        value.backward(torch.full_like(value, share * (1.0 if upstream is None else upstream)))
        losses.append(share * value.detach())
        gradients.append([z.grad for z in block if z.requires_grad])
    total = torch.cat(losses) if losses[0].dim() else torch.stack(losses).sum()
    return [total, *(torch.cat(parts) for parts in zip(*gradients, strict=True))]


def relative_error(actual: Tensor, want: Tensor) -> float:
    """||actual - want|| / ||want||; NaN if either has one, which exceeds every bound."""
    error, norm = (actual.double() - want).norm(), want.norm()
    return (error / norm if norm > 0 else error).item()


def check(loss: Tensor, logits: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Assert that the loss and the gradients are correct, and return their relative errors."""
    results = [loss.detach(), *(z.grad for z in logits if z.requires_grad)]
    names = ["loss", *["gradient"] * (len(results) - 1)]
    errors: dict[str, float] = {}
    for name, actual, want in zip(names, results, expected, strict=True):
        error = relative_error(actual, want)
        bound = NORM_ERROR[actual.dtype]
        assert error <= bound, (
            f"{name}: relative error {error:.1e} of {actual.dtype} exceeds {bound}"
        )
        errors[name] = max(error, errors.get(name, 0.0))
    return errors


def moved_bytes(logits: Sequence[Tensor]) -> int:
    """The minimum bytes that a loss has to move: logits read, gradients written, each once."""
    return sum(z.nbytes * (2 if z.requires_grad else 1) for z in logits)
