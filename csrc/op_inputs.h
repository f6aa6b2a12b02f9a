// The arguments of the ops, checked. What is checked is what memory safety needs, on any device;
// the ops of other backends ask for the same checks. Messages for users are
// churn_kernels/_checks.py's; what is refused here came past it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/class_shard.h"
#include "cpu/hash.h"
#include "cpu/loss.h"
#include "rows/superaccumulator.h"

namespace ck {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// More models than this would not fit a thread's stack.
inline constexpr int kMaxModels = 64;

DType dtype_of(const char* name, const Tensor& tensor);
ScalarType result_type(DType dtype);

// Refuses an option that is not in [0, count).
int64_t code(const char* name, int64_t value, int64_t count);

// The inputs of a loss, and the tensors that keep their memory alive.
struct Inputs {
  LossInputs loss;
  std::optional<Tensor> target, class_weight;
};

// `shard`: where the logits hold a part of the classes only.
Inputs read_inputs(const std::vector<Tensor>& logits, const std::optional<Tensor>& target,
                   const std::optional<Tensor>& class_weight, const LossOptions& options,
                   const ClassShard* shard = nullptr);

// The value of a loss of each reduction.
std::vector<int64_t> loss_shape(const LossInputs& inputs);
int64_t count(const std::vector<int64_t>& shape);

void check_upstream(const LossInputs& inputs, const Tensor& logits, const Tensor& upstream);
void check_stats(const LossInputs& inputs, const Tensor& stats);

// The tables of the stages so far, and the tensors that keep their memory alive.
struct Shard {
  ClassShard classes;
  std::vector<Tensor> tables;
};
Shard read_shard(int64_t first_class, int64_t classes, const std::vector<Tensor>& tables);
ScalarType table_type(int stage);
void check_tables(const LossInputs& inputs, const std::vector<Tensor>& tables);

void check_scale(const std::vector<Tensor>& gradients, const Tensor& upstream, bool exact);
void check_summand(const Tensor& x);
void check_words(const Tensor& words);

std::vector<HashPiece> read_pieces(const std::vector<Tensor>& pieces,
                                   const std::vector<int64_t>& first,
                                   const std::vector<int64_t>& run,
                                   const std::vector<int64_t>& step);

}  // namespace ck
