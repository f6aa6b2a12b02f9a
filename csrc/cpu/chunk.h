// The general sweeps' sums over a chunk, by name; A is the accumulator type.
#pragma once

#include "../rows/divergence.h"
#include "../rows/softmax.h"
#include "kernels.h"
#include "sum.h"

namespace ck {
inline namespace CK_ISA {

// One model's sums over a chunk (rows::ModelSums).
template <class A>
struct ModelChunk {
  using Wide = typename WideOf<A>::type;
  rows::SoftmaxSums<A> all, top;
  rows::UniformSums<A, Wide> flat, top_flat;
  A live, tempered_mass, lost, broken;
  Wide weighted_spread;

  explicit ModelChunk(const float* s)
      : all{A(s[kMass]), A(s[kMoment])},
        top{A(s[kTopMass]), A(s[kTopMoment])},
        flat{Wide(s[kSpread]), A(s[kExcess]), A(s[kLift])},
        top_flat{Wide(s[kTopSpread]), A(s[kTopExcess]), A(s[kTopLift])},
        live(s[kLive]),
        tempered_mass(s[kTemperedMass]),
        lost(s[kLost]),
        broken(s[kBroken]),
        weighted_spread(s[kWeightedSpread]) {}

  void add_to(Sum* out) const {
    all.mass.add_to(out[kMass]);
    all.moment.add_to(out[kMoment]);
    live.add_to(out[kLive]);
    tempered_mass.add_to(out[kTemperedMass]);
    flat.spread.add_to(out[kSpread]);
    flat.excess.add_to(out[kExcess]);
    flat.lift.add_to(out[kLift]);
    top.mass.add_to(out[kTopMass]);
    top.moment.add_to(out[kTopMoment]);
    top_flat.spread.add_to(out[kTopSpread]);
    top_flat.excess.add_to(out[kTopExcess]);
    top_flat.lift.add_to(out[kTopLift]);
    weighted_spread.add_to(out[kWeightedSpread]);
    lost.add_to(out[kLost]);
    broken.add_to(out[kBroken]);
  }
};

// One pair's sums over a chunk (rows::PairSums64).
template <class A>
struct PairChunk {
  rows::PairSums<A> skl;
  A mismatch;

  explicit PairChunk(const float* s)
      : skl{A(s[kFirst]), A(s[kSecond]), A(s[kGap]), A(s[kOther])}, mismatch(s[kMismatch]) {}

  // `unit` is the scale of the sums over D.
  void add_to(Sum* out, double unit) const {
    const auto add = [&](const A& sum, Sum& total) {
      Sum part{};
      sum.add_to(part);
      if constexpr (std::is_same_v<A, FixedSum>) add_fixed(total, part.fixed);
      else total.real += part.real / unit;
    };
    add(skl.first, out[kFirst]);
    add(skl.second, out[kSecond]);
    add(skl.other, out[kOther]);
    skl.gap.add_to(out[kGap]);
    mismatch.add_to(out[kMismatch]);
  }
};

// All sums of a chunk, in caller-provided memory of `bytes`.
template <class A>
struct Chunk {
  ModelChunk<A>* model;
  PairChunk<A>* pair;
  int models, pairs;

  Chunk(void* memory, const RowView& row, int pairs)
      : model(static_cast<ModelChunk<A>*>(memory)),
        pair(reinterpret_cast<PairChunk<A>*>(model + row.models)),
        models(row.models),
        pairs(pairs) {
    const float* scales = row.scales;
    for (int k = 0; k < models; ++k, scales += kModelSums) new (model + k) ModelChunk<A>(scales);
    for (int p = 0; p < pairs; ++p, scales += kPairSums) new (pair + p) PairChunk<A>(scales);
  }
  static size_t bytes(const RowView& row, int pairs) {
    return row.models * sizeof(ModelChunk<A>) + pairs * sizeof(PairChunk<A>);
  }
  void add_to(Sum* out, double unit) const {
    for (int k = 0; k < models; ++k, out += kModelSums) model[k].add_to(out);
    for (int p = 0; p < pairs; ++p, out += kPairSums) pair[p].add_to(out, unit);
  }
};

}  // namespace CK_ISA
}  // namespace ck
