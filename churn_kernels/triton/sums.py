"""From logits to a row's sums.

A resident row is summed relative to its largest logits. Of a row in blocks each lane takes the
largest that it has seen; sums relative to different maxima add up after `rebase`, so that blocks
and lanes come together in the same way. The order depends on the plan alone.
"""

import triton
import triton.language as tl

from churn_kernels.triton.math import (
    INFINITY,
    LOWEST_FLOAT,
    at_least_lowest,
    exp_nonpos,
    mul_add,
)
from churn_kernels.triton.row import Sums, pair_index
from churn_kernels.triton.tile import (
    across,
    any_row,
    blocks,
    classes_of,
    lane_max,
    lane_sum,
    load_block,
    load_weights,
    row_full,
    row_max,
    to_lane,
)
from churn_kernels.triton.topk import in_top_k, order_key
from churn_kernels.triton.tuples import add_each, larger_each, largest_each, take, total_each

ANY_TIE = tl.constexpr(2**30 - 1)  # behind every class: all ties belong
# Differences of two d beyond this come from a class at -inf, or from a mask.
FAR = tl.constexpr(-0.25 * LOWEST_FLOAT.value)


@triton.jit
def zeros(count: tl.constexpr, S: tl.constexpr):
    """A tile of zeros for each of `count` sums."""
    values = ()
    for _ in tl.static_range(count):
        values += (tl.zeros((S.height, S.width), S.compute),)
    return values


@triton.jit
def no_sums(maximum, S: tl.constexpr):
    """The sums over nothing, class by class of a tile."""
    tops: tl.constexpr = S.students if S.top else 0
    uniform_tops: tl.constexpr = S.students if S.top and S.uniform else 0
    smooths: tl.constexpr = S.models if S.smooths else 0
    pairs: tl.constexpr = S.pairs if S.couples else 0
    return Sums(
        maximum,
        zeros(S.models, S),
        zeros(S.models, S),
        zeros(S.models if S.uniform and not S.top else 0, S),
        zeros(S.models if S.counts_live else 0, S),
        zeros(S.models if S.tempered else 0, S),
        zeros(tops, S),
        zeros(tops, S),
        zeros(uniform_tops, S),
        zeros(uniform_tops, S),
        zeros(smooths, S),
        zeros(smooths, S),
        zeros(pairs, S),
        zeros(pairs, S),
        zeros(pairs, S),
        (),
        (),
    )


