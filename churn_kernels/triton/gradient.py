"""The gradient of every student at each class, out of the row's coefficients."""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import sign
from churn_kernels.triton.math import (
    INFINITY,
    WEIGHTLESS,
    at_least_lowest,
    canonical,
    exp_nonpos,
    mul_add,
)
from churn_kernels.triton.row import pair_index
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
    for k in tl.static_range(S.models):
        x += (z[k].to(S.compute),)
        difference = at_least_lowest(x[k] - across(row.maximum[k], S))
        d += (tl.where(x[k] != -INFINITY, difference, 0.0) if S.exact else difference,)
        f += (tempered(x[k], row.maximum[k], inverse_temperature, S),)
    apart = ()
    less = ()
    if S.d and S.divergence != 4:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                apart += (d[i] - d[j],)
                less += (f[i] - f[j],)
    result = ()
    for i in tl.static_range(S.students):
        e = f[i]
        if S.tempered:
            e = exp_nonpos(x[i] - across(row.maximum[i], S), S.exact)
        # exp is 0 far above WEIGHTLESS; no product with a coefficient overflows.
        near = tl.maximum(d[i], WEIGHTLESS)
        inner = mul_add(across(row.found.slope[i], S), near, across(row.found.constant[i], S))
        rest = tl.zeros_like(x[i])
        if S.uniform and not S.top:
            rest = tl.where(x[i] != -INFINITY, across(row.found.uniform[i], S), 0.0)
        if S.d:
            if S.tempered:
                coupled = across(row.found.tempered_constant[i], S) + tl.zeros_like(x[i])
                coupled, rest = add_partners(coupled, rest, i, x, apart, less, f, row, S)
                rest = mul_add(f[i], coupled, rest)
            else:
                inner, rest = add_partners(inner, rest, i, x, apart, less, f, row, S)
        if S.top:
            member = in_top_k(
                order_key(x[i]), c, across(row.thresholds[i], S), across(row.last_ties[i], S)
            )
            more = softmax_gradient(
                e,
                near,
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
def add_partners(inner, rest, i: tl.constexpr, x, apart, less, f, row, S: tl.constexpr):
    """The partners' part in f_i inner + rest; `apart` and `less` are of the pairs."""
    for j in tl.static_range(S.models):
        if j != i:
            inner, rest = add_partner(inner, rest, i, j, x, apart, less, f, row, S)
    return inner, rest


@triton.jit
def add_partner(
    inner, rest, i: tl.constexpr, j: tl.constexpr, x, apart, less, f, row, S: tl.constexpr
):
    place: tl.constexpr = i * S.models + j
    p: tl.constexpr = pair_index(min(i, j), max(i, j), S.models)
    slope = across(row.found.slopes[place], S)
    mean = across(row.found.means[place], S)
    if S.divergence == 3:
        level = across(row.levels[p] if i < j else -row.levels[p], S)
        difference = apart[p] if i < j else -apart[p]
        s = sign(difference, level, x[i] != -INFINITY, x[j] != -INFINITY, S)
        inner = mul_add(slope, s - mean, inner)
    else:
        other = across(row.found.others[place], S)
        f_j = f[j]
        if S.reduction == 0 or S.reduction == 3:
            # A model that is not coupled in stays out, whatever it holds: 0 times NaN is NaN.
            f_j = tl.where((slope != 0) | (other != 0), f_j, 0.0)
        rest = mul_add(-other, f_j, rest)
        if S.divergence == 1:
            less_i = less[p] if i < j else -less[p]
            if S.reduction == 0 or S.reduction == 3:
                less_i = f[i] - f_j
            rest = mul_add(across(row.found.shares[p], S), less_i, rest)
            # Where the class has no weight, what overflows does not count either.
            away = tl.where(f[i] == 0, 0.0, (apart[p] if i < j else -apart[p]) - mean)
            inner = mul_add(slope, away, inner)
    return inner, rest
