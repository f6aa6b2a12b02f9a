// The CPU loss: rows in, loss, terms and gradients out. Raw pointers, no torch.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "kernels.h"

namespace ck {

// One model's (N, C) logits; strides in elements.
struct Matrix {
  const void* data;
  int64_t row_stride, column_stride;
};

// Marks inputs as one shard of rows whose classes are split. Each stage makes a table of the
// shard's own classes; the tables of all shards, merged, are the input of the next stage
// (cpu/class_shard.h). Only exact mode has such tables, because they must merge in any order.
struct ClassShard {
  int64_t first_class;  // of the shard
  int64_t classes;      // of the whole rows
  // Merged tables (N, stage_width), one for each completed stage.
  std::vector<const void*> tables;
};

struct LossInputs {
  Isa isa;  // fixed for the whole call, even if another thread changes it
  DType dtype;
  int64_t rows, classes;
  std::vector<Matrix> logits;  // students first, then teachers
  const int64_t* target;       // (N,), or null
  const void* class_weight;    // (C,) in the compute dtype (float, or double for float64), or null
  LossOptions options;
  // Null: whole rows. Else `classes` is the shard's, but target and class_weight cover all classes.
  const ClassShard* shard;

  int64_t all_classes() const { return shard ? shard->classes : classes; }
  int64_t first_class() const { return shard ? shard->first_class : 0; }

  // Weight of a class's cross entropy.
  double weight_of(int64_t c) const {
    if (!class_weight) return 1.0;
    return dtype == DType::kFloat64 ? static_cast<const double*>(class_weight)[c]
                                    : static_cast<const float*>(class_weight)[c];
  }
  int models() const { return static_cast<int>(logits.size()); }
  int students() const { return models() - options.teachers; }
  int pairs() const {
    return options.divergence == Divergence::kNone ? 0 : pair_count(models(), options.teachers);
  }
  // Terms of one row: cross entropy and regulariser per student, divergence per pair.
  int row_terms() const { return 2 * students() + pair_count(models(), options.teachers); }
  // Number of float64 values per row that loss_backward() needs.
  int stats_width() const;
  // Reported by the forward pass: five values per student, one per pair, and the agreement.
  int reported_terms() const { return 5 * students() + pair_count(models(), options.teachers) + 1; }
};

// Outputs; null: not wanted. loss has one value, N, or N x row_terms() by reduction, in float64, as
// are the reported terms. gradients: (N, C) contiguous per student, in the logits' dtype.
struct LossOutputs {
  double* loss;
  double* stats;
  double* terms;
  const std::vector<void*>* gradients;
};

// Runs body(begin, end) over parts of [0, tasks) of at least `grain` tasks, on `threads` threads.
struct Parallel {
  int threads;
  void (*run)(int64_t tasks, int64_t grain,
              const std::function<void(int64_t begin, int64_t end)>& body);
};

// Classes of work below which a second thread does not pay.
inline constexpr int64_t kGrain = 16384;

// Throws std::out_of_range for a target outside [0, classes), before anything is written.
void loss_forward(const LossInputs& inputs, const LossOutputs& outputs, const Parallel& parallel);

// Gradients from the row statistics of loss_forward. upstream: one value, N, or N x row_terms().
void loss_backward(const LossInputs& inputs, const double* stats, const double* upstream,
                   const std::vector<void*>& gradients, const Parallel& parallel);

// How a call would run, for tests and bug reports, such as "fused avx512 rows cached": the sweeps,
// the instruction set, whether threads split the rows or the chunks of each row, and whether
// gradients are written through the caches or past them.
std::string plan(const LossInputs& inputs, const Parallel& parallel);

// Multiplies by a factor in place, if requested with exact mode's canonical results; returns at
// once if the factor is 1.
void scale(DType dtype, void* data, int64_t size, double factor, bool exact,
           const Parallel& parallel);

}  // namespace ck
