"""A row's sums in memory, between the kernel that finds them and those that use them.

A record is (fields, N) in the dtype of the row arithmetic, float64 in exact mode: each field holds
the rows side by side. Which fields there are, and where, `spec.make_spec` says. Class indices
travel as bits: below 2^30 they are no NaN, which whoever compares records would take for a
difference. What is loaded for a row that is not there is 1, of which every function has a value.
"""

import triton
import triton.language as tl

from churn_kernels.triton.row import PairSums, Sums, UniformSums
from churn_kernels.triton.sums import with_masses
from churn_kernels.triton.topk import logit_of, order_key


@triton.jit
def bits_of(x, S: tl.constexpr):
    if S.scalar == tl.float64:
        return x.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return x.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def index_of(x, S: tl.constexpr):
    if S.scalar == tl.float64:
        return x.to(tl.int64, bitcast=True).to(tl.int32)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def offset(place: tl.constexpr, rows, row):
    """Where field `place` of a row lies; fields times rows may pass 2^31."""
    return tl.full((), place, tl.int64) * rows + row


@triton.jit
def save_field(record, rows, row, present, place: tl.constexpr, values):
    for i in tl.static_range(len(values)):
        tl.store(record + offset(place + i, rows, row), values[i], mask=present)


@triton.jit
def load_field(record, rows, row, present, place: tl.constexpr, count: tl.constexpr):
    values = ()
    for i in tl.static_range(count):
        values += (tl.load(record + offset(place + i, rows, row), mask=present, other=1.0),)
    return values


@triton.jit
def save_indices(record, rows, row, present, place: tl.constexpr, values, S: tl.constexpr):
    for i in tl.static_range(len(values)):
        bits = bits_of(values[i], S)
        tl.store(record + offset(place + i, rows, row), bits, mask=present)


@triton.jit
def load_indices(
    record, rows, row, present, place: tl.constexpr, count: tl.constexpr, S: tl.constexpr
):
    values = ()
    for i in tl.static_range(count):
        bits = tl.load(record + offset(place + i, rows, row), mask=present, other=1.0)
        values += (index_of(bits, S),)
    return values


@triton.jit
def save_top_k(record, rows, row, present, thresholds, last_ties, S: tl.constexpr):
    logits = ()
    for k in tl.static_range(len(thresholds)):
        logits += (logit_of(thresholds[k], S.compute),)
    save_field(record, rows, row, present, S.at_threshold, logits)
    save_indices(record, rows, row, present, S.at_last_tie, last_ties, S)


@triton.jit
def load_top_k(record, rows, row, present, S: tl.constexpr):
    """Thresholds and last ties of the students; () where no top k is asked for."""
    count: tl.constexpr = S.students if S.top else 0
    logits = load_field(record, rows, row, present, S.at_threshold, count)
    thresholds = ()
    for k in tl.static_range(count):
        thresholds += (order_key(logits[k].to(S.compute)),)
    return thresholds, load_indices(record, rows, row, present, S.at_last_tie, count, S)


@triton.jit
def save_uniform(record, rows, row, present, place: tl.constexpr, flat):
    """Side by side; where no option asks there are no entries."""
    values = flat.live + flat.spread + flat.excess + flat.lift
    save_field(record, rows, row, present, place, values)


@triton.jit
def load_uniform(
    record, rows, row, present, place: tl.constexpr, lifts: tl.constexpr, spreads: tl.constexpr
):
    excess: tl.constexpr = place + lifts + spreads
    return UniformSums(
        load_field(record, rows, row, present, place, lifts),
        load_field(record, rows, row, present, place + lifts, spreads),
        load_field(record, rows, row, present, excess, spreads),
        load_field(record, rows, row, present, excess + spreads, lifts),
    )


@triton.jit
def save_sums(record, rows, row, present, sums, S: tl.constexpr):
    save_field(record, rows, row, present, S.at_maximum, sums.maximum)
    save_field(record, rows, row, present, S.at_mass, sums.mass)
    save_field(record, rows, row, present, S.at_moment, sums.moment)
    save_uniform(record, rows, row, present, S.at_live, sums.flat)
    if S.tempered:
        save_field(record, rows, row, present, S.at_tempered_mass, sums.tempered_mass)
    save_field(record, rows, row, present, S.at_top_mass, sums.top_mass)
    save_field(record, rows, row, present, S.at_top_moment, sums.top_moment)
    save_uniform(record, rows, row, present, S.at_top_live, sums.top_flat)
    save_field(record, rows, row, present, S.at_weighted_spread, sums.weighted_spread)
    save_field(record, rows, row, present, S.at_lost, sums.lost)
    save_field(record, rows, row, present, S.at_first, sums.pair.first)
    save_field(record, rows, row, present, S.at_second, sums.pair.second)
    save_field(record, rows, row, present, S.at_gap, sums.pair.gap)
    save_field(record, rows, row, present, S.at_other, sums.pair.other)
    save_field(record, rows, row, present, S.at_reach, sums.pair.reach)
    save_field(record, rows, row, present, S.at_tail, sums.tail)
    save_field(record, rows, row, present, S.at_top_tail, sums.top_tail)


@triton.jit
def load_sums(record, rows, row, present, S: tl.constexpr):
    models: tl.constexpr = S.models
    tops: tl.constexpr = S.students if S.top else 0
    spreads: tl.constexpr = S.students if S.uniform and not S.top else 0
    lifts: tl.constexpr = S.students if S.lifts else 0
    uniform_tops: tl.constexpr = S.students if S.uniform and S.top else 0
    smooths: tl.constexpr = S.students if S.smooths else 0
    sums = Sums(
        load_field(record, rows, row, present, S.at_maximum, models),
        load_field(record, rows, row, present, S.at_mass, models),
        load_field(record, rows, row, present, S.at_moment, models),
        load_uniform(record, rows, row, present, S.at_live, lifts, spreads),
        (),
        load_field(record, rows, row, present, S.at_top_mass, tops),
        load_field(record, rows, row, present, S.at_top_moment, tops),
        load_uniform(record, rows, row, present, S.at_top_live, uniform_tops, uniform_tops),
        load_field(record, rows, row, present, S.at_weighted_spread, smooths),
        (),
        load_field(record, rows, row, present, S.at_lost, smooths),
        PairSums(
            load_field(record, rows, row, present, S.at_first, S.at_second - S.at_first),
            load_field(record, rows, row, present, S.at_second, S.at_gap - S.at_second),
            load_field(record, rows, row, present, S.at_gap, S.at_other - S.at_gap),
            load_field(record, rows, row, present, S.at_other, S.at_reach - S.at_other),
            load_field(record, rows, row, present, S.at_reach, S.at_tail - S.at_reach),
        ),
        load_field(record, rows, row, present, S.at_tail, S.at_top_tail - S.at_tail),
        load_field(record, rows, row, present, S.at_top_tail, S.at_winner - S.at_top_tail),
    )
    if S.tempered:
        tempered = load_field(record, rows, row, present, S.at_tempered_mass, models)
    else:
        tempered = sums.mass
    return with_masses(sums, sums.mass, sums.moment, tempered, sums.tail)
