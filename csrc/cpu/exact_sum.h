// The exact sum of many float32 numbers on the CPU. Raw pointers, no torch.
#pragma once

#include <cstdint>

#include "../rows/superaccumulator.h"
#include "loss.h"

namespace ck {

// The normalised sum of x (size,); the words do not depend on the number of threads.
rows::Superaccumulator exact_sum(const float* x, int64_t size, const Parallel& parallel);

}  // namespace ck
