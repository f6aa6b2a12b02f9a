// The border to torch: op schemas, the checks that memory safety needs, dispatch to csrc/cpu.
// Messages for users are churn_kernels/_checks.py's; what is refused here came past it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

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
#include "rows/hash.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// More models than this would not fit a thread's stack.
constexpr int kMaxModels = 64;

// What `want` asks for, bit by bit.
constexpr int64_t kWantGradients = 1, kWantStats = 2, kWantTerms = 4;

ck::DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return ck::DType::kFloat32;
    case ScalarType::Double: return ck::DType::kFloat64;
    case ScalarType::Half: return ck::DType::kFloat16;
    case ScalarType::BFloat16: return ck::DType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "logits must be float32, float64, float16 or bfloat16");
}

ScalarType result_type(ck::DType dtype) {
  return dtype == ck::DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

const ck::Parallel& parallel() {
  thread_local ck::Parallel parallel{1, [](int64_t tasks, int64_t grain, const auto& body) {
                                       torch::stable::parallel_for(
                                           0, tasks, grain, [&](int64_t begin, int64_t end) {
                                             const ck::StandardFloats floats;
                                             body(begin, end);
                                           });
                                     }};
  parallel.threads = static_cast<int>(torch::stable::get_num_threads());
  return parallel;
}

// The checked inputs, and the tensors that keep their memory alive.
struct Inputs {
  ck::LossInputs loss;
  std::optional<Tensor> target, class_weight;
};

// `shard`: where the logits hold a part of the classes only.
Inputs read_inputs(const std::vector<Tensor>& logits, const std::optional<Tensor>& target,
                   const std::optional<Tensor>& class_weight, const ck::LossOptions& options,
                   const ck::ClassShard* shard = nullptr) {
  ck::active_isa();  // a wrong CHURN_CPU_ISA raises here, not in the middle of a thread's work
  STD_TORCH_CHECK(!logits.empty(), "logits must hold at least one tensor");
  const Tensor& first = logits[0];
  const bool stacked = first.dim() == 3;
  STD_TORCH_CHECK(stacked ? logits.size() == 1 : first.dim() == 2,
                  "logits must be (N, C) tensors, or one (K, N, C) tensor");
  Inputs in;
  in.loss.dtype = dtype_of(first);
  in.loss.rows = first.size(stacked ? 1 : 0);
  in.loss.classes = first.size(stacked ? 2 : 1);
  in.loss.options = options;
  in.loss.shard = shard;
  const auto add = [&](const void* data, int64_t row_stride, int64_t column_stride) {
    // A single class has no second column; its stride may be anything.
    in.loss.logits.push_back({data, row_stride, in.loss.classes == 1 ? 1 : column_stride});
  };
  if (stacked) {
    const int64_t bytes = ck::element_size(in.loss.dtype);
    for (int64_t k = 0; k < first.size(0); ++k) {
      add(static_cast<const char*>(first.const_data_ptr()) + k * first.stride(0) * bytes,
          first.stride(1), first.stride(2));
    }
  } else {
    for (const Tensor& t : logits) {
      STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == in.loss.rows &&
                          t.size(1) == in.loss.classes && t.scalar_type() == first.scalar_type(),
                      "logits must share shape, dtype and device");
      add(t.const_data_ptr(), t.stride(0), t.stride(1));
    }
  }
  STD_TORCH_CHECK(in.loss.classes > 0, "logits must have at least one class");
  STD_TORCH_CHECK(in.loss.models() > 0 && in.loss.models() <= kMaxModels, "logits must hold 1 to ",
                  kMaxModels, " models, got ", in.loss.models());
  STD_TORCH_CHECK(options.teachers >= 0 && options.teachers < in.loss.models() &&
                      (options.teachers > 0) == (options.divergence == ck::Divergence::kDistill) &&
                      (options.teachers == 0 || in.loss.students() == 1),
                  "divergence 4 takes one student and one or more teachers, the others none");
  STD_TORCH_CHECK(options.mode <= ck::Mode::kExact, "mode must be 0, 1, 2 or 3");
  STD_TORCH_CHECK(!options.exact() || in.loss.dtype != ck::DType::kFloat64,
                  "mode 3 (exact) takes logits of at most float32");
  STD_TORCH_CHECK(!shard || (options.exact() && shard->first_class >= 0 &&
                             shard->first_class <= shard->classes - in.loss.classes),
                  "shards of classes are for mode 3 (exact), and lie in [0, classes)");
  STD_TORCH_CHECK(options.top_k >= 0 && options.top_k <= in.loss.all_classes(),
                  "top_k must be in [0, C]");
  if (target) {
    STD_TORCH_CHECK(target->is_cpu() && target->dim() == 1 && target->size(0) == in.loss.rows &&
                        target->scalar_type() == ScalarType::Long,
                    "target must be an int64 tensor of shape (N,)");
    in.target = torch::stable::contiguous(*target);
    in.loss.target = static_cast<const int64_t*>(in.target->const_data_ptr());
  } else {
    in.loss.target = nullptr;
  }
  if (class_weight) {
    STD_TORCH_CHECK(class_weight->is_cpu() && class_weight->dim() == 1 &&
                        class_weight->size(0) == in.loss.all_classes(),
                    "class_weight must be a tensor of shape (C,)");
    in.class_weight =
        torch::stable::contiguous(torch::stable::to(*class_weight, result_type(in.loss.dtype)));
    in.loss.class_weight = in.class_weight->const_data_ptr();
  } else {
    in.loss.class_weight = nullptr;
  }
  return in;
}

