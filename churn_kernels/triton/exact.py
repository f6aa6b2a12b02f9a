"""Exact mode's sums over a row: terms cut to integers, which add up to the same in any order.

The arithmetic is csrc/rows/exact.h's, the terms are those of csrc/cpu/general.h, so the bits are
the CPU's. Extremes come first; they decide what terms are times as integers (`scales`).
"""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import sign
from churn_kernels.triton.math import exp_nonpos
from churn_kernels.triton.row import Sums, pair_index
from churn_kernels.triton.scales import difference, extremes, find_scales, pair_scales, weigh
from churn_kernels.triton.second import probability, teacher_terms, tempered
from churn_kernels.triton.sums import INFINITY, over_lanes, with_pairs
from churn_kernels.triton.tile import across, blocks, classes_of, lane_sum, load_block, load_weights
from churn_kernels.triton.topk import in_top_k, order_key
from churn_kernels.triton.tuples import add_each, largest_each, total_each


@triton.jit
def real(total, by):
    """A sum of integers as the number that it stands for."""
    return total.to(tl.float64) / by.to(tl.float64)


@triton.jit
def integers(x, S: tl.constexpr):
    """Sum of x, cut to integers, for each lane."""
    return lane_sum(x.to(tl.int64), S)


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
def add_sums(a, b):
    return Sums(
        a.maximum,
        add_each(a.mass, b.mass),
        add_each(a.moment, b.moment),
        add_each(a.spread, b.spread),
        add_each(a.live, b.live),
        add_each(a.tempered_mass, b.tempered_mass),
        add_each(a.top_mass, b.top_mass),
        add_each(a.top_moment, b.top_moment),
        add_each(a.top_spread, b.top_spread),
        add_each(a.top_live, b.top_live),
        add_each(a.weighted_spread, b.weighted_spread),
        (),
        add_each(a.first, b.first),
        add_each(a.second, b.second),
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


@triton.jit
def second_part(z, sums, by, inverse_temperature, S: tl.constexpr):
    """(first, second, only in teachers) of a part, for each lane."""
    first = ()
    second = ()
    alone = ()
    if S.divergence == 4:
        kl, only = teacher_terms(z, sums, inverse_temperature, S)
        first += (integers(kl * across(by[0], S), S),)
        alone += (lane_sum(only.to(tl.int64), S),)
    else:
        p = ()
        for k in tl.static_range(S.models):
            p += (probability(z[k].to(S.compute), k, sums, inverse_temperature, S),)
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                s = sign(p[i], p[j])
                first += (integers(s * S.unit * p[i], S),)
                second += (integers(s * S.unit * p[j], S),)
    return first, second, alone


@triton.jit
def exact_second_sums(z, at, sums, inverse_temperature, S: tl.constexpr):
    """The row's sums, with those that need its masses: L1, and KL to the teachers."""
    by = ()
    if S.divergence == 4:
        by = pair_scales(at, extremes(z, at, S), inverse_temperature, S)
    count: tl.constexpr = 1 if S.divergence == 4 else S.pairs
    zero = lane_sum(tl.zeros((S.height, S.width), tl.int64), S)
    first = ()
    second = ()
    alone = ()
    for _ in tl.static_range(count):
        first += (zero,)
        if S.divergence == 4:
            alone += (zero,)
        else:
            second += (zero,)
    for block in range(0, blocks(at, S)):
        parts = z if S.resident else load_block(at, block, True, S)
        for part in tl.static_range(S.parts):
            f, s, a = second_part(parts[part], sums, by, inverse_temperature, S)
            first, second, alone = add_each(first, f), add_each(second, s), add_each(alone, a)
    if S.wide:
        first, second, alone = total_each(first), total_each(second), largest_each(alone)
    reach = ()
    if S.divergence == 4:
        poison = sums.mass[0] * 0.0
        for t in tl.static_range(1, S.models):
            poison += sums.mass[t] * 0.0
        first = (real(first[0], by[0]) + poison,)
        reach = (tl.where(alone[0] > 0, INFINITY, 0.0),)
        return with_pairs(sums, first, (), reach)
    else:
        return with_pairs(sums, poisoned(first, sums, S), poisoned(second, sums, S), ())


@triton.jit
def poisoned(totals, sums, S: tl.constexpr):
    """L1's sums as numbers; NaN where one of the two models is."""
    found = ()
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            poison = (sums.tempered_mass[i] + sums.tempered_mass[j]) * 0.0
            total = totals[pair_index(i, j, S.models)].to(tl.float64) / S.unit
            found += (total + poison,)
    return found
