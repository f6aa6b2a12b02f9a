// Memory for gradients, cached between calls. A training step frees its gradients and then
// allocates the same again; the system would provide fresh zeroed pages each time, which costs
// more than computing the gradients.
#pragma once

#include <cstdint>

namespace ck {

// Smaller blocks go to the default allocator, which caches them itself.
inline constexpr int64_t kSmallestBuffer = 1 << 20;

// Maximum size of the unused buffers that are kept.
inline constexpr int64_t kKeptBufferBytes = 256 << 20;

// At least `bytes` of uninitialised memory, aligned for vectors. Thread-safe. Throws
// std::bad_alloc.
void* take_buffer(int64_t bytes);

// Returns a buffer of take_buffer to the cache. Thread-safe.
void give_back_buffer(void* buffer) noexcept;

}  // namespace ck
