// The threads of csrc/cpu, without torch: for ThreadSanitizer, which tests/sanitize.py builds it
// with. Each result must be that of one thread. The argument "race" plants a data race instead.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "../../csrc/cpu/buffers.h"
#include "../../csrc/cpu/exact_sum.h"
#include "../../csrc/cpu/hash.h"
#include "../../csrc/cpu/loss.h"
#include "../../csrc/rows/hash.h"

namespace {

using Body = std::function<void(int64_t, int64_t)>;

constexpr int kThreads = 4;

// Whatever the grain: each thread takes an equal share of the tasks.
void run_threads(int64_t tasks, int64_t, const Body& body) {
  std::vector<std::thread> threads;
  const int64_t share = (tasks + kThreads - 1) / kThreads;
  for (int64_t begin = 0; begin < tasks; begin += share) {
    threads.emplace_back(
        [&body, begin, end = std::min(tasks, begin + share)] { body(begin, end); });
  }
  for (std::thread& thread : threads) thread.join();
}

void run_alone(int64_t tasks, int64_t, const Body& body) { body(0, tasks); }

const ck::Parallel kTogether{kThreads, run_threads}, kAlone{1, run_alone};

std::vector<float> numbers(int64_t size) {
  std::vector<float> x(size);
  uint32_t state = 1;
  for (float& number : x) {
    state = state * 1664525u + 1013904223u;
    number = static_cast<float>(state >> 8) * 0x1p-22f - 2.0f;
  }
  return x;
}

int failures = 0;

void check(const char* name, bool same) {
  std::printf("%s %s\n", same ? "ok" : "FAILED", name);
  failures += !same;
}

std::vector<uint64_t> hash(const std::vector<float>& x, const ck::Parallel& parallel) {
  const auto bytes = static_cast<int64_t>(x.size() * sizeof(float));
  std::vector<ck::HashPiece> pieces{{x.data(), bytes, 0, bytes, bytes},
                                    {x.data(), 12, 5, 4, 8},
                                    {x.data() + 1, bytes / 2 - 8, 0, bytes, bytes}};
  std::vector<uint64_t> words(pieces.size() * ck::kHashWords);
  ck::hash(pieces, words.data(), parallel);
  return words;
}

bool same_sum(const std::vector<float>& x) {
  const auto size = static_cast<int64_t>(x.size());
  const auto a = ck::exact_sum(x.data(), size, kTogether);
  const auto b = ck::exact_sum(x.data(), size, kAlone);
  return std::memcmp(a.word, b.word, sizeof a.word) == 0;
}

// Loss, statistics and gradients of both passes.
struct Results {
  std::vector<double> loss, stats, terms;
  std::vector<float> gradients;
  bool operator==(const Results& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0]) == 0;
    };
    return same(loss, other.loss) && same(stats, other.stats) && same(terms, other.terms) &&
           same(gradients, other.gradients);
  }
};

Results loss(int64_t rows, int64_t classes, int models, ck::LossOptions options,
             const ck::Parallel& parallel) {
  const std::vector<float> logits = numbers(models * rows * classes);
  std::vector<int64_t> target(rows);
  for (int64_t row = 0; row < rows; ++row) target[row] = row * 7 % classes;
  ck::LossInputs in{};
  in.isa = ck::active_isa();
  in.dtype = ck::DType::kFloat32;
  in.rows = rows;
  in.classes = classes;
  in.target = target.data();
  in.options = options;
  for (int k = 0; k < models; ++k) {
    in.logits.push_back({logits.data() + k * rows * classes, classes, 1});
  }
  Results results{std::vector<double>(1), std::vector<double>(rows * in.stats_width()),
                  std::vector<double>(in.reported_terms()), std::vector<float>(2 * logits.size())};
  std::vector<void*> forward, backward;
  for (int k = 0; k < in.students(); ++k) {
    forward.push_back(results.gradients.data() + k * rows * classes);
    backward.push_back(results.gradients.data() + logits.size() + k * rows * classes);
  }
  ck::loss_forward(in, {results.loss.data(), results.stats.data(), results.terms.data(), &forward},
                   parallel);
  const double upstream = 0.5;
  ck::loss_backward(in, results.stats.data(), &upstream, backward, parallel);
  ck::scale(in.dtype, results.gradients.data(), static_cast<int64_t>(results.gradients.size()), 0.3,
            options.exact(), parallel);
  return results;
}

void check_losses() {
  ck::LossOptions plain{1.0,
                        0.3,
                        0.5,
                        ck::Regularizer::kEntropy,
                        0,
                        true,
                        ck::Divergence::kSkl,
                        0,
                        0.0,
                        -100,
                        1.0,
                        ck::Reduction::kMean,
                        ck::Mode::kFast};
  ck::LossOptions general = plain;
  general.top_k = 3;
  general.temperature = 2.0;
  general.label_smoothing = 0.1;
  general.divergence = ck::Divergence::kL1;
  for (const ck::Mode mode : {ck::Mode::kFast, ck::Mode::kExact}) {
    for (ck::LossOptions options : {plain, general}) {
      options.mode = mode;
      for (const auto& [rows, classes] : {std::pair<int64_t, int64_t>{70, 33}, {3, 5000}}) {
        check("loss", loss(rows, classes, 2, options, kTogether) ==
                          loss(rows, classes, 2, options, kAlone));
      }
    }
  }
}

void use_buffers() {
  for (int i = 0; i < 200; ++i) {
    const int64_t bytes = ck::kSmallestBuffer + i % 3 * (64 << 10);
    char* buffer = static_cast<char*>(ck::take_buffer(bytes));
    buffer[0] = buffer[bytes - 1] = static_cast<char>(i);
    ck::give_back_buffer(buffer);
  }
}

void race() {
  int64_t count = 0;
  const Body body = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) count += i;
  };
  run_threads(1000, 1, body);
  std::printf("%lld\n", static_cast<long long>(count));
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "race") == 0) {
    race();
    return 0;
  }
  const std::vector<float> x = numbers(600'000);
  check("hash", hash(x, kTogether) == hash(x, kAlone));
  check("exact sum", same_sum(x));
  check_losses();
  run_threads(kThreads, 1, [](int64_t, int64_t) { use_buffers(); });
  check("buffers", true);
  // Calls of their own in several threads, while one of them chooses the instruction set.
  const std::vector<uint64_t> want = hash(x, kAlone);
  std::vector<char> same(kThreads, 1);
  run_threads(kThreads, 1, [&](int64_t thread, int64_t) {
    for (int i = 0; i < 3; ++i) {
      if (thread == 0) ck::lower_isa(ck::isa_name(ck::detected_isa()));
      same[thread] = same[thread] && hash(x, kAlone) == want;
    }
  });
  check("instruction set", std::find(same.begin(), same.end(), 0) == same.end());
  return failures != 0;
}