@triton.jit
def add_part(a, z, c, weights, thresholds, last_ties, inverse_temperature, S: tl.constexpr):
    """Adds a part's logits z to the sums a, class by class of the tile; c are their indices."""
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
    weight_live = ()
    d = ()
    f = ()
    for k in tl.static_range(S.models):
        x = z[k].to(S.compute)
        m = a.maximum[k]
        raw = x - (across(m, S) if S.resident else to_lane(m, S))
        e = exp_nonpos(raw)  # exp(-inf) = 0: a class at -inf weighs nothing
        d += (at_least_lowest(raw),)
        mass += (a.mass[k] + e,)
        moment += (mul_add(e, d[k], a.moment[k]),)
        if S.counts_live:
            live += (a.live[k] + (x != -INFINITY).to(S.compute),)
        if S.uniform and not S.top:
            spread += (a.spread[k] + tl.where(x != -INFINITY, d[k], 0.0),)
        if S.tempered:
            f += (exp_nonpos(raw * inverse_temperature),)
            tempered_mass += (a.tempered_mass[k] + f[k],)
        else:
            f += (e,)
        if S.top and k < S.students:
            member = in_top_k(order_key(x), c, across(thresholds[k], S), across(last_ties[k], S))
            member = member & (x != -INFINITY)
            top_e = tl.where(member, e, 0.0)
            top_mass += (a.top_mass[k] + top_e,)
            top_moment += (mul_add(top_e, d[k], a.top_moment[k]),)
            if S.uniform:
                top_live += (a.top_live[k] + member.to(S.compute),)
                top_spread += (a.top_spread[k] + tl.where(member, d[k], 0.0),)
        if S.smooths:
            w = tl.where(x != -INFINITY, weights, 0.0)
            weight_live += (a.weight_live[k] + w,)
            weighted_spread += (mul_add(w, d[k], a.weighted_spread[k]),)
    first = ()
    second = ()
    reach = ()
    if S.couples:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                difference = d[i] - d[j]
                first += (mul_add(f[i], difference, a.first[len(first)]),)
                second += (mul_add(f[j], difference, a.second[len(second)]),)
                reach += (tl.maximum(a.reach[len(reach)], tl.abs(difference)),)
    return Sums(
        a.maximum,
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
        weight_live,
        first,
        second,
        reach,
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
        fold_each(a.spread, S),
        fold_each(a.live, S),
        fold_each(a.tempered_mass, S),
        fold_each(a.top_mass, S),
        fold_each(a.top_moment, S),
        fold_each(a.top_spread, S),
        fold_each(a.top_live, S),
        fold_each(a.weighted_spread, S),
        fold_each(a.weight_live, S),
        fold_each(a.first, S),
        fold_each(a.second, S),
        fold_reach(a.reach, S),
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
def fold_each(a, S: tl.constexpr):
    """Sum over the classes of each lane, of each entry."""
    folded = ()
    for i in tl.static_range(len(a)):
        folded += (lane_sum(a[i], S),)
    return folded


@triton.jit
def fold_reach(a, S: tl.constexpr):
    folded = ()
    for i in tl.static_range(len(a)):
        folded += (lane_max(a[i], S),)
    return folded


@triton.jit
def rebase(sums, maximum, inverse_temperature, S: tl.constexpr):
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
            tempered_scale += (exp_nonpos(by * inverse_temperature),)
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
                by = delta[i] - delta[j]
                mass_i = sums.tempered_mass[i] if S.tempered else sums.mass[i]
                mass_j = sums.tempered_mass[j] if S.tempered else sums.mass[j]
                # Pairs come in order: the next entry is this one's.
                first += (tempered_scale[i] * mul_add(by, mass_i, sums.first[len(first)]),)
                second += (tempered_scale[j] * mul_add(by, mass_j, sums.second[len(second)]),)
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
        sums.reach,
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
        larger_each(a.reach, b.reach),
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
        flat = total_each(
            a.mass
            + a.moment
            + a.first
            + a.second
            + a.spread
            + a.live
            + a.tempered_mass
            + a.top_mass
            + a.top_moment
            + a.top_spread
            + a.top_live
            + a.weighted_spread
        )
        models: tl.constexpr = len(a.mass)
        pairs: tl.constexpr = len(a.first)
        spread: tl.constexpr = 2 * models + 2 * pairs
        live: tl.constexpr = spread + len(a.spread)
        tempered_mass: tl.constexpr = live + len(a.live)
        top_mass: tl.constexpr = tempered_mass + len(a.tempered_mass)
        top_moment: tl.constexpr = top_mass + len(a.top_mass)
        top_spread: tl.constexpr = top_moment + len(a.top_moment)
        top_live: tl.constexpr = top_spread + len(a.top_spread)
        weighted_spread: tl.constexpr = top_live + len(a.top_live)
        a = Sums(
            maximum,
            take(flat, 0, models),
            take(flat, models, models),
            take(flat, spread, len(a.spread)),
            take(flat, live, len(a.live)),
            take(flat, tempered_mass, len(a.tempered_mass)),
            take(flat, top_mass, len(a.top_mass)),
            take(flat, top_moment, len(a.top_moment)),
            take(flat, top_spread, len(a.top_spread)),
            take(flat, top_live, len(a.top_live)),
            take(flat, weighted_spread, len(a.weighted_spread)),
            (),
            take(flat, 2 * models, pairs),
            take(flat, 2 * models + pairs, pairs),
            largest_each(a.reach),
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
def with_pairs(sums, first, second, reach):
    """The same sums with others of the pairs."""
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
        reach,
        sums.tail,
        sums.top_tail,
    )


@triton.jit
def find_mismatches(z, at, sums, S: tl.constexpr):
    """Sets a pair's reach to inf where a class is at -inf in one of the two models only.

    Such a class has gone into the sums as one that is very far; only then is it looked for.
    """
    reach = ()
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            far = sums.reach[pair_index(i, j, S.models)]
            if any_row(far > FAR, S):
                dead = row_full(0, tl.int32, S)
                for block in range(0, blocks(at, S)):
                    parts = z if S.keeps else load_block(at, block, True, S)
                    for part in tl.static_range(S.parts):
                        a = parts[part][i] == -INFINITY
                        b = parts[part][j] == -INFINITY
                        dead = tl.maximum(dead, row_max((a != b).to(tl.int32), S))
                far = tl.where(dead > 0, INFINITY, far)
            reach += (far,)
    return with_pairs(sums, sums.first, sums.second, reach)


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
    return with_masses(sums, mass, moment, tempered_mass, tail)


@triton.jit
def with_masses(sums, mass, moment, tempered_mass, tail):
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
        sums.reach,
        tail,
        sums.top_tail,
    )
