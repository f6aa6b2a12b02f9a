#include "op_inputs.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>

namespace ck {
namespace {

// Maximum number of logits of a call, and of classes of a sharded row, so that every derived size
// and offset fits an int64.
constexpr int64_t kMostNumbers = int64_t{1} << 48;

// Maximum width of a stage's table.
constexpr int64_t kMostWidth = (int64_t{1} << 31) - 1;

// Maximum number of rows whose losses an exact sum can hold without a carry.
constexpr int64_t kMostExactRows = (int64_t{1} << 31) - 1;

bool product_fits(std::initializer_list<int64_t> sizes, int64_t most) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (size == 0) return true;
  }
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product) || product > most) return false;
  }
  return true;
}

// Whether every element lies in the tensor's storage, which may have been resized.
bool is_backed(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = tensor.storage_offset();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return true;
    int64_t reach;
    if (__builtin_mul_overflow(sizes[i] - 1, strides[i], &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      return false;
    }
  }
  int64_t bytes;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  return last < bytes / static_cast<int64_t>(tensor.element_size());
}

// Rejects tensors on another device, or whose storage was resized.
void check_place(const char* name, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name,
                  " must be on the same device as the first tensor");
  STD_TORCH_CHECK(
      is_backed(tensor), name,
      " must lie in its storage, which has been resized; pass a tensor that holds data");
}

void check_options(const LossInputs& in) {
  const LossOptions& o = in.options;
  for (const double weight : {o.ce_weight, o.regularizer_weight, o.divergence_weight}) {
    STD_TORCH_CHECK(std::isfinite(weight), "weights must be finite, got ", weight);
  }
  STD_TORCH_CHECK(o.label_smoothing >= 0.0 && o.label_smoothing <= 1.0,
                  "label_smoothing must be in [0, 1], got ", o.label_smoothing);
  STD_TORCH_CHECK(o.temperature > 0.0 && std::isfinite(o.temperature),
                  "temperature must be > 0 and finite, got ", o.temperature);
  STD_TORCH_CHECK(in.models() > 0 && in.models() <= kMaxModels, "logits must hold 1 to ",
                  kMaxModels, " models, got ", in.models());
  STD_TORCH_CHECK(o.teachers >= 0 && o.teachers < in.models() &&
                      (o.teachers > 0) == (o.divergence == Divergence::kDistill) &&
                      (o.teachers == 0 || in.students() == 1),
                  "divergence 4 takes one student and one or more teachers, the others none");
  STD_TORCH_CHECK(!o.exact() || in.dtype != DType::kFloat64,
                  "mode 3 (exact) takes logits of at most float32");
  STD_TORCH_CHECK(!o.exact() || in.rows <= kMostExactRows, "mode 3 (exact) takes at most ",
                  kMostExactRows, " rows, got ", in.rows);
  STD_TORCH_CHECK(o.top_k >= 0 && o.top_k <= in.all_classes(), "top_k must be in [0, C]");
}

}  // namespace

DType dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
}

