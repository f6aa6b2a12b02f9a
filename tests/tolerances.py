"""How close two results have to be: one table, each entry with its reason; nothing loosens it."""

from typing import NamedTuple

import torch

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Tolerance(NamedTuple):
    """Largest |actual - expected| is atol + rtol |expected|."""

    rtol: float
    atol: float
    reason: str


TOLERANCES = {
    # What a backend returns against the float64 reference on the same inputs.
    ("loss", F64): Tolerance(5e-13, 2e-13, "sums of up to 1e5 float64 terms"),
    ("loss", F32): Tolerance(1e-6, 2e-7, "exp and sums in float32, a few ulp of each term"),
    ("loss", BF16): Tolerance(1e-6, 2e-7, "inputs are exact in float32, computed as float32"),
    ("loss", F16): Tolerance(1e-6, 2e-7, "inputs are exact in float32, computed as float32"),
    ("gradient", F64): Tolerance(5e-13, 2e-14, "as the loss"),
    ("gradient", F32): Tolerance(1e-5, 1e-7, "differences of probabilities cancel"),
    ("gradient", BF16): Tolerance(8e-3, 1e-7, "rounded to 8 bits, and again when scaled"),
    ("gradient", F16): Tolerance(1e-3, 1e-7, "rounded to 11 bits, subnormal below 6e-5"),
    # The means of churn_report, Triton's against PyTorch's in float64 on the same inputs.
    ("metric", F64): Tolerance(2e-13, 2e-14, "sums of up to 1e4 float64 terms, another order"),
    ("metric", F32): Tolerance(2e-6, 2e-7, "a logit's difference to the largest rounds at 1e-7 d"),
    ("metric", BF16): Tolerance(2e-6, 2e-7, "inputs are exact in float32, computed as float32"),
    ("metric", F16): Tolerance(2e-6, 2e-7, "inputs are exact in float32, computed as float32"),
    # The reference against a closed form or PyTorch's own functions, both in float64.
    ("formula", F64): Tolerance(1e-10, 1e-10, "two ways to sum the same few terms"),
}


def assert_close(actual, expected, kind, dtype):
    """Assert that `actual` is `expected` within the entry; NaN and infinities must match."""
    tolerance = TOLERANCES[kind, dtype]
    torch.testing.assert_close(
        actual, expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True
    )


def _spread(logits):
    """Largest distance between two finite logits: a divergence multiplies errors by as much."""
    values = torch.cat([z.detach().double().flatten() for z in logits])
    values = values[values.isfinite()]
    return (values.max() - values.min()).item() if values.numel() else 0.0


def loss_error_bound(want, dtype, logits, scale=1.0):
    """Largest error of each loss: the table's, times the weights and what the logits amplify."""
    tolerance = TOLERANCES["loss", dtype]
    return tolerance.rtol * want.abs() + tolerance.atol * scale * (1 + _spread(logits))


def gradient_error_bound(want, dtype, logits, weight=1.0):
    """Largest error of each gradient: as `loss_error_bound`."""
    tolerance = TOLERANCES["gradient", dtype]
    return tolerance.rtol * want.abs() + tolerance.atol * weight * (1 + _spread(logits))
