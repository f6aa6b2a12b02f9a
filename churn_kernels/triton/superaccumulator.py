"""A sum of float32 numbers that has no order; the twin of csrc/rows/superaccumulator.h.

The same words and the same bits as on the CPU, whatever the tiles, programs and atomics: all of it
is integer addition.
"""

import triton
import triton.language as tl

from churn_kernels._C import constants

LANES = tl.constexpr(constants.kSumLanes)
WORDS = tl.constexpr(constants.kSumWords)
LOW = tl.constexpr(0xFFFFFFFF)

MANTISSA = tl.constexpr(0x7FFFFF)
HIDDEN = tl.constexpr(0x800000)
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
SIGN = tl.constexpr(0x80000000)
HIDDEN_64 = tl.constexpr(1 << 52)
INFINITY_64 = tl.constexpr(0x7FF << 52)
NAN_64 = tl.constexpr(0xFFF << 51)
SIGN_64 = tl.constexpr(-(1 << 63))

ADDENDS = tl.constexpr(128)
"""Parts that may be added up element by element before `sum_parts`: 2^7 numbers below 2^55."""

# The last part counts NaN, +inf and -inf in fields of 21 bits each.
COUNT_BITS = tl.constexpr(21)
ONE_NAN = tl.constexpr(1)
ONE_PLUS_INF = tl.constexpr(1 << 21)
ONE_MINUS_INF = tl.constexpr(1 << 42)
COUNT = tl.constexpr((1 << 21) - 1)


@triton.jit
def parts_of(x):
    """Each number as int64 tiles: one for each lane that it may begin in, one for the specials.

    A part holds what its lane and the next one get, not yet split.
    """
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 255
    fraction = bits & MANTISSA
    mantissa = tl.where(exponent > 0, fraction + HIDDEN, fraction)
    place = tl.maximum(exponent, 1) - 1
    value = tl.where(bits < 0, -mantissa, mantissa).to(tl.int64) << (place & 31).to(tl.int64)
    infinite = tl.where(bits < 0, ONE_MINUS_INF, ONE_PLUS_INF)
    special = exponent == 255
    value = tl.where(special, tl.where(fraction != 0, ONE_NAN, infinite), value)
    lane = tl.where(special, LANES - 1, place >> 5)
    parts = ()
    for j in tl.static_range(LANES):
        parts += (tl.where(lane == j, value, 0),)
    return parts


@triton.jit
def add_parts(a, b):
    parts = ()
    for j in tl.static_range(LANES):
        parts += (a[j] + b[j],)
    return parts


@triton.jit
def sum_parts(parts):
    """The words of 1-D parts, scalars; the numbers in them are fewer than 2^21."""
    words = ()
    for j in tl.static_range(LANES):
        if j == 0:
            word = tl.sum(parts[0] & LOW, 0)
        elif j == LANES - 1:
            word = tl.sum(parts[j - 1] >> 32, 0)
        else:
            word = tl.sum(parts[j] & LOW, 0) + tl.sum(parts[j - 1] >> 32, 0)
        words += (word,)
    counts = tl.sum(parts[LANES - 1], 0)
    for field in tl.static_range(WORDS - LANES):
        words += ((counts >> (COUNT_BITS * field)) & COUNT,)
    return words


@triton.jit
def words_of(x, mask):
    """The words of a 1-D tile's numbers where `mask` is set, scalars, not normalised."""
    return sum_parts(parts_of(tl.where(mask, x, 0.0)))


@triton.jit
def add_words(pointer, words):
    """Adds to 12 int64 words in memory; other programs may do so at the same time."""
    for i in tl.static_range(WORDS):
        tl.atomic_add(pointer + i, words[i], sem="relaxed")


@triton.jit
def load_words(pointer):
    """Words as other programs left them in memory."""
    words = ()
    for i in tl.static_range(WORDS):
        words += (tl.load(pointer + i, cache_modifier=".cg"),)
    return words


@triton.jit
def store_words(pointer, words):
    for i in tl.static_range(WORDS):
        tl.store(pointer + i, words[i])


