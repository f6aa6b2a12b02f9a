"""Exact mode's sums over a row: terms cut to integers, which add up to the same in any order.

The arithmetic is csrc/rows/exact.h's, the terms are those of csrc/cpu/general.h, so the bits are
the CPU's. Extremes come first; they decide what terms are times as integers (`scales`).
"""

import triton
import triton.language as tl

from churn_kernels.triton.math import INFINITY, exp_nonpos, less_one
from churn_kernels.triton.row import PairSums, Sums, UniformSums
from churn_kernels.triton.scales import (
    REACH,
    difference,
    extremes,
    find_scales,
    integers,
    pair_reach,
    real,
    real_each,
)
from churn_kernels.triton.softmax import tempered, weigh
from churn_kernels.triton.sums import add_sums, over_lanes
from churn_kernels.triton.tile import across, blocks, classes_of, lane_sum, load_block, load_weights
from churn_kernels.triton.topk import in_top_k, order_key


@triton.jit
def uniform_integers(e, d, counted, by, near: tl.constexpr, S: tl.constexpr):
    """Of each student's classes that are counted; the others have e = d = 0."""
    live = ()
    spread = ()
    excess = ()
    lift = ()
    for k in tl.static_range(len(counted)):
        one = counted[k].to(S.compute)
        live += (lane_sum(counted[k].to(tl.int64), S),)
        if near:
            more = less_one(d[k], e[k], one)
            spread += (integers(d[k] * across(by[k][0], S), S),)
            excess += (integers(more * across(by[k][1], S) * d[k], S),)
        else:
            more = e[k] - one
        lift += (integers(more * across(by[k][2], S), S),)
    return UniformSums(live, spread, excess, lift)


@triton.jit
def pair_integers(f, d, by, S: tl.constexpr):
    first = ()
    second = ()
    other = ()
    if S.couples:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                apart = d[i] - d[j]
                first += (integers(f[i] * across(by.first[len(first)], S) * apart, S),)
                second += (integers((f[i] - f[j]) * across(by.second[len(second)], S) * apart, S),)
                other += (integers(f[j] * across(by.other[len(other)], S) * apart, S),)
    return PairSums(first, second, (), other, ())


@triton.jit
def part_sums(z, c, weights, row, by, thresholds, last_ties, inverse_temperature, S: tl.constexpr):
    """The integers that a part's terms add up to, for each lane."""
    mass = ()
    moment = ()
    tempered_mass = ()
    top_mass = ()
    top_moment = ()
    weighted_spread = ()
    lost = ()
    d = ()
    es = ()
    f = ()
    alive = ()
    member = ()
    top_d = ()
    top_e = ()
    for k in tl.static_range(S.models):
        x = z[k].to(S.compute)
        live = x != -INFINITY
        d += (difference(x, row.maximum[k], S),)
        e = tl.where(live, exp_nonpos(d[k], True), 0.0)
        es += (e,)
        counted = tl.where(live, tl.where(d[k] == 0, across(by.peak[k], S), e), 0.0)
        unit = across(by.unit[k], S)
        mass += (integers(counted * unit, S),)
        moment += (integers(counted * unit * d[k], S),)
        if S.tempered:
            f += (tempered(x, row.maximum[k], inverse_temperature, S),)
            tempered_mass += (integers(f[k] * S.unit, S),)
        else:
            f += (e,)
        if k < S.students:
            if S.lifts:
                alive += (live,)
            if S.top:
                inside = in_top_k(
                    order_key(x), c, across(thresholds[k], S), across(last_ties[k], S)
                )
                inside = inside & live
                top_counted = tl.where(inside, counted, 0.0)
                top_mass += (integers(top_counted * unit, S),)
                top_moment += (integers(top_counted * unit * d[k], S),)
                if S.uniform:
                    member += (inside,)
                    top_d += (tl.where(inside, d[k], 0.0),)
                    top_e += (tl.where(inside, e, 0.0),)
            if S.smooths:
                term = weigh(weights, d[k], S)
                weighted_spread += (integers(term * across(by.weighted_spread[k], S), S),)
                lost += (lane_sum(((x == -INFINITY) & (weights != 0)).to(tl.int64), S),)
    return Sums(
        row.maximum,
        mass,
        moment,
        uniform_integers(es, d, alive, by.flat, not S.top, S),
        tempered_mass,
        top_mass,
        top_moment,
        uniform_integers(top_e, top_d, member, by.top_flat, True, S),
        weighted_spread,
        (),
        lost,
        pair_integers(f, d, by.pair, S),
        (),
        (),
    )


