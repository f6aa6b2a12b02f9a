"""From logits to a row's sums.

A resident row is summed relative to its largest logits. Of a row in blocks each lane takes the
largest that it has seen; sums relative to different maxima add up after `rebase`, so that blocks
and lanes come together in the same way. The order depends on the plan alone.
"""

import triton
import triton.language as tl

from churn_kernels.triton.groups import (
    add_pair_sums,
    add_pairs,
    add_to_uniform,
    add_uniforms,
    fold_pairs,
    fold_uniform,
    no_pairs,
    no_uniform,
    rebase_pairs,
    rebase_uniform,
    take_uniform,
)
from churn_kernels.triton.math import INFINITY, at_least_lowest, exp_nonpos, mul_add
from churn_kernels.triton.row import PairSums, Sums, pair_index
from churn_kernels.triton.softmax import weigh
from churn_kernels.triton.tile import (
    across,
    any_row,
    blocks,
    classes_of,
    fold_each,
    lane_max,
    load_block,
    load_weights,
    row_full,
    row_max,
    to_lane,
    zeros,
)
from churn_kernels.triton.topk import in_top_k, order_key
from churn_kernels.triton.tuples import add_each, larger_each, largest_each, take, total_each

ANY_TIE = tl.constexpr(2**30 - 1)  # behind every class: all ties belong


@triton.jit
def no_sums(maximum, S: tl.constexpr):
    """The sums over nothing, class by class of a tile."""
    tops: tl.constexpr = S.students if S.top else 0
    spreads: tl.constexpr = S.students if S.uniform and not S.top else 0
    lifts: tl.constexpr = S.students if S.lifts else 0
    uniform_tops: tl.constexpr = S.students if S.uniform and S.top else 0
    smooths: tl.constexpr = S.students if S.smooths else 0
    return Sums(
        maximum,
        zeros(S.models, S),
        zeros(S.models, S),
        no_uniform(lifts, spreads, S),
        zeros(S.models if S.tempered else 0, S),
        zeros(tops, S),
        zeros(tops, S),
        no_uniform(uniform_tops, uniform_tops, S),
        zeros(smooths, S),
        zeros(smooths, S),
        zeros(smooths, S),
        no_pairs(S),
        (),
        (),
    )


@triton.jit
def add_part(a, z, c, weights, thresholds, last_ties, inverse_temperature, S: tl.constexpr):
    """Adds a part's logits z to the sums a; c are their indices."""
    mass = ()
    moment = ()
    tempered_mass = ()
    top_mass = ()
    top_moment = ()
    weighted_spread = ()
    weight_live = ()
    lost = ()
    raw = ()
    d = ()
    live = ()
    live_d = ()
    es = ()
    f = ()
    member = ()
    top_d = ()
    top_e = ()
    for k in tl.static_range(S.models):
        x = z[k].to(S.compute)
        m = a.maximum[k]
        raw += (x - (across(m, S) if S.resident else to_lane(m, S)),)
        e = exp_nonpos(raw[k])  # exp(-inf) = 0: a class at -inf weighs nothing
        es += (e,)
        d += (at_least_lowest(raw[k]),)
        mass += (a.mass[k] + e,)
        moment += (mul_add(e, d[k], a.moment[k]),)
        if S.tempered:
            f += (exp_nonpos(raw[k] * inverse_temperature),)
            tempered_mass += (a.tempered_mass[k] + f[k],)
        else:
            f += (e,)
        if k < S.students:
            live += (x != -INFINITY,)
            live_d += (tl.where(live[k], d[k], 0.0),)
            if S.top:
                inside = in_top_k(
                    order_key(x), c, across(thresholds[k], S), across(last_ties[k], S)
                )
                member += (inside & live[k],)
                top_d += (tl.where(member[k], d[k], 0.0),)
                top_e += (tl.where(member[k], e, 0.0),)
                top_mass += (a.top_mass[k] + top_e[k],)
                top_moment += (mul_add(top_e[k], d[k], a.top_moment[k]),)
            if S.smooths:
                w = tl.where(live[k], weights, 0.0)
                term = weigh(w, d[k] * S.distance, S)
                weighted_spread += (a.weighted_spread[k] + term,)
                weight_live += (a.weight_live[k] + w * S.distance,)
                dead = (x == -INFINITY) & (weights != 0)
                lost += (a.lost[k] + dead.to(S.compute),)
    return Sums(
        a.maximum,
        mass,
        moment,
        add_to_uniform(a.flat, es, live_d, live, S),
        tempered_mass,
        top_mass,
        top_moment,
        add_to_uniform(a.top_flat, top_e, top_d, member, S),
        weighted_spread,
        weight_live,
        lost,
        add_pairs(a.pair, d, raw, f, S),
        (),
        (),
    )


