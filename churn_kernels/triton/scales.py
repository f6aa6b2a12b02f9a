"""What decides how exact mode scales a row's sums: its extremes, which have no order.

The twin of `RowWork::set_scales` and of csrc/rows/exact.h.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from churn_kernels._C import constants
from churn_kernels.triton.math import (
    INFINITY,
    LOWEST_FLOAT,
    at_least_lowest,
    exp_nonpos,
    log_pos,
    number,
)
from churn_kernels.triton.row import PairSums, pair_index
from churn_kernels.triton.softmax import tempered, weigh
from churn_kernels.triton.tile import (
    across,
    any_row,
    blocks,
    classes_of,
    has_edge,
    lane_max,
    lane_sum,
    load_block,
    load_weights,
    row_full,
)
from churn_kernels.triton.topk import logit_of

REACH = tl.constexpr(constants.kReach)
LEAST_PEAK = tl.constexpr(constants.kLeastPeak)
LEAST_EXPONENT = tl.constexpr(constants.kLeastExponent)
ROUNDING = tl.constexpr(constants.kRounding)
DIFFERENCE_ROUNDING = tl.constexpr(constants.kDifferenceRounding)
UNTAUGHT = tl.constexpr(constants.kUntaught)


class Extremes(NamedTuple):
    """What decides a row's scales, of each model, by row."""

    maximum: tl.tuple
    second: tl.tuple  # the next logit
    broken: tl.tuple  # not 0: a NaN or +inf is among them
    least: tl.tuple  # of the classes that are not at -inf; where SKL to uniform asks
    highest: tl.tuple  # of a pair z_i - z_j, the largest
    minus_lowest: tl.tuple  # and the largest z_j - z_i
    alone: tl.tuple  # of pairs, not 0: a class is at -inf in one of the two only


class Scales(NamedTuple):
    """What a term is times as an integer."""

    unit: tl.tuple  # of exp(d) and exp(d) d
    peak: tl.tuple  # 1, or 0 where those sums count the largest class apart
    flat: tl.tuple  # of each student those of UniformSums but `live`, together
    top_flat: tl.tuple
    weighted_spread: tl.tuple
    pair: PairSums


@triton.jit
def lanes_full(value, dtype: tl.constexpr, S: tl.constexpr):
    """A value for each lane of a tile."""
    return lane_max(tl.full((S.height, S.width), value, dtype), S)


@triton.jit
def row_largest(lanes, S: tl.constexpr):
    """Largest over the lanes of a row."""
    return tl.max(lanes, 0) if S.wide else lanes


