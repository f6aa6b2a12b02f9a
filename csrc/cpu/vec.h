// Vec<S>: a vector of kLanes<S> values, in as many native registers as the instruction set needs.
// The lanes and the order of operations are the same everywhere; only the register width differs.
#pragma once

#include <cstdint>

#include "../rows/constants.h"
#include "../rows/math.h"

#if defined(__AVX512F__)
#define CK_NATIVE_BYTES 64
#elif defined(__AVX2__)
#define CK_NATIVE_BYTES 32
#else
#define CK_NATIVE_BYTES 16
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ck {
inline namespace CK_ISA {

template <class S>
using Native __attribute__((vector_size(CK_NATIVE_BYTES))) = S;

template <class S>
struct Vec {
  using Scalar = S;
  static constexpr int kParts = kVectorBytes / CK_NATIVE_BYTES;
  Native<S> part[kParts];

  Vec() = default;
  CK_HD explicit Vec(S x) {
    for (auto& p : part) p = Native<S>{} + x;
  }
  CK_HD S* lanes() { return reinterpret_cast<S*>(part); }
  CK_HD const S* lanes() const { return reinterpret_cast<const S*>(part); }
};

namespace native {

template <class S>
CK_HD Native<S> max(Native<S> a, Native<S> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return (Native<S>)_mm512_max_ps((__m512)a, (__m512)b);
  else return (Native<S>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return (Native<S>)_mm256_max_ps((__m256)a, (__m256)b);
  else return (Native<S>)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif defined(__SSE2__)
  if constexpr (sizeof(S) == 4) return (Native<S>)_mm_max_ps((__m128)a, (__m128)b);
  else return (Native<S>)_mm_max_pd((__m128d)a, (__m128d)b);
#else
  return a > b ? a : b;
#endif
}

template <class S>
CK_HD Native<S> mul_add(Native<S> a, Native<S> b, Native<S> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return (Native<S>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else return (Native<S>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  if constexpr (sizeof(S) == 4) return (Native<S>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else return (Native<S>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__) || defined(CK_SOFTWARE_FMA)
  for (int i = 0; i < static_cast<int>(CK_NATIVE_BYTES / sizeof(S)); ++i) {
    c[i] = rows::mul_add(S(a[i]), S(b[i]), S(c[i]));
  }
  return c;
#else
  return a * b + c;
#endif
}

}  // namespace native

template <class S, class F>
CK_HD Vec<S> each(F f) {
  Vec<S> r;
  for (int i = 0; i < Vec<S>::kParts; ++i) r.part[i] = f(i);
  return r;
}

template <class S>
CK_HD Vec<S> operator+(const Vec<S>& a, const Vec<S>& b) {
  return each<S>([&](int i) { return a.part[i] + b.part[i]; });
}
template <class S>
CK_HD Vec<S> operator-(const Vec<S>& a, const Vec<S>& b) {
  return each<S>([&](int i) { return a.part[i] - b.part[i]; });
}
template <class S>
CK_HD Vec<S> operator*(const Vec<S>& a, const Vec<S>& b) {
  return each<S>([&](int i) { return a.part[i] * b.part[i]; });
}
template <class S>
CK_HD Vec<S> operator/(const Vec<S>& a, const Vec<S>& b) {
  return each<S>([&](int i) { return a.part[i] / b.part[i]; });
}
template <class S>
CK_HD Vec<S> mul_add(const Vec<S>& a, const Vec<S>& b, const Vec<S>& c) {
  return each<S>([&](int i) { return native::mul_add<S>(a.part[i], b.part[i], c.part[i]); });
}
// Lane by lane the smaller; b where either is NaN.
template <class S>
CK_HD Vec<S> min(const Vec<S>& a, const Vec<S>& b) {
  return each<S>([&](int i) { return a.part[i] < b.part[i] ? a.part[i] : b.part[i]; });
}
// Lane by lane the larger; b where either is NaN.
template <class S>
CK_HD Vec<S> max(const Vec<S>& a, const Vec<S>& b) {
  return each<S>([&](int i) { return native::max<S>(a.part[i], b.part[i]); });
}
template <class S>
CK_HD Vec<S> zero_below(const Vec<S>& x, const Vec<S>& limit, const Vec<S>& value) {
  return each<S>([&](int i) { return x.part[i] < limit.part[i] ? Native<S>{} : value.part[i]; });
}
// `yes` where x == y, `no` elsewhere (NaN included).
template <class S>
CK_HD Vec<S> where_equal(const Vec<S>& x, const Vec<S>& y, const Vec<S>& yes, const Vec<S>& no) {
  return each<S>([&](int i) { return x.part[i] == y.part[i] ? yes.part[i] : no.part[i]; });
}
template <class S>
  requires std::is_floating_point_v<S>
CK_HD S where_equal(S x, S y, S yes, S no) {
  return x == y ? yes : no;
}
// `yes` where x > y, `no` elsewhere (NaN included).
template <class S>
CK_HD Vec<S> where_greater(const Vec<S>& x, const Vec<S>& y, const Vec<S>& yes, const Vec<S>& no) {
  return each<S>([&](int i) { return x.part[i] > y.part[i] ? yes.part[i] : no.part[i]; });
}
// 1 where x > y, 0 elsewhere.
template <class S>
CK_HD Vec<S> greater(const Vec<S>& x, const Vec<S>& y) {
  return where_greater(x, y, Vec<S>(S(1)), Vec<S>(S(0)));
}

template <class S>
CK_HD double largest_lane(const Vec<S>& x) {
  S largest = x.lanes()[0];
  for (int i = 1; i < kLanes<S>; ++i) largest = rows::max(largest, x.lanes()[i]);
  return static_cast<double>(largest);
}

template <class S>
CK_HD bool any_nonzero(const Vec<S>& x) {
  using Int = typename rows::Format<S>::Int;
  Native<Int> bits = (Native<Int>)x.part[0];
  for (int i = 1; i < Vec<S>::kParts; ++i) bits |= (Native<Int>)x.part[i];
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)bits, (__m512i)bits) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)bits, (__m256i)bits);
#else
  Int any = 0;
  for (int i = 0; i < static_cast<int>(CK_NATIVE_BYTES / sizeof(S)); ++i) any |= bits[i];
  return any != 0;
#endif
}

template <class S>
CK_HD Vec<S> add_to_exponent(const Vec<S>& p, const Vec<S>& shifted) {
  using U = std::make_unsigned_t<typename rows::Format<S>::Int>;
  return each<S>([&](int i) {
    return (Native<S>)((Native<U>)p.part[i] +
                       ((Native<U>)shifted.part[i] << rows::Format<S>::kMantissaBits));
  });
}
#if defined(__AVX512F__)
// Two instructions; results of lanes not below the limit are normal numbers.
CK_HD Vec<float> power_unless_below(const Vec<float>& x, const Vec<float>& limit,
                                    const Vec<float>& p, const Vec<float>& n, const Vec<float>&) {
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x.part[0], (__m512)limit.part[0], _CMP_NLT_UQ);
  Vec<float> r;
  r.part[0] = (Native<float>)_mm512_maskz_scalef_ps(kept, (__m512)p.part[0], (__m512)n.part[0]);
  return r;
}
CK_HD Vec<double> power_unless_below(const Vec<double>& x, const Vec<double>& limit,
                                     const Vec<double>& p, const Vec<double>& n,
                                     const Vec<double>&) {
  const __mmask8 kept = _mm512_cmp_pd_mask((__m512d)x.part[0], (__m512d)limit.part[0], _CMP_NLT_UQ);
  Vec<double> r;
  r.part[0] = (Native<double>)_mm512_maskz_scalef_pd(kept, (__m512d)p.part[0], (__m512d)n.part[0]);
  return r;
}
#endif
template <class S>
CK_HD Vec<S> split_exponent(const Vec<S>& x, Vec<S>& k) {
  using Int = typename rows::Format<S>::Int;
  using U = std::make_unsigned_t<Int>;
  return each<S>([&](int i) {
    const Native<U> bits = (Native<U>)x.part[i];
    const Native<Int> offset = (Native<Int>)(bits - U{rows::Format<S>::kSqrtHalf});
    const Native<Int> power = offset >> rows::Format<S>::kMantissaBits;
    k.part[i] = __builtin_convertvector(power, Native<S>);
    return (Native<S>)(bits - ((Native<U>)power << rows::Format<S>::kMantissaBits));
  });
}

// The first n lanes of x, `fill` in the others.
template <class S>
CK_HD Vec<S> keep_first(Vec<S> x, int n, S fill) {
  for (int i = n; i < kLanes<S>; ++i) x.lanes()[i] = fill;
  return x;
}

// Sum over the lanes by halves; the order is part of the interface (rows/constants.h).
template <class S>
CK_HD double fold(Vec<S> x) {
  S* lane = x.lanes();
  for (int width = kLanes<S> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return static_cast<double>(lane[0]);
}

}  // namespace CK_ISA
}  // namespace ck
