"""exp, log and fused multiply-add of the softmax; the twin of csrc/rows/math.h.

float32 takes the GPU's own exp2, which is one instruction; float64 has no such instruction and
takes the library's exp.
"""

import triton
import triton.language as tl

from churn_kernels._C import constants

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_FLOAT = tl.constexpr(constants.kLowestFloat)
LOWEST_DOUBLE = tl.constexpr(constants.kLowestDouble)


@triton.jit
def mul_add(a, b, c):
    """a * b + c with one rounding."""
    return tl.fma(a, b, c)


@triton.jit
def exp_nonpos(d):
    """exp(d) for d <= 0; NaN stays NaN."""
    if d.dtype == tl.float64:
        return tl.exp(d)
    else:
        return tl.exp2(d * LOG2_E)


@triton.jit
def log_pos(x):
    """log(x) for x > 0; NaN stays NaN."""
    return tl.log(x)


@triton.jit
def at_least_lowest(d):
    """max(d, kLowest): -inf and the masks' lowest() become numbers that no slope overflows."""
    if d.dtype == tl.float64:
        return tl.maximum(d, LOWEST_DOUBLE)
    else:
        return tl.maximum(d, LOWEST_FLOAT)


@triton.jit
def scalar(x, dtype: tl.constexpr):
    """A float64 argument in the dtype of the row arithmetic."""
    return tl.full((), x, tl.float64).to(dtype)
