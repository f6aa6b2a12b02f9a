"""Exact mode's sums over a row: terms cut to integers, which add up to the same in any order.

The arithmetic is csrc/rows/exact.h's, the terms are those of csrc/cpu/general.h, so the bits are
the CPU's. Extremes come first; they decide what terms are times as integers (`scales`).
"""

import triton
import triton.language as tl

from churn_kernels.triton.math import INFINITY, exp_nonpos
from churn_kernels.triton.row import Sums
from churn_kernels.triton.scales import difference, extremes, find_scales, integers, real, weigh
from churn_kernels.triton.softmax import tempered
from churn_kernels.triton.sums import add_sums, over_lanes
from churn_kernels.triton.tile import across, blocks, classes_of, lane_sum, load_block, load_weights
from churn_kernels.triton.topk import in_top_k, order_key


@triton.jit
def part_sums(z, c, weights, row, by, thresholds, last_ties, inverse_temperature, S: tl.constexpr):
    """The integers that a part's terms add up to, for each lane."""
    mass = ()
    moment = ()
    spread = ()
    live = ()
    tempered_mass = ()
    top_mass = ()
    top_moment = ()
    top_spread = ()
    top_live = ()
    weighted_spread = ()
    d = ()
    f = ()
    alive = ()
    for k in tl.static_range(S.models):
        x = z[k].to(S.compute)
        alive += (x != -INFINITY,)
        d += (difference(x, row.maximum[k], S),)
        e = tl.where(alive[k], exp_nonpos(d[k], True), 0.0)
        counted = tl.where(alive[k], tl.where(d[k] == 0, across(by.peak[k], S), e), 0.0)
        unit = across(by.unit[k], S)
        mass += (integers(counted * unit, S),)
        moment += (integers(counted * unit * d[k], S),)
        if S.counts_live:
            live += (lane_sum(alive[k].to(tl.int64), S),)
        if S.uniform and not S.top:
            spread += (integers(d[k] * across(by.spread[k], S), S),)
        if S.tempered:
            f += (tempered(x, row.maximum[k], inverse_temperature, S),)
            tempered_mass += (integers(f[k] * S.unit, S),)
        else:
            f += (e,)
        if S.top and k < S.students:
            member = in_top_k(order_key(x), c, across(thresholds[k], S), across(last_ties[k], S))
            member = member & alive[k]
            top_e = tl.where(member, counted, 0.0)
            top_mass += (integers(top_e * unit, S),)
            top_moment += (integers(top_e * unit * d[k], S),)
            if S.uniform:
                top_live += (lane_sum(member.to(tl.int64), S),)
                top_d = tl.where(member, d[k], 0.0)
                top_spread += (integers(top_d * across(by.top_spread[k], S), S),)
        if S.smooths:
            term = weigh(weights, d[k])
            weighted_spread += (integers(term * across(by.weighted_spread[k], S), S),)
    first = ()
    second = ()
    if S.couples:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                apart = d[i] - d[j]
                unit_of_pair = across(by.pair[len(first)], S)
                first += (integers(f[i] * unit_of_pair * apart, S),)
                second += (integers(f[j] * unit_of_pair * apart, S),)
    return Sums(
        row.maximum,
        mass,
        moment,
        spread,
        live,
        tempered_mass,
        top_mass,
        top_moment,
        top_spread,
        top_live,
        weighted_spread,
        (),
        first,
        second,
        (),
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
def real_each(totals, by):
    found = ()
    for i in tl.static_range(len(totals)):
        found += (real(totals[i], by[i]),)
    return found


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
def exact_sums(z, at, class_weight, thresholds, last_ties, inverse_temperature, S: tl.constexpr):
    """The row's sums in float64, its maxima in float32; NaN of a model that holds one or +inf."""
    row = extremes(z, at, S)
    by = find_scales(at, row, class_weight, thresholds, inverse_temperature, S)
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
    reach = ()
    for p in tl.static_range(len(row.alone)):
        reach += (tl.where(row.alone[p] > 0, INFINITY, 0.0),)
    return Sums(
        row.maximum,
        mass,
        real_each(sums.moment, by.unit),
        real_each(sums.spread, by.spread),
        counts(sums.live),
        real_units(sums.tempered_mass, S),
        top_mass,
        real_each(sums.top_moment, by.unit),
        real_each(sums.top_spread, by.top_spread),
        counts(sums.top_live),
        real_each(sums.weighted_spread, by.weighted_spread),
        (),
        real_each(sums.first, by.pair),
        real_each(sums.second, by.pair),
        reach,
        tail,
        top_tail,
    )
