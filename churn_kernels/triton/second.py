"""The sums of L1 and distillation, which need the masses of the first sums."""

import triton
import triton.language as tl

from churn_kernels.triton.divergence import kl_term, sign
from churn_kernels.triton.math import at_least_lowest, exp_nonpos, log_pos
from churn_kernels.triton.sums import (
    INFINITY,
    add_each,
    larger_each,
    largest_each,
    total_each,
    with_pairs,
)
from churn_kernels.triton.tile import across, blocks, lane_max, lane_sum, load_block


@triton.jit
def tempered(x, maximum, temperature, S: tl.constexpr):
    """exp((x - maximum) / T) of a class."""
    d = x - across(maximum, S)
    if S.tempered:
        d = d / temperature
    return exp_nonpos(d)


@triton.jit
def probability(x, k: tl.constexpr, sums, temperature, S: tl.constexpr):
    """softmax(z_k / T) of a class."""
    return tempered(x, sums.maximum[k], temperature, S) / across(sums.tempered_mass[k], S)


@triton.jit
def part_terms(z, sums, temperature, S: tl.constexpr):
    """(first, second, reach) of a part, for each lane."""
    first = ()
    second = ()
    reach = ()
    if S.divergence == 4:
        x = z[0].to(S.compute)
        q = probability(z[1].to(S.compute), 1, sums, temperature, S)
        for t in tl.static_range(2, S.models):
            q += probability(z[t].to(S.compute), t, sums, temperature, S)
        q = q / (S.models - 1)
        live = x != -INFINITY
        d = at_least_lowest(x - across(sums.maximum[0], S))
        if S.tempered:
            d = d / temperature
        log_p = d - across(log_pos(sums.tempered_mass[0]), S)
        first += (lane_sum(tl.where(live, kl_term(q, log_p), 0.0), S),)
        only_teachers = tl.where((q > 0) & (live == 0), INFINITY, 0.0)
        reach += (lane_max(only_teachers, S),)
    else:
        p = ()
        for k in tl.static_range(S.models):
            p += (probability(z[k].to(S.compute), k, sums, temperature, S),)
        for i in tl.static_range(S.models):
            for j in tl.static_range(i + 1, S.models):
                s = sign(p[i], p[j])
                first += (lane_sum(s * p[i], S),)
                second += (lane_sum(s * p[j], S),)
    return first, second, reach


@triton.jit
def block_terms(z, sums, temperature, S: tl.constexpr):
    first, second, reach = part_terms(z[0], sums, temperature, S)
    for part in tl.static_range(1, S.parts):
        f, s, r = part_terms(z[part], sums, temperature, S)
        first, second, reach = add_each(first, f), add_each(second, s), larger_each(reach, r)
    return first, second, reach


@triton.jit
def second_sums(z, at, sums, temperature, S: tl.constexpr):
    """The row's sums, with those of the second sweep."""
    parts = z if S.resident else load_block(at, 0, True, S)
    first, second, reach = block_terms(parts, sums, temperature, S)
    if not S.resident:
        for block in range(1, blocks(at, S)):
            parts = load_block(at, block, True, S)
            f, s, r = block_terms(parts, sums, temperature, S)
            first, second, reach = add_each(first, f), add_each(second, s), larger_each(reach, r)
    if S.wide:
        first, second, reach = total_each(first), total_each(second), largest_each(reach)
    return with_pairs(sums, first, second, reach)
