#include "loss.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "../rows/constants.h"
#include "row_work.h"

namespace ck {

// Each instruction set's table, from its own build of kernels.cpp.
#if defined(CK_HAS_NEON)
namespace neon {
const KernelSet& kernels(DType dtype);
}
#else
namespace baseline {
const KernelSet& kernels(DType dtype);
}
#endif
#if defined(CK_HAS_AVX2)
namespace avx2 {
const KernelSet& kernels(DType dtype);
}
#endif
#if defined(CK_HAS_AVX512)
namespace avx512 {
const KernelSet& kernels(DType dtype);
}
#endif

const KernelSet& kernel_set(Isa isa, DType dtype) {
#if defined(CK_HAS_NEON)
  (void)isa;
  return neon::kernels(dtype);
#else
#if defined(CK_HAS_AVX512)
  if (isa == Isa::kAvx512) return avx512::kernels(dtype);
#endif
#if defined(CK_HAS_AVX2)
  if (isa == Isa::kAvx2) return avx2::kernels(dtype);
#endif
  return baseline::kernels(dtype);
#endif
}

namespace {

// Classes of work below which a second thread does not pay.
constexpr int64_t kGrain = 16384;
// Gradients larger than this go past the caches: they would push out the logits of the next rows.
constexpr int64_t kStreamBytes = 32 << 20;

// Rows and weights that take part, and what "mean" divides by.
struct Batch {
  int64_t active = 0;
  double weight = 0.0;
};

Batch count_rows(const LossInputs& in) {
  Batch batch;
  if (!in.target) {
    batch.active = in.rows;
    return batch;
  }
  for (int64_t row = 0; row < in.rows; ++row) {
    const int64_t y = in.target[row];
    if (y == in.options.ignore_index) continue;
    if (y < 0 || y >= in.classes) {
      throw std::out_of_range("target must hold class indices in [0, " +
                              std::to_string(in.classes) + "), got " + std::to_string(y) +
                              " at row " + std::to_string(row) +
                              "; pass ignore_index for rows without a label");
    }
    ++batch.active;
    if (!in.class_weight) {
      batch.weight += 1.0;
    } else if (in.dtype == DType::kFloat64) {
      batch.weight += static_cast<const double*>(in.class_weight)[y];
    } else {
      batch.weight += static_cast<const float*>(in.class_weight)[y];
    }
  }
  return batch;
}

// Upstream gradient of each row term when the reduced loss's is 1.
std::vector<double> term_weights(const LossInputs& in, const Batch& batch) {
  const LossOptions& o = in.options;
  const bool mean = o.reduction == Reduction::kMean;
  const double rows = mean ? static_cast<double>(batch.active) : 1.0;
  const double ce = o.ce_weight / (mean ? batch.weight : 1.0);
  std::vector<double> weights(in.row_terms());
  const int students = in.students();
  const int pairs = in.row_terms() - 2 * students;
  for (int i = 0; i < in.row_terms(); ++i) {
    weights[i] = i < students       ? (in.target && o.ce_weight != 0.0 ? ce : 0.0)
                 : i < 2 * students ? o.regularizer_weight / rows
                                    : o.divergence_weight / (rows * pairs);
  }
  return weights;
}

double weighted(const std::vector<double>& weights, const double* terms) {
  double total = 0.0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] != 0.0) total += weights[i] * terms[i];  // a term without weight may be infinite
  }
  return total;
}

bool streams(const LossInputs& in) {
  return in.rows * in.classes * in.students() * element_size(in.dtype) > kStreamBytes;
}

// How the rows of one call are shared out. Rows first; where there are too few of them, the chunks
// of each row. Either way every sum has the same order.
class Schedule {
 public:
  Schedule(const LossInputs& in, const Parallel& parallel) : in_(in), parallel_(parallel) {
    chunks_ = (in.classes + kChunk - 1) / kChunk;
    splits_rows_ = parallel.threads > 1 && in.rows < 4 * parallel.threads && chunks_ > 1;
  }
  bool splits_rows() const { return splits_rows_; }

