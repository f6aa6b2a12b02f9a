// Digests of the exact arithmetic: whatever the compiler, its options and the instruction set, one
// line each, the same. exp over every float32 in [-87, 0] (every n-th with an argument n), log over
// every 101 n-th above 0, and the float64 twins that a row's scalars take.
#include <cstdio>
#include <cstdlib>

#include "../../csrc/rows/exact.h"

namespace {

using namespace ck::rows;

struct Digest {  // FNV-1a over words
  uint64_t state = 0xcbf29ce484222325;
  void add(uint64_t word) { state = (state ^ word) * 0x100000001b3; }
  void print(const char* name) const {
    std::printf("%s %016llx\n", name, static_cast<unsigned long long>(state));
  }
};

}  // namespace

int main(int count, char** arguments) {
  const uint32_t step = count > 1 ? static_cast<uint32_t>(std::atoi(arguments[1])) : 1;
  Digest exp32, log32, exp64, log64, fma, fixed, series;
  for (uint32_t bits = 0x80000000u; bits <= 0xc2ae0000u; bits += step) {
    exp32.add(bits_as<uint32_t>(exp_nonpos(bits_as<float>(bits))));
  }
  for (uint32_t bits = 0x00800000u; bits < 0x7f800000u; bits += 101 * step) {
    const float x = bits_as<float>(bits);
    log32.add(bits_as<uint32_t>(log_pos(x)));
    log64.add(bits_as<uint64_t>(log_pos(static_cast<double>(x))));
    exp64.add(bits_as<uint64_t>(exp_nonpos(-static_cast<double>(bits) * 0x1p-22)));
    // Every sign and size of the three, so that products cancel, underflow and overflow.
    const uint32_t mixed = bits * 2654435761u;
    const float y = bits_as<float>(mixed & 0xbfffffff), z = -x * y;
    fma.add(bits_as<uint32_t>(canonical(mul_add(x, y, z))));
    fma.add(bits_as<uint32_t>(canonical(mul_add(x, y, bits_as<float>(mixed >> 3)))));
    const float near = static_cast<float>(static_cast<int32_t>(mixed)) * 0x1p-32f;
    series.add(bits_as<uint32_t>(exp_series(near)));
    fixed.add(static_cast<uint64_t>(places(bits)) << 32 | static_cast<uint64_t>(reach_exponent(x)));
  }
  exp32.print("exp32");
  log32.print("log32");
  exp64.print("exp64");
  log64.print("log64");
  fma.print("fma");
  fixed.print("fixed");
  series.print("series");
}
