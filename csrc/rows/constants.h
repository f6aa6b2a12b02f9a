// Constants that fix the order of every sum over a row. A change here changes low bits of results,
// so it goes with an entry in CHANGELOG.md.
#pragma once

#include <cstdint>
#include <limits>

namespace ck {

// A sum over classes runs in kLanes interleaved partial sums: class c belongs to lane c % kLanes.
// 64 bytes of lanes at every instruction set: AVX-512 holds them in one register, AVX2 in two.
inline constexpr int kVectorBytes = 64;
template <class S>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));

// Lanes are folded by halves (lane i + lane i + n/2, and so on) once per chunk of this many
// classes, and the chunks are added up in float64, first to last. Threads that share one row take
// whole chunks, so the bits depend on the number of classes alone.
inline constexpr int64_t kChunk = 2048;

// The general kernel works through a chunk in blocks that stay in the first-level cache.
inline constexpr int64_t kBlock = 256;
static_assert(kChunk % kBlock == 0 && kBlock % kLanes<float> == 0);

// d = logit - maximum is held at or above this: a distance of two logits that S has no number for
// counts as the largest that it has.
template <class S>
inline constexpr S kLowest = std::numeric_limits<S>::lowest();

// exp(d) is 0 far above this, so where d meets exp(d) it may stand in for any d below: no product
// with a gradient's coefficient overflows.
inline constexpr double kWeightless = -1024.0;

// Numbers the bits of exact mode and of exact sums: where it is the same, so are they, on every
// machine and backend. A change of such bits takes the next number.
inline constexpr int kExactSpec = 2;

}  // namespace ck
