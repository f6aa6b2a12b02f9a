"""The sums of L1 and distillation, which need the masses of the first sums."""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import kl_term, sign
from churn_kernels.triton.math import INFINITY, at_least_lowest, log_pos, mul_add
from churn_kernels.triton.row import pair_index
from churn_kernels.triton.scales import extremes, integers, pair_scales, real
from churn_kernels.triton.softmax import tempered
from churn_kernels.triton.sums import with_pairs
from churn_kernels.triton.tile import across, blocks, lane_max, lane_sum, load_block, row_full
from churn_kernels.triton.tuples import add_each, larger_each, largest_each, total_each


@triton.jit
def inverse_mass(sums, k: tl.constexpr, S: tl.constexpr):
    """What makes model k's exponentials probabilities."""
    return (1.0 / sums.tempered_mass[k]).to(S.compute)


@triton.jit
def probability(x, k: tl.constexpr, sums, inverse_temperature, S: tl.constexpr):
    """softmax(z_k / T) of a class."""
    f = tempered(x, sums.maximum[k].to(S.compute), inverse_temperature, S)
    return f * across(inverse_mass(sums, k, S), S)


@triton.jit
def teacher_terms(z, sums, inverse_temperature, S: tl.constexpr):
    """(KL term, 1 where only the teachers have the class) of each class."""
    x = z[0].to(S.compute)
    q = tl.zeros_like(x)
    for t in tl.static_range(1, S.models):
        maximum = sums.maximum[t].to(S.compute)
        f = tempered(z[t].to(S.compute), maximum, inverse_temperature, S)
        q = mul_add(f, across(inverse_mass(sums, t, S), S), q)
    q = q * (1.0 / (S.models - 1))
    live = x != -INFINITY
    d = tl.where(live, at_least_lowest(x - across(sums.maximum[0].to(S.compute), S)), 0.0)
    if S.tempered:
        d = d * inverse_temperature
    log_mass = log_pos(sums.tempered_mass[0], S.exact).to(S.compute)
    kl = kl_term(q, d - across(log_mass, S), S)
    return tl.where(live, kl, 0.0), tl.where(live, 0, (q > 0).to(tl.int32))


@triton.jit
def added(x, by, S: tl.constexpr):
    """Sum of x for each lane: of floats, or of integers `by` times as large, by row."""
    if S.exact:
        return integers(x * across(by, S), S)
    else:
        return lane_sum(x, S)


@triton.jit
def part_terms(z, sums, by, inverse_temperature, S: tl.constexpr):
    """(first, second, reach) of a part, for each lane."""
    first = ()
    second = ()
    reach = ()
    if S.divergence == 4:
        kl, alone = teacher_terms(z, sums, inverse_temperature, S)
        first += (added(kl, by, S),)
        reach += (lane_max(tl.where(alone > 0, INFINITY, 0.0), S),)
    else:
        p = ()
        for k in tl.static_range(S.models):
            p += (probability(z[k].to(S.compute), k, sums, inverse_temperature, S),)
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                s = sign(p[i], p[j])
                first += (added(s * p[i], by, S),)
                second += (added(s * p[j], by, S),)
    return first, second, reach


@triton.jit
def block_terms(z, sums, by, inverse_temperature, S: tl.constexpr):
    first, second, reach = part_terms(z[0], sums, by, inverse_temperature, S)
    for part in tl.static_range(1, S.parts):
        f, s, r = part_terms(z[part], sums, by, inverse_temperature, S)
        first, second, reach = add_each(first, f), add_each(second, s), larger_each(reach, r)
    return first, second, reach


@triton.jit
def real_pairs(totals, sums, S: tl.constexpr):
    """L1's sums as numbers; NaN where one of the two models is, as integers cannot be."""
    found = ()
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            poison = (sums.mass[i] + sums.mass[j]) * 0.0
            total = totals[pair_index(i, j, S.models)].to(tl.float64) / S.unit
            found += (total + poison,)
    return found


@triton.jit
def real_divergence(total, by, sums, S: tl.constexpr):
    """KL to the teachers as a number; NaN where any model is."""
    poison = sums.mass[0] * 0.0
    for t in tl.static_range(1, S.models):
        poison += sums.mass[t] * 0.0
    return real(total, by) + poison


@triton.jit
def second_sums(z, at, sums, inverse_temperature, S: tl.constexpr):
    """The row's sums, with those that need its masses."""
    by = row_full(S.unit, S.compute, S)
    if S.exact and S.divergence == 4:
        by = pair_scales(at, extremes(z, at, S), inverse_temperature, S)[0]
    parts = z if S.resident else load_block(at, 0, True, S)
    first, second, reach = block_terms(parts, sums, by, inverse_temperature, S)
    if not S.resident:
        for block in range(1, blocks(at, S)):
            parts = load_block(at, block, True, S)
            f, s, r = block_terms(parts, sums, by, inverse_temperature, S)
            first, second, reach = add_each(first, f), add_each(second, s), larger_each(reach, r)
    if S.wide:
        first, second, reach = total_each(first), total_each(second), largest_each(reach)
    if S.exact:
        if S.divergence == 4:
            first = (real_divergence(first[0], by, sums, S),)
        else:
            first, second = real_pairs(first, sums, S), real_pairs(second, sums, S)
    return with_pairs(sums, first, second, reach)
