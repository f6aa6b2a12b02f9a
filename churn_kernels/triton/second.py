"""The sums of L1 and distillation, which need the masses of the first sums."""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import kl_term, sign
from churn_kernels.triton.math import at_least_lowest, exp_nonpos, log_pos, mul_add
from churn_kernels.triton.sums import INFINITY, with_pairs
from churn_kernels.triton.tile import across, blocks, lane_max, lane_sum, load_block
from churn_kernels.triton.tuples import add_each, larger_each, largest_each, total_each


@triton.jit
def tempered(x, maximum, inverse_temperature, S: tl.constexpr):
    """exp((x - maximum) / T) of a class."""
    d = x - across(maximum, S)
    if S.tempered:
        d = at_least_lowest(d) * inverse_temperature
    return tl.where(x == -INFINITY, 0.0, exp_nonpos(d, S.exact))


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
def part_terms(z, sums, inverse_temperature, S: tl.constexpr):
    """(first, second, reach) of a part, for each lane."""
    first = ()
    second = ()
    reach = ()
    if S.divergence == 4:
        kl, alone = teacher_terms(z, sums, inverse_temperature, S)
        first += (lane_sum(kl, S),)
        reach += (lane_max(tl.where(alone > 0, INFINITY, 0.0), S),)
    else:
        p = ()
        for k in tl.static_range(S.models):
            p += (probability(z[k].to(S.compute), k, sums, inverse_temperature, S),)
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                s = sign(p[i], p[j])
                first += (lane_sum(s * p[i], S),)
                second += (lane_sum(s * p[j], S),)
    return first, second, reach


@triton.jit
def block_terms(z, sums, inverse_temperature, S: tl.constexpr):
    first, second, reach = part_terms(z[0], sums, inverse_temperature, S)
    for part in tl.static_range(1, S.parts):
        f, s, r = part_terms(z[part], sums, inverse_temperature, S)
        first, second, reach = add_each(first, f), add_each(second, s), larger_each(reach, r)
    return first, second, reach


@triton.jit
def second_sums(z, at, sums, inverse_temperature, S: tl.constexpr):
    """The row's sums, with those of the second sweep."""
    parts = z if S.resident else load_block(at, 0, True, S)
    first, second, reach = block_terms(parts, sums, inverse_temperature, S)
    if not S.resident:
        for block in range(1, blocks(at, S)):
            parts = load_block(at, block, True, S)
            f, s, r = block_terms(parts, sums, inverse_temperature, S)
            first, second, reach = add_each(first, f), add_each(second, s), larger_each(reach, r)
    if S.wide:
        first, second, reach = total_each(first), total_each(second), largest_each(reach)
    return with_pairs(sums, first, second, reach)
