"""The gradient of every student at each class, out of the row's coefficients."""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import sign
from churn_kernels.triton.math import at_least_lowest, exp_nonpos, mul_add
from churn_kernels.triton.softmax import softmax_gradient
from churn_kernels.triton.sums import INFINITY, tempered
from churn_kernels.triton.tile import across
from churn_kernels.triton.topk import in_top_k, order_key


@triton.jit
def gradients(
    z, c, weights, target, sums, thresholds, last_ties, coefficients, temperature, S: tl.constexpr
):
    """Gradient of each student at the classes c, whose logits are z."""
    d = ()
    f = ()
    p = ()
    for k in tl.static_range(S.models):
        d += (at_least_lowest(z[k] - across(sums.maximum[k], S)),)
        f += (tempered(z[k], sums.maximum[k], temperature, S),)
        if S.divergence == 3:
            p += (f[k] / across(sums.tempered_mass[k], S),)
    found = ()
    for i in tl.static_range(S.students):
        e = exp_nonpos(z[i] - across(sums.maximum[i], S)) if S.tempered else f[i]
        constant = across(coefficients.constant[i], S)
        slope = across(coefficients.slope[i], S)
        uniform = across(coefficients.uniform[i], S)
        if S.uniform:
            uniform = tl.where(z[i] != -INFINITY, uniform, 0.0)
        g = softmax_gradient(e, d[i], constant, slope, uniform)
        if S.top:
            member = in_top_k(
                order_key(z[i]), c, across(thresholds[i], S), across(last_ties[i], S)
            )
            more = softmax_gradient(
                e,
                d[i],
                across(coefficients.top_constant[i], S),
                across(coefficients.top_slope[i], S),
                across(coefficients.top_uniform[i], S),
            )
            g += tl.where(member & (z[i] != -INFINITY), more, 0.0)
        if S.smooths:
            g = mul_add(-across(coefficients.smoothing[i], S), weights, g)
        if S.d:
            g = add_divergence_gradient(g, i, d, f, p, coefficients, S)
        if S.ce:
            g -= tl.where(c == across(target, S), across(coefficients.target[i], S), 0.0)
        found += (g,)
    return found


@triton.jit
def add_divergence_gradient(g, i: tl.constexpr, d, f, p, coefficients, S: tl.constexpr):
    """f_i (constant + sum_j slope_j d_j) - sum_j other_j f_j; sign(p_i - p_j) for d_j with L1."""
    inner = across(coefficients.tempered_constant[i], S)
    for j in tl.static_range(S.models):
        slope = across(coefficients.slopes[i * S.models + j], S)
        if S.divergence == 3:
            if j != i:
                inner = mul_add(slope, sign(p[i], p[j]), inner)
        else:
            if S.divergence == 1:
                inner = mul_add(slope, d[j], inner)
            if j != i:
                g = mul_add(-across(coefficients.others[i * S.models + j], S), f[j], g)
    return mul_add(f[i], inner, g)