@triton.jit
def block_sums(
    z, at, block, class_weight, thresholds, last_ties, inverse_temperature, S: tl.constexpr
):
    """Sums of one block, for each lane: relative to the row's maxima where the block is the row."""
    maximum = ()
    for k in tl.static_range(S.models):
        largest = lane_max(z[0][k].to(S.compute), S)
        for part in tl.static_range(1, S.parts):
            largest = tl.maximum(largest, lane_max(z[part][k].to(S.compute), S))
        maximum += (tl.max(largest, 0) if S.wide and S.resident else largest,)
    a = no_sums(finite_each(maximum), S)
    for part in tl.static_range(S.parts):
        c = classes_of(at, block, part, S)
        weights = load_weights(class_weight, at, c, S) if S.smooths else 0.0
        a = add_part(a, z[part], c, weights, thresholds, last_ties, inverse_temperature, S)
    return Sums(
        maximum,
        fold_each(a.mass, S),
        fold_each(a.moment, S),
        fold_uniform(a.flat, S),
        fold_each(a.tempered_mass, S),
        fold_each(a.top_mass, S),
        fold_each(a.top_moment, S),
        fold_uniform(a.top_flat, S),
        fold_each(a.weighted_spread, S),
        fold_each(a.weight_live, S),
        fold_each(a.lost, S),
        fold_pairs(a.pair, S),
        (),
        (),
    )


@triton.jit
def finite_each(maximum):
    """Maxima to subtract: 0 for that of no class, so that its sums are 0 and not NaN."""
    finite = ()
    for k in tl.static_range(len(maximum)):
        finite += (tl.where(maximum[k] == -INFINITY, 0.0, maximum[k]),)
    return finite


@triton.jit
def rebase(sums, maximum, inverse_temperature, S: tl.constexpr):
    """The same sums relative to other, larger maxima: d shifts by delta, exp(d) by exp(delta).

    A lane that is left so far below that it weighs nothing adds 0: products with the scale first.
    """
    mass = ()
    moment = ()
    tempered_mass = ()
    top_mass = ()
    top_moment = ()
    weighted_spread = ()
    delta = ()
    scale = ()
    tempered_scale = ()
    for k in tl.static_range(S.models):
        # A lane without a class has sums of 0; nothing is to become of them.
        by = tl.where(sums.maximum[k] == -INFINITY, 0.0, sums.maximum[k] - maximum[k])
        by = at_least_lowest(by)
        delta += (by,)
        scale += (exp_nonpos(by),)
        s = scale[k]
        mass += (s * sums.mass[k],)
        moment += (mul_add(s * by, sums.mass[k], s * sums.moment[k]),)
        if S.tempered:
            tempered_scale += (exp_nonpos(by * inverse_temperature),)
            tempered_mass += (tempered_scale[k] * sums.tempered_mass[k],)
        else:
            tempered_scale += (s,)
        if S.top and k < S.students:
            top_mass += (s * sums.top_mass[k],)
            top_moment += (mul_add(s * by, sums.top_mass[k], s * sums.top_moment[k]),)
        if S.smooths and k < S.students:
            weighted_spread += (mul_add(by, sums.weight_live[k], sums.weighted_spread[k]),)
    return Sums(
        maximum,
        mass,
        moment,
        rebase_uniform(sums.flat, delta, scale, S),
        tempered_mass,
        top_mass,
        top_moment,
        rebase_uniform(sums.top_flat, delta, scale, S),
        weighted_spread,
        sums.weight_live,
        sums.lost,
        rebase_pairs(
            sums.pair,
            sums.tempered_mass if S.tempered else sums.mass,
            delta,
            tempered_scale,
            inverse_temperature,
            S,
        ),
        (),
        (),
    )


