"""One element of the divergences between two models; the twin of csrc/rows/divergence.h."""

import triton
import triton.language as tl

from churn_kernels.triton.math import (
    SMALLEST,
    SMALLEST_DOUBLE,
    log_pos,
    mul_add,
    polynomial,
    where_near,
)


@triton.jit
def sign(difference, level, alive_i, alive_j, S: tl.constexpr):
    """Sign of p_i - p_j, out of d_i - d_j and the level at which they are equal; 0 if that is NaN.

    A class at -inf in one model only is the other's.
    """
    s = (difference > level).to(S.compute) - (difference < level).to(S.compute)
    known = (level == level).to(S.compute)
    alone = (alive_i.to(S.compute) - alive_j.to(S.compute)) * known
    return tl.where(alone != 0, alone, s)


@triton.jit
def probability_difference(e_i, e_j, shared, more_i, minus_more_j):
    """p_i - p_j, with the digits that exponentials of nearly equal models still have."""
    return mul_add(shared, e_i - e_j, mul_add(more_i, e_i, minus_more_j * e_j))


@triton.jit
def kl_term(p, q, log_p, S: tl.constexpr):
    """A class of KL(q || p) = sum q (exp(D) - 1 - D), D = log p - log q; q the teachers' mean."""
    smallest: tl.constexpr = SMALLEST_DOUBLE if S.compute == tl.float64 else SMALLEST
    difference = log_p - log_pos(tl.maximum(q, smallest), S.exact)
    near = q * (difference * difference * polynomial(difference, "series_2_terms"))
    far = (p - q) - q * difference
    return tl.where(q < smallest, p, where_near(difference, near, far))
