// IEEE 754 floating point regardless of the process's settings: a library built with -ffast-math,
// or torch.set_flush_denormal, may have switched on flushing of subnormal numbers to 0.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ck {

// While it lives, this thread rounds to nearest and keeps subnormal numbers.
class StandardFloats {
 public:
  StandardFloats() : before_(get()) { set(kStandard); }
  ~StandardFloats() { set(before_); }
  StandardFloats(const StandardFloats&) = delete;
  StandardFloats& operator=(const StandardFloats&) = delete;

 private:
#if defined(__x86_64__)
  using Word = uint32_t;
  static constexpr Word kStandard = 0x1f80;  // all exceptions masked
  static Word get() { return _mm_getcsr(); }
  static void set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kStandard = 0;
  static Word get() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(Word word) { asm volatile("msr fpcr, %0" : : "r"(word)); }
#else
  using Word = int;
  static constexpr Word kStandard = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif
  Word before_;
};

}  // namespace ck
