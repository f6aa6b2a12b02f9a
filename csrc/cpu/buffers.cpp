#include "buffers.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__SANITIZE_ADDRESS__)  // makes memory that is cached but not lent out of bounds
#include <sanitizer/asan_interface.h>
#define CK_FORBID(data, bytes) ASAN_POISON_MEMORY_REGION(data, bytes)
#define CK_ALLOW(data, bytes) ASAN_UNPOISON_MEMORY_REGION(data, bytes)
#else
#define CK_FORBID(data, bytes)
#define CK_ALLOW(data, bytes)
#endif

namespace ck {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kGranule = 64 << 10;  // sizes are rounded up to this, so that more of them match
constexpr int64_t kMostBytes = int64_t{1} << 62;

struct Buffer {
  void* data;
  int64_t bytes;
};

struct Shelf {
  std::mutex mutex;
  std::vector<Buffer> kept;  // oldest first; reserved for all lent buffers
  int64_t kept_bytes = 0;
  std::unordered_map<void*, int64_t> lent;  // sizes of the buffers in use
};

// Never destroyed: tensors may outlive every static object.
Shelf& shelf() {
  static Shelf* const shelf = new Shelf;
  return *shelf;
}

void* fresh(int64_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
  madvise(data, bytes, MADV_HUGEPAGE);  // fewer page faults; a failure is harmless
#endif
  return data;
}

void release(const Buffer& buffer) {
  CK_ALLOW(buffer.data, buffer.bytes);
  std::free(buffer.data);
}

}  // namespace

void* take_buffer(int64_t bytes) {
  if (bytes > kMostBytes) throw std::bad_alloc();
  const int64_t size = (bytes + kGranule - 1) / kGranule * kGranule;
  Shelf& s = shelf();
  const std::lock_guard lock(s.mutex);
  const auto fits = [&](const Buffer& b) { return b.bytes >= size && b.bytes - size <= size / 8; };
  const auto found = std::find_if(s.kept.rbegin(), s.kept.rend(), fits);
  Buffer buffer;
  if (found != s.kept.rend()) {
    buffer = *found;
    s.lent.emplace(buffer.data, buffer.bytes);
    s.kept_bytes -= buffer.bytes;
    s.kept.erase(std::next(found).base());
  } else {
    s.kept.reserve(s.kept.size() + s.lent.size() + 1);  // give_back_buffer must not fail
    buffer = {fresh(size), size};
    try {
      s.lent.emplace(buffer.data, buffer.bytes);
    } catch (...) {
      release(buffer);
      throw;
    }
  }
  CK_FORBID(buffer.data, buffer.bytes);
  CK_ALLOW(buffer.data, bytes);
  return buffer.data;
}

void give_back_buffer(void* data) noexcept {
  Shelf& s = shelf();
  const std::lock_guard lock(s.mutex);
  const auto lent = s.lent.find(data);
  const Buffer buffer{data, lent->second};
  s.lent.erase(lent);
  if (buffer.bytes > kKeptBufferBytes) return release(buffer);
  CK_FORBID(buffer.data, buffer.bytes);
  s.kept.push_back(buffer);
  s.kept_bytes += buffer.bytes;
  while (s.kept_bytes > kKeptBufferBytes) {
    s.kept_bytes -= s.kept.front().bytes;
    release(s.kept.front());
    s.kept.erase(s.kept.begin());
  }
}

}  // namespace ck
