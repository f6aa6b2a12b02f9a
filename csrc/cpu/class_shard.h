// Rows whose classes lie in several shards (ClassShard in cpu/loss.h): what one of them finds in
// its own classes, stage by stage. The shards' tables merge, in any order and any grouping, into
// that of the whole rows; then loss_forward and loss_backward have the bits of whole rows.
#pragma once

#include "loss.h"

namespace ck {

// Numbers of 8 bytes a row: float64 in the first three stages, int64 in the sums.
enum class Stage : int {
  kExtremes,  // per model: kExtremes; the larger, and of equal ones the lower class
  kTopK,      // per student: the k largest logits and their classes, the first in that order first
  kBounds,    // see kModelBounds; the larger
  kSums,      // models x kModelSums, pairs x kPairSums, per student the bits of the target's logit
              // (float64) in the shard that has it, 0 in the others; added up
  kSecondSums,  // pairs x kPairSums, for the divergences that need a second sweep; added up
};
inline constexpr int kStages = 5;

// Largest logit, second largest, class of the largest.
inline constexpr int kExtremes = 3;

// Width of the stage's table; 0 where the options do without it.
int64_t stage_width(const LossInputs& inputs, Stage stage);

// This shard's table of the stage that follows those of which inputs.shard has tables.
void run_stage(const LossInputs& inputs, void* table, const Parallel& parallel);

}  // namespace ck
