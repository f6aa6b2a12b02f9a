// The exact sum of many float32 numbers on the CPU. Raw pointers, no torch.
#pragma once

#include <cstdint>

#include "../rows/superaccumulator.h"
#include "loss.h"

namespace ck {

// The sum of x (size,), normalised; any number of threads, and of numbers, gives the same words.
rows::Superaccumulator exact_sum(const float* x, int64_t size, const Parallel& parallel);

}  // namespace ck
