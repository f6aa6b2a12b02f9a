"""Tuples of tiles and of lanes, entry by entry."""

import triton
import triton.language as tl


@triton.jit
def add_each(a, b):
    """Entry by entry, two tuples."""
    total = ()
    for i in tl.static_range(len(a)):
        total += (a[i] + b[i],)
    return total


@triton.jit
def larger_each(a, b):
    total = ()
    for i in tl.static_range(len(a)):
        total += (tl.maximum(a[i], b[i]),)
    return total


@triton.jit
def add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def total_each(a):
    """Sum over the lanes of each entry; four at a time, for threads to meet but once for them."""
    total = ()
    fours: tl.constexpr = len(a) // 4 * 4
    for i in tl.static_range(0, fours, 4):
        total += tl.reduce((a[i], a[i + 1], a[i + 2], a[i + 3]), 0, add4)
    for i in tl.static_range(fours, len(a)):
        total += (tl.sum(a[i], 0),)
    return total


@triton.jit
def largest_each(a):
    total = ()
    for i in tl.static_range(len(a)):
        total += (tl.max(a[i], 0),)
    return total


@triton.jit
def take(a, start: tl.constexpr, count: tl.constexpr):
    """Entries [start, start + count)."""
    taken = ()
    for i in tl.static_range(count):
        taken += (a[start + i],)
    return taken