@triton.jit
def normalize(words):
    """The one set of words for a value: lanes 0 to 7 in [0, 2^32), the sign in lane 8."""
    normal = ()
    carry = words[0] - words[0]
    for j in tl.static_range(LANES):
        lane = words[j] + carry
        if j < LANES - 1:
            normal += (lane & LOW,)
            carry = lane >> 32
        else:
            normal += (lane,)
    for i in tl.static_range(LANES, WORDS):
        normal += (words[i],)
    return normal


@triton.jit
def negated(words):
    result = ()
    for i in tl.static_range(WORDS):
        result += (-words[i],)
    return result


@triton.jit
def magnitude_limbs(words):
    """(|sum| as ten 32-bit limbs, whether the sum is negative)."""
    plus = normalize(words)
    minus = normalize(negated(words))
    negative = plus[LANES - 1] < 0
    limbs = ()
    for j in tl.static_range(LANES):
        limb = tl.where(negative, minus[j], plus[j])
        if j < LANES - 1:
            limbs += (limb,)
        else:
            limbs += (limb & LOW, limb >> 32)
    return limbs, negative


@triton.jit
def leading_bits(limbs):
    """(64 bits from the first 1 on, its place, whether a 1 follows them); bits 0 for a sum of 0."""
    zero = limbs[0] - limbs[0]
    top, second, third, rest, place = limbs[0], zero, zero, zero, zero
    lower = zero
    for j in tl.static_range(1, LANES + 1):
        if j > 2:
            lower = lower | limbs[j - 3]
        found = limbs[j] != 0
        top = tl.where(found, limbs[j], top)
        second = tl.where(found, limbs[j - 1], second)
        third = tl.where(found, limbs[j - 2] if j > 1 else zero, third)
        rest = tl.where(found, lower, rest)
        place = tl.where(found, 32 * j, place)
    shift = zero
    for step in tl.static_range(5):
        by = 16 >> step
        short = ((top << shift) >> (32 - by)) == 0
        shift = tl.where(short, shift + by, shift)
    bits = (((top << 32) | second) << shift) | (third >> (32 - shift))
    rest = rest | ((third << shift) & LOW)
    return bits, place + 31 - shift, rest != 0


@triton.jit
def rounded(bits, more, dropped: tl.constexpr):
    """The 64 bits without the last `dropped`, to nearest, ties to even."""
    kept = (bits >> dropped) & ((1 << (64 - dropped)) - 1)
    rest = bits & ((1 << dropped) - 1)
    half = 1 << (dropped - 1)
    tie = tl.where(more, 1, kept & 1)
    return kept + tl.where(rest > half, 1, tl.where(rest == half, tie, 0))


@triton.jit
def special_or(bits, words, nan: tl.constexpr, infinity: tl.constexpr, sign: tl.constexpr):
    """`bits`, or those of NaN or an infinity, if the words say that one was added."""
    plus, minus = words[LANES + 1], words[LANES + 2]
    bits = tl.where(plus != 0, infinity, tl.where(minus != 0, infinity | sign, bits))
    both = tl.where(minus != 0, plus, 0)
    return tl.where(both != 0, nan, tl.where(words[LANES] != 0, nan, bits))


@triton.jit
def round_words(words):
    """(float32, float64): the sum rounded once to either, to nearest, ties to even.

    A sum of 0 is +0. NaN, the one quiet NaN, if there was one, or infinities of both signs.
    """
    limbs, negative = magnitude_limbs(words)
    bits, place, more = leading_bits(limbs)
    # A number of fewer than 24 bits is its float32's bits: whole units of the smallest one.
    narrow = ((place - 22) << 23) + rounded(bits, more, 40) - HIDDEN
    narrow = tl.where(place < 23, limbs[0], tl.minimum(narrow, INFINITY))
    narrow = tl.where(negative, narrow | SIGN, narrow)
    narrow = special_or(narrow, words, NAN, INFINITY, SIGN)
    wide = ((place + 874) << 52) + rounded(bits, more, 11) - HIDDEN_64
    wide = tl.where(bits == 0, 0, tl.where(negative, wide | SIGN_64, wide))
    wide = special_or(wide, words, NAN_64, INFINITY_64, SIGN_64)
    return (
        narrow.to(tl.int32).to(tl.float32, bitcast=True),
        wide.to(tl.float64, bitcast=True),
    )
