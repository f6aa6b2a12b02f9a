#include "exact_sum.h"

#include <algorithm>
#include <mutex>

namespace ck {
namespace {

using rows::bits_as;
using rows::Superaccumulator;

// Mantissas are added to bins by sign and exponent, one integer addition each, and the bins are
// folded into the accumulator once for many numbers. Neighbouring numbers go to different sets of
// bins: they often share an exponent, and their additions would depend on each other.
constexpr int kSets = 4;
constexpr int kBins = 512;
constexpr int kMantissaBits = 23;
constexpr uint32_t kMantissa = (1u << kMantissaBits) - 1;

// The high bits of a bin count its numbers, the low bits sum their mantissas.
constexpr int kCountShift = 40;
constexpr uint64_t kOne = uint64_t{1} << kCountShift;

// With fewer numbers than this, clearing and folding bins does not pay.
constexpr int64_t kFewest = 512;
// Numbers between two foldings; below 2^17, or the mantissas of one bin would reach its count.
constexpr int64_t kBlock = 1 << 16;
// Blocks below which a second thread does not pay.
constexpr int64_t kFewestBlocks = 2;

void fill_bins(const float* x, int64_t size, uint64_t (&bins)[kSets][kBins]) {
  const auto put = [&](int set, float number) {
    const uint32_t bits = bits_as<uint32_t>(number);
    bins[set][bits >> kMantissaBits] += kOne | (bits & kMantissa);
  };
  int64_t i = 0;
  for (; i + kSets <= size; i += kSets) {
    for (int set = 0; set < kSets; ++set) put(set, x[i + set]);
  }
  for (; i < size; ++i) put(0, x[i]);
}

void add_block(const float* x, int64_t size, Superaccumulator& sum) {
  if (size < kFewest) {
    for (int64_t i = 0; i < size; ++i) sum.add(x[i]);
    return sum.normalize();
  }
  uint64_t bins[kSets][kBins] = {};
  fill_bins(x, size, bins);
  bool special = false;
  for (int bin = 0; bin < kBins; ++bin) {
    uint64_t held = 0;
    for (int set = 0; set < kSets; ++set) held += bins[set][bin];
    if (held == 0) continue;
    const int exponent = bin & 255;
    special |= exponent == 255;
    if (exponent == 255) continue;
    int64_t mantissas = static_cast<int64_t>(held & (kOne - 1));
    if (exponent > 0) mantissas += static_cast<int64_t>(held >> kCountShift) << kMantissaBits;
    sum.add_at(std::max(exponent, 1) - 1, bin == exponent ? mantissas : -mantissas);
  }
  // A bin cannot distinguish infinities from NaN; few blocks have either.
  for (int64_t i = 0; special && i < size; ++i) {
    if ((bits_as<uint32_t>(x[i]) >> kMantissaBits & 255) == 255) sum.add(x[i]);
  }
  sum.normalize();
}

}  // namespace

Superaccumulator exact_sum(const float* x, int64_t size, const Parallel& parallel) {
  Superaccumulator total{};
  std::mutex lock;
  const auto body = [&](int64_t begin, int64_t end) {
    Superaccumulator sum{};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t start = block * kBlock;
      add_block(x + start, std::min(kBlock, size - start), sum);
    }
    const std::lock_guard guard(lock);
    total.merge(sum);
    total.normalize();
  };
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  if (blocks < 2 || parallel.threads < 2) {
    body(0, blocks);
  } else {
    parallel.run(blocks, kFewestBlocks, body);
  }
  return total;
}

}  // namespace ck
