// Loads and stores of a row: any logit dtype to and from float32 or float64 lanes, in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace ck {
inline namespace CK_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// Scalar conversions, round to nearest even.
CK_HD float to_compute(float x) { return x; }
CK_HD double to_compute(double x) { return x; }
CK_HD float to_compute(BFloat16 x) {
  return rows::bits_as<float>(static_cast<uint32_t>(x.bits) << 16);
}
CK_HD float to_compute(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  if (magnitude >= 0x0f800000) return rows::bits_as<float>(sign | 0x70000000 | magnitude);
  const float value = rows::bits_as<float>(magnitude) * 0x1p112f;  // rebias, subnormals included
  return rows::bits_as<float>(sign | rows::bits_as<uint32_t>(value));
#endif
}

template <class T>
CK_HD T from_compute(Compute<T> x) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    return x;
  } else {
    const uint32_t bits = rows::bits_as<uint32_t>(x);
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (x != x) return {0x7fc0};
      return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
    } else {
#if defined(__F16C__)
      return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
      const uint32_t sign = bits >> 16 & 0x8000;
      const uint32_t magnitude = bits & 0x7fffffff;
      if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
      if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
      if (magnitude < 0x38800000) {  // subnormal half: let a float addition round it
        const float aligned = rows::bits_as<float>(magnitude) + 0.5f;
        return {static_cast<uint16_t>(sign | (rows::bits_as<uint32_t>(aligned) - 0x3f000000))};
      }
      const uint32_t rounded = magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1);
      return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
    }
  }
}

namespace native {

using Bits __attribute__((vector_size(CK_NATIVE_BYTES / 2))) = uint16_t;

// On AVX2 compilers emit four instructions for this conversion; the intrinsic is one.
CK_HD Native<uint32_t> widened(Bits bits) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (Native<uint32_t>)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Native<uint32_t>);
#endif
}

// One native register of logits.
template <class T>
CK_HD Native<Compute<T>> load(const T* p) {
  using S = Compute<T>;
  Native<S> x;
  if constexpr (sizeof(T) == sizeof(S)) {
    memcpy(&x, p, sizeof x);
  } else {
    Bits bits;
    memcpy(&bits, p, sizeof bits);
    if constexpr (std::is_same_v<T, BFloat16>) {
      x = (Native<S>)(widened(bits) << 16);
    } else {
#if defined(__AVX512F__)
      x = (Native<S>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
      x = (Native<S>)_mm256_cvtph_ps((__m128i)bits);
#else
      for (int i = 0; i < static_cast<int>(CK_NATIVE_BYTES / sizeof(S)); ++i) {
        x[i] = to_compute(p[i]);
      }
#endif
    }
  }
  return x;
}

template <bool kStream, class Register>
CK_HD void put(void* p, Register bits) {
#if defined(__x86_64__)
  if constexpr (kStream) {
    if constexpr (sizeof(Register) == 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)bits);
#endif
    } else if constexpr (sizeof(Register) == 32) {
#if defined(__AVX2__)
      _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)bits);
#endif
    } else if constexpr (sizeof(Register) == 16) {
      _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)bits);
    } else {
      memcpy(p, &bits, sizeof bits);
    }
    return;
  }
#endif
  memcpy(p, &bits, sizeof bits);
}

template <bool kStream, class T>
CK_HD void store(T* p, Native<Compute<T>> x) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    put<kStream>(p, x);
  } else {
    Bits out;
    if constexpr (std::is_same_v<T, BFloat16>) {
      const Native<uint32_t> bits = (Native<uint32_t>)x;
      const Native<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      out = __builtin_convertvector(x == x ? rounded : Native<uint32_t>{} + 0x7fc0, Bits);
    } else {
#if defined(__AVX512F__)
      out = (Bits)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
      out = (Bits)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
      for (int i = 0; i < static_cast<int>(CK_NATIVE_BYTES / sizeof(float)); ++i) {
        out[i] = from_compute<T>(x[i]).bits;
      }
#endif
    }
    put<kStream>(p, out);
  }
}

}  // namespace native

template <class T>
CK_HD Vec<Compute<T>> load(const T* p) {
  constexpr int kWidth = CK_NATIVE_BYTES / sizeof(Compute<T>);
  return each<Compute<T>>([&](int i) { return native::load(p + i * kWidth); });
}

// The first n <= kLanes logits at p, then `fill`; does not read past p + n.
template <class T>
CK_HD Vec<Compute<T>> load_first(const T* p, int n, Compute<T> fill) {
  Vec<Compute<T>> x(fill);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    x.part[0] = (Native<float>)_mm512_mask_loadu_ps((__m512)x.part[0], (1u << n) - 1, p);
    return x;
  }
#endif
  for (int i = 0; i < n; ++i) x.lanes()[i] = to_compute(p[i]);
  return x;
}

// Lanes p[0], p[stride], ...
template <class T>
CK_HD Vec<Compute<T>> load_strided(const T* p, int64_t stride, int n, Compute<T> fill) {
  Vec<Compute<T>> x(fill);
  for (int i = 0; i < n; ++i) x.lanes()[i] = to_compute(p[i * stride]);
  return x;
}

// kStream: past the caches; p must then be aligned to the bytes written.
template <bool kStream, class T>
CK_HD void store(T* p, const Vec<Compute<T>>& x) {
  constexpr int kWidth = CK_NATIVE_BYTES / sizeof(Compute<T>);
  for (int i = 0; i < Vec<Compute<T>>::kParts; ++i) {
    native::store<kStream>(p + i * kWidth, x.part[i]);
  }
}

template <class T>
CK_HD void store_first(T* p, int n, const Vec<Compute<T>>& x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)x.part[0]);
    return;
  }
#endif
  for (int i = 0; i < n; ++i) p[i] = from_compute<T>(x.lanes()[i]);
}

}  // namespace CK_ISA
}  // namespace ck
