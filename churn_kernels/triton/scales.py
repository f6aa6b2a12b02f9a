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

REACH = tl.constexpr(2.0**constants.kReachBits)
REACH_BITS = tl.constexpr(constants.kReachBits)
LEAST_PEAK = tl.constexpr(constants.kLeastPeak)
LEAST_EXPONENT = tl.constexpr(constants.kLeastExponent)
ROUNDING = tl.constexpr(constants.kRounding)


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
    spread: tl.tuple
    top_spread: tl.tuple
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
    pairs: tl.constexpr = S.pairs if S.couples else 0
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
    if S.couples:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                p: tl.constexpr = pair_index(i, j, S.models)
                high = row_largest(a.highest[p], S)
                low = row_largest(a.minus_lowest[p], S)
                highest += (high,)
                minus_lowest += (low,)
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
    if S.couples:
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                p: tl.constexpr = pair_index(i, j, S.models)
                # Neither sees the NaN of a class at -inf in both.
                apart = z[i].to(S.compute) - z[j].to(S.compute)
                highest += (tl.maximum(a.highest[p], lane_max(apart, S)),)
                minus_lowest += (tl.maximum(a.minus_lowest[p], lane_max(-apart, S)),)
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
def reach_bits(reach):
    """The least E with reach < 2^E, from REACH_BITS on."""
    bits = ((reach.to(tl.int32, bitcast=True) >> 23) & 255) - 126
    return tl.maximum(bits, REACH_BITS)  # at most 128, as no term is inf


@triton.jit
def scale(reach, S: tl.constexpr):
    return power(reach_bits(reach), S)


@triton.jit
def bits_of(x):
    """The least E of a float64 0 <= x < 2^E."""
    return (x.to(tl.int64, bitcast=True) >> 52).to(tl.int32) - 1022


@triton.jit
def exponent_scale(exponent, S: tl.constexpr):
    return power(tl.maximum(exponent, LEAST_EXPONENT), S)


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
def pair_reach(at, row, i: tl.constexpr, j: tl.constexpr, inverse_temperature, S: tl.constexpr):
    """The largest |d_i - d_j| of the classes that count: not both exponentials are 0."""
    largest = lanes_full(0.0, S.compute, S)
    for block in range(0, blocks(at, S)):
        parts = load_block(at, block, True, S)
        for part in tl.static_range(S.parts):
            a = parts[part][i].to(S.compute)
            b = parts[part][j].to(S.compute)
            apart = difference(a, row.maximum[i], S) - difference(b, row.maximum[j], S)
            counts_a = tempered(a, row.maximum[i], inverse_temperature, S) > 0
            counts_b = tempered(b, row.maximum[j], inverse_temperature, S) > 0
            apart = tl.where(counts_a | counts_b, tl.abs(apart), 0.0)
            largest = tl.maximum(largest, lane_max(apart, S))
    return row_largest(largest, S)


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

    A difference of two exponentials is at most 1, and at most 1.3 D where D is small.
    """
    first = ()
    second = ()
    for i in tl.static_range(S.models):
        for j in tl.static_range(i + 1, S.models):
            p: tl.constexpr = pair_index(i, j, S.models)
            lowest = -row.minus_lowest[p].to(tl.float64)
            rounding = temperature * ROUNDING
            reach = (row.highest[p].to(tl.float64) - lowest) + rounding
            far = (reach < REACH) == 0
            if any_row(far, S):
                counted = pair_reach(at, row, i, j, inverse_temperature, S).to(tl.float64)
                reach = tl.where(far, counted, reach)
            bits = bits_of(reach)
            peak = shared_peak(at, row, i, j, inverse_temperature, S)
            first += (exponent_scale(bits + peak, S),)
            second += (exponent_scale(bits + tl.minimum(bits + 1, 0) + peak, S),)
    return PairSums(first, second, (), ())


@triton.jit
def second_scales(at, row, temperature, inverse_temperature, S: tl.constexpr):
    """Of the sums over probabilities: L1's, or KL to the teachers.

    Of that, with |d - d_t| / T <= reach, |D| is at most twice the reach, and a term at most q D^2
    where that is below 1, at most p + q |D| elsewhere.
    """
    if S.divergence == 4:
        reach = row_full(0.0, S.compute, S)
        peak = row_full(LEAST_PEAK, tl.int32, S)
        for t in tl.static_range(1, S.models):
            reach = tl.maximum(reach, pair_reach(at, row, 0, t, inverse_temperature, S))
            peak = tl.maximum(peak, shared_peak(at, row, 0, t, inverse_temperature, S))
        bits = bits_of(reach.to(tl.float64) / temperature + ROUNDING)
        bits = tl.where(bits < 0, 2 * bits, bits) + 2
        by = exponent_scale(bits + sure_peak(peak, at.classes), S)
        return PairSums((by,), (), (), ())
    else:
        unit = ()
        gap = ()
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                unit += (row_full(S.unit, S.compute, S),)
                peak = shared_peak(at, row, i, j, inverse_temperature, S)
                gap += (exponent_scale(sure_peak(peak, at.classes), S),)
        return PairSums(unit, unit, gap, ())


@triton.jit
def find_scales(
    at, row, class_weight, thresholds, temperature, inverse_temperature, S: tl.constexpr
):
    unit = ()
    peak = ()
    spread = ()
    top_spread = ()
    weighted = ()
    for k in tl.static_range(S.models):
        bits = peak_bits(row, k, tl.full((), 1.0, tl.float64))
        unit += (power(bits, S),)
        peak += (tl.where(bits < 0, 0.0, 1.0),)
        if S.uniform and k < S.students:
            if S.top:
                least = tl.maximum(logit_of(thresholds[k], S.compute), row.least[k])
                top_spread += (scale(reach_of(row, k, least), S),)
            else:
                spread += (scale(reach_of(row, k, row.least[k]), S),)
    if S.smooths:
        reach = weighted_reach(at, row, class_weight, S)
        for k in tl.static_range(S.students):
            weighted += (scale(reach[k], S),)
    pair = PairSums((), (), (), ())
    if S.couples:
        pair = skl_scales(at, row, temperature, inverse_temperature, S)
    return Scales(unit, peak, spread, top_spread, weighted, pair)
