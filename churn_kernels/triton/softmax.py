"""One element of softmax, entropy and the divergence to uniform; the twin of csrc/rows/softmax.h.

d = logit - row maximum, e = exp(d), p = e / mass.
"""

import triton
import triton.language as tl  # noqa: F401 - the interpreter looks for it in each module

from churn_kernels.triton.math import mul_add


@triton.jit
def softmax_gradient(e, d, constant, slope, uniform):
    """Every softmax term's gradient has this shape in one row: e (constant + slope d) + uniform."""
    return mul_add(e, mul_add(slope, d, constant), uniform)
