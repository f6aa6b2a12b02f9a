// The accumulators of the sweeps: float lanes in a fixed order, or order-independent 64-bit
// integers.
#pragma once

#include <cstring>

#include "../rows/exact.h"
#include "kernels.h"
#include "vec.h"

namespace ck {
inline namespace CK_ISA {

template <class S>
struct FloatSum {
  Vec<S> lanes;

  explicit FloatSum(float) : lanes(S(0)) {}
  void add_to(Sum& total) const { total.real += fold(lanes); }
};

// A float64 sum for numbers as large as the distance of two logits: it does not overflow, and a
// long sum keeps its digits.
struct WideSum {
  static constexpr int kWidth = static_cast<int>(CK_NATIVE_BYTES / 8);
  Native<double> lanes[kLanes<float> / kWidth];

  explicit WideSum(float) : lanes{} {}
  void add_to(Sum& total) const {
    for (const Native<double>& part : lanes) {
      for (int i = 0; i < kWidth; ++i) total.real += part[i];
    }
  }
};

CK_HD void plus(WideSum& sum, const Vec<float>& x) {
  using Half __attribute__((vector_size(CK_NATIVE_BYTES / 2))) = float;
  for (int i = 0; i < kLanes<float> / WideSum::kWidth; ++i) {
    Half half;
    memcpy(&half, x.lanes() + i * WideSum::kWidth, sizeof half);
    sum.lanes[i] += __builtin_convertvector(half, Native<double>);
  }
}

template <class S>
CK_HD void plus(FloatSum<S>& sum, const Vec<S>& x) {
  rows::plus(sum.lanes, x);
}
template <class S>
CK_HD void plus_product(FloatSum<S>& sum, const Vec<S>& a, const Vec<S>& b) {
  rows::plus_product(sum.lanes, a, b);
}

// Integer addition is order-independent, so the number of lanes is that of a native register. They
// wrap around.
struct FixedSum {
  Native<uint64_t> lanes;
  Vec<float> scale;

  explicit FixedSum(float scale) : lanes{}, scale(scale) {}
  void add_to(Sum& total) const {
    for (int i = 0; i < static_cast<int>(CK_NATIVE_BYTES / 8); ++i) {
      add_fixed(total, static_cast<int64_t>(lanes[i]));
    }
  }
};

// Adds each lane of x, truncated to an integer; |x| <= 2^rows::kMostPlaces. Other values and NaN
// add an arbitrary number: such rows are summed again with another scale, or are undefined.
CK_HD void add_integers(Native<uint64_t>& lanes, const Vec<float>& x) {
#if defined(__AVX512F__)
  const __m512 all = (__m512)x.part[0];
  lanes += (Native<uint64_t>)_mm512_cvttps_epi64(_mm512_castps512_ps256(all));
  lanes += (Native<uint64_t>)_mm512_cvttps_epi64(_mm512_extractf32x8_ps(all, 1));
#elif defined(__AVX2__)
  // Adding an integer to 1.5 * 2^52 leaves it in the low bits of the float64.
  const __m256d shift = _mm256_set1_pd(0x1.8p52);
  Native<uint64_t> bits = -4 * (Native<uint64_t>)shift;
  for (const Native<float>& part : x.part) {
    const __m256 cut = _mm256_round_ps((__m256)part, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
    bits += (Native<uint64_t>)_mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(cut)), shift);
    bits += (Native<uint64_t>)_mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(cut, 1)), shift);
  }
  lanes += bits;
#else
  for (int i = 0; i < kLanes<float>; ++i) {
    const float lane = x.lanes()[i];
    const bool fits = lane >= -0x1p62f && lane <= 0x1p62f;
    lanes[i % static_cast<int>(CK_NATIVE_BYTES / 8)] +=
        static_cast<uint64_t>(fits ? static_cast<int64_t>(lane) : 0);
  }
#endif
}

CK_HD void plus(FixedSum& sum, const Vec<float>& x) { add_integers(sum.lanes, x * sum.scale); }
CK_HD void plus_product(FixedSum& sum, const Vec<float>& a, const Vec<float>& b) {
  add_integers(sum.lanes, a * sum.scale * b);
}

// The accumulator for numbers as large as the distance of two logits; A is that of all others.
template <class A>
struct WideOf {
  using type = A;
};
template <>
struct WideOf<FloatSum<float>> {
  using type = WideSum;
};

// The largest and second largest added values, lane by lane; equal ones count twice.
template <class S>
struct TwoLargest {
  Vec<S> first, second;

  TwoLargest() : first(-std::numeric_limits<S>::infinity()), second(first) {}
  CK_HD void add(const Vec<S>& z) {
    second = max(second, where_greater(z, first, first, z));
    first = max(first, z);
  }
  CK_HD void merge(const TwoLargest& other) {
    add(other.first);
    second = max(second, other.second);
  }
  // The largest and second largest over all lanes.
  void fold_into(double& largest, double& next) const {
    S a = -std::numeric_limits<S>::infinity(), b = a;
    for (int i = 0; i < kLanes<S>; ++i) {
      const S x = first.lanes()[i], y = second.lanes()[i];
      b = rows::max(b, x > a ? rows::max(a, y) : x);
      a = rows::max(a, x);
    }
    largest = static_cast<double>(a);
    next = static_cast<double>(b);
  }
};

// rows::canonical of each lane.
CK_HD Vec<float> canonical(const Vec<float>& x) {
  const Vec<float> smallest(std::numeric_limits<float>::min());
  const Vec<float> kept = zero_below(max(x, Vec<float>(0.0f) - x), smallest, x);
  return where_equal(x, x, kept, Vec<float>(std::numeric_limits<float>::quiet_NaN()));
}
using rows::canonical;

// Converts a returned number, scalar or vector, to its stored form; A is the accumulator type.
template <class A, class X>
CK_HD X result(const X& x) {
  if constexpr (std::is_same_v<A, FixedSum>) return canonical(x);
  else return x;
}

}  // namespace CK_ISA
}  // namespace ck
