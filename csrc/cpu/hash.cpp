#include "hash.h"

#include <algorithm>
#include <mutex>

#include "../rows/hash.h"
#include "kernels.h"

namespace ck {

void hash(const void* data, int bytes, int64_t size, int64_t first, uint64_t* words,
          const Parallel& parallel) {
  // Parts below which a second thread does not pay; whole blocks, so that no thread shares one.
  constexpr int64_t kTask = 64 * kHashBlock;
  const HashSweep sweep = hash_sweep(active_isa(), bytes);
  const int64_t head = first % kHashBlock;  // parts before the first one in its block
  const int64_t tasks = (head + size + kTask - 1) / kTask;
  std::mutex lock;
  const auto body = [&](int64_t begin, int64_t end) {
    uint64_t sum[kHashWords] = {};
    const int64_t from = std::max(begin * kTask - head, int64_t{0});
    const int64_t to = std::min(end * kTask - head, size);
    sweep(data, from, to, first, sum);
    const std::lock_guard guard(lock);
    for (int k = 0; k < kHashWords; ++k) words[k] += sum[k];
  };
  tasks < 2 || parallel.threads < 2 ? body(0, tasks) : parallel.run(tasks, 1, body);
}

}  // namespace ck
