// exp and log of the softmax, for any value type V: float or double on a GPU and in scalar code, a
// vector of lanes on the CPU. V supplies mul_add, zero_below, add_to_exponent and split_exponent;
// the scalar versions are here, the vector versions in cpu/vec.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "macros.h"

namespace ck {
inline namespace CK_ISA {
namespace rows {

template <class To, class From>
CK_HD To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// Software a * b + c with one rounding. The product is exact in float64; the sum is rounded to odd
// there, so that the second rounding, to float32, never sees a false tie.
CK_HD float software_fma(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double sum = product + static_cast<double>(c);
  const double part = sum - product;
  const double lost = (product - (sum - part)) + (static_cast<double>(c) - part);
  uint64_t bits = bits_as<uint64_t>(sum);
  if ((lost < 0.0 || lost > 0.0) && bits % 2 == 0) bits += (lost > 0.0) == (sum > 0.0) ? 1 : -1;
  return static_cast<float>(bits_as<double>(bits));
}

// a * b + c: one rounding if the target has fma, two if it does not (the x86 baseline, except in
// its build of exact mode). Vector lanes and the scalar version follow the same rule, so they
// agree.
CK_HD float mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(CK_SOFTWARE_FMA)
  return software_fma(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// As above, but the portable build, which computes the scalars of a row, rounds twice on every
// machine, so that they have the same bits everywhere.
CK_HD double mul_add(double a, double b, double c) {
#if (defined(__FMA__) || defined(__aarch64__)) && !defined(CK_PORTABLE)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <class S>
CK_HD S max(S a, S b) {
  return a > b ? a : b;
}

// `yes` where x > y, `no` elsewhere (NaN included).
template <class S>
CK_HD S where_greater(S x, S y, S yes, S no) {
  return x > y ? yes : no;
}

// `value`, or 0 where x < limit. NaN in x keeps `value`.
template <class S>
CK_HD S zero_below(S x, S limit, S value) {
  return x < limit ? S(0) : value;
}

// Adds to a sum of floats; fixed point has its own overloads.
template <class V>
CK_HD void plus(V& sum, V x) {
  sum = sum + x;
}
template <class V>
CK_HD void plus_product(V& sum, V a, V b) {
  sum = mul_add(a, b, sum);
}

// The bit-level format of S, and the constants of exp and log.
template <class S>
struct Format;

template <>
struct Format<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kShift = 0x1.8p23f;   // adding it rounds to an integer, in the low bits
  static constexpr float kExpLowest = -87.0f;  // exp below this is 0: no subnormal ever appears
  static constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr Int kSqrtHalf = 0x3f3504f3;  // bits of sqrt(1/2), where log splits its argument

  // Minimax of (exp(r) - 1 - r) / r^2 on |r| <= ln(2) / 2, relative error of exp 3e-9; highest
  // power first.
  static constexpr int kExpTerms = 5;
  CK_HD static constexpr float exp_term(int i) {
    constexpr float terms[kExpTerms] = {0x1.6db4eap-10f, 0x1.123bdep-7f, 0x1.55545ep-5f,
                                        0x1.55548ep-3f, 0.5f};
    return terms[i];
  }
  // Minimax of (2 atanh(s) - 2 s) / s^3 in s^2, for log(m) with s = (m - 1) / (m + 1).
  static constexpr int kLogTerms = 4;
  CK_HD static constexpr float log_term(int i) {
    constexpr float terms[kLogTerms] = {0x1.e2fdd2p-3f, 0x1.2438a8p-2f, 0x1.999a7cp-2f,
                                        0x1.555554p-1f};
    return terms[i];
  }
};

template <>
struct Format<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kShift = 0x1.8p52;
  static constexpr double kExpLowest = -708.0;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr Int kSqrtHalf = 0x3fe6a09e667f3bcd;

  // As above; relative error of exp 3e-18.
  static constexpr int kExpTerms = 10;
  CK_HD static constexpr double exp_term(int i) {
    constexpr double terms[kExpTerms] = {
        0x1.af85ffba526a0p-26, 0x1.28b0a6ca4c38ap-22, 0x1.71dddf8016519p-19, 0x1.a0199631010abp-16,
        0x1.a01a01bb043c5p-13, 0x1.6c16c185cabbfp-10, 0x1.111111110d5d5p-7,  0x1.555555554ff92p-5,
        0x1.5555555555561p-3,  0x1.000000000000cp-1};
    return terms[i];
  }
  static constexpr int kLogTerms = 7;
  CK_HD static constexpr double log_term(int i) {
    constexpr double terms[kLogTerms] = {
        0x1.2f0d8ef234f70p-3, 0x1.39a0f4f5f828fp-3, 0x1.7466462d33713p-3, 0x1.c71c51e7f3125p-3,
        0x1.2492494217a8bp-2, 0x1.999999997fb31p-2, 0x1.5555555555593p-1};
    return terms[i];
  }
};

// p * 2^n for n = the integer that Format::kShift left in the low bits of `shifted`.
template <class S>
CK_HD S add_to_exponent(S p, S shifted) {
  using U = std::make_unsigned_t<typename Format<S>::Int>;
  return bits_as<S>(
      static_cast<U>(bits_as<U>(p) + (bits_as<U>(shifted) << Format<S>::kMantissaBits)));
}

// p * 2^n, n as above and as a number, or 0 where x < limit.
template <class V>
CK_HD V power_unless_below(V x, V limit, V p, V, V shifted) {
  return zero_below(x, limit, add_to_exponent(p, shifted));
}

// x = m * 2^k with m in [sqrt(1/2), sqrt(2)); returns m, sets k.
template <class S>
CK_HD S split_exponent(S x, S& k) {
  using Int = typename Format<S>::Int;
  using U = std::make_unsigned_t<Int>;
  const U offset = bits_as<U>(x) - U{Format<S>::kSqrtHalf};  // wraps around for x < 0 and NaN
  const Int power = static_cast<Int>(offset) >> Format<S>::kMantissaBits;
  k = static_cast<S>(power);
  return bits_as<S>(
      static_cast<U>(bits_as<U>(x) - (static_cast<U>(power) << Format<S>::kMantissaBits)));
}

template <class V>
struct ScalarOf {
  using type = typename V::Scalar;
};
template <>
struct ScalarOf<float> {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};

// exp(d) for d <= 0; 0 below Format::kExpLowest; NaN stays NaN.
template <class V>
CK_HD V exp_nonpos(V d) {
  using S = typename ScalarOf<V>::type;
  using F = Format<S>;
  const V shifted = mul_add(d, V(S(1.4426950408889634)), V(F::kShift));
  const V n = shifted - V(F::kShift);
  V r = mul_add(n, V(-F::kLn2High), d);
  r = mul_add(n, V(-F::kLn2Low), r);
  V p(F::exp_term(0));
  for (int i = 1; i < F::kExpTerms; ++i) p = mul_add(p, r, V(F::exp_term(i)));
  p = mul_add(mul_add(p, r, V(S(1))), r, V(S(1)));
  return power_unless_below(d, V(F::kExpLowest), p, n, shifted);
}

// log(x) for normal x > 0.
template <class V>
CK_HD V log_pos(V x) {
  using S = typename ScalarOf<V>::type;
  using F = Format<S>;
  V k;
  const V f = split_exponent(x, k) - V(S(1));
  const V s = f / (f + V(S(2)));
  const V z = s * s;
  const V half_square = V(S(0.5)) * f * f;
  V tail(F::log_term(0));
  for (int i = 1; i < F::kLogTerms; ++i) tail = mul_add(tail, z, V(F::log_term(i)));
  // log(1 + f) = f - (f^2/2 - s (f^2/2 + z tail(z))): the small terms first, then the large ones.
  const V correction = mul_add(s, mul_add(z, tail, half_square), k * V(F::kLn2Low));
  return mul_add(k, V(F::kLn2High), f - (half_square - correction));
}

// log(1 + t) for t >= 0, accurate for small t.
template <class V>
CK_HD V log1p_nonneg(V t) {
  const V one(1.0), sum = one + t;
  return log_pos(sum) + (t - (sum - one)) / sum;
}

CK_HD constexpr double inverse_factorial(int n) {
  double x = 1.0;
  for (int i = 2; i <= n; ++i) x /= i;
  return x;
}

// The power series of (exp(x) - 1 - x) / x^2; for |x| < kNear, with a relative error below an ulp.
inline constexpr double kNear = 0.5;
template <class S>
inline constexpr int kSeriesTerms = sizeof(S) == 4 ? 8 : 14;
template <class V>
CK_HD V exp_series(V x) {
  using S = typename ScalarOf<V>::type;
  V p(S(inverse_factorial(kSeriesTerms<S> + 1)));
  for (int i = kSeriesTerms<S>; i >= 2; --i) p = mul_add(p, x, V(S(inverse_factorial(i))));
  return p;
}

// `near` where |x| < kNear, `far` elsewhere (NaN included).
template <class V>
CK_HD V where_near(V x, V near, V far) {
  using S = typename ScalarOf<V>::type;
  return where_greater(V(S(kNear)), max(x, V(S(0)) - x), near, far);
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
