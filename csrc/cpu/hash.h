// Hashes of tensors on the CPU. Raw pointers, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "loss.h"

namespace ck {

// A piece of a tensor, contiguous here, strided there: byte b of the data is byte
// first + b / run * step + b % run of the tensor.
struct HashPiece {
  const void* data;
  int64_t bytes;
  int64_t first, run, step;
};

// words: (pieces, kHashWords). Adds each piece's words (rows/hash.h) to its row.
void hash(const std::vector<HashPiece>& pieces, uint64_t* words, const Parallel& parallel);

}  // namespace ck
