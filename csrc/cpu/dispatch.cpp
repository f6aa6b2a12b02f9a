#include "kernels.h"

namespace ck {

// The kernel tables of each instruction set, from its own build of kernels.cpp.
#define CK_DECLARE(isa)                        \
  namespace isa {                              \
  const KernelSet& kernels(DType dtype);       \
  const KernelSet& exact_kernels(DType dtype); \
  HashSweep hash_sweep();                      \
  }
#if defined(CK_HAS_NEON)
CK_DECLARE(neon)
#else
CK_DECLARE(baseline)
CK_DECLARE(baseline_exact)
#endif
#if defined(CK_HAS_AVX2)
CK_DECLARE(avx2)
#endif
#if defined(CK_HAS_AVX512)
CK_DECLARE(avx512)
#endif
#undef CK_DECLARE

const KernelSet& kernel_set([[maybe_unused]] Isa isa, DType dtype, bool exact) {
#if defined(CK_HAS_NEON)
  return exact ? neon::exact_kernels(dtype) : neon::kernels(dtype);
#else
#if defined(CK_HAS_AVX512)
  if (isa == Isa::kAvx512) return exact ? avx512::exact_kernels(dtype) : avx512::kernels(dtype);
#endif
#if defined(CK_HAS_AVX2)
  if (isa == Isa::kAvx2) return exact ? avx2::exact_kernels(dtype) : avx2::kernels(dtype);
#endif
  return exact ? baseline_exact::exact_kernels(dtype) : baseline::kernels(dtype);
#endif
}

HashSweep hash_sweep([[maybe_unused]] Isa isa) {
#if defined(CK_HAS_NEON)
  return neon::hash_sweep();
#else
#if defined(CK_HAS_AVX512)
  if (isa == Isa::kAvx512) return avx512::hash_sweep();
#endif
#if defined(CK_HAS_AVX2)
  if (isa == Isa::kAvx2) return avx2::hash_sweep();
#endif
  return baseline::hash_sweep();
#endif
}

}  // namespace ck