@triton.jit
def larger(a, b):
    """The larger of the two; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def two_largest(first, second, other_first, other_second):
    """The largest and the second largest of two such pairs."""
    next_first = tl.minimum(first, other_first)
    return larger(first, other_first), tl.maximum(next_first, tl.maximum(second, other_second))


@triton.jit
def lane_two_largest(x, S: tl.constexpr):
    """Of the classes of each lane."""
    none = tl.full((S.height, S.width), -INFINITY, S.compute)
    if S.wide:
        x = tl.reshape(x, (S.width // S.vector, S.vector))
        none = tl.reshape(none, (S.width // S.vector, S.vector))
    return tl.reduce((x, none), 1, two_largest)


@triton.jit
def lanes_nothing(count: tl.constexpr, S: tl.constexpr):
    """Before the largest of each lane: -inf, `count` times."""
    values = ()
    for _ in tl.static_range(count):
        values += (lanes_full(-INFINITY, S.compute, S),)
    return values


@triton.jit
def extremes(z, at, S: tl.constexpr):
    leasts: tl.constexpr = S.students if S.uniform else 0
    pairs: tl.constexpr = S.pairs if S.divergence != 4 else 0
    # `least` is the largest of -x here.
    a = Extremes(
        lanes_nothing(S.models, S),
        lanes_nothing(S.models, S),
        (),
        lanes_nothing(leasts, S),
        lanes_nothing(pairs, S),
        lanes_nothing(pairs, S),
        (),
    )
    if S.resident:
        for part in tl.static_range(S.parts):
            a = extend(a, at, 0, part, z[part], S)
    else:
        for block in range(0, blocks(at, S)):
            parts = load_block(at, block, True, S)
            for part in tl.static_range(S.parts):
                a = extend(a, at, block, part, parts[part], S)
    maximum = ()
    second = ()
    broken = ()
    least = ()
    for k in tl.static_range(S.models):
        top, after = a.maximum[k], a.second[k]
        if S.wide:
            top, after = tl.reduce((top, after), 0, two_largest)
        broken += (((top != top) | (top == INFINITY)).to(tl.int32),)
        maximum += (tl.where(top == top, top, -INFINITY),)
        second += (after,)
        if k < leasts:
            bottom = -row_largest(a.least[k], S)
            if any_row(bottom == -INFINITY, S):
                bottom = least_live(at, k, S)
            least += (bottom,)
    highest = ()
    minus_lowest = ()
    alone = ()
    if pairs > 0:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                high = row_largest(a.highest[len(highest)], S)
                low = row_largest(a.minus_lowest[len(minus_lowest)], S)
                highest += (high,)
                minus_lowest += (low,)
                if S.couples:
                    alone += (find_alone(at, i, j, tl.maximum(high, low), S),)
    return Extremes(maximum, second, broken, least, highest, minus_lowest, alone)


@triton.jit
def extend(a, at, block, part: tl.constexpr, z, S: tl.constexpr):
    """Extremes of the lanes with one part more."""
    maximum = ()
    second = ()
    least = ()
    for k in tl.static_range(S.models):
        x = z[k].to(S.compute)
        top, after = lane_two_largest(x, S)
        top, after = two_largest(a.maximum[k], a.second[k], top, after)
        maximum += (top,)
        second += (after,)
        if k < len(a.least):
            if has_edge(part, True, S):  # what lies outside the row is no class at -inf
                c = classes_of(at, block, part, S)
                x = tl.where((c >= 0) & (c < at.classes), x, INFINITY)
            least += (tl.maximum(a.least[k], lane_max(-x, S)),)
    highest = ()
    minus_lowest = ()
    if len(a.highest) > 0:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                # Neither sees the NaN of a class at -inf in both.
                apart = z[i].to(S.compute) - z[j].to(S.compute)
                highest += (tl.maximum(a.highest[len(highest)], lane_max(apart, S)),)
                minus_lowest += (
                    tl.maximum(a.minus_lowest[len(minus_lowest)], lane_max(-apart, S)),
                )
    return Extremes(maximum, second, (), least, highest, minus_lowest, ())


@triton.jit
def least_live(at, k: tl.constexpr, S: tl.constexpr):
    """The smallest logit of a model that is not -inf."""
    least = lanes_full(-INFINITY, S.compute, S)
    for block in range(0, blocks(at, S)):
        parts = load_block(at, block, True, S)
        for part in tl.static_range(S.parts):
            x = parts[part][k].to(S.compute)
            least = tl.maximum(least, lane_max(tl.where(x == -INFINITY, x, -x), S))
    return -row_largest(least, S)


@triton.jit
def find_alone(at, i: tl.constexpr, j: tl.constexpr, apart, S: tl.constexpr):
    """Whether a class of the row is at -inf in one of two models only: not 0 then.

    Then `apart`, the largest distance of two logits, is inf.
    """
    alone = row_full(0, tl.int32, S)
    if any_row(apart == INFINITY, S):
        found = lanes_full(0, tl.int32, S)
        for block in range(0, blocks(at, S)):
            parts = load_block(at, block, True, S)
            for part in tl.static_range(S.parts):
                differ = (parts[part][i] == -INFINITY) != (parts[part][j] == -INFINITY)
                found = tl.maximum(found, lane_max(differ.to(tl.int32), S))
        alone = row_largest(found, S)
    return alone


@triton.jit
def power(bits, S: tl.constexpr):
    """2^(places - bits): what terms below 2^bits are times as integers."""
    return ((-bits + (S.places + 127)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def real(total, by):
    """A sum of integers as the number that it stands for."""
    return total.to(tl.float64) / by.to(tl.float64)


@triton.jit
def real_each(totals, by):
    found = ()
    for i in tl.static_range(len(totals)):
        found += (real(totals[i], by[i]),)
    return found


@triton.jit
def integers(x, S: tl.constexpr):
    """Sum of x, cut to integers, for each lane."""
    return lane_sum(x.to(tl.int64), S)


@triton.jit
def bits_of(x):
    """The least E of a float64 0 <= x < 2^E."""
    return (x.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1022


@triton.jit
def exponent_scale(exponent, S: tl.constexpr):
    return power(tl.maximum(exponent, LEAST_EXPONENT), S)


@triton.jit
def scale(reach, S: tl.constexpr):
    """Of terms that are at most `reach`."""
    return exponent_scale(bits_of(reach.to(tl.float64)), S)


@triton.jit
def uniform_scales(reach, S: tl.constexpr):
    """Of d, (exp(d) - 1) d and exp(d) - 1 where all |d| are at most `reach`."""
    bits = bits_of(reach.to(tl.float64))
    lift = tl.minimum(bits + 1, 0)
    return exponent_scale(bits, S), exponent_scale(bits + lift, S), exponent_scale(lift, S)


@triton.jit
def peak_bits(row, k: tl.constexpr, inverse_temperature):
    """No exp(d / T) nor exp(d / T) d but those of the largest class reaches 2^peak_bits.

    0 where it is not apart.
    """
    gap = row.second[k].to(tl.float64) - row.maximum[k].to(tl.float64)
    lowest = number(LOWEST_FLOAT, tl.float64)
    one = number(1.0, tl.float64)
    gap = tl.where(gap > lowest, gap, lowest) * inverse_temperature.to(tl.float64)
    bound = exp_nonpos(gap, True) * tl.maximum(one, -gap)
    return tl.minimum(tl.maximum(bits_of(bound), LEAST_PEAK), 0)


@triton.jit
def reach_of(row, k: tl.constexpr, least):
    """The largest |d| down to the logit `least`."""
    return tl.minimum(row.maximum[k] - least, -LOWEST_FLOAT)


@triton.jit
def difference(x, maximum, S: tl.constexpr):
    """d of each class; 0 at -inf."""
    return tl.where(x == -INFINITY, 0.0, at_least_lowest(x - across(maximum, S)))


@triton.jit
def weighted_reach(at, row, class_weight, S: tl.constexpr):
    """The largest |class weight d| of each student."""
    reach = ()
    for k in tl.static_range(S.students):
        largest = lanes_full(0.0, S.compute, S)
        for block in range(0, blocks(at, S)):
            parts = load_block(at, block, True, S)
            for part in tl.static_range(S.parts):
                c = classes_of(at, block, part, S)
                d = difference(parts[part][k].to(S.compute), row.maximum[k], S)
                term = weigh(load_weights(class_weight, at, c, S), d, S)
                largest = tl.maximum(largest, lane_max(tl.abs(term), S))
        reach += (row_largest(largest, S),)
    return reach


@triton.jit
def pair_reach(row, p: tl.constexpr, temperature):
    """Bounds |d_i - d_j| by the differences of the logits, up to the rounding of each of both."""
    highest, lowest = row.highest[p].to(tl.float64), -row.minus_lowest[p].to(tl.float64)
    largest = tl.maximum(tl.abs(highest), tl.abs(lowest))
    return (highest - lowest) + temperature * ROUNDING + largest * DIFFERENCE_ROUNDING


@triton.jit
def far_terms(at, row, i: tl.constexpr, j: tl.constexpr, inverse_temperature, S: tl.constexpr):
    """The largest terms of a pair's sums."""
    first = lanes_full(0.0, S.compute, S)
    second = lanes_full(0.0, S.compute, S)
    other = lanes_full(0.0, S.compute, S)
    for block in range(0, blocks(at, S)):
        parts = load_block(at, block, True, S)
        for part in tl.static_range(S.parts):
            x = parts[part][i].to(S.compute)
            y = parts[part][j].to(S.compute)
            apart = tl.abs(difference(x, row.maximum[i], S) - difference(y, row.maximum[j], S))
            a = tempered(x, row.maximum[i], inverse_temperature, S)
            b = tempered(y, row.maximum[j], inverse_temperature, S)
            first = tl.maximum(first, lane_max(a * apart, S))
            second = tl.maximum(second, lane_max(tl.abs(a - b) * apart, S))
            other = tl.maximum(other, lane_max(b * apart, S))
    return row_largest(first, S), row_largest(second, S), row_largest(other, S)