  // f(first row, last row, part) over parts whose bounds depend on the batch alone.
  void each_part(const std::function<void(int64_t, int64_t, int64_t)>& f) const {
    const int64_t height = part_height();
    const auto body = [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        f(part * height, std::min(in_.rows, (part + 1) * height), part);
      }
    };
    if (splits_rows_) return body(0, parts());
    const int64_t work = std::max<int64_t>(1, height * in_.classes * in_.models());
    parallel_.run(parts(), std::max<int64_t>(1, kGrain / work), body);
  }
  int64_t parts() const { return (in_.rows + part_height() - 1) / part_height(); }

  // A sweep whose result has no order: one range where the row is one thread's.
  void sweep(const std::function<void(int64_t begin, int64_t end, int64_t chunk)>& f) const {
    if (!splits_rows_) return f(0, in_.classes, 0);
    each_chunk(f);
  }
  void each_chunk(const std::function<void(int64_t begin, int64_t end, int64_t chunk)>& f) const {
    const auto body = [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        f(chunk * kChunk, std::min(in_.classes, (chunk + 1) * kChunk), chunk);
      }
    };
    splits_rows_ ? parallel_.run(chunks_, 1, body) : body(0, chunks_);
  }
  int64_t chunks() const { return chunks_; }

 private:
  int64_t part_height() const { return std::clamp<int64_t>(in_.rows / 64, 1, 32); }

  const LossInputs& in_;
  const Parallel& parallel_;
  int64_t chunks_;
  bool splits_rows_;
};

// Scratch of the calling thread, of one size whatever the problem.
void* thread_memory() {
  struct alignas(kVectorBytes) Memory {
    char bytes[RowWork::kKeptBytes];
  };
  thread_local const std::unique_ptr<Memory> memory(new Memory);
  return memory->bytes;
}

using SumSweep = void (*)(const RowView&, int64_t, int64_t, double*);

void add_sums(RowWork& work, const Schedule& schedule, SumSweep sweep) {
  if (!schedule.splits_rows()) {
    schedule.each_chunk(
        [&](int64_t begin, int64_t end, int64_t) { sweep(work.view(), begin, end, work.sums()); });
    return;
  }
  const int size = work.sums_size();
  std::vector<double> partial(schedule.chunks() * size, 0.0);
  schedule.each_chunk([&](int64_t begin, int64_t end, int64_t chunk) {
    sweep(work.view(), begin, end, &partial[chunk * size]);
  });
  for (int64_t chunk = 0; chunk < schedule.chunks(); ++chunk) {
    for (int i = 0; i < size; ++i) work.sums()[i] += partial[chunk * size + i];
  }
}

void find_maxima(RowWork& work, const Schedule& schedule) {
  const int models = work.view().models;
  if (!schedule.splits_rows()) {
    work.kernels().maxima(work.view(), 0, work.view().classes, work.maxima());
    return;
  }
  std::vector<double> partial(schedule.chunks() * models);
  schedule.each_chunk([&](int64_t begin, int64_t end, int64_t chunk) {
    work.kernels().maxima(work.view(), begin, end, &partial[chunk * models]);
  });
  std::copy_n(partial.begin(), models, work.maxima());
  for (int64_t i = models; i < static_cast<int64_t>(partial.size()); ++i) {
    work.maxima()[i % models] = std::max(work.maxima()[i % models], partial[i]);
  }
}

void sum_row(RowWork& work, const Schedule& schedule) {
  find_maxima(work, schedule);
  work.select_top_k();
  work.clear_sums();
  add_sums(work, schedule, work.kernels().sums);
  if (work.falls_back()) add_sums(work, schedule, work.kernels().sums);
  work.finish_sums();
  if (work.view().options->needs_second_sweep()) {
    work.prepare_second_sweep();
    add_sums(work, schedule, work.kernels().second_sums);
  }
}

void write_gradient(RowWork& work, const Schedule& schedule) {
  schedule.sweep([&](int64_t begin, int64_t end, int64_t) {
    work.kernels().gradient(work.view(), begin, end);
  });
}

}  // namespace