@triton.jit
def add_sums(a, b):
    """Sums relative to the same maxima, lane by lane."""
    return Sums(
        a.maximum,
        add_each(a.mass, b.mass),
        add_each(a.moment, b.moment),
        add_uniforms(a.flat, b.flat),
        add_each(a.tempered_mass, b.tempered_mass),
        add_each(a.top_mass, b.top_mass),
        add_each(a.top_moment, b.top_moment),
        add_uniforms(a.top_flat, b.top_flat),
        add_each(a.weighted_spread, b.weighted_spread),
        add_each(a.weight_live, b.weight_live),
        add_each(a.lost, b.lost),
        add_pair_sums(a.pair, b.pair),
        (),
        (),
    )


@triton.jit
def combine(a, b, inverse_temperature, S: tl.constexpr):
    """Sums of two blocks, lane by lane."""
    maximum = larger_each(a.maximum, b.maximum)
    a = rebase(a, maximum, inverse_temperature, S)
    b = rebase(b, maximum, inverse_temperature, S)
    return add_sums(a, b)


@triton.jit
def over_lanes(a, inverse_temperature, S: tl.constexpr):
    """Sums of the row, out of those of its lanes."""
    if S.wide:
        maximum = a.maximum
        if not S.resident and not S.exact:
            maximum = largest_each(a.maximum)
            a = rebase(a, maximum, inverse_temperature, S)
        masses = a.mass + a.moment + a.tempered_mass + a.top_mass + a.top_moment
        pairs = a.pair.first + a.pair.second + a.pair.gap + a.pair.other
        flats = a.flat.live + a.flat.spread + a.flat.excess + a.flat.lift
        tops = a.top_flat.live + a.top_flat.spread + a.top_flat.excess + a.top_flat.lift
        flat = total_each(masses + pairs + flats + tops + a.weighted_spread + a.lost)
        moment: tl.constexpr = len(a.mass)
        tempered_mass: tl.constexpr = moment + len(a.moment)
        top_mass: tl.constexpr = tempered_mass + len(a.tempered_mass)
        top_moment: tl.constexpr = top_mass + len(a.top_mass)
        first: tl.constexpr = top_moment + len(a.top_moment)
        second: tl.constexpr = first + len(a.pair.first)
        gap: tl.constexpr = second + len(a.pair.second)
        other: tl.constexpr = gap + len(a.pair.gap)
        live: tl.constexpr = other + len(a.pair.other)
        top_live: tl.constexpr = live + len(flats)
        weighted_spread: tl.constexpr = top_live + len(tops)
        lost: tl.constexpr = weighted_spread + len(a.weighted_spread)
        a = Sums(
            maximum,
            take(flat, 0, len(a.mass)),
            take(flat, moment, len(a.moment)),
            take_uniform(flat, live, len(a.flat.live), len(a.flat.spread)),
            take(flat, tempered_mass, len(a.tempered_mass)),
            take(flat, top_mass, len(a.top_mass)),
            take(flat, top_moment, len(a.top_moment)),
            take_uniform(flat, top_live, len(a.top_flat.live), len(a.top_flat.spread)),
            take(flat, weighted_spread, len(a.weighted_spread)),
            (),
            take(flat, lost, len(a.lost)),
            PairSums(
                take(flat, first, len(a.pair.first)),
                take(flat, second, len(a.pair.second)),
                take(flat, gap, len(a.pair.gap)),
                take(flat, other, len(a.pair.other)),
                largest_each(a.pair.reach),
            ),
            (),
            (),
        )
    return a