@triton.jit
def teacher_bounds(at, row, inverse_temperature, S: tl.constexpr):
    """What bounds the terms of KL to the teachers.

    The largest |d - d_t| of a class that teacher t gives a weight, the student's largest
    exp(d / T) where no teacher gives any, and 1 if some give a class weight and others do not.
    """
    reach = lanes_full(0.0, S.compute, S)
    untaught = lanes_full(0.0, S.compute, S)
    uneven = lanes_full(0, tl.int32, S)
    for block in range(0, blocks(at, S)):
        parts = load_block(at, block, True, S)
        for part in tl.static_range(S.parts):
            x = parts[part][0].to(S.compute)
            d = difference(x, row.maximum[0], S)
            most = tl.zeros_like(x)
            least = tl.full(x.shape, 1.0, S.compute)
            for t in tl.static_range(1, S.models):
                y = parts[part][t].to(S.compute)
                q = tempered(y, row.maximum[t], inverse_temperature, S)
                apart = tl.abs(d - difference(y, row.maximum[t], S))
                reach = tl.maximum(reach, lane_max(tl.where(q > 0, apart, 0.0), S))
                most = tl.maximum(most, q)
                least = tl.minimum(least, q)
            p = tempered(x, row.maximum[0], inverse_temperature, S)
            untaught = tl.maximum(untaught, lane_max(tl.where(most < UNTAUGHT, p, 0.0), S))
            differs = (most > 0) & (least == 0)
            uneven = tl.maximum(uneven, lane_max(differs.to(tl.int32), S))
    return row_largest(reach, S), row_largest(untaught, S), row_largest(uneven, S)


