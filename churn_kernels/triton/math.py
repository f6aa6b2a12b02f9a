"""exp, log and fused multiply-add of the softmax; the twin of csrc/rows/math.h.

float32 takes the GPU's own exp2, which is one instruction; float64 has no such instruction and
takes the library's exp. Exact mode takes neither: it repeats csrc/rows/math.h bit by bit, whose
float64, that of a row's scalars, rounds a * b + c twice.
"""

import triton
import triton.language as tl

from churn_kernels._C import constants

LOG2_E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))
LOWEST_FLOAT = tl.constexpr(constants.kLowestFloat)
LOWEST_DOUBLE = tl.constexpr(constants.kLowestDouble)
WEIGHTLESS = tl.constexpr(constants.kWeightless)
NEAR = tl.constexpr(constants.kNear)
FLOAT = tl.constexpr(constants.Float)
DOUBLE = tl.constexpr(constants.Double)
SMALLEST = tl.constexpr(2.0**-126)  # normal float32
SMALLEST_DOUBLE = tl.constexpr(2.0**-1022)


@triton.jit
def mul_add(a, b, c):
    """a * b + c with one rounding."""
    return tl.fma(a, b, c)


@triton.jit
def number(value: tl.constexpr, dtype: tl.constexpr):
    """A constant of just this dtype."""
    return tl.full((), value, dtype)


@triton.constexpr_function
def constant_of(dtype, name):
    """A number of csrc/rows/math.h's Format."""
    return (DOUBLE if dtype == tl.float64 else FLOAT).value[name]


@triton.constexpr_function
def term(dtype, name, i):
    return (DOUBLE if dtype == tl.float64 else FLOAT).value[name][i]


@triton.constexpr_function
def count_terms(dtype, name):
    return len((DOUBLE if dtype == tl.float64 else FLOAT).value[name])


@triton.constexpr_function
def bits_dtype(dtype):
    return tl.int64 if dtype == tl.float64 else tl.int32


@triton.jit
def scalar_mul_add(a, b, c):
    """mul_add as exact mode has it."""
    if a.dtype == tl.float64:
        return a * b + c
    else:
        return tl.fma(a, b, c)


@triton.jit
def divide(a, b):
    """a / b, rounded to nearest."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def polynomial(x, name: tl.constexpr):
    """The terms of this name, the first with the highest power of x."""
    p = number(term(x.dtype, name, 0), x.dtype)
    for i in tl.static_range(1, count_terms(x.dtype, name)):
        p = scalar_mul_add(p, x, number(term(x.dtype, name, i), x.dtype))
    return p


@triton.jit
def where_near(x, near, far):
    """`near` where |x| < NEAR, `far` elsewhere (NaN included)."""
    return tl.where(tl.abs(x) < NEAR, near, far)


@triton.jit
def less_one(x, e, one):
    """e - one for e = exp(x), with its digits where e is nearly one; 0 where x = e = one = 0."""
    return where_near(x, x * polynomial(x, "series_1_terms"), e - one)


@triton.jit
def exact_exp(d):
    dtype: tl.constexpr = d.dtype
    whole: tl.constexpr = bits_dtype(dtype)
    shift = number(constant_of(dtype, "kShift"), dtype)
    one = number(1.0, dtype)
    shifted = scalar_mul_add(d, number(LOG2_E, dtype), shift)
    n = shifted - shift
    r = scalar_mul_add(n, number(-constant_of(dtype, "kLn2High"), dtype), d)
    r = scalar_mul_add(n, number(-constant_of(dtype, "kLn2Low"), dtype), r)
    p = scalar_mul_add(polynomial(r, "exp_terms"), r, one)
    p = scalar_mul_add(p, r, one)
    power = shifted.to(whole, bitcast=True) << constant_of(dtype, "kMantissaBits")
    p = (p.to(whole, bitcast=True) + power).to(dtype, bitcast=True)
    return tl.where(d < number(constant_of(dtype, "kExpLowest"), dtype), number(0.0, dtype), p)


@triton.jit
def exact_log(x):
    dtype: tl.constexpr = x.dtype
    whole: tl.constexpr = bits_dtype(dtype)
    bits = x.to(whole, bitcast=True)
    split = tl.full((), constant_of(dtype, "kSqrtHalf"), whole)
    power = (bits - split) >> constant_of(dtype, "kMantissaBits")
    k = power.to(dtype)
    m = (bits - (power << constant_of(dtype, "kMantissaBits"))).to(dtype, bitcast=True)
    f = m - number(1.0, dtype)
    s = divide(f, f + number(2.0, dtype))
    z = s * s
    half_square = number(0.5, dtype) * f * f
    tail = scalar_mul_add(z, polynomial(z, "log_terms"), half_square)
    correction = scalar_mul_add(s, tail, k * number(constant_of(dtype, "kLn2Low"), dtype))
    high = number(constant_of(dtype, "kLn2High"), dtype)
    return tl.where(x == x, scalar_mul_add(k, high, f - (half_square - correction)), x)


@triton.jit
def log1p_nonneg(t):
    """log(1 + t) for t >= 0 of exact mode, with the digits of t that 1 + t has no room for."""
    one = number(1.0, t.dtype)
    total = one + t
    return exact_log(total) + divide(t - (total - one), total)


@triton.jit
def exp_nonpos(d, EXACT: tl.constexpr = False):
    """exp(d) for d <= 0; NaN stays NaN."""
    if EXACT:
        return exact_exp(d)
    elif d.dtype == tl.float64:
        return tl.exp(d)
    else:
        return tl.exp2(d * LOG2_E)


@triton.jit
def log_pos(x, EXACT: tl.constexpr = False):
    """log(x) for x > 0; NaN stays NaN."""
    if EXACT:
        return exact_log(x)
    else:
        return tl.log(x)


@triton.jit
def canonical(x):
    """A float32 result of exact mode: one NaN, no -0, 0 in place of subnormal numbers."""
    kept = tl.where(tl.abs(x) < SMALLEST, 0.0, x)
    return tl.where(x == x, kept, float("nan"))


@triton.jit
def cast_exactly(x, dtype: tl.constexpr):
    """A canonical float32 in another dtype, rounded to nearest; the same bits on every target."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        bits = x.to(tl.float16).to(tl.int16, bitcast=True)
        bits = tl.where(x == x, bits, tl.full((), 0x7E00, tl.int16))
        return bits.to(tl.float16, bitcast=True)
    else:
        return x.to(dtype)


@triton.constexpr_function
def lowest_of(dtype):
    """kLowest of the dtype of the classes' arithmetic."""
    return (LOWEST_DOUBLE if dtype == tl.float64 else LOWEST_FLOAT).value


@triton.jit
def at_least_lowest(d):
    """max(d, kLowest): a distance that the dtype has no number for becomes the largest it has."""
    return tl.maximum(d, lowest_of(d.dtype))


@triton.jit
def scalar(x, dtype: tl.constexpr):
    """A float64 argument in the dtype of the row arithmetic."""
    return tl.full((), x, tl.float64).to(dtype)
