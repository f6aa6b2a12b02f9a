"""What the order of a row's logits decides: its k largest, and its best two."""

import triton
import triton.language as tl

from churn_kernels.triton.math import INFINITY
from churn_kernels.triton.sums import ANY_TIE
from churn_kernels.triton.tile import (
    across,
    any_row,
    blocks,
    classes_of,
    load_block,
    row_full,
    row_max,
    row_sum,
)
from churn_kernels.triton.topk import in_top_k, midpoint, order_key


@triton.jit
def count_members(z, at, k: tl.constexpr, threshold, last_tie, S: tl.constexpr):
    """Classes of model k in the set that `in_top_k` describes."""
    count = row_full(0, tl.int32, S)
    for block in range(0, blocks(at, S)):
        parts = z if S.resident else load_block(at, block, True, S)
        for part in tl.static_range(S.parts):
            key = order_key(parts[part][k].to(S.compute))
            c = classes_of(at, block, part, S)
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


@triton.jit
def best_two(z, at, sums, S: tl.constexpr):
    """Of each model, the first class of the largest logit; of each student, the next logit."""
    winners = ()
    runners_up = ()
    for k in tl.static_range(S.models):
        maximum = sums.maximum[k]
        winner = row_full(ANY_TIE, tl.int32, S)
        ties = row_full(0, tl.int32, S)
        second = row_full(-INFINITY, S.compute, S)
        for block in range(0, blocks(at, S)):
            parts = z if S.resident else load_block(at, block, True, S)
            for part in tl.static_range(S.parts):
                x = parts[part][k].to(S.compute)
                c = classes_of(at, block, part, S)
                largest = x == across(maximum, S)
                winner = tl.minimum(winner, -row_max(tl.where(largest, -c, -ANY_TIE), S))
                ties += row_sum(largest.to(tl.int32), S)
                second = tl.maximum(second, row_max(tl.where(largest, -INFINITY, x), S))
        winners += (winner,)
        if k < S.students:
            runners_up += (tl.where(ties > 1, maximum, second),)
    return winners, runners_up
