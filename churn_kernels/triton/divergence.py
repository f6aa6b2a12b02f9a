"""One element of the divergences between two models; the twin of csrc/rows/divergence.h."""

import triton
import triton.language as tl

from churn_kernels.triton.math import SMALLEST, SMALLEST_DOUBLE, log_pos


@triton.jit
def sign(a, b):
    """Sign of a - b, 0 where they are equal."""
    return (a > b).to(a.dtype) - (a < b).to(a.dtype)


@triton.jit
def kl_term(q, log_p, S: tl.constexpr):
    """KL(q || p) of a class, q the teachers' mean softmax; 0 log 0 = 0."""
    smallest: tl.constexpr = SMALLEST_DOUBLE if S.compute == tl.float64 else SMALLEST
    log_q = log_pos(tl.maximum(q, smallest), S.exact)
    return q * tl.where(q < smallest, 0.0, log_q - log_p)