@triton.jit
def row_sums(z, at, class_weight, thresholds, last_ties, inverse_temperature, S: tl.constexpr):
    """Sums of the row; z holds it where it is resident."""
    first = z if S.resident else load_block(at, 0, True, S)
    sums = block_sums(first, at, 0, class_weight, thresholds, last_ties, inverse_temperature, S)
    if not S.resident:
        count = blocks(at, S)
        for block in range(1, count - 1):
            inner = load_block(at, block, False, S)
            part = block_sums(
                inner, at, block, class_weight, thresholds, last_ties, inverse_temperature, S
            )
            sums = combine(sums, part, inverse_temperature, S)
        # The last block, if it is not the first: a loop, which compiles where a branch would not.
        for block in range(tl.maximum(count - 1, 1), count):
            last = load_block(at, block, True, S)
            part = block_sums(
                last, at, block, class_weight, thresholds, last_ties, inverse_temperature, S
            )
            sums = combine(sums, part, inverse_temperature, S)
    return over_lanes(sums, inverse_temperature, S)


@triton.jit
def with_pairs(sums, pair):
    """The same sums with others of the pairs."""
    return Sums(
        sums.maximum,
        sums.mass,
        sums.moment,
        sums.flat,
        sums.tempered_mass,
        sums.top_mass,
        sums.top_moment,
        sums.top_flat,
        sums.weighted_spread,
        sums.weight_live,
        sums.lost,
        pair,
        sums.tail,
        sums.top_tail,
    )


@triton.jit
def find_mismatches(z, at, sums, S: tl.constexpr):
    """Keeps a pair's reach of inf only where a class is at -inf in one of the two models alone.

    Others have logits further apart than the largest number; only then is it looked for.
    """
    reach = ()
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            far = sums.pair.reach[pair_index(i, j, S.models)]
            if any_row(far == INFINITY, S):
                dead = row_full(0, tl.int32, S)
                for block in range(0, blocks(at, S)):
                    parts = z if S.keeps else load_block(at, block, True, S)
                    for part in tl.static_range(S.parts):
                        a = parts[part][i] == -INFINITY
                        b = parts[part][j] == -INFINITY
                        dead = tl.maximum(dead, row_max((a != b).to(tl.int32), S))
                far = tl.where(dead > 0, INFINITY, 0.0).to(S.compute)
            reach += (far,)
    pair = sums.pair
    return with_pairs(sums, PairSums(pair.first, pair.second, pair.gap, pair.other, reach))


@triton.jit
def finish_sums(sums, broken, S: tl.constexpr):
    """Poison a row that means nothing: a target out of range, or no class above -inf.

    Sets the tempered masses where there is no inverse_temperature, too.
    """
    mass = ()
    moment = ()
    tempered_mass = ()
    tail = ()
    for k in tl.static_range(S.models):
        poison = tl.where(broken | (sums.maximum[k] == -INFINITY), float("nan"), 0.0)
        mass += (sums.mass[k] + poison,)
        moment += (sums.moment[k] + poison,)
        if S.tempered:
            tempered_mass += (sums.tempered_mass[k] + poison,)
        else:
            tempered_mass += (sums.mass[k] + poison,)
        if S.exact:
            tail += (sums.tail[k] + poison,)
    sums = with_masses(sums, mass, moment, tempered_mass, tail)
    if S.couples and not S.others:
        other = ()
        for p in tl.static_range(S.pairs):
            other += (sums.pair.first[p] - sums.pair.second[p],)
        pair = sums.pair
        sums = with_pairs(sums, PairSums(pair.first, pair.second, pair.gap, other, pair.reach))
    if S.exact and S.pairs > 0 and S.divergence != 4:
        # The masses have all digits of their differences.
        gap = ()
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                if S.tempered:
                    gap += (tempered_mass[i] - tempered_mass[j],)
                else:
                    gap += (tail[i] - tail[j],)
        pair = sums.pair
        sums = with_pairs(sums, PairSums(pair.first, pair.second, gap, pair.other, pair.reach))
    return sums


@triton.jit
def with_masses(sums, mass, moment, tempered_mass, tail):
    return Sums(
        sums.maximum,
        mass,
        moment,
        sums.flat,
        tempered_mass,
        sums.top_mass,
        sums.top_moment,
        sums.top_flat,
        sums.weighted_spread,
        sums.weight_live,
        sums.lost,
        sums.pair,
        tail,
        sums.top_tail,
    )
