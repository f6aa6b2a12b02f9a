// Position-sensitive hash, computed as an order-independent sum.
//
//   word[k] = sum over places p of part[p] key(k, p) mod 2^64,  k = 0, 1
//
// The parts are a tensor's bytes, four at a time, as little-endian unsigned numbers; the last one
// is padded with zeros. Byte b contributes with weight 2^(8 (b % 4)) key(k, b / 4), so the words of
// the pieces of a tensor add up, wherever it is cut. Keys are odd, or their factors are, so that
// every change of one part is detected; the keys of a block differ, so that every swap within it
// is.
#pragma once

#include <array>
#include <cstdint>

#include "macros.h"

namespace ck {

// Version of the hashes: equal versions give equal hashes on every machine and backend.
inline constexpr int kHashSpec = 2;

inline constexpr int kHashWords = 2;
inline constexpr int64_t kHashPart = 4;      // bytes
inline constexpr int64_t kHashBlock = 1024;  // parts
inline constexpr uint64_t kHashStep = 0x9e3779b97f4a7c15;
inline constexpr uint64_t kHashMix[] = {0xbf58476d1ce4e5b9, 0x94d049bb133111eb};

inline namespace CK_ISA {
namespace rows {

// The output function of SplitMix64 (Steele, Lea and Flood 2014).
constexpr uint64_t splitmix64(uint64_t x) {
  x += kHashStep;
  x = (x ^ (x >> 30)) * kHashMix[0];
  x = (x ^ (x >> 27)) * kHashMix[1];
  return x ^ (x >> 31);
}

// key(k, p) = hash_keys[k][p % kHashBlock] * block_key(k, p / kHashBlock)
using HashKeys = std::array<std::array<uint32_t, kHashBlock>, kHashWords>;
constexpr HashKeys make_hash_keys() {
  HashKeys keys{};
  for (int k = 0; k < kHashWords; ++k) {
    for (int64_t i = 0; i < kHashBlock; ++i) {
      keys[k][i] = static_cast<uint32_t>(splitmix64(k * kHashBlock + i) >> 32) | 1;
    }
  }
  return keys;
}
constexpr uint64_t block_key(int k, int64_t block) {
  return splitmix64(((static_cast<uint64_t>(k) + 1) << 56) + static_cast<uint64_t>(block)) | 1;
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