Tensor new_empty(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// An uninitialised tensor for gradients; large ones come out of memory kept from earlier calls.
Tensor new_gradient(const Tensor& like, const std::vector<int64_t>& sizes, int64_t bytes) {
  if (bytes < ck::kSmallestBuffer) return new_empty(like, sizes, like.scalar_type());
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
  return torch::stable::from_blob(ck::take_buffer(bytes), sizes, strides, like.device(),
                                  like.scalar_type(), &ck::give_back_buffer);
}

// Fresh contiguous gradients in the structure of the logits, and where each student's begins.
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
  STD_TORCH_CHECK(dense.scalar_type() == ScalarType::Float, "upstream must be float32 or float64");
  const float* p = static_cast<const float*>(dense.const_data_ptr());
  return {p, p + size};
}

std::vector<int64_t> loss_shape(const ck::LossInputs& in) {
  switch (in.options.reduction) {
    case ck::Reduction::kNone: return {in.rows};
    case ck::Reduction::kTerms: return {in.rows, in.row_terms()};
    default: return {};
  }
}

int64_t count(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

#define CK_LOSS_OPTIONS                                                                       \
  double ce_weight, double regularizer_weight, double divergence_weight, int64_t regularizer, \
      int64_t top_k, bool renormalize_top_k, int64_t divergence, int64_t teachers,            \
      double label_smoothing, int64_t ignore_index, double temperature, int64_t reduction,    \
      int64_t mode
#define CK_PACK_OPTIONS                                                                      \
  ck::LossOptions {                                                                          \
    ce_weight, regularizer_weight, divergence_weight, ck::Regularizer(regularizer), top_k,   \
        renormalize_top_k, ck::Divergence(divergence), static_cast<int>(teachers),           \
        label_smoothing, ignore_index, temperature, ck::Reduction(reduction), ck::Mode(mode) \
  }
#define CK_OPTIONS_SCHEMA                                                                    \
  "float ce_weight, float regularizer_weight, float divergence_weight, int regularizer, "    \
  "int top_k, bool renormalize_top_k, int divergence, int teachers, float label_smoothing, " \
  "int ignore_index, float temperature, int reduction, int mode"

using Results = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

Results forward(const std::vector<Tensor>& logits, const Inputs& in, int64_t want) {
  const Tensor& first = logits[0];
  const ScalarType type = result_type(in.loss.dtype);
  const std::vector<int64_t> shape = loss_shape(in.loss);
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
  std::vector<double> values(count(shape)), reported(terms.numel());
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
  STD_TORCH_CHECK(stats.is_cpu() && stats.scalar_type() == ScalarType::Double && stats.dim() == 2 &&
                      stats.size(0) == in.loss.rows && stats.size(1) == in.loss.stats_width() &&
                      stats.is_contiguous(),
                  "stats must be what churn_kernels::loss returned for the same options");
  STD_TORCH_CHECK(upstream.is_cpu() && upstream.numel() == count(loss_shape(in.loss)),
                  "upstream must have the loss's shape");
  std::vector<void*> pointers;
  std::vector<Tensor> gradients = new_gradients(logits, in.loss, pointers);
  ck::loss_backward(in.loss, static_cast<const double*>(stats.const_data_ptr()),
                    read(upstream).data(), pointers, parallel());
  return gradients;
}

Results loss(std::vector<Tensor> logits, std::optional<Tensor> target,
             std::optional<Tensor> class_weight, CK_LOSS_OPTIONS, int64_t want) {
  return forward(logits, read_inputs(logits, target, class_weight, CK_PACK_OPTIONS), want);
}

std::vector<Tensor> loss_backward(std::vector<Tensor> logits, std::optional<Tensor> target,
                                  std::optional<Tensor> class_weight, Tensor stats, Tensor upstream,
                                  CK_LOSS_OPTIONS) {
  return backward(logits, read_inputs(logits, target, class_weight, CK_PACK_OPTIONS), stats,
                  upstream);
}

// The tables of the stages so far, and the tensors that keep their memory alive.
struct Shard {
  ck::ClassShard classes;
  std::vector<Tensor> tables;
};

Shard read_shard(int64_t first_class, int64_t classes, const std::vector<Tensor>& tables) {
  Shard shard{{first_class, classes, {}}, {}};
  STD_TORCH_CHECK(tables.size() <= ck::kStages, "tables must be those of at most ", ck::kStages,
                  " stages");
  for (const Tensor& table : tables) shard.tables.push_back(torch::stable::contiguous(table));
  for (const Tensor& table : shard.tables) shard.classes.tables.push_back(table.const_data_ptr());
  return shard;
}

ScalarType table_type(int stage) {
  return stage < static_cast<int>(ck::Stage::kSums) ? ScalarType::Double : ScalarType::Long;
}

void check_tables(const ck::LossInputs& in, const std::vector<Tensor>& tables) {
  for (size_t i = 0; i < tables.size(); ++i) {
    const Tensor& table = tables[i];
    const int stage = static_cast<int>(i);
    STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == table_type(stage) &&
                        table.dim() == 2 && table.size(0) == in.rows &&
                        table.size(1) == ck::stage_width(in, ck::Stage(stage)),
                    "tables[", i, "] must be merged of what churn_kernels::class_table returned");
  }
}

