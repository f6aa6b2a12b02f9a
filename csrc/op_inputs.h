// Checks of the ops' arguments for memory safety, on any device; the ops of other backends use
// them, too. Checks with messages for users are in churn_kernels/_checks.py; these are for direct
// calls of the ops.
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

// Maximum number of models, whose working memory must fit a thread's stack.
inline constexpr int kMaxModels = 64;

DType dtype_of(const char* name, const Tensor& tensor);
ScalarType result_type(DType dtype);

// Rejects an option outside [0, count).
int64_t code(const char* name, int64_t value, int64_t count);

// The inputs of a loss, and the tensors that own their memory.
struct Inputs {
  LossInputs loss;
  std::optional<Tensor> target, class_weight;
};

// `shard`: given if the logits hold only a part of the classes.
Inputs read_inputs(const std::vector<Tensor>& logits, const std::optional<Tensor>& target,
                   const std::optional<Tensor>& class_weight, const LossOptions& options,
                   const ClassShard* shard = nullptr);

// Shape of the loss for each reduction.
std::vector<int64_t> loss_shape(const LossInputs& inputs);
int64_t count(const std::vector<int64_t>& shape);

void check_upstream(const LossInputs& inputs, const Tensor& logits, const Tensor& upstream);
void check_stats(const LossInputs& inputs, const Tensor& stats);

// The tables of the stages so far, and the tensors that own their memory.
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