void loss_forward(const LossInputs& in, const LossOutputs& out, const Parallel& parallel) {
  const Batch batch = count_rows(in);
  const std::vector<double> weights = term_weights(in, batch);
  const Schedule schedule(in, parallel);
  const Reduction reduction = in.options.reduction;
  const bool per_row = reduction == Reduction::kNone || reduction == Reduction::kTerms;
  const int width = in.row_terms(), reported = in.reported_terms();
  // Per part: the sums of the row terms, then the sums of the report; folded first to last.
  std::vector<double> partial(schedule.parts() * (width + reported), 0.0);

  schedule.each_part([&](int64_t begin, int64_t end, int64_t part) {
    RowWork work(in);
    if (out.gradients && !schedule.splits_rows()) work.keep_exponentials(thread_memory());
    std::vector<double> row_terms(width);
    double* part_terms = &partial[part * (width + reported)];
    for (int64_t row = begin; row < end; ++row) {
      const bool active = work.start(row, out.gradients, streams(in));
      std::fill(row_terms.begin(), row_terms.end(), 0.0);
      if (active) {
        sum_row(work, schedule);
        work.terms(row_terms.data());
        if (out.terms) work.add_report(row_terms.data(), part_terms + width);
        if (out.gradients) {
          work.set_gradient(weights.data());
          write_gradient(work, schedule);
        }
      }
      if (out.stats) {
        double* stats = out.stats + row * in.stats_width();
        active ? work.save(stats) : (void)std::fill_n(stats, in.stats_width(), 0.0);
      }
      if (reduction == Reduction::kNone) {
        out.loss[row] = active ? weighted(weights, row_terms.data()) : 0.0;
      } else if (reduction == Reduction::kTerms) {
        std::copy(row_terms.begin(), row_terms.end(), out.loss + row * width);
      } else {
        for (int i = 0; i < width; ++i) part_terms[i] += row_terms[i];
      }
    }
  });

  std::vector<double> total(width + reported, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) total[i % total.size()] += partial[i];
  if (!per_row) {
    const bool empty_mean = reduction == Reduction::kMean && batch.active == 0;
    *out.loss =
        empty_mean ? std::numeric_limits<double>::quiet_NaN() : weighted(weights, total.data());
  }
  if (out.terms) {
    for (int i = 0; i < reported; ++i) {
      const bool weighted_mean = i < in.students();
      out.terms[i] =
          total[width + i] / (weighted_mean ? batch.weight : static_cast<double>(batch.active));
    }
    if (!in.target) {  // no label: cross entropy and accuracy have no value
      const int students = in.students();
      const double nan = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(out.terms, students, nan);
      std::fill_n(out.terms + 2 * students, students, nan);
    }
  }
}

void loss_backward(const LossInputs& in, const double* stats, const double* upstream,
                   const std::vector<void*>& gradients, const Parallel& parallel) {
  const std::vector<double> unit = term_weights(in, count_rows(in));
  const Schedule schedule(in, parallel);
  const Reduction reduction = in.options.reduction;
  const int width = in.row_terms();
  schedule.each_part([&](int64_t begin, int64_t end, int64_t) {
    RowWork work(in);
    std::vector<double> weights(width);
    for (int64_t row = begin; row < end; ++row) {
      if (!work.start(row, &gradients, streams(in))) continue;
      work.restore(stats + row * in.stats_width());
      for (int i = 0; i < width; ++i) {
        weights[i] = reduction == Reduction::kTerms  ? upstream[row * width + i]
                     : unit[i] == 0.0                ? 0.0
                     : reduction == Reduction::kNone ? unit[i] * upstream[row]
                                                     : unit[i] * upstream[0];
      }
      work.set_gradient(weights.data());
      write_gradient(work, schedule);
    }
  });
}

std::string plan(const LossInputs& in, const Parallel& parallel) {
  return std::string(folds_into_one_sweep(in) ? "fused " : "general ") + isa_name(active_isa()) +
         (Schedule(in, parallel).splits_rows() ? " chunks" : " rows") +
         (streams(in) && folds_into_one_sweep(in) ? " streamed" : " cached");
}

void scale(DType dtype, void* data, int64_t size, double factor, const Parallel& parallel) {
  if (factor == 1.0) return;
  const KernelSet& set = kernel_set(active_isa(), dtype);
  const auto body = [&](int64_t begin, int64_t end) { set.scale(data, begin, end, factor); };
  parallel.run(size, kGrain, body);
}

}  // namespace ck
