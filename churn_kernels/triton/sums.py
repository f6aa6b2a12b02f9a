"""From logits to a row's sums: one block at a time, relative to the largest logit of each lane.

Sums relative to different maxima add up after `rebase`, so that blocks, lanes and parts of a row
all come together in the same way. The order depends on the plan alone.
"""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import kl_term, sign
from churn_kernels.triton.math import at_least_lowest, exp_nonpos, log_pos, mul_add
from churn_kernels.triton.row import Sums, pair_index
from churn_kernels.triton.tile import (
    across,
    blocks,
    classes_of_block,
    lane_max,
    lane_sum,
    load_block,
    load_weights,
    any_row,
    row_full,
    row_sum,
    to_lane,
)
from churn_kernels.triton.topk import in_top_k, midpoint, order_key

INFINITY = tl.constexpr(float("inf"))
ANY_TIE = tl.constexpr(2**30 - 1)  # behind every class: all ties belong


@triton.jit
def block_sums(z, c, weights, thresholds, last_ties, temperature, S: tl.constexpr):
    """Sums of one block, for each lane."""
    maximum = ()
    mass = ()
    moment = ()
    spread = ()
    lives = ()
    tempered_mass = ()
    top_mass = ()
    top_moment = ()
    top_spread = ()
    top_live = ()
    weighted_spread = ()
    weight_live = ()
    d = ()
    f = ()
    live = ()
    for k in tl.static_range(S.models):
        m = lane_max(z[k], S)
        maximum += (m,)
        raw = z[k] - to_lane(tl.where(m == -INFINITY, 0.0, m), S)
        e = exp_nonpos(raw)  # exp(-inf) = 0: a class at -inf weighs nothing
        d += (at_least_lowest(raw),)
        live += (z[k] != -INFINITY,)
        mass += (lane_sum(e, S),)
        moment += (lane_sum(e * d[k], S),)
        if S.counts_live:
            lives += (lane_sum(live[k].to(S.compute), S),)
        if S.uniform and not S.top:
            spread += (lane_sum(tl.where(live[k], d[k], 0.0), S),)
        if S.tempered:
            f += (exp_nonpos(raw / temperature),)
            tempered_mass += (lane_sum(f[k], S),)
        else:
            f += (e,)
        if S.top and k < S.students:
            member = in_top_k(
                order_key(z[k]), c, across(thresholds[k], S), across(last_ties[k], S)
            )
            member = member & live[k]
            top_e = tl.where(member, e, 0.0)
            top_mass += (lane_sum(top_e, S),)
            top_moment += (lane_sum(top_e * d[k], S),)
            if S.uniform:
                top_live += (lane_sum(member.to(S.compute), S),)
                top_spread += (lane_sum(tl.where(member, d[k], 0.0), S),)
        if S.smooths:
            w = tl.where(live[k], weights, 0.0)
            weight_live += (lane_sum(w, S),)
            weighted_spread += (lane_sum(w * d[k], S),)
    first = ()
    second = ()
    mismatch = ()
    if S.couples:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                difference = d[i] - d[j]
                first += (lane_sum(f[i] * difference, S),)
                second += (lane_sum(f[j] * difference, S),)
                mismatch += (lane_sum((live[i] != live[j]).to(S.compute), S),)
    return Sums(
        maximum,
        mass,
        moment,
        spread,
        lives,
        tempered_mass,
        top_mass,
        top_moment,
        top_spread,
        top_live,
        weighted_spread,
        weight_live,
        first,
        second,
        mismatch,
    )


@triton.jit
def rebase(sums, maximum, temperature, S: tl.constexpr):
    """The same sums relative to other, larger maxima: d shifts by delta, exp(d) by exp(delta)."""
    mass = ()
    moment = ()
    spread = ()
    tempered_mass = ()
    top_mass = ()
    top_moment = ()
    top_spread = ()
    weighted_spread = ()
    delta = ()
    tempered_scale = ()
    for k in tl.static_range(S.models):
        # A lane without a class has sums of 0; nothing is to become of them.
        by = tl.where(sums.maximum[k] == -INFINITY, 0.0, sums.maximum[k] - maximum[k])
        by = at_least_lowest(by)
        scale = exp_nonpos(by)
        delta += (by,)
        mass += (scale * sums.mass[k],)
        moment += (scale * mul_add(by, sums.mass[k], sums.moment[k]),)
        if S.uniform and not S.top:
            spread += (mul_add(by, sums.live[k], sums.spread[k]),)
        if S.tempered:
            tempered_scale += (exp_nonpos(by / temperature),)
            tempered_mass += (tempered_scale[k] * sums.tempered_mass[k],)
        else:
            tempered_scale += (scale,)
        if S.top and k < S.students:
            top_mass += (scale * sums.top_mass[k],)
            top_moment += (scale * mul_add(by, sums.top_mass[k], sums.top_moment[k]),)
            if S.uniform:
                top_spread += (mul_add(by, sums.top_live[k], sums.top_spread[k]),)
        if S.smooths:
            weighted_spread += (mul_add(by, sums.weight_live[k], sums.weighted_spread[k]),)
    first = ()
    second = ()
    if S.couples:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                p: tl.constexpr = pair_index(i, j, S.models)
                by = delta[i] - delta[j]
                mass_i = sums.tempered_mass[i] if S.tempered else sums.mass[i]
                mass_j = sums.tempered_mass[j] if S.tempered else sums.mass[j]
                first += (tempered_scale[i] * mul_add(by, mass_i, sums.first[p]),)
                second += (tempered_scale[j] * mul_add(by, mass_j, sums.second[p]),)
    return Sums(
        maximum,
        mass,
        moment,
        spread,
        sums.live,
        tempered_mass,
        top_mass,
        top_moment,
        top_spread,
        sums.top_live,
        weighted_spread,
        sums.weight_live,
        first,
        second,
        sums.mismatch,
    )