@triton.jit
def shared_peak(at, row, i: tl.constexpr, j: tl.constexpr, inverse_temperature, S: tl.constexpr):
    """Peak bits of the terms of a pair, 0 where its models have not the same largest class.

    The difference of two d is 0 at a class that is the largest of both models, so where it
    outweighs all others in both, what is left is as small as the exponentials of the rest.
    """
    peak_i = peak_bits(row, i, inverse_temperature)
    peak_j = peak_bits(row, j, inverse_temperature)
    peaked = (peak_i < 0) & (peak_j < 0)
    shared = row_full(0, tl.int32, S)
    if any_row(peaked, S):
        found = lanes_full(0, tl.int32, S)
        for block in range(0, blocks(at, S)):
            parts = load_block(at, block, True, S)
            for part in tl.static_range(S.parts):
                largest_i = parts[part][i].to(S.compute) == across(row.maximum[i], S)
                largest_j = parts[part][j].to(S.compute) == across(row.maximum[j], S)
                found = tl.maximum(found, lane_max((largest_i & largest_j).to(tl.int32), S))
        shared = row_largest(found, S)
    return tl.where(peaked & (shared > 0), tl.maximum(peak_i, peak_j), 0)


@triton.jit
def sure_peak(peak, classes):
    """Peak bits of sums over probabilities.

    Their difference at the largest class is that of all others.
    """
    return tl.where(peak < 0, tl.minimum(0, peak + bits_of(classes.to(tl.float64)) + 1), 0)


