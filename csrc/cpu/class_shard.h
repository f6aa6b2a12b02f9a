// Rows whose classes are split into shards (ClassShard in cpu/loss.h): the table of one shard's
// classes, stage by stage. The shards' tables merge, in any order and grouping, into
// that of the whole rows, from which loss_forward and loss_backward have the bits of whole rows.
#pragma once

#include "loss.h"

namespace ck {

// Tables of 8-byte numbers per row: float64 in the first three stages, int64 in the sums.
enum class Stage : int {
  kExtremes,  // per model: kExtremes; merged by maximum, ties by the lower class
  kTopK,      // per student: the k largest logits and their classes; merged into the k largest
  kBounds,    // see kModelBounds; merged by maximum
  kSums,      // models x kModelSums, pairs x kPairSums, per student the bits of the target's logit
              // (float64) in the shard that has it, 0 in the others; merged by addition
  kSecondSums,  // pairs x kPairSums, for divergences with a second sweep; merged by addition
};
inline constexpr int kStages = 5;

// Largest logit, second largest, class of the largest.
inline constexpr int kExtremes = 3;

// Width of the stage's table; 0 if the options do not need it.
int64_t stage_width(const LossInputs& inputs, Stage stage);

// This shard's table for the next stage, the first for which inputs.shard has no table.
void run_stage(const LossInputs& inputs, void* table, const Parallel& parallel);

}  // namespace ck
