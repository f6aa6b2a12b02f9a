// Constants that fix the order of every sum over a row. Changing one changes low bits of results
// and needs an entry in CHANGELOG.md.
#pragma once

#include <cstdint>
#include <limits>

namespace ck {

// A sum over classes is split into kLanes interleaved partial sums: class c belongs to lane
// c % kLanes. The lanes take 64 bytes in every instruction set: one AVX-512 register, two AVX2
// registers.
inline constexpr int kVectorBytes = 64;
template <class S>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));

// Lanes are folded by halves (lane i + lane i + n/2, and so on) once per chunk of this many
// classes, and the chunks are added in float64, first to last. Threads that share one row take
// whole chunks, so the bits depend only on the number of classes.
inline constexpr int64_t kChunk = 2048;

// The general kernel processes a chunk in blocks that stay in the L1 cache.
inline constexpr int64_t kBlock = 256;
static_assert(kChunk % kBlock == 0 && kBlock % kLanes<float> == 0);

// Lower bound of d = logit - maximum: a distance of two logits beyond the largest S counts as the
// largest S.
template <class S>
inline constexpr S kLowest = std::numeric_limits<S>::lowest();

// Lower bound of d in products with exp(d), which is 0 far above it, so that no product with a
// gradient's coefficient overflows.
inline constexpr double kWeightless = -1024.0;

// Version of the bits of exact mode and of exact sums: equal versions give equal bits on every
// machine and backend. Increase it when these bits change.
inline constexpr int kExactSpec = 2;

}  // namespace ck
