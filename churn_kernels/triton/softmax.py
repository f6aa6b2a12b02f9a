"""One element of softmax, entropy and the divergence to uniform; the twin of csrc/rows/softmax.h.

d = logit - row maximum, e = exp(d), p = e / mass.
"""

import triton
import triton.language as tl

from churn_kernels.triton.math import INFINITY, at_least_lowest, exp_nonpos, lowest_of, mul_add
from churn_kernels.triton.tile import across


@triton.jit
def tempered(x, maximum, inverse_temperature, S: tl.constexpr):
    """exp((x - maximum) / T) of a class, maximum by row; 0 at -inf."""
    d = x - across(maximum, S)
    if S.tempered:
        d = at_least_lowest(d) * inverse_temperature
        return tl.where(x == -INFINITY, 0.0, exp_nonpos(d, S.exact))
    else:
        return exp_nonpos(d, S.exact)


@triton.jit
def weigh(weight, distance, S: tl.constexpr):
    """class weight times a distance in units of `S.distance`, a number even where none is."""
    return tl.maximum(weight * distance, lowest_of(S.compute) * S.distance)


@triton.jit
def softmax_gradient(e, d, constant, slope, uniform):
    """Every softmax term's gradient has this shape in one row: e (constant + slope d) + uniform."""
    return mul_add(e, mul_add(slope, d, constant), uniform)
