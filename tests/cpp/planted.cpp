// Faults for tests/sanitize.py, in the library that it builds: each must end the process.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu/buffers.h"

namespace {

volatile int64_t sink;

void plant(std::string fault) {
  volatile int64_t one = 1;
  if (fault == "read") {
    const std::vector<float> numbers(24);
    sink = static_cast<int64_t>(numbers.data()[23 + one]);
  } else if (fault == "buffer") {  // memory that the allocator has, and nobody asked for
    char* buffer = static_cast<char*>(ck::take_buffer(ck::kSmallestBuffer + 1));
    buffer[ck::kSmallestBuffer + one] = 1;
  } else if (fault == "returned") {
    char* buffer = static_cast<char*>(ck::take_buffer(ck::kSmallestBuffer));
    ck::give_back_buffer(buffer);
    sink = buffer[one];
  } else if (fault == "overflow") {
    sink = std::numeric_limits<int64_t>::max() + one;
  } else if (fault == "cast") {
    const volatile double number = 1e30;
    sink = static_cast<int64_t>(number);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(churn_kernels, m) { m.def("plant(str fault) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(churn_kernels, CompositeExplicitAutograd, m) {
  m.impl("plant", TORCH_BOX(&plant));
}
