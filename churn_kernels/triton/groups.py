"""Sums of SKL to uniform and of pairs of models: tuples that only some options fill.

They are tiles, folded at the end of a block, as in `sums`; but a pair's reach is by lane at once.
"""

import triton
import triton.language as tl

from churn_kernels.triton.math import exp_less_one, mul_add, polynomial, where_near
from churn_kernels.triton.row import PairSums, UniformSums
from churn_kernels.triton.tile import fold_each, lane_max, zeros
from churn_kernels.triton.tuples import add_each, larger_each, take


@triton.jit
def no_uniform(lifts: tl.constexpr, spreads: tl.constexpr, S: tl.constexpr):
    return UniformSums(zeros(lifts, S), zeros(spreads, S), zeros(spreads, S), zeros(lifts, S))


@triton.jit
def add_to_uniform(a, e, d, counted, S: tl.constexpr):
    """Adds the classes of each student that are counted; the others have e = d = 0."""
    live = ()
    spread = ()
    excess = ()
    lift = ()
    for k in tl.static_range(len(a.lift)):
        one = counted[k].to(S.compute)
        live += (a.live[k] + one,)
        more = e[k] - one
        if k < len(a.spread):
            distance = d[k] * S.distance
            spread += (a.spread[k] + distance,)
            excess += (mul_add(more, distance, a.excess[k]),)
        lift += (a.lift[k] + more,)
    return UniformSums(live, spread, excess, lift)


@triton.jit
def fold_uniform(a, S: tl.constexpr):
    return UniformSums(
        fold_each(a.live, S), fold_each(a.spread, S), fold_each(a.excess, S), fold_each(a.lift, S)
    )


@triton.jit
def rebase_uniform(a, delta, scale, S: tl.constexpr):
    spread = ()
    excess = ()
    lift = ()
    for k in tl.static_range(len(a.lift)):
        less = exp_less_one(delta[k], scale[k])
        if k < len(a.spread):
            by = delta[k] * S.distance
            moved = mul_add(by, a.live[k], a.spread[k])
            spread += (moved,)
            excess += (mul_add(less, moved, scale[k] * mul_add(by, a.lift[k], a.excess[k])),)
        lift += (mul_add(less, a.live[k], scale[k] * a.lift[k]),)
    return UniformSums(a.live, spread, excess, lift)


@triton.jit
def add_uniforms(a, b):
    return UniformSums(
        add_each(a.live, b.live),
        add_each(a.spread, b.spread),
        add_each(a.excess, b.excess),
        add_each(a.lift, b.lift),
    )


@triton.jit
def take_uniform(values, start: tl.constexpr, lifts: tl.constexpr, spreads: tl.constexpr):
    """Entries from `start` on, in the order of the fields."""
    return UniformSums(
        take(values, start, lifts),
        take(values, start + lifts, spreads),
        take(values, start + lifts + spreads, spreads),
        take(values, start + lifts + 2 * spreads, lifts),
    )


@triton.jit
def no_pairs(S: tl.constexpr):
    couples: tl.constexpr = S.pairs if S.couples else 0
    gaps: tl.constexpr = S.pairs if S.gaps else 0
    reach = ()
    for _ in tl.static_range(couples):
        reach += (lane_max(tl.zeros((S.height, S.width), S.compute), S),)
    others: tl.constexpr = S.pairs if S.others else 0
    return PairSums(zeros(couples, S), zeros(couples, S), zeros(gaps, S), zeros(others, S), reach)


@triton.jit
def add_pairs(a, d, raw, f, S: tl.constexpr):
    """Adds the classes of each pair of models."""
    first = ()
    second = ()
    gap = ()
    other = ()
    reach = ()
    if S.gaps:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                less = f[i] - f[j]
                gap += (a.gap[len(gap)] + less,)
                if S.couples:
                    difference = (d[i] - d[j]) * S.distance
                    first += (mul_add(f[i], difference, a.first[len(first)]),)
                    second += (mul_add(less, difference, a.second[len(second)]),)
                    if S.others:
                        other += (mul_add(f[j], difference, a.other[len(other)]),)
                    apart = lane_max(tl.abs(raw[i] - raw[j]), S)  # not the NaN of both at -inf
                    reach += (tl.maximum(a.reach[len(reach)], apart),)
    return PairSums(first, second, gap, other, reach)


@triton.jit
def fold_pairs(a, S: tl.constexpr):
    return PairSums(
        fold_each(a.first, S),
        fold_each(a.second, S),
        fold_each(a.gap, S),
        fold_each(a.other, S),
        a.reach,
    )


@triton.jit
def rebase_pairs(a, mass, delta, scale, inverse_temperature, S: tl.constexpr):
    """`scale` is exp(delta / T), `mass` sum f. No two large numbers cancel.

    first' = s_i (first + by mass_i), second' = s_j (second + by gap) + (s_i - s_j) (first + by
    mass_i), gap' = s_j gap + (s_i - s_j) mass_i, other' = s_j (other + by mass_j), with by =
    delta_i - delta_j.
    """
    first = ()
    second = ()
    gap = ()
    other = ()
    if S.gaps:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                by = delta[i] - delta[j]
                x = by * inverse_temperature if S.tempered else by
                near = scale[j] * mul_add(x * x, polynomial(x, "series_terms"), x)
                less = where_near(x, near, scale[i] - scale[j])
                gap += (mul_add(less, mass[i], scale[j] * a.gap[len(gap)]),)
                if S.couples:
                    by = by * S.distance
                    moved = mul_add(by, mass[i], a.first[len(first)])
                    first += (scale[i] * moved,)
                    moved_second = scale[j] * mul_add(by, a.gap[len(second)], a.second[len(second)])
                    second += (mul_add(less, moved, moved_second),)
                    if S.others:
                        other += (scale[j] * mul_add(by, mass[j], a.other[len(other)]),)
    return PairSums(first, second, gap, other, a.reach)


@triton.jit
def add_pair_sums(a, b):
    return PairSums(
        add_each(a.first, b.first),
        add_each(a.second, b.second),
        add_each(a.gap, b.gap),
        add_each(a.other, b.other),
        larger_each(a.reach, b.reach),
    )
