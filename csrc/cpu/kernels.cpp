// Compiled once per instruction set (CK_ISA): the sweeps of every dtype, as a table.
#include "kernels.h"

#include "fused.h"
#include "general.h"

namespace ck {
inline namespace CK_ISA {
namespace {

template <class T>
void scale(void* data, int64_t begin, int64_t end, double factor) {
  T* x = static_cast<T*>(data);
  const Vec<Compute<T>> f(static_cast<Compute<T>>(factor));
  constexpr int kWidth = kLanes<Compute<T>>;
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) store<false>(x + i, load(x + i) * f);
  if (i < end) {
    const int n = static_cast<int>(end - i);
    store_first(x + i, n, load_first(x + i, n, Compute<T>(0)) * f);
  }
}

template <class T, class Sweeps>
constexpr Kernels table() {
  return {&Sweeps::maxima,    &Sweeps::sums,        &General<T>::second_sums, &Sweeps::gradient,
          &General<T>::top_k, &General<T>::top_two, &General<T>::logit};
}

template <class T>
constexpr KernelSet kernels_of() {
  return {{table<T, Fused<T, 1>>(), table<T, Fused<T, 2>>()}, table<T, General<T>>(), &scale<T>};
}

}  // namespace

const KernelSet& kernels(DType dtype) {
  static constexpr KernelSet sets[kDTypes] = {kernels_of<float>(), kernels_of<double>(),
                                              kernels_of<Half>(), kernels_of<BFloat16>()};
  return sets[static_cast<int>(dtype)];
}

}  // namespace CK_ISA
}  // namespace ck
