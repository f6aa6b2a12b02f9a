#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace ck {
namespace {

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           machine_has(Isa::kAvx2);
  }
  if (isa == Isa::kAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return true;  // the rest is part of the architecture that the library was built for
}

std::string usable_names() {
  std::string names;
  for (Isa isa : built_isas()) {
    if (machine_has(isa)) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  return names;
}

Isa named_isa(const std::string& name) {
  for (Isa isa : built_isas()) {
    if (name == isa_name(isa) && machine_has(isa)) return isa;
  }
  throw std::invalid_argument("CHURN_CPU_ISA must be one of " + usable_names() +
                              " on this machine, got '" + name + "'; unset it to use the best");
}

// Read and set concurrently by threads.
std::atomic<Isa>& active() {
  static std::atomic<Isa> isa = [] {
    const char* name = std::getenv("CHURN_CPU_ISA");
    return name && *name ? named_isa(name) : detected_isa();
  }();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kNeon: return "neon";
    case Isa::kBaseline: break;
  }
  return "baseline";
}

std::vector<Isa> built_isas() {
  return {
#if defined(CK_HAS_NEON)
      Isa::kNeon,
#else
      Isa::kBaseline,
#endif
#if defined(CK_HAS_AVX2)
      Isa::kAvx2,
#endif
#if defined(CK_HAS_AVX512)
      Isa::kAvx512,
#endif
  };
}

Isa detected_isa() {
  Isa best = built_isas().front();
  for (Isa isa : built_isas()) {
    if (machine_has(isa)) best = isa;
  }
  return best;
}

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void lower_isa(const std::string& name) {
  active().store(named_isa(name), std::memory_order_relaxed);
}

}  // namespace ck
