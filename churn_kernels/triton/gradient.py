"""The gradient of every student at each class, out of the row's coefficients."""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import sign
from churn_kernels.triton.math import at_least_lowest, exp_nonpos, mul_add
from churn_kernels.triton.second import probability, tempered
from churn_kernels.triton.softmax import softmax_gradient
from churn_kernels.triton.sums import INFINITY
from churn_kernels.triton.tile import across
from churn_kernels.triton.topk import in_top_k, order_key


@triton.jit
def gradients(z, c, weights, target, row, temperature, labelled: tl.constexpr, S: tl.constexpr):
    """Gradient of each student at the classes c, whose logits are z; `row` is a `RowState`.

    Without `labelled` the 1 of the target is left out: the caller writes that class again.
    """
    x = ()
    d = ()
    f = ()
    p = ()
    for k in tl.static_range(S.models):
        x += (z[k].to(S.compute),)
        d += (at_least_lowest(x[k] - across(row.sums.maximum[k], S)),)
        f += (tempered(x[k], row.sums.maximum[k], temperature, S),)
        if S.divergence == 3:
            p += (probability(x[k], k, row.sums, temperature, S),)
    result = ()
    for i in tl.static_range(S.students):
        e = exp_nonpos(x[i] - across(row.sums.maximum[i], S)) if S.tempered else f[i]
        inner = mul_add(across(row.found.slope[i], S), d[i], across(row.found.constant[i], S))
        if S.d and not S.tempered:
            inner = add_partners(inner, i, d, p, row.found, S)
        g = e * inner
        if S.uniform and not S.top:
            g += tl.where(x[i] != -INFINITY, across(row.found.uniform[i], S), 0.0)
        if S.top:
            member = in_top_k(
                order_key(x[i]), c, across(row.thresholds[i], S), across(row.last_ties[i], S)
            )
            more = softmax_gradient(
                e,
                d[i],
                across(row.found.top_constant[i], S),
                across(row.found.top_slope[i], S),
                across(row.found.top_uniform[i], S),
            )
            g += tl.where(member & (x[i] != -INFINITY), more, 0.0)
        if S.smooths:
            g = mul_add(-across(row.found.smoothing[i], S), weights, g)
        if S.d:
            if S.tempered:
                own = across(row.found.slopes[i * S.models + i], S)
                coupled = mul_add(own, d[i], across(row.found.tempered_constant[i], S))
                g = mul_add(f[i], add_partners(coupled, i, d, p, row.found, S), g)
            if S.divergence != 3:
                for j in tl.static_range(S.models):
                    if j != i:
                        g = mul_add(-across(row.found.others[i * S.models + j], S), f[j], g)
        if S.ce and labelled:
            g -= tl.where(c == across(target, S), across(row.found.target[i], S), 0.0)
        result += (g,)
    return result


@triton.jit
def add_partners(inner, i: tl.constexpr, d, p, found, S: tl.constexpr):
    """inner + sum over the partners j of slope_j d_j; with L1, of slope_j sign(p_i - p_j)."""
    for j in tl.static_range(S.models):
        if j != i:
            slope = across(found.slopes[i * S.models + j], S)
            if S.divergence == 1:
                inner = mul_add(slope, d[j], inner)
            if S.divergence == 3:
                inner = mul_add(slope, sign(p[i], p[j]), inner)
    return inner
