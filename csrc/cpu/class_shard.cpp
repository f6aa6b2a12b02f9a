#include "class_shard.h"

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "../rows/exact.h"
#include "../rows/topk.h"
#include "float_environment.h"
#include "row_work.h"

namespace ck {
namespace {

void find_extremes(const RowWork& work, int64_t first_class, Sum* out) {
  for (int k = 0; k < work.view().models; ++k, out += kExtremes) {
    TopTwo top;
    work.kernels().top_two(work.view(), k, &top);
    out[0].real = top.first;
    out[1].real = top.second;
    out[2].real = static_cast<double>(first_class + top.index);
  }
}

// If there are fewer than k classes, the rest is padded with -inf at a class index past the last.
void find_top_k(const RowWork& work, const LossInputs& in, Sum* out) {
  const RowView& row = work.view();
  const int64_t most = in.options.top_k, k = std::min(most, row.classes);
  std::vector<double> heap(k);
  std::vector<std::pair<double, int64_t>> found;
  for (int student = 0; student < row.students; ++student) {
    double threshold;
    int64_t last_tie;
    work.kernels().top_k(row, student, k, heap.data(), &threshold, &last_tie);
    found.clear();
    for (int64_t c = 0; c < row.classes && static_cast<int64_t>(found.size()) < k; ++c) {
      const double z = work.kernels().logit(row, student, c);
      if (rows::in_top_k(z, c, threshold, last_tie)) found.emplace_back(z, in.first_class() + c);
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    found.resize(most, {-std::numeric_limits<double>::infinity(), in.all_classes()});
    for (const auto& [z, c] : found) {
      (out++)->real = z;
      (out++)->real = static_cast<double>(c);
    }
  }
}

void find_sums(RowWork& work, Sum* out) {
  const RowView& row = work.view();
  std::fill_n(out, work.sums_size() + row.students, Sum{});
  work.kernels().sums(row, 0, row.classes, out);
  if (row.target < 0) return;
  for (int k = 0; k < row.students; ++k) {
    out[work.sums_size() + k].real = work.kernels().logit(row, k, row.target);
  }
}

void find_second_sums(RowWork& work, Sum* out) {
  const RowView& row = work.view();
  const int first_pair = row.models * kModelSums;
  std::vector<Sum> sums(work.sums_size(), Sum{});
  work.kernels().second_sums(row, 0, row.classes, sums.data());
  std::copy(sums.begin() + first_pair, sums.end(), out);
}

void run_row(RowWork& work, const LossInputs& in, Stage stage, Sum* out) {
  switch (stage) {
    case Stage::kExtremes: return find_extremes(work, in.first_class(), out);
    case Stage::kTopK: return find_top_k(work, in, out);
    case Stage::kBounds:
      std::fill_n(&out->real, work.bounds_size(), -std::numeric_limits<double>::infinity());
      return work.kernels().bounds(work.view(), 0, in.classes, &out->real);
    case Stage::kSums: return find_sums(work, out);
    case Stage::kSecondSums: return find_second_sums(work, out);
  }
}

}  // namespace

int64_t stage_width(const LossInputs& in, Stage stage) {
  const int pairs = pair_count(in.models(), in.options.teachers);
  switch (stage) {
    case Stage::kExtremes: return in.models() * kExtremes;
    case Stage::kTopK:
      return in.options.regularizes_top_k() ? in.students() * in.options.top_k * 2 : 0;
    case Stage::kBounds: return in.models() * kModelBounds + in.pairs() * kPairBounds;
    case Stage::kSums: return in.models() * kModelSums + pairs * kPairSums + in.students();
    case Stage::kSecondSums: return in.options.needs_second_sweep() ? pairs * kPairSums : 0;
  }
  return 0;
}

void run_stage(const LossInputs& in, void* table, const Parallel& parallel) {
  const StandardFloats floats;
  const auto stage = static_cast<Stage>(in.shard->tables.size());
  const int64_t width = stage_width(in, stage);
  if (width == 0) return;
  Sum* out = static_cast<Sum*>(table);
  const int64_t work_of_row = std::max<int64_t>(1, in.classes * in.models());
  parallel.run(in.rows, std::max<int64_t>(1, kGrain / work_of_row),
               [&](int64_t begin, int64_t end) {
                 RowWork work(in);
                 for (int64_t row = begin; row < end; ++row) {
                   Sum* of_row = out + row * width;
                   if (!work.start(row, nullptr, false)) {
                     std::fill_n(of_row, width, Sum{});
                     continue;
                   }
                   work.take_tables(row);
                   run_row(work, in, stage, of_row);
                 }
               });
}

}  // namespace ck