@triton.jit
def add_each(a, b):
    """Entry by entry, two tuples."""
    total = ()
    for i in tl.static_range(len(a)):
        total += (a[i] + b[i],)
    return total


@triton.jit
def total_each(a):
    """Sum over the lanes of each entry."""
    total = ()
    for i in tl.static_range(len(a)):
        total += (tl.sum(a[i], 0),)
    return total


@triton.jit
def combine(a, b, temperature, S: tl.constexpr):
    """Sums of two blocks, lane by lane."""
    maximum = ()
    for k in tl.static_range(S.models):
        maximum += (tl.maximum(a.maximum[k], b.maximum[k]),)
    a = rebase(a, maximum, temperature, S)
    b = rebase(b, maximum, temperature, S)
    return Sums(
        maximum,
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
        add_each(a.weight_live, b.weight_live),
        add_each(a.first, b.first),
        add_each(a.second, b.second),
        add_each(a.mismatch, b.mismatch),
    )


@triton.jit
def over_lanes(a, temperature, S: tl.constexpr):
    """Sums of the row, out of those of its lanes."""
    if S.wide:
        maximum = ()
        for k in tl.static_range(S.models):
            maximum += (tl.max(a.maximum[k], 0),)
        a = rebase(a, maximum, temperature, S)
        a = Sums(
            maximum,
            total_each(a.mass),
            total_each(a.moment),
            total_each(a.spread),
            total_each(a.live),
            total_each(a.tempered_mass),
            total_each(a.top_mass),
            total_each(a.top_moment),
            total_each(a.top_spread),
            total_each(a.top_live),
            total_each(a.weighted_spread),
            total_each(a.weight_live),
            total_each(a.first),
            total_each(a.second),
            total_each(a.mismatch),
        )
    return a


@triton.jit
def row_sums(z, at, class_weight, thresholds, last_ties, temperature, S: tl.constexpr):
    """Sums of the row; z holds it where it is resident."""
    c = classes_of_block(at, 0, S)
    first = z if S.resident else load_block(at, 0, S)
    weights = load_weights(class_weight, at, c, S) if S.smooths else 0.0
    sums = block_sums(first, c, weights, thresholds, last_ties, temperature, S)
    if not S.resident:
        for block in range(1, blocks(at, S)):
            c = classes_of_block(at, block, S)
            weights = load_weights(class_weight, at, c, S) if S.smooths else 0.0
            part = block_sums(
                load_block(at, block, S), c, weights, thresholds, last_ties, temperature, S
            )
            sums = combine(sums, part, temperature, S)
    return over_lanes(sums, temperature, S)


@triton.jit
def finish_sums(sums, broken, S: tl.constexpr):
    """Poison a row that means nothing: a target out of range, or no class above -inf.

    Sets the tempered masses where there is no temperature, too.
    """
    mass = ()
    moment = ()
    tempered_mass = ()
    for k in tl.static_range(S.models):
        poison = tl.where(broken | (sums.maximum[k] == -INFINITY), float("nan"), 0.0)
        mass += (sums.mass[k] + poison,)
        moment += (sums.moment[k] + poison,)
        if S.tempered:
            tempered_mass += (sums.tempered_mass[k] + poison,)
        else:
            tempered_mass += (sums.mass[k] + poison,)
    return with_masses(sums, mass, moment, tempered_mass)


@triton.jit
def with_masses(sums, mass, moment, tempered_mass):
    return Sums(
        sums.maximum,
        mass,
        moment,
        sums.spread,
        sums.live,
        tempered_mass,
        sums.top_mass,
        sums.top_moment,
        sums.top_spread,
        sums.top_live,
        sums.weighted_spread,
        sums.weight_live,
        sums.first,
        sums.second,
        sums.mismatch,
    )


