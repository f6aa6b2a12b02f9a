// Memory for gradients, kept from one call for the next. A training step frees its gradients and
// then asks for the same again; the system would hand out fresh zeroed pages each time, which costs
// more than computing the gradients.
#pragma once

#include <cstdint>

namespace ck {

// Smaller blocks are the ordinary allocator's business: it keeps them itself.
inline constexpr int64_t kSmallestBuffer = 1 << 20;

// At most this much memory is kept while nobody uses it.
inline constexpr int64_t kKeptBufferBytes = 256 << 20;

// At least `bytes`, aligned for vectors, in any thread. Contents are whatever they are. Throws
// std::bad_alloc.
void* take_buffer(int64_t bytes);

// Takes back what take_buffer returned, from any thread.
void give_back_buffer(void* buffer) noexcept;

}  // namespace ck
