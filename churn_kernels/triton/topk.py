"""Membership in a row's k largest logits; the twin of csrc/rows/topk.h.

Logits are compared by integer keys of the same order, so that the k-th largest is found by
bisection: whatever the logits hold, it takes no more steps than a key has bits.
"""

import triton
import triton.language as tl


@triton.jit
def order_key(z):
    """An integer that orders as the logit does; both zeros have one key."""
    if z.dtype == tl.float64:
        bits = (z + 0.0).to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = (z + 0.0).to(tl.int32, bitcast=True)
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def logit_of(key, dtype: tl.constexpr):
    """The logit whose key this is."""
    if dtype == tl.float64:
        bits = key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(dtype, bitcast=True)


@triton.jit
def in_top_k(key, index, threshold, last_tie):
    """Above the threshold, or equal to it and not behind its last tie that still belongs."""
    return (key > threshold) | ((key == threshold) & (index <= last_tie))


@triton.jit
def midpoint(low, high):
    """Mean of two integers rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)