Tensor class_table(std::vector<Tensor> logits, std::optional<Tensor> target,
                   std::optional<Tensor> class_weight, std::vector<Tensor> tables,
                   int64_t first_class, int64_t classes, CK_LOSS_OPTIONS) {
  const Shard shard = read_shard(first_class, classes, tables);
  const Inputs in = read_inputs(logits, target, class_weight, CK_PACK_OPTIONS, &shard.classes);
  check_tables(in.loss, tables);
  const int stage = static_cast<int>(tables.size());
  STD_TORCH_CHECK(stage < ck::kStages, "there is no stage after the last");
  Tensor table = new_empty(logits[0], {in.loss.rows, ck::stage_width(in.loss, ck::Stage(stage))},
                           table_type(stage));
  ck::run_stage(in.loss, table.mutable_data_ptr(), parallel());
  return table;
}

std::tuple<Tensor, Tensor, Tensor> class_loss(std::vector<Tensor> logits,
                                              std::optional<Tensor> target,
                                              std::optional<Tensor> class_weight,
                                              std::vector<Tensor> tables, int64_t first_class,
                                              int64_t classes, CK_LOSS_OPTIONS, int64_t want) {
  const Shard shard = read_shard(first_class, classes, tables);
  const Inputs in = read_inputs(logits, target, class_weight, CK_PACK_OPTIONS, &shard.classes);
  check_tables(in.loss, tables);
  STD_TORCH_CHECK(tables.size() == ck::kStages, "tables must be those of all stages");
  auto [value, stats, terms, gradients] = forward(logits, in, want & ~kWantGradients);
  return {value, stats, terms};
}

std::vector<Tensor> class_loss_backward(std::vector<Tensor> logits, std::optional<Tensor> target,
                                        std::optional<Tensor> class_weight, Tensor stats,
                                        Tensor upstream, int64_t first_class, int64_t classes,
                                        CK_LOSS_OPTIONS) {
  const Shard shard = read_shard(first_class, classes, {});
  return backward(logits,
                  read_inputs(logits, target, class_weight, CK_PACK_OPTIONS, &shard.classes), stats,
                  upstream);
}

std::string plan(std::vector<Tensor> logits, CK_LOSS_OPTIONS) {
  return ck::plan(read_inputs(logits, std::nullopt, std::nullopt, CK_PACK_OPTIONS).loss,
                  parallel());
}

void scale_(std::vector<Tensor> gradients, Tensor upstream, bool exact) {
  STD_TORCH_CHECK(upstream.is_cpu() && upstream.numel() == 1, "upstream must be a scalar");
  const double factor = read(upstream)[0];
  for (Tensor& g : gradients) {
    STD_TORCH_CHECK(g.is_cpu() && g.is_contiguous(), "gradients must be contiguous");
    ck::scale(dtype_of(g), g.mutable_data_ptr(), g.numel(), factor, exact, parallel());
  }
}

Tensor exact_words(Tensor x) {
  STD_TORCH_CHECK(x.is_cpu() && dtype_of(x) != ck::DType::kFloat64,
                  "x must be a float32, float16 or bfloat16 tensor on the CPU");
  const Tensor dense = torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
  const ck::rows::Superaccumulator sum =
      ck::exact_sum(static_cast<const float*>(dense.const_data_ptr()), dense.numel(), parallel());
  Tensor words = new_empty(x, {ck::kSumWords}, ScalarType::Long);
  std::copy_n(sum.word, ck::kSumWords, static_cast<int64_t*>(words.mutable_data_ptr()));
  return words;
}