ScalarType result_type(DType dtype) {
  return dtype == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

int64_t code(const char* name, int64_t value, int64_t count) {
  STD_TORCH_CHECK(value >= 0 && value < count, name, " must be in [0, ", count, "), got ", value);
  return value;
}

Inputs read_inputs(const std::vector<Tensor>& logits, const std::optional<Tensor>& target,
                   const std::optional<Tensor>& class_weight, const LossOptions& options,
                   const ClassShard* shard) {
  STD_TORCH_CHECK(!logits.empty(), "logits must hold at least one tensor");
  const Tensor& first = logits[0];
  const bool stacked = first.dim() == 3;
  STD_TORCH_CHECK(stacked ? logits.size() == 1 : first.dim() == 2,
                  "logits must be (N, C) tensors, or one (K, N, C) tensor");
  const int64_t models = stacked ? first.size(0) : static_cast<int64_t>(logits.size());
  STD_TORCH_CHECK(models <= kMaxModels, "logits must hold 1 to ", kMaxModels, " models, got ",
                  models);
  Inputs in;
  in.loss.isa = active_isa();  // throws for an invalid CHURN_CPU_ISA
  in.loss.dtype = dtype_of("logits", first);
  in.loss.rows = first.size(stacked ? 1 : 0);
  in.loss.classes = first.size(stacked ? 2 : 1);
  in.loss.options = options;
  in.loss.shard = shard;
  STD_TORCH_CHECK(in.loss.classes > 0, "logits must have at least one class");
  STD_TORCH_CHECK(product_fits({models, in.loss.rows, in.loss.classes}, kMostNumbers) &&
                      product_fits({in.loss.rows}, kMostNumbers) &&
                      product_fits({in.loss.classes}, kMostNumbers),
                  "logits must hold at most ", kMostNumbers, " numbers, got ", models, " x ",
                  in.loss.rows, " x ", in.loss.classes, "; split the batch");
  const auto add = [&](const void* data, int64_t row_stride, int64_t column_stride) {
    // With a single class, the column stride is arbitrary.
    in.loss.logits.push_back({data, row_stride, in.loss.classes == 1 ? 1 : column_stride});
  };
  for (const Tensor& t : logits) {
    check_place("logits", t, first);
    if (stacked) break;
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == in.loss.rows && t.size(1) == in.loss.classes &&
                        t.scalar_type() == first.scalar_type(),
                    "logits must share shape, dtype and device");
    add(t.const_data_ptr(), t.stride(0), t.stride(1));
  }
  for (int64_t k = 0; stacked && k < models; ++k) {
    const auto* data = static_cast<const char*>(first.const_data_ptr());
    const int64_t apart = models > 1 ? first.stride(0) * element_size(in.loss.dtype) : 0;
    add(data + k * apart, first.stride(1), first.stride(2));
  }
  STD_TORCH_CHECK(!shard || (options.exact() && shard->classes <= kMostNumbers &&
                             shard->classes >= in.loss.classes && shard->first_class >= 0 &&
                             shard->first_class <= shard->classes - in.loss.classes),
                  "shards of classes are for mode 3 (exact), and lie in [0, classes), for at most ",
                  kMostNumbers, " classes");
  check_options(in.loss);
  in.loss.target = nullptr;
  if (target) {
    check_place("target", *target, first);
    STD_TORCH_CHECK(target->dim() == 1 && target->size(0) == in.loss.rows &&
                        target->scalar_type() == ScalarType::Long,
                    "target must be an int64 tensor of shape (N,)");
    in.target = torch::stable::contiguous(*target);
    in.loss.target = static_cast<const int64_t*>(in.target->const_data_ptr());
  }
  in.loss.class_weight = nullptr;
  if (class_weight) {
    check_place("class_weight", *class_weight, first);
    STD_TORCH_CHECK(class_weight->dim() == 1 && class_weight->size(0) == in.loss.all_classes(),
                    "class_weight must be a tensor of shape (C,)");
    dtype_of("class_weight", *class_weight);
    in.class_weight =
        torch::stable::contiguous(torch::stable::to(*class_weight, result_type(in.loss.dtype)));
    in.loss.class_weight = in.class_weight->const_data_ptr();
  }
  return in;
}

std::vector<int64_t> loss_shape(const LossInputs& in) {
  switch (in.options.reduction) {
    case Reduction::kNone: return {in.rows};
    case Reduction::kTerms: return {in.rows, in.row_terms()};
    default: return {};
  }
}

