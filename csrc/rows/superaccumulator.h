// An order-independent sum of float32 numbers: an integer as wide as the range of float32, so that
// nothing is rounded before the end. The arithmetic is on bits; a process or a GPU that flushes
// subnormal numbers to zero gets the same sum.
#pragma once

#include <cstdint>

#include "math.h"

namespace ck {

// The sum in units of 2^-149, the smallest float32, is lane[0] + lane[1] 2^32 + ... + lane[8]
// 2^256.
inline constexpr int kSumLanes = 9;
// The counts of NaN, +inf and -inf follow the lanes.
inline constexpr int kSumNans = kSumLanes, kSumPlusInf = kSumLanes + 1,
                     kSumMinusInf = kSumLanes + 2;
inline constexpr int kSumWords = kSumLanes + 3;

inline namespace CK_ISA {
namespace rows {

// float32 and float64 as an exponent field, a bias and special values.
template <class S>
struct Encoding {
  using Bits = std::make_unsigned_t<typename Format<S>::Int>;
  static constexpr int kMantissaBits = Format<S>::kMantissaBits;
  static constexpr int kExponentBits = 8 * static_cast<int>(sizeof(S)) - 1 - kMantissaBits;
  static constexpr int kBias = (1 << (kExponentBits - 1)) - 1;
  static constexpr Bits kHidden = Bits(1) << kMantissaBits;
  static constexpr Bits kInfinity = ((Bits(1) << kExponentBits) - 1) << kMantissaBits;
  static constexpr Bits kNan = kInfinity | kHidden >> 1;  // the one NaN that a sum returns
  static constexpr Bits kSign = Bits(1) << (8 * sizeof(S) - 1);
};

struct Superaccumulator {
  int64_t word[kSumWords];

  // A number changes no lane by 2^32 or more: after normalize(), 2^31 - 1 numbers may be added,
  // here or in accumulators that are merged.
  CK_HD void add(float x) {
    using F = Encoding<float>;
    const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & ~F::kSign;
    const bool negative = bits != magnitude;
    if (magnitude >= F::kInfinity) {
      ++word[magnitude > F::kInfinity ? kSumNans : negative ? kSumMinusInf : kSumPlusInf];
      return;
    }
    const int exponent = static_cast<int>(magnitude >> F::kMantissaBits);
    const int64_t mantissa = (magnitude & (F::kHidden - 1)) + (exponent > 0 ? F::kHidden : 0);
    add_at(exponent > 0 ? exponent - 1 : 0, negative ? -mantissa : mantissa);
  }

  // Adds value * 2^place units, for |value| < 2^40 and place in [0, 254). Rounding down splits the
  // value over two lanes, and for a mantissa both parts are below 2^32.
  CK_HD void add_at(int place, int64_t value) {
    const int lane = place >> 5, shift = place & 31;
    const uint64_t low = static_cast<uint64_t>(value & kLow) << shift;
    move(lane, static_cast<int64_t>(low & kLow));
    move(lane + 1, static_cast<int64_t>(low >> 32) + (value >> 32) * (int64_t{1} << shift));
  }

  CK_HD void merge(const Superaccumulator& other) {
    for (int i = 0; i < kSumWords; ++i) move(i, other.word[i]);
  }

  // Carries until lanes 0 to 7 lie in [0, 2^32) and lane 8 has the sign: equal values have equal
  // words.
  CK_HD void normalize() {
    for (int i = 0; i + 1 < kSumLanes; ++i) {
      move(i + 1, word[i] >> 32);
      word[i] &= kLow;
    }
  }

  // The sum rounded once, to nearest, ties to even; an infinity if beyond the range of S. A sum of
  // 0 is +0. NaN if there was one, or infinities of both signs.
  template <class S>
  CK_HD S round() const {
    using F = Encoding<S>;
    if (word[kSumNans] || (word[kSumPlusInf] && word[kSumMinusInf])) return bits_as<S>(F::kNan);
    if (word[kSumPlusInf]) return bits_as<S>(F::kInfinity);
    if (word[kSumMinusInf])
      return bits_as<S>(static_cast<typename F::Bits>(F::kInfinity | F::kSign));
    const Leading sum = leading();
    typename F::Bits bits = magnitude<F>(sum);
    if (bits > F::kInfinity) bits = F::kInfinity;
    if (sum.negative) bits |= F::kSign;
    return bits_as<S>(bits);
  }

 private:
  static constexpr int64_t kLow = 0xffffffff;
  static constexpr int kUnit = -149;  // a lane's unit is 2^kUnit

  // Words that are not a valid sum wrap around, as on a GPU.
  CK_HD void move(int i, int64_t by) {
    word[i] = static_cast<int64_t>(static_cast<uint64_t>(word[i]) + static_cast<uint64_t>(by));
  }

  // A sum's 64 leading bits, the first of them 1 unless the sum is 0.
  struct Leading {
    uint64_t bits;
    int place;  // the first bit is worth 2^place units
    bool more;  // whether a 1 follows the 64
    bool negative;
  };

  CK_HD Leading leading() const {
    Superaccumulator sum = *this;
    sum.normalize();
    const bool negative = sum.word[kSumLanes - 1] < 0;
    if (negative) {
      for (int64_t& lane : sum.word) lane = static_cast<int64_t>(-static_cast<uint64_t>(lane));
      sum.normalize();
    }
    // The last lane has the width of two others.
    const auto limb = [&](int i) {
      return i < 0           ? uint64_t{0}
             : i < kSumLanes ? static_cast<uint64_t>(sum.word[i] & kLow)
                             : static_cast<uint64_t>(sum.word[kSumLanes - 1] >> 32);
    };
    int top = kSumLanes;
    while (top > 0 && limb(top) == 0) --top;
    int shift = 0;
    while (shift < 31 && limb(top) >> (31 - shift) == 0) ++shift;
    const uint64_t next = limb(top - 2);
    Leading result{(limb(top) << 32 | limb(top - 1)) << shift | next >> (32 - shift),
                   32 * top + 31 - shift, (next << shift & kLow) != 0, negative};
    for (int i = 0; i < top - 2; ++i) result.more |= limb(i) != 0;
    return result;
  }

  // The bits of |sum|; for numbers out of range they are above infinity's.
  template <class F>
  static CK_HD typename F::Bits magnitude(const Leading& sum) {
    using Bits = typename F::Bits;
    constexpr int kDropped = 63 - F::kMantissaBits;
    const int field = sum.place + kUnit + F::kBias;
    if (field <= 0 || sum.bits == 0) {  // subnormal in float32: the bits are the number of units
      return static_cast<Bits>(sum.bits >> (63 - sum.place));
    }
    const uint64_t kept = sum.bits >> kDropped, rest = sum.bits << (64 - kDropped);
    const bool up = rest > kHalf || (rest == kHalf && (sum.more || kept & 1));
    // A mantissa that rounds up to the next power of two correctly carries into the exponent.
    return (static_cast<Bits>(field) << F::kMantissaBits) + static_cast<Bits>(kept + up) -
           F::kHidden;
  }
  static constexpr uint64_t kHalf = uint64_t{1} << 63;
};

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
