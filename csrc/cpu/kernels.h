// The sweeps over one row that each instruction set provides, and what they read and write.
#pragma once

#include <cstdint>

#include "../rows/options.h"
#include "isa.h"

namespace ck {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };
inline constexpr int kDTypes = 4;

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A sum: fixed point in exact mode (rows/exact.h) until RowWork converts it to a real number.
union Sum {
  double real;
  int64_t fixed;
};

// Fixed point wraps around: a row whose terms are out of bounds is summed again with another scale,
// or is undefined.
CK_HD void add_fixed(Sum& sum, int64_t x) {
  sum.fixed = static_cast<int64_t>(static_cast<uint64_t>(sum.fixed) + static_cast<uint64_t>(x));
}

// One row, as the sweeps see it. Arrays are per model (students first) or per pair.
// Sums and coefficients are plain arrays in the order of rows/row.h's structs, so that chunks are
// added in one loop.
struct RowView {
  const LossOptions* options;
  int64_t classes;
  int models, students;
  const void* const* logits;
  const int64_t* column_strides;
  int64_t next_row;          // elements to the next row; 0: none
  void* const* gradients;    // students; contiguous; null: not wanted
  const void* class_weight;  // (C,) in the compute dtype; null: all ones
  int64_t target;            // -1: no target
  bool stream;               // write gradients past the caches
  // Exponentials stored by the sums for the gradient, models x exponential_stride in the compute
  // dtype; null: the gradient recomputes them.
  void* exponentials;
  int64_t exponential_stride;
  const float* scales;       // fixed-point scale of each sum
  const float* peaks;        // per model: 1, or 0 if exact sums handle the largest class separately
  const double* maxima;      // per model
  const double* thresholds;  // per model; of the k largest
  const int64_t* last_ties;  // per model
  const double* inverse_masses;  // per model: 1 / tempered mass, for the second sweep
  const double* log_masses;      // per model: log of it
  const double* pair_scalars;    // pairs x kPairScalars
  const double* gradient;        // students x kGradientScalars
  const double* partners;        // students x models x kPartnerScalars
};

// Layout of a row's sums, models x kModelSums, then pairs x kPairSums, and of its scalars: the
// structs of rows/row.h.
enum ModelSum : int {
  kMass,
  kMoment,
  kLive,
  kTemperedMass,
  kSpread,
  kExcess,
  kLift,
  kTopMass,
  kTopMoment,
  kTopSpread,
  kTopExcess,
  kTopLift,
  kWeightedSpread,
  kLost,
  kBroken,
  kTail,
  kTopTail,
  kModelSums
};
enum PairSum : int { kFirst, kSecond, kGap, kOther, kMismatch, kPairSums };
inline constexpr int kPairScalars = 4, kGradientScalars = 9, kPartnerScalars = 4;

// Scales of exact mode's unbounded sums. Per model: the largest |d| over all its
// classes and over its k largest, and the largest |class weight d|. Per pair: the largest |term|
// of its sums, and the largest z_i - z_j and z_j - z_i. For the pair with the teachers: as
// kFirstReach the largest |d - d_t| of a class with weight in teacher t; as kSecondReach the
// student's largest exp(d / T) where no teacher has weight; and as kOtherReach 1 if the teachers
// differ at a class where any has weight. Models x kModelBounds, then pairs x kPairBounds.
enum ModelBound : int { kReach, kTopReach, kWeightedReach, kModelBounds };
enum PairBound : int {
  kHighest,
  kMinusLowest,
  kFirstReach,
  kSecondReach,
  kOtherReach,
  kPairBounds
};

// Largest and second largest logit, and the lowest index of the largest.
struct TopTwo {
  double first, second;
  int64_t index;
};

struct Kernels {
  // maxima[k] of model k over classes [begin, end). In exact mode the second largest logits follow.
  // The fused sweeps append the negated minima (in exact mode only if the sums need them), and in
  // exact mode the pair's kHighest and kMinusLowest.
  void (*maxima)(const RowView&, int64_t begin, int64_t end, double* maxima);
  // Exact mode: the maximum of each bound over classes [begin, end).
  void (*bounds)(const RowView&, int64_t begin, int64_t end, double* bounds);
  // Adds one chunk's sums to `sums`.
  void (*sums)(const RowView&, int64_t begin, int64_t end, Sum* sums);
  void (*second_sums)(const RowView&, int64_t begin, int64_t end, Sum* sums);
  void (*gradient)(const RowView&, int64_t begin, int64_t end);
  // The k-th largest logit of one model and its last tie; `heap` holds k float64.
  void (*top_k)(const RowView&, int model, int64_t k, void* heap, double* threshold,
                int64_t* last_tie);
  void (*top_two)(const RowView&, int model, TopTwo*);
  // Whether a class of [begin, end) is the largest of both models.
  bool (*shares_maximum)(const RowView&, int i, int j, int64_t begin, int64_t end);
  double (*logit)(const RowView&, int model, int64_t index);
};

// `fused` handles one or two models whose options fold into one sweep; `general` handles
// everything. In exact mode both give the same bits; `fused` leaves rows whose sums need other
// scales to `general`.
struct KernelSet {
  Kernels fused[2], general;
  // Multiplies by a factor in place.
  void (*scale)(void* data, int64_t begin, int64_t end, double factor);
};

const KernelSet& kernel_set(Isa isa, DType dtype, bool exact);

// Adds the words of `bytes` bytes (rows/hash.h), starting at byte `first` of the tensor.
using HashSweep = void (*)(const void* data, int64_t bytes, int64_t first, uint64_t* words);
HashSweep hash_sweep(Isa isa);

}  // namespace ck
