#include "hash.h"

#include <algorithm>
#include <mutex>

#include "../rows/hash.h"
#include "kernels.h"

namespace ck {
namespace {

// Bytes below which a second thread does not pay.
constexpr int64_t kTask = 64 * kHashPart * kHashBlock;

// Adds the words of bytes [begin, end) of a piece.
void hash_part(HashSweep sweep, const HashPiece& piece, int64_t begin, int64_t end,
               uint64_t* words) {
  const auto* data = static_cast<const unsigned char*>(piece.data);
  while (begin < end) {
    const int64_t in_run = begin % piece.run, count = std::min(piece.run - in_run, end - begin);
    sweep(data + begin, count, piece.first + begin / piece.run * piece.step + in_run, words);
    begin += count;
  }
}

}  // namespace

void hash(const std::vector<HashPiece>& pieces, uint64_t* words, const Parallel& parallel) {
  const HashSweep sweep = hash_sweep(active_isa());
  std::vector<int64_t> ends;  // of each piece, in bytes of the concatenated pieces
  int64_t bytes = 0;
  for (const HashPiece& piece : pieces) ends.push_back(bytes += piece.bytes);
  std::mutex lock;
  const auto body = [&](int64_t first_task, int64_t end_task) {
    int64_t begin = first_task * kTask;
    const int64_t end = std::min(end_task * kTask, bytes);
    auto piece = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++piece) {
      const int64_t before = ends[piece] - pieces[piece].bytes, stop = std::min(ends[piece], end);
      uint64_t sum[kHashWords] = {};
      hash_part(sweep, pieces[piece], begin - before, stop - before, sum);
      begin = stop;
      const std::lock_guard guard(lock);
      for (int k = 0; k < kHashWords; ++k) words[piece * kHashWords + k] += sum[k];
    }
  };
  const int64_t tasks = (bytes + kTask - 1) / kTask;
  if (tasks < 2 || parallel.threads < 2) {
    body(0, tasks);
  } else {
    parallel.run(tasks, 1, body);
  }
}

}  // namespace ck
