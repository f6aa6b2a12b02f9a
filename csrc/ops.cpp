// The interface to torch: op schemas, and dispatch of checked arguments to csrc/cpu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/buffers.h"
#include "cpu/class_shard.h"
#include "cpu/exact_sum.h"
#include "cpu/float_environment.h"
#include "cpu/hash.h"
#include "cpu/isa.h"
#include "cpu/loss.h"
#include "op_inputs.h"
#include "rows/hash.h"

namespace {

using ck::Inputs;
using ck::Shard;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bits of `want`.
constexpr int64_t kWantGradients = 1, kWantStats = 2, kWantTerms = 4;

// Runs body on torch's threads. Exceptions are rethrown here once all threads are done, because
// torch's C interface cannot pass them on.
void run_parallel(int64_t tasks, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  std::exception_ptr failure;
  std::mutex lock;
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) noexcept {
    try {
      const ck::StandardFloats floats;
      body(begin, end);
    } catch (...) {
      const std::lock_guard guard(lock);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

ck::Parallel parallel() {
  return {static_cast<int>(torch::stable::get_num_threads()), &run_parallel};
}

void need_cpu(const char* name, const std::vector<Tensor>& tensors) {
  for (const Tensor& t : tensors) STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
}

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// An uninitialised tensor for gradients; large ones use memory cached from earlier calls.
Tensor new_gradient(const Tensor& like, const std::vector<int64_t>& sizes, int64_t bytes) {
  if (bytes < ck::kSmallestBuffer) return new_empty(like, sizes, like.scalar_type());
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  return torch::stable::from_blob(ck::take_buffer(bytes), sizes, strides, like.device(),
                                  like.scalar_type(), &ck::give_back_buffer);
}

// New contiguous gradients in the structure of the logits, and a pointer to each student's.
std::vector<Tensor> new_gradients(const std::vector<Tensor>& logits, const ck::LossInputs& in,
                                  std::vector<void*>& pointers) {
  const Tensor& first = logits[0];
  const bool stacked = first.dim() == 3;
  const int64_t bytes = in.rows * in.classes * ck::element_size(in.dtype);
  std::vector<Tensor> gradients;
  for (int k = 0; k < in.students(); ++k) {
    if (!stacked) {
      gradients.push_back(new_gradient(first, {in.rows, in.classes}, bytes));
    } else if (k == 0) {
      gradients.push_back(
          new_gradient(first, {in.students(), in.rows, in.classes}, in.students() * bytes));
    }
    pointers.push_back(static_cast<char*>(gradients.back().mutable_data_ptr()) +
                       (stacked ? k * bytes : 0));
  }
  return gradients;
}

// A float64 buffer as a tensor of the result's dtype.
void write(const std::vector<double>& values, Tensor& out) {
  if (out.scalar_type() == ScalarType::Double) {
    std::copy(values.begin(), values.end(), static_cast<double*>(out.mutable_data_ptr()));
  } else {
    std::copy(values.begin(), values.end(), static_cast<float*>(out.mutable_data_ptr()));
  }
}

std::vector<double> read(const Tensor& values) {
  const Tensor dense = torch::stable::contiguous(values);
  const int64_t size = dense.numel();
  if (dense.scalar_type() == ScalarType::Double) {
    const double* p = static_cast<const double*>(dense.const_data_ptr());
    return {p, p + size};
  }
  const float* p = static_cast<const float*>(dense.const_data_ptr());
  return {p, p + size};
}

#define CK_LOSS_OPTIONS                                                                       \
  double ce_weight, double regularizer_weight, double divergence_weight, int64_t regularizer, \
      int64_t top_k, bool renormalize_top_k, int64_t divergence, int64_t teachers,            \
      double label_smoothing, int64_t ignore_index, double temperature, int64_t reduction,    \
      int64_t mode
#define CK_PACK_OPTIONS                                                                     \
  ck::LossOptions {                                                                         \
    ce_weight, regularizer_weight, divergence_weight,                                       \
        ck::Regularizer(ck::code("regularizer", regularizer, 3)), top_k, renormalize_top_k, \
        ck::Divergence(ck::code("divergence", divergence, 5)),                              \
        static_cast<int>(ck::code("teachers", teachers, ck::kMaxModels)), label_smoothing,  \
        ignore_index, temperature, ck::Reduction(ck::code("reduction", reduction, 4)),      \
        ck::Mode(ck::code("mode", mode, 4))                                                 \
  }
#define CK_OPTIONS_SCHEMA                                                                    \
  "float ce_weight, float regularizer_weight, float divergence_weight, int regularizer, "    \
  "int top_k, bool renormalize_top_k, int divergence, int teachers, float label_smoothing, " \
  "int ignore_index, float temperature, int reduction, int mode"

using Results = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

Results forward(const std::vector<Tensor>& logits, const Inputs& in, int64_t want) {
  const Tensor& first = logits[0];
  const ScalarType type = ck::result_type(in.loss.dtype);
  const std::vector<int64_t> shape = ck::loss_shape(in.loss);
  const bool reduced = shape.empty();

  Tensor value = new_empty(first, shape, type);
  Tensor stats = want & kWantStats
                     ? new_empty(first, {in.loss.rows, in.loss.stats_width()}, ScalarType::Double)
                     : new_empty(first, {0}, ScalarType::Double);
  Tensor terms = new_empty(first, {want & kWantTerms ? in.loss.reported_terms() : 0}, type);
  std::vector<void*> pointers;
  std::vector<Tensor> gradients;
  if (want & kWantGradients) {
    STD_TORCH_CHECK(reduced, "gradients come with the loss for reduction mean and sum only");
    gradients = new_gradients(logits, in.loss, pointers);
  }
  std::vector<double> values(ck::count(shape)), reported(terms.numel());
  const ck::LossOutputs out{
      values.data(), want & kWantStats ? static_cast<double*>(stats.mutable_data_ptr()) : nullptr,
      want & kWantTerms ? reported.data() : nullptr, want & kWantGradients ? &pointers : nullptr};
  ck::loss_forward(in.loss, out, parallel());
  write(values, value);
  if (want & kWantTerms) write(reported, terms);
  return {value, stats, terms, gradients};
}

std::vector<Tensor> backward(const std::vector<Tensor>& logits, const Inputs& in,
                             const Tensor& stats, const Tensor& upstream) {
  ck::check_stats(in.loss, stats);
  ck::check_upstream(in.loss, logits[0], upstream);
  std::vector<void*> pointers;
  std::vector<Tensor> gradients = new_gradients(logits, in.loss, pointers);
  ck::loss_backward(in.loss, static_cast<const double*>(stats.const_data_ptr()),
                    read(upstream).data(), pointers, parallel());
  return gradients;
}

constexpr int64_t kWants = kWantGradients + kWantStats + kWantTerms + 1;

Results loss(std::vector<Tensor> logits, std::optional<Tensor> target,
             std::optional<Tensor> class_weight, CK_LOSS_OPTIONS, int64_t want) {
  need_cpu("logits", logits);
  return forward(logits, ck::read_inputs(logits, target, class_weight, CK_PACK_OPTIONS),
                 ck::code("want", want, kWants));
}

std::vector<Tensor> loss_backward(std::vector<Tensor> logits, std::optional<Tensor> target,
                                  std::optional<Tensor> class_weight, Tensor stats, Tensor upstream,
                                  CK_LOSS_OPTIONS) {
  need_cpu("logits", logits);
  return backward(logits, ck::read_inputs(logits, target, class_weight, CK_PACK_OPTIONS), stats,
                  upstream);
}

Tensor class_table(std::vector<Tensor> logits, std::optional<Tensor> target,
                   std::optional<Tensor> class_weight, std::vector<Tensor> tables,
                   int64_t first_class, int64_t classes, CK_LOSS_OPTIONS) {
  need_cpu("logits", logits);
  const Shard shard = ck::read_shard(first_class, classes, tables);
  const Inputs in = ck::read_inputs(logits, target, class_weight, CK_PACK_OPTIONS, &shard.classes);
  ck::check_tables(in.loss, tables);
  const int stage = static_cast<int>(tables.size());
  STD_TORCH_CHECK(stage < ck::kStages, "there is no stage after the last");
  Tensor table = new_empty(logits[0], {in.loss.rows, ck::stage_width(in.loss, ck::Stage(stage))},
                           ck::table_type(stage));
  ck::run_stage(in.loss, table.mutable_data_ptr(), parallel());
  return table;
}

std::tuple<Tensor, Tensor, Tensor> class_loss(std::vector<Tensor> logits,
                                              std::optional<Tensor> target,
                                              std::optional<Tensor> class_weight,
                                              std::vector<Tensor> tables, int64_t first_class,
                                              int64_t classes, CK_LOSS_OPTIONS, int64_t want) {
  need_cpu("logits", logits);
  const Shard shard = ck::read_shard(first_class, classes, tables);
  const Inputs in = ck::read_inputs(logits, target, class_weight, CK_PACK_OPTIONS, &shard.classes);
  ck::check_tables(in.loss, tables);
  STD_TORCH_CHECK(tables.size() == ck::kStages, "tables must be those of all stages");
  auto [value, stats, terms, gradients] =
      forward(logits, in, ck::code("want", want, kWants) & ~kWantGradients);
  return {value, stats, terms};
}

std::vector<Tensor> class_loss_backward(std::vector<Tensor> logits, std::optional<Tensor> target,
                                        std::optional<Tensor> class_weight, Tensor stats,
                                        Tensor upstream, int64_t first_class, int64_t classes,
                                        CK_LOSS_OPTIONS) {
  need_cpu("logits", logits);
  const Shard shard = ck::read_shard(first_class, classes, {});
  return backward(logits,
                  ck::read_inputs(logits, target, class_weight, CK_PACK_OPTIONS, &shard.classes),
                  stats, upstream);
}

std::string plan(std::vector<Tensor> logits, CK_LOSS_OPTIONS) {
  need_cpu("logits", logits);
  return ck::plan(ck::read_inputs(logits, std::nullopt, std::nullopt, CK_PACK_OPTIONS).loss,
                  parallel());
}

void scale_(std::vector<Tensor> gradients, Tensor upstream, bool exact) {
  need_cpu("gradients", gradients);
  ck::check_scale(gradients, upstream, exact);
  const double factor = read(upstream)[0];
  for (const Tensor& g : gradients) {
    ck::scale(ck::dtype_of("gradients", g), g.mutable_data_ptr(), g.numel(), factor, exact,
              parallel());
  }
}

Tensor exact_words(Tensor x) {
  need_cpu("x", {x});
  ck::check_summand(x);
  const Tensor dense = torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
  const ck::rows::Superaccumulator sum =
      ck::exact_sum(static_cast<const float*>(dense.const_data_ptr()), dense.numel(), parallel());
  Tensor words = new_empty(x, {ck::kSumWords}, ScalarType::Long);
  std::copy_n(sum.word, ck::kSumWords, static_cast<int64_t*>(words.mutable_data_ptr()));
  return words;
}

Tensor exact_round(Tensor words) {
  need_cpu("words", {words});
  ck::check_words(words);
  const Tensor dense = torch::stable::contiguous(words);
  ck::rows::Superaccumulator sum;
  std::copy_n(static_cast<const int64_t*>(dense.const_data_ptr()), ck::kSumWords, sum.word);
  Tensor value = new_empty(words, {}, ScalarType::Float);
  *static_cast<float*>(value.mutable_data_ptr()) = sum.round<float>();
  return value;
}

// (pieces, 2). A piece's bytes are runs of `run` bytes that begin `step` bytes apart in its tensor,
// the first one at byte `first`.
Tensor hash_words(std::vector<Tensor> pieces, std::vector<int64_t> first, std::vector<int64_t> run,
                  std::vector<int64_t> step) {
  need_cpu("pieces", pieces);
  const std::vector<ck::HashPiece> found = ck::read_pieces(pieces, first, run, step);
  const auto count = static_cast<int64_t>(found.size());
  Tensor words = new_empty(pieces[0], {count, ck::kHashWords}, ScalarType::Long);
  auto* out = static_cast<uint64_t*>(words.mutable_data_ptr());
  std::fill_n(out, count * ck::kHashWords, uint64_t{0});
  ck::hash(found, out, parallel());
  return words;
}

// The checks of the ops above, for other backends to call with the same arguments.
void check_loss(std::vector<Tensor> logits, std::optional<Tensor> target,
                std::optional<Tensor> class_weight, CK_LOSS_OPTIONS, int64_t want) {
  ck::read_inputs(logits, target, class_weight, CK_PACK_OPTIONS);
  ck::code("want", want, kWants);
}

void check_loss_backward(std::vector<Tensor> logits, std::optional<Tensor> target,
                         std::optional<Tensor> class_weight, Tensor /*each backend's own*/,
                         Tensor upstream, CK_LOSS_OPTIONS) {
  const Inputs in = ck::read_inputs(logits, target, class_weight, CK_PACK_OPTIONS);
  ck::check_upstream(in.loss, logits[0], upstream);
}

void check_scale_(std::vector<Tensor> gradients, Tensor upstream, bool exact) {
  ck::check_scale(gradients, upstream, exact);
}

void check_exact_words(Tensor x) { ck::check_summand(x); }

void check_exact_round(Tensor words) { ck::check_words(words); }

void check_hash_words(std::vector<Tensor> pieces, std::vector<int64_t> first,
                      std::vector<int64_t> run, std::vector<int64_t> step) {
  ck::read_pieces(pieces, first, run, step);
}

std::string cpu_isa(std::string request) {
  if (!request.empty()) ck::lower_isa(request);
  return ck::isa_name(ck::active_isa());
}

// Wraps an op to report out-of-memory errors.
template <auto op>
struct Boxed;
template <class Result, class... Arguments, Result (*op)(Arguments...)>
struct Boxed<op> {
  static constexpr const char* kOutOfMemory =
      "churn_kernels: not enough memory for this call; pass fewer rows at a time";

  static Result call(Arguments... arguments) {
    try {
      return op(std::move(arguments)...);
    } catch (const std::bad_alloc&) {
      throw std::runtime_error(kOutOfMemory);
    } catch (const std::length_error&) {
      throw std::runtime_error(kOutOfMemory);
    }
  }
};
#define CK_BOX(op) TORCH_BOX(&Boxed<&op>::call)

#define CK_INPUTS_SCHEMA "Tensor[] logits, Tensor? target, Tensor? class_weight, "
#define CK_LOSS_SCHEMA "loss(" CK_INPUTS_SCHEMA CK_OPTIONS_SCHEMA ", int want) -> "
#define CK_BACKWARD_SCHEMA \
  "loss_backward(" CK_INPUTS_SCHEMA "Tensor stats, Tensor upstream, " CK_OPTIONS_SCHEMA ") -> "
#define CK_WORDS_SCHEMA "exact_words(Tensor x) -> "
#define CK_ROUND_SCHEMA "exact_round(Tensor words) -> "
#define CK_HASH_SCHEMA "hash_words(Tensor[] pieces, int[] first, int[] run, int[] step) -> "
#define CK_SHARD_SCHEMA "int first_class, int classes, " CK_OPTIONS_SCHEMA

}  // namespace

STABLE_TORCH_LIBRARY(churn_kernels, m) {
  m.def(CK_LOSS_SCHEMA "(Tensor, Tensor, Tensor, Tensor[])");
  m.def(CK_BACKWARD_SCHEMA "Tensor[]");
  m.def("class_table(" CK_INPUTS_SCHEMA "Tensor[] tables, " CK_SHARD_SCHEMA ") -> Tensor");
  m.def("class_loss(" CK_INPUTS_SCHEMA "Tensor[] tables, " CK_SHARD_SCHEMA
        ", int want) -> (Tensor, Tensor, Tensor)");
  m.def("class_loss_backward(" CK_INPUTS_SCHEMA "Tensor stats, Tensor upstream, " CK_SHARD_SCHEMA
        ") -> Tensor[]");
  m.def("scale_(Tensor(a!)[] gradients, Tensor upstream, bool exact) -> ()");
  m.def(CK_WORDS_SCHEMA "Tensor");
  m.def(CK_ROUND_SCHEMA "Tensor");
  m.def(CK_HASH_SCHEMA "Tensor");
  m.def("plan(Tensor[] logits, " CK_OPTIONS_SCHEMA ") -> str");
  m.def("cpu_isa(str request) -> str");
  m.def("check_" CK_LOSS_SCHEMA "()");
  m.def("check_" CK_BACKWARD_SCHEMA "()");
  m.def("check_scale_(Tensor[] gradients, Tensor upstream, bool exact) -> ()");
  m.def("check_" CK_WORDS_SCHEMA "()");
  m.def("check_" CK_ROUND_SCHEMA "()");
  m.def("check_" CK_HASH_SCHEMA "()");
}

STABLE_TORCH_LIBRARY_IMPL(churn_kernels, CPU, m) {
  m.impl("loss", CK_BOX(loss));
  m.impl("loss_backward", CK_BOX(loss_backward));
  m.impl("class_table", CK_BOX(class_table));
  m.impl("class_loss", CK_BOX(class_loss));
  m.impl("class_loss_backward", CK_BOX(class_loss_backward));
  m.impl("exact_words", CK_BOX(exact_words));
  m.impl("exact_round", CK_BOX(exact_round));
  m.impl("hash_words", CK_BOX(hash_words));
  m.impl("plan", CK_BOX(plan));
  m.impl("scale_", CK_BOX(scale_));
}

STABLE_TORCH_LIBRARY_IMPL(churn_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", CK_BOX(cpu_isa));
  m.impl("check_loss", CK_BOX(check_loss));
  m.impl("check_loss_backward", CK_BOX(check_loss_backward));
  m.impl("check_scale_", CK_BOX(check_scale_));
  m.impl("check_exact_words", CK_BOX(check_exact_words));
  m.impl("check_exact_round", CK_BOX(check_exact_round));
  m.impl("check_hash_words", CK_BOX(check_hash_words));
}