int64_t count(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

void check_upstream(const LossInputs& in, const Tensor& logits, const Tensor& upstream) {
  check_place("upstream", upstream, logits);
  STD_TORCH_CHECK(upstream.numel() == count(loss_shape(in)), "upstream must have the loss's shape");
  STD_TORCH_CHECK(
      upstream.scalar_type() == ScalarType::Float || upstream.scalar_type() == ScalarType::Double,
      "upstream must be float32 or float64");
}

void check_stats(const LossInputs& in, const Tensor& stats) {
  STD_TORCH_CHECK(stats.is_cpu() && stats.scalar_type() == ScalarType::Double && stats.dim() == 2 &&
                      stats.size(0) == in.rows && stats.size(1) == in.stats_width() &&
                      stats.is_contiguous() && is_backed(stats),
                  "stats must be what churn_kernels::loss returned for the same options");
}

Shard read_shard(int64_t first_class, int64_t classes, const std::vector<Tensor>& tables) {
  Shard shard{{first_class, classes, {}}, {}};
  STD_TORCH_CHECK(tables.size() <= kStages, "tables must be those of at most ", kStages, " stages");
  for (const Tensor& table : tables) {
    STD_TORCH_CHECK(table.is_cpu() && is_backed(table),
                    "tables must be CPU tensors that hold data");
    shard.tables.push_back(torch::stable::contiguous(table));
    shard.classes.tables.push_back(shard.tables.back().const_data_ptr());
  }
  return shard;
}

ScalarType table_type(int stage) {
  return stage < static_cast<int>(Stage::kSums) ? ScalarType::Double : ScalarType::Long;
}

void check_tables(const LossInputs& in, const std::vector<Tensor>& tables) {
  for (int stage = 0; stage < kStages; ++stage) {
    const int64_t width = stage_width(in, Stage(stage));
    STD_TORCH_CHECK(width <= kMostWidth,
                    "top_k must be smaller where classes lie in shards: ", width,
                    " numbers a row are more than ", kMostWidth);
    if (stage >= static_cast<int>(tables.size())) continue;
    const Tensor& table = tables[stage];
    STD_TORCH_CHECK(table.scalar_type() == table_type(stage) && table.dim() == 2 &&
                        table.size(0) == in.rows && table.size(1) == width,
                    "tables[", stage,
                    "] must be merged of what churn_kernels::class_table returned");
  }
}

void check_scale(const std::vector<Tensor>& gradients, const Tensor& upstream, bool exact) {
  STD_TORCH_CHECK(upstream.numel() == 1, "upstream must be a scalar");
  STD_TORCH_CHECK(is_backed(upstream) && (upstream.scalar_type() == ScalarType::Float ||
                                          upstream.scalar_type() == ScalarType::Double),
                  "upstream must be float32 or float64");
  std::vector<std::pair<uintptr_t, uintptr_t>> places;  // first byte, byte after the last
  for (const Tensor& g : gradients) {
    const DType dtype = dtype_of("gradients", g);
    check_place("gradients", g, upstream);
    STD_TORCH_CHECK(g.is_contiguous(), "gradients must be contiguous");
    STD_TORCH_CHECK(!exact || dtype != DType::kFloat64, "exact gradients are at most float32");
    STD_TORCH_CHECK(
        dtype == dtype_of("gradients", gradients[0]) && g.numel() == gradients[0].numel(),
        "gradients must share dtype and number of elements");
    if (g.numel() == 0) continue;
    const auto begin = reinterpret_cast<uintptr_t>(g.const_data_ptr());
    places.emplace_back(begin, begin + static_cast<uintptr_t>(g.numel() * element_size(dtype)));
  }
  std::sort(places.begin(), places.end());
  for (size_t i = 1; i < places.size(); ++i) {
    STD_TORCH_CHECK(places[i].first >= places[i - 1].second, "gradients must not overlap");
  }
}

void check_summand(const Tensor& x) {
  STD_TORCH_CHECK(dtype_of("x", x) != DType::kFloat64,
                  "x must be a float32, float16 or bfloat16 tensor");
  check_place("x", x, x);
}

void check_words(const Tensor& words) {
  STD_TORCH_CHECK(words.scalar_type() == ScalarType::Long && words.dim() == 1 &&
                      words.size(0) == kSumWords && is_backed(words),
                  "words must be what churn_kernels::exact_words returned, or a sum of such");
}

std::vector<HashPiece> read_pieces(const std::vector<Tensor>& pieces,
                                   const std::vector<int64_t>& first,
                                   const std::vector<int64_t>& run,
                                   const std::vector<int64_t>& step) {
  const size_t count = pieces.size();
  STD_TORCH_CHECK(count > 0, "pieces must hold at least one tensor");
  STD_TORCH_CHECK(first.size() == count && run.size() == count && step.size() == count,
                  "first, run and step must hold a number for each piece");
  std::vector<HashPiece> found;
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& x = pieces[i];
    check_place("pieces", x, pieces[0]);
    STD_TORCH_CHECK(x.is_contiguous(), "pieces must be contiguous");
    STD_TORCH_CHECK(first[i] >= 0 && run[i] > 0 && step[i] >= run[i],
                    "a piece must have 0 <= first and 0 < run <= step");
    const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
    STD_TORCH_CHECK(bytes <= run[i] || bytes % run[i] == 0,
                    "a piece must hold a whole number of runs");
    int64_t end = 0;  // of the piece within the tensor
    STD_TORCH_CHECK(bytes == 0 || (!__builtin_mul_overflow((bytes - 1) / run[i], step[i], &end) &&
                                   !__builtin_add_overflow(end, first[i], &end) &&
                                   !__builtin_add_overflow(end, std::min(bytes, run[i]), &end) &&
                                   !__builtin_add_overflow(total, bytes, &total)),
                    "a piece must lie in a tensor of less than 2^63 bytes");
    found.push_back({x.const_data_ptr(), bytes, first[i], run[i], step[i]});
  }
  return found;
}

}  // namespace ck
