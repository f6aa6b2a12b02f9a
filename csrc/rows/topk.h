// Membership in a row's k largest logits, ties broken by the lowest index.
#pragma once

#include <cstdint>

#include "macros.h"

namespace ck {
inline namespace CK_ISA {
namespace rows {

// `threshold` is the k-th largest logit, `last_tie` the index of the last class equal to it that is
// included.
template <class S>
CK_HD bool in_top_k(S logit, int64_t index, S threshold, int64_t last_tie) {
  return logit > threshold || (logit == threshold && index <= last_tie);
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
