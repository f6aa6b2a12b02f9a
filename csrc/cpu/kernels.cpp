// The sweeps of every dtype, as a table. Compiled once per instruction set (CK_ISA), and once more
// for the exact mode of one without fma.
#include "kernels.h"

#include <algorithm>
#include <cstring>

#include "../rows/hash.h"
#include "fused.h"
#include "general.h"

namespace ck {
inline namespace CK_ISA {
namespace {

template <class T, class A>
void scale(void* data, int64_t begin, int64_t end, double factor) {
  T* x = static_cast<T*>(data);
  const Vec<Compute<T>> f(static_cast<Compute<T>>(factor));
  constexpr int kWidth = kLanes<Compute<T>>;
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) store<false>(x + i, result<A>(load(x + i) * f));
  if (i < end) {
    const int n = static_cast<int>(end - i);
    store_first(x + i, n, result<A>(load_first(x + i, n, Compute<T>(0)) * f));
  }
}

template <class T, class A, class Sweeps>
constexpr Kernels table() {
  using Any = General<T, A>;
  return {&Sweeps::maxima,   &Any::bounds,         &Sweeps::sums,
          &Any::second_sums, &Sweeps::gradient,    &Any::top_k,
          &Any::top_two,     &Any::shares_maximum, &Any::logit};
}

template <class T, class A>
constexpr KernelSet kernels_of() {
  return {{table<T, A, Fused<T, 1, A>>(), table<T, A, Fused<T, 2, A>>()},
          table<T, A, General<T, A>>(),
          &scale<T, A>};
}

#if !defined(CK_SOFTWARE_FMA)
constexpr rows::HashKeys kHashKeys = rows::make_hash_keys();

// Some bytes of one part of a hash, from its byte `at` on.
uint64_t part_of(const unsigned char* data, int64_t bytes, int64_t at) {
  uint64_t part = 0;
  for (int64_t i = 0; i < bytes; ++i) part |= static_cast<uint64_t>(data[i]) << 8 * (at + i);
  return part;
}

void add_part(uint64_t part, int64_t place, uint64_t* words) {
  for (int k = 0; k < kHashWords; ++k)
    words[k] += part * kHashKeys[k][place % kHashBlock] * rows::block_key(k, place / kHashBlock);
}

void hash(const void* bits, int64_t bytes, int64_t first, uint64_t* words) {
  const auto* data = static_cast<const unsigned char*>(bits);
  int64_t place = first / kHashPart;
  if (const int64_t at = first % kHashPart; at != 0) {
    const int64_t count = std::min(kHashPart - at, bytes);
    add_part(part_of(data, count, at), place++, words);
    data += count;
    bytes -= count;
  }
  while (bytes >= kHashPart) {
    const int64_t in_block = place % kHashBlock;
    const int64_t count = std::min(kHashBlock - in_block, bytes / kHashPart);
    uint64_t sum[kHashWords] = {};
    for (int64_t i = 0; i < count; ++i) {
      uint32_t part;
      std::memcpy(&part, data + i * kHashPart, kHashPart);
      sum[0] += uint64_t{part} * kHashKeys[0][in_block + i];
      sum[1] += uint64_t{part} * kHashKeys[1][in_block + i];
    }
    for (int k = 0; k < kHashWords; ++k)
      words[k] += sum[k] * rows::block_key(k, place / kHashBlock);
    place += count;
    data += count * kHashPart;
    bytes -= count * kHashPart;
  }
  if (bytes > 0) add_part(part_of(data, bytes, 0), place, words);
}
#endif

}  // namespace

#if !defined(CK_SOFTWARE_FMA)
HashSweep hash_sweep() { return hash; }

const KernelSet& kernels(DType dtype) {
  static constexpr KernelSet sets[kDTypes] = {
      kernels_of<float, FloatSum<float>>(), kernels_of<double, FloatSum<double>>(),
      kernels_of<Half, FloatSum<float>>(), kernels_of<BFloat16, FloatSum<float>>()};
  return sets[static_cast<int>(dtype)];
}
#endif

// The baseline's exact kernels are built separately, with fma in software.
#if defined(__FMA__) || defined(__aarch64__) || defined(CK_SOFTWARE_FMA)
const KernelSet& exact_kernels(DType dtype) {
  static constexpr KernelSet sets[] = {kernels_of<float, FixedSum>(),
                                       {},
                                       kernels_of<Half, FixedSum>(),
                                       kernels_of<BFloat16, FixedSum>()};
  return sets[static_cast<int>(dtype)];
}
#endif

}  // namespace CK_ISA
}  // namespace ck