@triton.jit
def skl_scales(at, row, temperature, inverse_temperature, S: tl.constexpr):
    """Of symmetric KL's sums, with a sweep of its own where logits lie far apart.

    A difference of two exponentials is at most 1, and at most 1.3 D / T where that is small.
    """
    first = ()
    second = ()
    other = ()
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            reach = pair_reach(row, pair_index(i, j, S.models), temperature)
            bits = bits_of(reach)
            peak = shared_peak(at, row, i, j, inverse_temperature, S)
            a = exponent_scale(bits + peak, S)
            b = exponent_scale(bits + tl.minimum(bits_of(reach / temperature) + 1, 0) + peak, S)
            c = a
            far = (reach < REACH) == 0
            if any_row(far, S):
                far_a, far_b, far_c = far_terms(at, row, i, j, inverse_temperature, S)
                a = tl.where(far, scale(far_a, S), a)
                b = tl.where(far, scale(far_b, S), b)
                c = tl.where(far, scale(far_c, S), c)
            first += (a,)
            second += (b,)
            other += (c,)
    return PairSums(first, second, (), other, ())


@triton.jit
def kl_scales(at, row, masses, temperature, inverse_temperature, S: tl.constexpr):
    """Of KL to the teachers; see `kl_exponent` of csrc/rows/exact.h."""
    peak = row_full(LEAST_PEAK, tl.int32, S)
    apart = row_full(0.0, tl.float64, S)  # of log masses
    student = log_pos(masses[0], True)
    for t in tl.static_range(1, S.models):
        peak = tl.maximum(peak, shared_peak(at, row, 0, t, inverse_temperature, S))
        apart = tl.maximum(apart, tl.abs(student - log_pos(masses[t], True)))
    distance, untaught, uneven = teacher_bounds(at, row, inverse_temperature, S)
    reach = distance.to(tl.float64) / temperature + apart
    reach += tl.where(uneven > 0, bits_of(number(S.models - 1.0, tl.float64)).to(tl.float64), 0.0)
    bits = bits_of(reach + ROUNDING)
    bits = tl.maximum(tl.where(bits < 0, 2 * bits, bits) + 2 + peak, LEAST_EXPONENT)
    alone = tl.where(peak < 0, 2 * bits_of(apart + ROUNDING / 32), bits)
    untaught = bits_of(untaught.to(tl.float64) * (1.0 / masses[0]))
    by = exponent_scale(tl.maximum(tl.maximum(bits, alone), untaught), S)
    return PairSums((by,), (), (), (), ())


@triton.jit
def l1_scales(at, row, masses, temperature, inverse_temperature, S: tl.constexpr):
    """Of L1's sums. No p is above the larger inverse mass, no difference above 2.6 reach of it."""
    unit = ()
    gap = ()
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            inverse = tl.maximum(1.0 / masses[i], 1.0 / masses[j])
            peak = shared_peak(at, row, i, j, inverse_temperature, S)
            reach = pair_reach(row, pair_index(i, j, S.models), temperature)
            bits = bits_of(reach / temperature) + 2
            bits = tl.minimum(tl.minimum(bits, sure_peak(peak, at.classes)), 0)
            unit += (row_full(S.unit, S.compute, S),)
            gap += (exponent_scale(bits_of(inverse) + bits, S),)
    return PairSums(unit, unit, gap, (), ())


@triton.jit
def find_scales(
    at, row, class_weight, thresholds, temperature, inverse_temperature, S: tl.constexpr
):
    unit = ()
    peak = ()
    flat = ()
    top_flat = ()
    weighted = ()
    for k in tl.static_range(S.models):
        bits = peak_bits(row, k, tl.full((), 1.0, tl.float64))
        unit += (power(bits, S),)
        peak += (tl.where(bits < 0, 0.0, 1.0),)
        if S.uniform and k < S.students:
            flat += (uniform_scales(reach_of(row, k, row.least[k]), S),)
            if S.top:
                least = tl.maximum(logit_of(thresholds[k], S.compute), row.least[k])
                top_flat += (uniform_scales(reach_of(row, k, least), S),)
    if S.smooths:
        reach = weighted_reach(at, row, class_weight, S)
        for k in tl.static_range(S.students):
            weighted += (scale(reach[k], S),)
    pair = PairSums((), (), (), (), ())
    if S.couples:
        pair = skl_scales(at, row, temperature, inverse_temperature, S)
    return Scales(unit, peak, flat, top_flat, weighted, pair)