@triton.jit
def tempered(z, maximum, temperature, S: tl.constexpr):
    """exp((z - maximum) / T) of a class."""
    d = z - across(maximum, S)
    if S.tempered:
        d = d / temperature
    return exp_nonpos(d)


@triton.jit
def block_second_sums(z, c, sums, temperature, S: tl.constexpr):
    """Tile-wise terms of L1 or distillation, which need the masses first: (first, second, mismatch)
    """
    first = ()
    second = ()
    mismatch = ()
    if S.divergence == 4:
        q = tl.zeros_like(z[0])
        for t in tl.static_range(1, S.models):
            q += tempered(z[t], sums.maximum[t], temperature, S) / across(
                sums.tempered_mass[t], S
            )
        q = q / (S.models - 1)
        live = z[0] != -INFINITY
        d = at_least_lowest(z[0] - across(sums.maximum[0], S))
        if S.tempered:
            d = d / temperature
        log_p = d - across(log_pos(sums.tempered_mass[0]), S)
        first += (lane_sum(tl.where(live, kl_term(q, log_p), 0.0), S),)
        mismatch += (lane_sum(((q > 0) & (live == 0)).to(S.compute), S),)
    else:
        p = ()
        for k in tl.static_range(S.models):
            p += (
                tempered(z[k], sums.maximum[k], temperature, S)
                / across(sums.tempered_mass[k], S),
            )
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                s = sign(p[i], p[j])
                first += (lane_sum(s * p[i], S),)
                second += (lane_sum(s * p[j], S),)
    return first, second, mismatch


@triton.jit
def second_sums(z, at, sums, temperature, S: tl.constexpr):
    """The row's sums with those of the divergences that need the masses first."""
    c = classes_of_block(at, 0, S)
    block_z = z if S.resident else load_block(at, 0, S)
    first, second, mismatch = block_second_sums(block_z, c, sums, temperature, S)
    if not S.resident:
        for block in range(1, blocks(at, S)):
            c = classes_of_block(at, block, S)
            f, s, m = block_second_sums(load_block(at, block, S), c, sums, temperature, S)
            first = add_each(first, f)
            second = add_each(second, s)
            mismatch = add_each(mismatch, m)
    if S.wide:
        first, second, mismatch = total_each(first), total_each(second), total_each(mismatch)
    return Sums(
        sums.maximum,
        sums.mass,
        sums.moment,
        sums.spread,
        sums.live,
        sums.tempered_mass,
        sums.top_mass,
        sums.top_moment,
        sums.top_spread,
        sums.top_live,
        sums.weighted_spread,
        sums.weight_live,
        first,
        second,
        mismatch,
    )


@triton.jit
def count_members(z, at, k: tl.constexpr, threshold, last_tie, S: tl.constexpr):
    """Classes of model k in the set that `in_top_k` describes."""
    if S.resident:
        c = classes_of_block(at, 0, S)
        member = in_top_k(order_key(z[k]), c, across(threshold, S), across(last_tie, S))
        count = row_sum(member.to(tl.int32), S)
    else:
        count = row_full(0, tl.int32, S)
        for block in range(0, blocks(at, S)):
            c = classes_of_block(at, block, S)
            key = order_key(load_block(at, block, S)[k])
            member = in_top_k(key, c, across(threshold, S), across(last_tie, S))
            count += row_sum(member.to(tl.int32), S)
    return count


@triton.jit
def select_top_k(z, at, k: tl.constexpr, wanted, S: tl.constexpr):
    """Threshold and last tie of the `wanted` largest logits of model k.

    Bisects on the key until just as many lie at or above it; where ties straddle the border, then
    on the class index.
    """
    lowest = order_key(tl.full((), -INFINITY, S.compute))
    low = row_full(lowest, lowest.dtype, S)
    high = -low  # the key of +inf is -1 - low
    last = row_full(ANY_TIE, tl.int32, S)
    searching = high > low
    while any_row(searching, S):
        middle = midpoint(low, high)
        count = count_members(z, at, k, middle, last, S)
        low = tl.where(searching & (count >= wanted), middle, low)
        high = tl.where(searching & (count < wanted), middle, high)
        searching = searching & (count != wanted) & (high - 1 > low)
    # At or above `low` lie as many as are wanted, or more: its ties, of which the first belong.
    count = count_members(z, at, k, low, last, S)
    before = row_full(-1, tl.int32, S)
    last = tl.where(count > wanted, at.classes - 1, last)
    searching = (count > wanted) & (at.classes > 1)
    while any_row(searching, S):
        middle = midpoint(before, last)
        count = count_members(z, at, k, low, middle, S)
        last = tl.where(searching & (count >= wanted), middle, last)
        before = tl.where(searching & (count < wanted), middle, before)
        searching = searching & (last - 1 > before)
    return low, last
