// Hashes of tensors on the CPU. Raw pointers, no torch.
#pragma once

#include <cstdint>

#include "loss.h"

namespace ck {

// Adds the words of `size` parts of 1, 2 or 4 bytes (rows/hash.h), the first of which is at place
// `first`, to `words`.
void hash(const void* data, int bytes, int64_t size, int64_t first, uint64_t* words,
          const Parallel& parallel);

}  // namespace ck
