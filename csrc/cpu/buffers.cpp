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

namespace ck {
namespace {

constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kGranule = 64 << 10;  // sizes are rounded up to it, so that more of them match

struct Buffer {
  void* data;
  int64_t bytes;
};

struct Shelf {
  std::mutex mutex;
  std::vector<Buffer> kept;  // oldest first
  int64_t kept_bytes = 0;
  std::unordered_map<void*, int64_t> lent;  // sizes of what is in use
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
  madvise(data, bytes, MADV_HUGEPAGE);  // fewer page faults; where refused, nothing is lost
#endif
  return data;
}

}  // namespace

void* take_buffer(int64_t bytes) {
  bytes = (bytes + kGranule - 1) / kGranule * kGranule;
  Shelf& s = shelf();
  const std::lock_guard lock(s.mutex);
  const auto fits = [&](const Buffer& b) {
    return b.bytes >= bytes && b.bytes - bytes <= bytes / 8;
  };
  const auto found = std::find_if(s.kept.rbegin(), s.kept.rend(), fits);
  Buffer buffer;
  if (found != s.kept.rend()) {
    buffer = *found;
    s.kept_bytes -= buffer.bytes;
    s.kept.erase(std::next(found).base());
  } else {
    buffer = {fresh(bytes), bytes};
  }
  s.lent[buffer.data] = buffer.bytes;
  return buffer.data;
}

void give_back_buffer(void* data) noexcept {
  Shelf& s = shelf();
  const std::lock_guard lock(s.mutex);
  const auto lent = s.lent.extract(data);
  if (lent.mapped() > kKeptBufferBytes) return std::free(data);
  s.kept.push_back({data, lent.mapped()});
  s.kept_bytes += lent.mapped();
  while (s.kept_bytes > kKeptBufferBytes) {
    s.kept_bytes -= s.kept.front().bytes;
    std::free(s.kept.front().data);
    s.kept.erase(s.kept.begin());
  }
}

}  // namespace ck