Tensor exact_round(Tensor words) {
  STD_TORCH_CHECK(words.is_cpu() && words.scalar_type() == ScalarType::Long && words.dim() == 1 &&
                      words.size(0) == ck::kSumWords,
                  "words must be what churn_kernels::exact_words returned, or a sum of such");
  const Tensor dense = torch::stable::contiguous(words);
  ck::rows::Superaccumulator sum;
  std::copy_n(static_cast<const int64_t*>(dense.const_data_ptr()), ck::kSumWords, sum.word);
  Tensor value = new_empty(words, {}, ScalarType::Float);
  *static_cast<float*>(value.mutable_data_ptr()) = sum.round<float>();
  return value;
}

// (pieces, 2). Each piece's bytes lie in runs of `run` bytes, which begin `step` bytes apart in its
// tensor, the first one at byte `first`.
Tensor hash_words(std::vector<Tensor> pieces, std::vector<int64_t> first, std::vector<int64_t> run,
                  std::vector<int64_t> step) {
  const size_t count = pieces.size();
  STD_TORCH_CHECK(first.size() == count && run.size() == count && step.size() == count,
                  "first, run and step must hold a number for each piece");
  std::vector<ck::HashPiece> found;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& x = pieces[i];
    STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "pieces must be contiguous CPU tensors");
    STD_TORCH_CHECK(first[i] >= 0 && run[i] > 0 && step[i] >= run[i],
                    "a piece must have 0 <= first and 0 < run <= step");
    found.push_back({x.const_data_ptr(), x.numel() * static_cast<int64_t>(x.element_size()),
                     first[i], run[i], step[i]});
  }
  Tensor words =
      new_empty(pieces[0], {static_cast<int64_t>(count), ck::kHashWords}, ScalarType::Long);
  auto* out = static_cast<uint64_t*>(words.mutable_data_ptr());
  std::fill_n(out, count * ck::kHashWords, uint64_t{0});
  ck::hash(found, out, parallel());
  return words;
}

std::string cpu_isa(std::string request) {
  if (!request.empty()) ck::lower_isa(request);
  return ck::isa_name(ck::active_isa());
}

}  // namespace

STABLE_TORCH_LIBRARY(churn_kernels, m) {
  m.def("loss(Tensor[] logits, Tensor? target, Tensor? class_weight, " CK_OPTIONS_SCHEMA
        ", int want) -> (Tensor, Tensor, Tensor, Tensor[])");
  m.def(
      "loss_backward(Tensor[] logits, Tensor? target, Tensor? class_weight, Tensor stats, "
      "Tensor upstream, " CK_OPTIONS_SCHEMA ") -> Tensor[]");
  m.def(
      "class_table(Tensor[] logits, Tensor? target, Tensor? class_weight, Tensor[] tables, "
      "int first_class, int classes, " CK_OPTIONS_SCHEMA ") -> Tensor");
  m.def(
      "class_loss(Tensor[] logits, Tensor? target, Tensor? class_weight, Tensor[] tables, "
      "int first_class, int classes, " CK_OPTIONS_SCHEMA ", int want) -> (Tensor, Tensor, Tensor)");
  m.def(
      "class_loss_backward(Tensor[] logits, Tensor? target, Tensor? class_weight, Tensor stats, "
      "Tensor upstream, int first_class, int classes, " CK_OPTIONS_SCHEMA ") -> Tensor[]");
  m.def("scale_(Tensor(a!)[] gradients, Tensor upstream, bool exact) -> ()");
  m.def("exact_words(Tensor x) -> Tensor");
  m.def("exact_round(Tensor words) -> Tensor");
  m.def("hash_words(Tensor[] pieces, int[] first, int[] run, int[] step) -> Tensor");
  m.def("plan(Tensor[] logits, " CK_OPTIONS_SCHEMA ") -> str");
  m.def("cpu_isa(str request) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(churn_kernels, CPU, m) {
  m.impl("loss", TORCH_BOX(&loss));
  m.impl("loss_backward", TORCH_BOX(&loss_backward));
  m.impl("class_table", TORCH_BOX(&class_table));
  m.impl("class_loss", TORCH_BOX(&class_loss));
  m.impl("class_loss_backward", TORCH_BOX(&class_loss_backward));
  m.impl("exact_words", TORCH_BOX(&exact_words));
  m.impl("exact_round", TORCH_BOX(&exact_round));
  m.impl("hash_words", TORCH_BOX(&hash_words));
  m.impl("plan", TORCH_BOX(&plan));
  m.impl("scale_", TORCH_BOX(&scale_));
}

STABLE_TORCH_LIBRARY_IMPL(churn_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
