"""The sums of L1 and distillation, which need the masses of the first sums."""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import kl_term, probability_difference, sign
from churn_kernels.triton.groups import add_pair_sums
from churn_kernels.triton.math import INFINITY, at_least_lowest, log_pos, mul_add
from churn_kernels.triton.row import PairSums, cast_each, pair_levels, pair_scalars
from churn_kernels.triton.scales import extremes, integers, kl_scales, l1_scales, real_each
from churn_kernels.triton.softmax import tempered
from churn_kernels.triton.sums import with_pairs
from churn_kernels.triton.tile import across, blocks, lane_max, lane_sum, load_block
from churn_kernels.triton.tuples import largest_each, total_each


@triton.jit
def probability(x, k: tl.constexpr, sums, inverse_temperature, S: tl.constexpr):
    """softmax(z_k / T) of a class."""
    f = tempered(x, sums.maximum[k].to(S.compute), inverse_temperature, S)
    return f * across((1.0 / sums.tempered_mass[k]).to(S.compute), S)


@triton.jit
def teacher_terms(z, sums, inverse_temperature, S: tl.constexpr):
    """(KL term, 1 where only a teacher has the class) of each class."""
    x = z[0].to(S.compute)
    q = tl.zeros_like(x)
    taught = tl.zeros_like(x).to(tl.int32)
    for t in tl.static_range(1, S.models):
        y = z[t].to(S.compute)
        f = tempered(y, sums.maximum[t].to(S.compute), inverse_temperature, S)
        q = mul_add(f, across((1.0 / sums.tempered_mass[t]).to(S.compute), S), q)
        taught = tl.maximum(taught, (y != -INFINITY).to(tl.int32))
    q = q * (1.0 / (S.models - 1))
    live = x != -INFINITY
    d = tl.where(live, at_least_lowest(x - across(sums.maximum[0].to(S.compute), S)), 0.0)
    if S.tempered:
        d = at_least_lowest(d * inverse_temperature)
    log_mass = log_pos(sums.tempered_mass[0], S.exact).to(S.compute)
    p = probability(x, 0, sums, inverse_temperature, S)
    kl = kl_term(p, q, d - across(log_mass, S), S)
    return tl.where(live, kl, 0.0), tl.where(live, 0, taught)


@triton.jit
def added(x, by, p: tl.constexpr, S: tl.constexpr):
    """Sum of x for each lane: of floats, or of integers by[p] times as large."""
    if S.exact:
        return integers(x * across(by[p], S), S)
    else:
        return lane_sum(x, S)


@triton.jit
def l1_terms(z, sums, by, scalars, inverse_temperature, S: tl.constexpr):
    """(first, second, gap) of each pair."""
    first = ()
    second = ()
    gap = ()
    f = ()
    d = ()
    alive = ()
    for k in tl.static_range(S.models):
        x = z[k].to(S.compute)
        maximum = sums.maximum[k].to(S.compute)
        alive += (x != -INFINITY,)
        difference = at_least_lowest(x - across(maximum, S))
        d += (tl.where(alive[k], difference, 0.0) if S.exact else difference,)
        f += (tempered(x, maximum, inverse_temperature, S),)
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            level, shared, more_i, minus_more_j = scalars[len(gap)]
            less = probability_difference(
                f[i], f[j], across(shared, S), across(more_i, S), across(minus_more_j, S)
            )
            s = sign(d[i] - d[j], across(level, S), alive[i], alive[j], S)
            first += (added(s * f[i], by.first, len(first), S),)
            second += (added(s * f[j], by.second, len(second), S),)
            gap += (added(s * less, by.gap, len(gap), S),)
    return first, second, gap


@triton.jit
def part_terms(z, sums, by, scalars, inverse_temperature, S: tl.constexpr):
    """The pairs' sums of a part, for each lane."""
    if S.divergence == 4:
        kl, alone = teacher_terms(z, sums, inverse_temperature, S)
        reach = lane_max(tl.where(alone > 0, INFINITY, 0.0), S)
        return PairSums((added(kl, by.first, 0, S),), (), (), (), (reach,))
    else:
        first, second, gap = l1_terms(z, sums, by, scalars, inverse_temperature, S)
        return PairSums(first, second, gap, (), ())


@triton.jit
def block_terms(z, sums, by, scalars, inverse_temperature, S: tl.constexpr):
    total = part_terms(z[0], sums, by, scalars, inverse_temperature, S)
    for part in tl.static_range(1, S.parts):
        more = part_terms(z[part], sums, by, scalars, inverse_temperature, S)
        total = add_pair_sums(total, more)
    return total


@triton.jit
def l1_scalars(sums, temperature, S: tl.constexpr):
    """(level, shared, more_i, minus_more_j) of each pair."""
    levels = pair_levels(sums, temperature, S)
    scalars = ()
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            mass_i, mass_j = sums.tempered_mass[i], sums.tempered_mass[j]
            shared, more_i, minus_more_j = pair_scalars(mass_i, mass_j, sums.pair.gap[len(scalars)])
            scalars += (cast_each((levels[len(scalars)], shared, more_i, minus_more_j), S.compute),)
    return scalars


@triton.jit
def second_sums(z, at, sums, temperature, inverse_temperature, S: tl.constexpr):
    """The row's sums, with those that need its masses."""
    by = PairSums((), (), (), (), ())
    scalars = ()
    if S.exact:
        row = extremes(z, at, S)
        if S.divergence == 4:
            by = kl_scales(at, row, sums.tempered_mass, temperature, inverse_temperature, S)
        else:
            by = l1_scales(at, row, sums.tempered_mass, temperature, inverse_temperature, S)
    if S.divergence == 3:
        scalars = l1_scalars(sums, temperature, S)
    parts = z if S.resident else load_block(at, 0, True, S)
    pair = block_terms(parts, sums, by, scalars, inverse_temperature, S)
    if not S.resident:
        for block in range(1, blocks(at, S)):
            parts = load_block(at, block, True, S)
            more = block_terms(parts, sums, by, scalars, inverse_temperature, S)
            pair = add_pair_sums(pair, more)
    if S.wide:
        pair = PairSums(
            total_each(pair.first),
            total_each(pair.second),
            total_each(pair.gap),
            (),
            largest_each(pair.reach),
        )
    if S.exact:
        first = real_each(pair.first, by.first)
        if S.divergence == 4:  # integers are no NaN, but teachers may be
            for t in tl.static_range(1, S.models):
                first = (first[0] + sums.mass[t] * 0.0,)
        second, gap = real_each(pair.second, by.second), real_each(pair.gap, by.gap)
        pair = PairSums(first, second, gap, (), pair.reach)
    return with_pairs(sums, pair)