@triton.jit
def block_sums(
    z, at, block, class_weight, row, by, thresholds, last_ties, inverse_temperature, S: tl.constexpr
):
    c = classes_of(at, block, 0, S)
    weights = load_weights(class_weight, at, c, S) if S.smooths else 0.0
    sums = part_sums(z[0], c, weights, row, by, thresholds, last_ties, inverse_temperature, S)
    for part in tl.static_range(1, S.parts):
        c = classes_of(at, block, part, S)
        weights = load_weights(class_weight, at, c, S) if S.smooths else 0.0
        more = part_sums(
            z[part], c, weights, row, by, thresholds, last_ties, inverse_temperature, S
        )
        sums = add_sums(sums, more)
    return sums


@triton.jit
def real_units(totals, S: tl.constexpr):
    """Of sums that all rows scale alike."""
    found = ()
    for i in tl.static_range(len(totals)):
        found += (totals[i].to(tl.float64) / S.unit,)
    return found


@triton.jit
def counts(totals):
    found = ()
    for i in tl.static_range(len(totals)):
        found += (totals[i].to(tl.float64),)
    return found


@triton.jit
def real_uniform(a, by):
    spread = ()
    excess = ()
    lift = ()
    for k in tl.static_range(len(a.lift)):
        if k < len(a.spread):
            spread += (real(a.spread[k], by[k][0]),)
            excess += (real(a.excess[k], by[k][1]),)
        lift += (real(a.lift[k], by[k][2]),)
    return UniformSums(counts(a.live), spread, excess, lift)


@triton.jit
def real_pairs(a, by, row, temperature, S: tl.constexpr):
    """`other` is first - second where those have its digits."""
    first, second = real_each(a.first, by.first), real_each(a.second, by.second)
    other = ()
    reach = ()
    for p in tl.static_range(len(first)):
        near = pair_reach(row, p, temperature) < REACH
        other += (tl.where(near, first[p] - second[p], real(a.other[p], by.other[p])),)
        reach += (tl.where(row.alone[p] > 0, INFINITY, 0.0),)
    return PairSums(first, second, (), other, reach)


@triton.jit
def exact_sums(
    z, at, class_weight, thresholds, last_ties, temperature, inverse_temperature, S: tl.constexpr
):
    """The row's sums in float64, its maxima in float32; NaN of a model that holds one or +inf."""
    row = extremes(z, at, S)
    by = find_scales(at, row, class_weight, thresholds, temperature, inverse_temperature, S)
    first = z if S.resident else load_block(at, 0, True, S)
    sums = block_sums(
        first, at, 0, class_weight, row, by, thresholds, last_ties, inverse_temperature, S
    )
    for block in range(1, blocks(at, S)):
        parts = load_block(at, block, True, S)
        more = block_sums(
            parts, at, block, class_weight, row, by, thresholds, last_ties, inverse_temperature, S
        )
        sums = add_sums(sums, more)
    sums = over_lanes(sums, inverse_temperature, S)
    mass = ()
    tail = ()
    top_mass = ()
    top_tail = ()
    for k in tl.static_range(S.models):
        peak = by.peak[k].to(tl.float64)
        # A NaN, or no class above -inf: nothing of the row has a meaning.
        lost = (row.broken[k] > 0) | (row.maximum[k] == -INFINITY)
        total = tl.where(lost, float("nan"), real(sums.mass[k], by.unit[k]))
        tail += (total - peak,)
        mass += (total + (1.0 - peak),)
        if k < len(sums.top_mass):
            total = tl.where(lost, float("nan"), real(sums.top_mass[k], by.unit[k]))
            top_tail += (total - peak,)
            top_mass += (total + (1.0 - peak),)
    return Sums(
        row.maximum,
        mass,
        real_each(sums.moment, by.unit),
        real_uniform(sums.flat, by.flat),
        real_units(sums.tempered_mass, S),
        top_mass,
        real_each(sums.top_moment, by.unit),
        real_uniform(sums.top_flat, by.top_flat),
        real_each(sums.weighted_spread, by.weighted_spread),
        (),
        counts(sums.lost),
        real_pairs(sums.pair, by.pair, row, temperature, S),
        tail,
        top_tail,
    )
