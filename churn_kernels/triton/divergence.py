"""One element of the divergences between two models; the twin of csrc/rows/divergence.h."""

import triton
import triton.language as tl

from churn_kernels.triton.math import log_pos


@triton.jit
def sign(a, b):
    """Sign of a - b, 0 where they are equal."""
    return (a > b).to(a.dtype) - (a < b).to(a.dtype)


@triton.jit
def kl_term(q, log_p):
    """KL(q || p) of a class, q the teachers' mean softmax; 0 log 0 = 0."""
    return q * tl.where(q > 0, log_pos(tl.where(q > 0, q, 1.0)) - log_p, 0.0)
