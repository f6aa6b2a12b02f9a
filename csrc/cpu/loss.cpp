#include "loss.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "../rows/constants.h"
#include "../rows/exact.h"
#include "../rows/superaccumulator.h"
#include "float_environment.h"
#include "row_work.h"

namespace ck {

namespace {

// Gradients larger than this bypass the caches: they would evict the next rows' logits.
constexpr int64_t kStreamBytes = 32 << 20;

// Sums over the rows of a batch: in float64 from first to last, or, in exact mode,
// order-independent sums of float32.
class BatchSums {
 public:
  BatchSums(bool exact, int count) : real_(exact ? 0 : count), exact_(exact ? count : 0) {}

  void add(int i, double x) {
    exact_.empty() ? void(real_[i] += x) : exact_[i].add(rows::canonical(static_cast<float>(x)));
  }
  void merge(const BatchSums& other) {
    for (size_t i = 0; i < real_.size(); ++i) real_[i] += other.real_[i];
    for (size_t i = 0; i < exact_.size(); ++i) exact_[i].merge(other.exact_[i]);
  }
  double total(int i) const { return exact_.empty() ? real_[i] : exact_[i].round<double>(); }
  // Rounded once to the dtype of the loss.
  double rounded(int i) const { return exact_.empty() ? real_[i] : exact_[i].round<float>(); }

 private:
  std::vector<double> real_;
  std::vector<rows::Superaccumulator> exact_;
};

// Number and total weight of the rows that are not ignored, and the divisors of "mean".
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
  rows::Superaccumulator exact{};
  for (int64_t row = 0; row < in.rows; ++row) {
    const int64_t y = in.target[row];
    if (y == in.options.ignore_index) continue;
    if (y < 0 || y >= in.all_classes()) {
      throw std::out_of_range("target must hold class indices in [0, " +
                              std::to_string(in.all_classes()) + "), got " + std::to_string(y) +
                              " at row " + std::to_string(row) +
                              "; pass ignore_index for rows without a label");
    }
    ++batch.active;
    in.options.exact() ? exact.add(static_cast<float>(in.weight_of(y)))
                       : void(batch.weight += in.weight_of(y));
  }
  if (in.options.exact()) batch.weight = exact.round<double>();
  return batch;
}

// Upstream gradient of each row term for a loss gradient of 1; without a batch, for a row's loss.
std::vector<double> term_weights(const LossInputs& in, const Batch* batch) {
  const LossOptions& o = in.options;
  const double rows = batch ? static_cast<double>(batch->active) : 1.0;
  const double ce = o.ce_weight / (batch ? batch->weight : 1.0);
  std::vector<double> weights(in.row_terms());
  const int students = in.students();
  const int pairs = in.row_terms() - 2 * students;
  for (int i = 0; i < in.row_terms(); ++i) {
    weights[i] = i < students       ? (in.target && o.ce_weight != 0.0 ? ce : 0.0)
                 : i < 2 * students ? o.regularizer_weight / rows
                                    : o.divergence_weight / pairs / rows;
  }
  return weights;
}

// Weighted sum of terms [begin, end), skipping terms that the options switch off, which may be
// infinite. A weight that is 0 because it was divided by infinity is not skipped.
double weighted(const std::vector<double>& weights, const std::vector<double>& row_weights,
                const double* terms, int begin, int end) {
  double total = 0.0;
  for (int i = begin; i < end; ++i) {
    if (row_weights[i] != 0.0) total += weights[i] * terms[i];
  }
  return total;
}

// The reduced loss of a batch, from sums over its rows. Exact mode sums the rows' losses rounded
// to float32, so that an exact sum of `reduction="none"` has the same bits. With class weights the
// cross entropy and the rest are summed separately, because "mean" divides them by different
// numbers.
class Reduced {
 public:
  Reduced(const LossInputs& in, const Batch& batch)
      : in_(in),
        batch_(batch),
        mean_(in.options.reduction == Reduction::kMean),
        row_weights_(term_weights(in, nullptr)),
        weights_(mean_ ? term_weights(in, &batch) : row_weights_) {}

  // Upstream gradient of each row term for a loss gradient of 1.
  const std::vector<double>& weights() const { return weights_; }
  int sums() const { return in_.options.exact() ? 3 : in_.row_terms(); }

  double row_loss(const double* terms) const {
    return weighted(row_weights_, row_weights_, terms, 0, in_.row_terms());
  }
  void add(const double* terms, BatchSums& sums) const {
    const int width = in_.row_terms();
    if (!in_.options.exact()) {
      for (int i = 0; i < width; ++i) sums.add(i, terms[i]);
      return;
    }
    sums.add(0, row_loss(terms));
    sums.add(1, weighted(row_weights_, row_weights_, terms, 0, in_.students()));
    sums.add(2, weighted(row_weights_, row_weights_, terms, in_.students(), width));
  }
  double value(const BatchSums& sums) const {
    if (mean_ && batch_.active == 0) return std::numeric_limits<double>::quiet_NaN();
    if (!in_.options.exact()) {
      std::vector<double> totals(in_.row_terms());
      for (size_t i = 0; i < totals.size(); ++i) totals[i] = sums.total(static_cast<int>(i));
      return weighted(weights_, row_weights_, totals.data(), 0, in_.row_terms());
    }
    if (!mean_) return sums.rounded(0);
    const double rows = static_cast<double>(batch_.active);
    return in_.class_weight && row_weights_[0] != 0.0
               ? sums.total(1) / batch_.weight + sums.total(2) / rows
               : sums.total(0) / rows;
  }

