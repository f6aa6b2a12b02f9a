"""The gradient of every student at each class, out of the row's coefficients."""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import sign
from churn_kernels.triton.math import (
    INFINITY,
    at_least_lowest,
    canonical,
    exp_nonpos,
    mul_add,
)
from churn_kernels.triton.softmax import softmax_gradient, tempered
from churn_kernels.triton.tile import across
from churn_kernels.triton.topk import in_top_k, order_key


@triton.jit
def gradients(
    z, c, weights, target, row, inverse_temperature, labelled: tl.constexpr, S: tl.constexpr
):
    """Gradient of each student at the classes c, whose logits are z; `row` is a `RowState`.

    Without `labelled` the 1 of the target is left out: the caller writes that class again. The
    order of operations is that of csrc/cpu/fused.h and general.h, as exact mode has one result.
    """
    x = ()
    d = ()
    f = ()
    p = ()
    for k in tl.static_range(S.models):
        x += (z[k].to(S.compute),)
        difference = at_least_lowest(x[k] - across(row.maximum[k], S))
        d += (tl.where(x[k] != -INFINITY, difference, 0.0) if S.exact else difference,)
        f += (tempered(x[k], row.maximum[k], inverse_temperature, S),)
        if S.divergence == 3:
            p += (f[k] * across(row.inverse_masses[k], S),)
    result = ()
    for i in tl.static_range(S.students):
        e = f[i]
        if S.tempered:
            e = exp_nonpos(x[i] - across(row.maximum[i], S), S.exact)
        inner = mul_add(across(row.found.slope[i], S), d[i], across(row.found.constant[i], S))
        rest = tl.zeros_like(x[i])
        if S.uniform and not S.top:
            rest = tl.where(x[i] != -INFINITY, across(row.found.uniform[i], S), 0.0)
        if S.d:
            if not S.tempered:
                inner = add_partners(inner, i, d, p, row.found, S)
            if S.divergence != 3:
                for j in tl.static_range(S.models):
                    if j != i:
                        other = across(row.found.others[i * S.models + j], S)
                        rest = mul_add(-other, f[j], rest)
            if S.tempered:
                own = across(row.found.slopes[i * S.models + i], S)
                coupled = mul_add(own, d[i], across(row.found.tempered_constant[i], S))
                rest = mul_add(f[i], add_partners(coupled, i, d, p, row.found, S), rest)
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
            rest += tl.where(member & (x[i] != -INFINITY), more, 0.0)
        if S.smooths:
            rest = mul_add(-across(row.found.smoothing[i], S), weights, rest)
        g = mul_add(e, inner, rest)
        if S.ce and labelled:
            g -= tl.where(c == across(target, S), across(row.found.target[i], S), 0.0)
        result += (canonical(g) if S.exact else g,)
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
