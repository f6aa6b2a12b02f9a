// The options of a loss call. The codes are part of the op schema.
#pragma once

#include <cstdint>

#include "macros.h"

namespace ck {

enum class Regularizer : int64_t { kNone = 0, kEntropy = 1, kUniformSkl = 2 };
enum class Divergence : int64_t { kNone = 0, kSkl = 1, kCrossEntropy = 2, kL1 = 3, kDistill = 4 };
enum class Mode : int64_t { kFast = 0, kRunToRun = 1, kInvariant = 2, kExact = 3 };
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2, kTerms = 3 };

struct LossOptions {
  double ce_weight, regularizer_weight, divergence_weight;
  Regularizer regularizer;
  int64_t top_k;  // 0: every class
  bool renormalize_top_k;
  Divergence divergence;
  int teachers;  // number of trailing models held fixed
  double label_smoothing;
  int64_t ignore_index;
  double temperature;
  Reduction reduction;
  // The weakest acceptable mode; the CPU computes in kInvariant for each of the first three.
  Mode mode;

  CK_HD bool exact() const { return mode == Mode::kExact; }
  CK_HD bool regularizes_top_k() const { return top_k > 0 && regularizer != Regularizer::kNone; }
  // Divergences whose sums need both models' masses first, hence a second sweep.
  CK_HD bool needs_second_sweep() const {
    return divergence == Divergence::kL1 || divergence == Divergence::kDistill;
  }
};

// Students come first, then teachers. Pairs of students run (0,1), (0,2), ..., (1,2), ...; with
// teachers there is one "pair": the student against their mean.
CK_HD constexpr int pair_count(int models, int teachers) {
  return teachers > 0 ? 1 : models * (models - 1) / 2;
}

}  // namespace ck