 private:
  const LossInputs& in_;
  const Batch& batch_;
  bool mean_;
  std::vector<double> row_weights_, weights_;
};

bool streams(const LossInputs& in) {
  return in.rows * in.classes * in.students() * element_size(in.dtype) > kStreamBytes;
}

// Distributes a call over threads: by rows or, if there are too few, by the chunks of each row.
// Every sum has the same order either way.
class Schedule {
 public:
  Schedule(const LossInputs& in, const Parallel& parallel) : in_(in), parallel_(parallel) {
    chunks_ = (in.classes + kChunk - 1) / kChunk;
    splits_rows_ = parallel.threads > 1 && in.rows < 4 * parallel.threads && chunks_ > 1;
  }
  bool splits_rows() const { return splits_rows_; }

  // f(first row, last row, part) over parts whose bounds depend only on the batch.
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

  // An order-independent sweep: a single range if one thread processes the row.
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

// Scratch memory of the calling thread, of fixed size.
void* thread_memory() {
  struct alignas(kVectorBytes) Memory {
    char bytes[RowWork::kKeptBytes];
  };
  thread_local const std::unique_ptr<Memory> memory(new Memory);
  return memory->bytes;
}

using SumSweep = void (*)(const RowView&, int64_t, int64_t, Sum*);

void add_sums(RowWork& work, const Schedule& schedule, SumSweep sweep) {
  if (!schedule.splits_rows()) {
    schedule.each_chunk(
        [&](int64_t begin, int64_t end, int64_t) { sweep(work.view(), begin, end, work.sums()); });
    return;
  }
  const int size = work.sums_size();
  const bool exact = work.view().options->exact();
  std::vector<Sum> partial(schedule.chunks() * size, Sum{});
  schedule.each_chunk([&](int64_t begin, int64_t end, int64_t chunk) {
    sweep(work.view(), begin, end, &partial[chunk * size]);
  });
  for (int64_t chunk = 0; chunk < schedule.chunks(); ++chunk) {
    for (int i = 0; i < size; ++i) {
      const Sum& part = partial[chunk * size + i];
      exact ? add_fixed(work.sums()[i], part.fixed) : void(work.sums()[i].real += part.real);
    }
  }
}

// The maximum of each of `size` numbers over the classes, into `largest`; order-independent.
template <class Sweep>
void find_largest(const Schedule& schedule, int size, double* largest, double least, Sweep sweep) {
  std::fill_n(largest, size, least);
  if (!schedule.splits_rows())
    return schedule.sweep([&](int64_t begin, int64_t end, int64_t) { sweep(begin, end, largest); });
  std::vector<double> partial(schedule.chunks() * size, least);
  schedule.each_chunk([&](int64_t begin, int64_t end, int64_t chunk) {
    sweep(begin, end, &partial[chunk * size]);
  });
  for (int64_t i = 0; i < static_cast<int64_t>(partial.size()); ++i) {
    largest[i % size] = std::max(largest[i % size], partial[i]);
  }
}

// As find_largest, for the two largest logits of each model; all models' largest come first.
void find_two_largest(RowWork& work, const Schedule& schedule) {
  const int models = work.view().models;
  double* best = work.maxima();
  if (!schedule.splits_rows()) {
    return work.kernels().maxima(work.view(), 0, work.view().classes, best);
  }
  const int size = work.maxima_size();
  std::fill_n(best, size, -std::numeric_limits<double>::infinity());
  std::vector<double> partial(schedule.chunks() * size, best[0]);
  schedule.sweep([&](int64_t begin, int64_t end, int64_t chunk) {
    work.kernels().maxima(work.view(), begin, end, &partial[chunk * size]);
  });
  for (int64_t chunk = 0; chunk < schedule.chunks(); ++chunk) {
    const double* part = &partial[chunk * size];
    for (int k = 0; k < models; ++k) {
      best[models + k] = std::max({best[models + k], part[models + k], std::min(best[k], part[k])});
      best[k] = std::max(best[k], part[k]);
    }
    for (int i = 2 * models; i < size; ++i) best[i] = std::max(best[i], part[i]);
  }
}

void find_maxima(RowWork& work, const Schedule& schedule) {
  if (work.view().options->exact()) return find_two_largest(work, schedule);
  find_largest(schedule, work.maxima_size(), work.maxima(),
               -std::numeric_limits<double>::infinity(),
               [&](int64_t begin, int64_t end, double* largest) {
                 work.kernels().maxima(work.view(), begin, end, largest);
               });
}

void set_scales(RowWork& work, const Schedule& schedule) {
  std::fill_n(work.bounds(), work.bounds_size(), 0.0);
  if (work.needs_bounds()) {
    find_largest(schedule, work.bounds_size(), work.bounds(),
                 -std::numeric_limits<double>::infinity(),
                 [&](int64_t begin, int64_t end, double* largest) {
                   work.kernels().bounds(work.view(), begin, end, largest);
                 });
  }
  work.set_scales();
}

void sum_row(RowWork& work, const Schedule& schedule) {
  find_maxima(work, schedule);
  work.select_top_k();
  work.clear_sums();
  work.choose_kernels();
  set_scales(work, schedule);
  add_sums(work, schedule, work.kernels().sums);
  if (work.falls_back()) {
    set_scales(work, schedule);
    add_sums(work, schedule, work.kernels().sums);
  }
  work.finish_sums();
  if (work.view().options->needs_second_sweep()) {
    work.prepare_second_sweep();
    add_sums(work, schedule, work.kernels().second_sums);
    work.finish_second_sums();
  }
}

void write_gradient(RowWork& work, const Schedule& schedule) {
  schedule.sweep([&](int64_t begin, int64_t end, int64_t) {
    work.kernels().gradient(work.view(), begin, end);
  });
}

}  // namespace

void loss_forward(const LossInputs& in, const LossOutputs& out, const Parallel& parallel) {
  const StandardFloats floats;
  const Batch batch = count_rows(in);
  const Reduced reduced(in, batch);
  const Schedule schedule(in, parallel);
  const Reduction reduction = in.options.reduction;
  const bool per_row = reduction == Reduction::kNone || reduction == Reduction::kTerms;
  const int width = in.row_terms();
  const int reported = out.terms ? in.reported_terms() : 0;
  // Exact mode returns canonical results.
  const auto result = [&](double x) {
    return in.options.exact() ? rows::canonical(static_cast<float>(x)) : x;
  };
  // Per part, then in total: the sums of the loss, followed by those of the report.
  BatchSums total(in.options.exact(), reduced.sums() + reported);
  std::vector<BatchSums> partial(schedule.parts(), total);

  schedule.each_part([&](int64_t begin, int64_t end, int64_t part) {
    RowWork work(in);
    if (out.gradients && !schedule.splits_rows()) work.keep_exponentials(thread_memory());
    std::vector<double> terms(width), report(reported);
    for (int64_t row = begin; row < end; ++row) {
      const bool active = work.start(row, out.gradients, streams(in));
      std::fill(terms.begin(), terms.end(), 0.0);
      if (active) {
        in.shard ? work.take_tables(row) : sum_row(work, schedule);
        work.terms(terms.data());
        if (reported) work.report(terms.data(), report.data());
        for (int i = 0; i < reported; ++i) partial[part].add(reduced.sums() + i, report[i]);
        if (out.gradients) {
          work.set_gradient(reduced.weights().data());
          write_gradient(work, schedule);
        }
      }
      if (out.stats) {
        double* stats = out.stats + row * in.stats_width();
        active ? work.save(stats) : (void)std::fill_n(stats, in.stats_width(), 0.0);
      }
      if (reduction == Reduction::kNone) {
        out.loss[row] = active ? result(reduced.row_loss(terms.data())) : 0.0;
      } else if (reduction == Reduction::kTerms) {
        std::transform(terms.begin(), terms.end(), out.loss + row * width, result);
      } else {
        reduced.add(terms.data(), partial[part]);
      }
    }
  });

  for (const BatchSums& sums : partial) total.merge(sums);
  if (!per_row) *out.loss = result(reduced.value(total));
  if (out.terms) {
    for (int i = 0; i < reported; ++i) {
      const bool weighted_mean = i < in.students();
      out.terms[i] = result(total.total(reduced.sums() + i) /
                            (weighted_mean ? batch.weight : static_cast<double>(batch.active)));
    }
    if (!in.target) {  // cross entropy and accuracy are undefined
      const int students = in.students();
      const double nan = std::numeric_limits<double>::quiet_NaN();
      std::fill_n(out.terms, students, nan);
      std::fill_n(out.terms + 2 * students, students, nan);
    }
  }
}

void loss_backward(const LossInputs& in, const double* stats, const double* upstream,
                   const std::vector<void*>& gradients, const Parallel& parallel) {
  const StandardFloats floats;
  const Batch batch = count_rows(in);
  const std::vector<double> unit = Reduced(in, batch).weights();
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
  return std::string(folds_into_one_sweep(in) ? "fused " : "general ") + isa_name(in.isa) +
         (Schedule(in, parallel).splits_rows() ? " chunks" : " rows") +
         (streams(in) && folds_into_one_sweep(in) ? " streamed" : " cached");
}

void scale(DType dtype, void* data, int64_t size, double factor, bool exact,
           const Parallel& parallel) {
  if (factor == 1.0) return;
  const StandardFloats floats;
  const KernelSet& set = kernel_set(active_isa(), dtype, exact);
  const auto body = [&](int64_t begin, int64_t end) { set.scale(data, begin, end, factor); };
  parallel.run(size, kGrain, body);
}

}  // namespace ck
