// The arithmetic of exact mode. Terms of a sum are truncated to a fixed number of binary places, as
// integers, whose sum does not depend on the order. Everything else is IEEE arithmetic, each
// operation rounded once, the same on every machine.
//
// A change here that changes a bit needs a new kExactSpec (constants.h).
#pragma once

#include <cstdint>
#include <limits>

#include "math.h"

namespace ck {
inline namespace CK_ISA {
namespace rows {

// Terms of at most 1 (exp(d), exp(d) d, probabilities) keep this many binary places; fewer if the
// number of classes could overflow the sum. The conversion through float64 (AVX2) allows no more.
inline constexpr int kMostPlaces = 50;
CK_HD int places(int64_t classes) {
  int bits = 0;
  while (bits < 62 && (int64_t{1} << bits) < classes) ++bits;
  return 62 - bits < kMostPlaces ? 62 - bits : kMostPlaces;
}

// The least n of 0 <= x < 2^n.
CK_HD int bits_of(double x) { return static_cast<int>(bits_as<int64_t>(x) >> 52) - 1023 + 1; }

CK_HD int min(int a, int b) { return a < b ? a : b; }

// No sum keeps places below 2^-126.
inline constexpr int kLeastExponent = kMostPlaces - 126;
CK_HD int at_least(int exponent) { return exponent > kLeastExponent ? exponent : kLeastExponent; }

// Unbounded terms (d, differences of two d) are scaled per row: they keep `places` binary places
// below 2^exponent, a bound on the largest |term| in the row. Up to kReach the bound follows from
// the row's largest and smallest numbers; a row that reaches further needs a sweep that finds its
// largest terms.
inline constexpr double kReach = 256.0;

CK_HD int reach_exponent(double reach) { return at_least(bits_of(reach)); }

// For all |d| <= reach: exponents of exp(d) - 1, and of its product with d.
CK_HD int lift_exponent(double reach) { return at_least(min(bits_of(reach) + 1, 0)); }
CK_HD int excess_exponent(double reach) {
  return at_least(bits_of(reach) + min(bits_of(reach) + 1, 0));
}

// If one class outweighs all others, sums of exp(d) and exp(d) d over the others keep more
// places: the largest class is handled separately, and the scale follows from the second largest,
// whose d is `gap`. All other terms are below 2^peak_exponent(gap); 0 if the largest is included.
inline constexpr int kLeastPeak = -75;
CK_HD int peak_exponent(double gap) {
  const int bits = bits_of(exp_nonpos(gap) * max(1.0, -gap));
  return bits > 0 ? 0 : bits < kLeastPeak ? kLeastPeak : bits;
}

// The exponents of a pair's sums (divergence.h).
struct PairExponents {
  int first, second, gap, other;
};

// Upper bound of |d_i - d_j| over the classes, from the largest and the smallest difference of the
// two models' logits, `highest` and `lowest`, allowing for the rounding of each d and each
// difference.
inline constexpr double kRounding = 0x1p-15, kDifferenceRounding = 0x1p-22;
CK_HD double pair_reach(double highest, double lowest, double temperature) {
  const double largest = max(max(highest, -highest), max(lowest, -lowest));
  return (highest - lowest) + kRounding * temperature + kDifferenceRounding * largest;
}

// Symmetric KL. A difference of two exponentials is at most 1, and at most 1.3 D / T if that is
// small. `peak` is the pair's, see below.
CK_HD PairExponents skl_exponents(double reach, double temperature, int peak) {
  const int bits = bits_of(reach);
  const int first = at_least(bits + peak);
  return {first, at_least(bits + min(bits_of(reach / temperature) + 1, 0) + peak), 0, first};
}
// For a row that reaches further: from the largest terms themselves.
CK_HD PairExponents far_exponents(double first, double second, double other) {
  return {reach_exponent(first), reach_exponent(second), 0, reach_exponent(other)};
}

// The difference of two d is 0 at a class that is the largest in both models. If that class
// outweighs all others in both, the pair's sums are as small as the exponentials of the others.
CK_HD int pair_peak(bool shares_maximum, int peak_i, int peak_j) {
  return !shares_maximum ? 0 : peak_i > peak_j ? peak_i : peak_j;
}

// The same for sums over probabilities, whose difference at the largest class equals minus the sum
// of all other differences.
CK_HD int sure_peak(int peak, int64_t classes) {
  return peak < 0 ? min(0, peak + bits_of(static_cast<double>(classes)) + 1) : 0;
}

// KL to the teachers. A term is at most q D^2 where |D| is below 1, at most p + q |D| elsewhere,
// and p where q is treated as 0. |D| is at most `reach`, the sum of the largest |d - d_t| / T of a
// class that teacher t has, the largest difference of log masses, and, if only some teachers have a
// class, the logarithm of their number. A class that outweighs all others has only the difference
// of log masses. `untaught` is the largest p without a q.
inline constexpr double kUntaught = 0x1p-64;
CK_HD int kl_exponent(double reach, double log_masses, double untaught, int peak) {
  const int bits = bits_of(reach + kRounding);
  int exponent = at_least((bits < 0 ? 2 * bits : bits) + 2 + peak);
  if (peak < 0) exponent = max(exponent, 2 * bits_of(log_masses + 0x1p-5 * kRounding));
  return max(exponent, bits_of(untaught));
}

// L1: no p exceeds the larger inverse mass, and no |p_i - p_j| exceeds 1.3 times twice the reach
// times that; `reach` is that of d / T.
CK_HD PairExponents l1_exponents(double inverse_mass, double reach, int peak, int64_t classes) {
  const int bits = min(bits_of(reach) + 2, sure_peak(peak, classes));
  return {0, 0, at_least(bits_of(inverse_mass) + min(bits, 0)), 0};
}

CK_HD double power_of_two(int n) { return bits_as<double>(static_cast<int64_t>(n + 1023) << 52); }

// Canonical form of exact mode's results: a single NaN, no -0, and 0 in place of subnormal numbers,
// which a machine may flush.
CK_HD float canonical(float x) {
  if (x != x) return std::numeric_limits<float>::quiet_NaN();
  constexpr float kSmallest = std::numeric_limits<float>::min();
  return x < kSmallest && x > -kSmallest ? 0.0f : x;
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
