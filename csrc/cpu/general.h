// The sweeps for every other case: any number of models, temperature, top-k, label smoothing, L1,
// teachers, classes at -inf, strided columns. A chunk is processed in blocks that stay in the L1
// cache, one short loop per term. gnu::flatten inlines the loop bodies: a call would keep the sums
// in memory.
#pragma once

#include <alloca.h>

#include <algorithm>

#include "../rows/divergence.h"
#include "../rows/row.h"
#include "../rows/softmax.h"
#include "../rows/topk.h"
#include "chunk.h"
#include "kernels.h"
#include "memory.h"
#include "sum.h"

namespace ck {
inline namespace CK_ISA {

template <class T, class A>
struct General {
  using S = Compute<T>;
  using V = Vec<S>;
  static constexpr bool kExact = std::is_same_v<A, FixedSum>;
  static constexpr int kWidth = kLanes<S>;
  static constexpr int kVectors = static_cast<int>(kBlock) / kWidth;
  static constexpr S kInfinity = std::numeric_limits<S>::infinity();
  // Scale of the sums over a pair's D, so that they do not overflow; exact mode's fixed point has
  // its own scales.
  static constexpr S kUnit = kExact ? S(1) : S(0x1p-32);

  // One block of one model. Classes at -inf, and lanes past the end, have live = d = e = f = 0.
  struct Block {
    V logit[kVectors], d[kVectors], e[kVectors], tempered[kVectors], live[kVectors];
  };

  static V load_any(const RowView& row, int k, int64_t c, int n, S fill) {
    const T* z = static_cast<const T*>(row.logits[k]);
    const int64_t stride = row.column_strides[k];
    if (stride != 1) return load_strided(z + c * stride, stride, n, fill);
    return n == kWidth ? load(z + c) : load_first(z + c, n, fill);
  }

  // Calls f(vector index, first class, lanes in range) over one block.
  template <class F>
  CK_HD static void each_vector(int64_t begin, int64_t end, F f) {
    int v = 0;
    for (int64_t c = begin; c < end; c += kWidth, ++v) {
      f(v, c, static_cast<int>(std::min<int64_t>(kWidth, end - c)));
    }
  }

  [[gnu::flatten]] static void fill(const RowView& row, int k, int64_t begin, int64_t end,
                                    Block& block) {
    const V maximum(static_cast<S>(row.maxima[k]));
    const bool tempers = row.options->temperature != 1.0;
    const V inverse_temperature(static_cast<S>(1.0 / row.options->temperature));
    const V zero(S(0)), dead(-kInfinity), lowest(kLowest<S>);
    each_vector(begin, end, [&](int v, int64_t c, int n) {
      const V z = load_any(row, k, c, n, -kInfinity);
      const V d = where_equal(z, dead, zero, max(lowest, z - maximum));
      block.logit[v] = z;
      block.d[v] = d;
      block.live[v] = where_equal(z, dead, zero, V(S(1)));
      block.e[v] = rows::exp_nonpos(d) * block.live[v];
      block.tempered[v] =
          tempers ? rows::exp_nonpos(d * inverse_temperature) * block.live[v] : block.e[v];
    });
  }

  // 1 for the row's k largest, 0 elsewhere.
  static V members(const RowView& row, int k, V z, V live, int64_t c) {
    const S threshold = static_cast<S>(row.thresholds[k]);
    const int64_t ties_within = row.last_ties[k] - c;
    V member = greater(z, V(threshold));
    if (ties_within >= kWidth - 1) {
      member = where_equal(z, V(threshold), V(S(1)), member);
    } else if (ties_within >= 0) {
      for (int i = 0; i < kWidth; ++i) {
        member.lanes()[i] =
            rows::in_top_k(z.lanes()[i], int64_t{i}, threshold, ties_within) ? S(1) : S(0);
      }
    }
    return member * live;
  }

  static V class_weights(const RowView& row, int64_t c, int n) {
    if (!row.class_weight) return V(S(1));
    return load_first(static_cast<const S*>(row.class_weight) + c, n, S(0));
  }

  // class weight d, clamped below to the lowest finite S.
  static V weigh(V weight, V d) { return max(V(std::numeric_limits<S>::lowest()), weight * d); }

  static TwoLargest<S> two_largest(const RowView& row, int k, int64_t begin, int64_t end) {
    TwoLargest<S> best;
    for (int64_t c = begin; c < end; c += kWidth) {
      const int n = static_cast<int>(std::min<int64_t>(kWidth, end - c));
      best.add(load_any(row, k, c, n, -kInfinity));
    }
    return best;
  }

  static void maxima(const RowView& row, int64_t begin, int64_t end, double* out) {
    for (int k = 0; k < row.models; ++k) {
      if constexpr (kExact) {
        two_largest(row, k, begin, end).fold_into(out[k], out[row.models + k]);
        continue;
      }
      V best(-kInfinity);
      for (int64_t c = begin; c < end; c += kWidth) {
        const int n = static_cast<int>(std::min<int64_t>(kWidth, end - c));
        best = max(best, load_any(row, k, c, n, -kInfinity));
      }
      out[k] = largest_lane(best);
    }
  }

  [[gnu::flatten]] static void model_sums(const RowView& row, int k, const Block& block,
                                          int64_t begin, int64_t end, ModelChunk<A>& out) {
    const bool top = row.options->regularizes_top_k() && k < row.students;
    const bool uniform = row.options->regularizer == Regularizer::kUniformSkl && k < row.students;
    const bool smooths = row.options->label_smoothing != 0.0;
    ModelChunk<A> sums = out;
    const V peak(static_cast<S>(row.peaks[k])), one(S(1)), none(S(0));
    V check(S(0));
    each_vector(begin, end, [&](int v, int64_t c, int n) {
      const V d = block.d[v], live = block.live[v];
      const V e = kExact ? where_equal(d, none, peak, block.e[v]) * live : block.e[v];
      rows::add(sums.all, e, d);
      plus(sums.live, live);
      plus(sums.tempered_mass, block.tempered[v]);
      if (uniform && !top) rows::add_uniform(sums.flat, block.e[v], d, live);
      if (uniform && top) plus(sums.flat.lift, block.e[v] - live);
      if (top) {
        const V member = members(row, k, block.logit[v], live, c);
        rows::add(sums.top, member * e, d);
        if (uniform) rows::add_uniform(sums.top_flat, member * block.e[v], member * d, member);
      }
      if (smooths) {
        const V weight = class_weights(row, c, n);
        plus(sums.weighted_spread, weigh(weight, d));
        const V dead = keep_first(one - live, n, S(0));
        plus(sums.lost, where_equal(weight, none, none, dead));
      }
      if constexpr (kExact) check = check + e;
    });
    if constexpr (kExact) plus(sums.broken, where_equal(check, check, none, one));
    out = sums;
  }

  static Block* fill_all(const RowView& row, void* memory, int64_t begin, int64_t end) {
    Block* blocks = static_cast<Block*>(memory);
    for (int k = 0; k < row.models; ++k) fill(row, k, begin, end, blocks[k]);
    return blocks;
  }

  // Memory on the caller's stack, aligned for vectors.
#define CK_STACK(bytes)                                                                  \
  reinterpret_cast<void*>(                                                               \
      (reinterpret_cast<uintptr_t>(alloca((bytes) + kVectorBytes)) + kVectorBytes - 1) / \
      kVectorBytes * kVectorBytes)

  static int pairs(const RowView& row) {
    return row.options->divergence == Divergence::kNone
               ? 0
               : pair_count(row.models, row.options->teachers);
  }

  static void sums(const RowView& row, int64_t begin, int64_t end, Sum* out) {
    void* memory = CK_STACK(row.models * sizeof(Block));
    const Chunk<A> total(CK_STACK(Chunk<A>::bytes(row, pairs(row))), row, pairs(row));
    const bool couples = pairs(row) > 0 && row.options->teachers == 0 &&
                         !(kExact && row.options->needs_second_sweep());
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      for (int k = 0; k < row.models; ++k) model_sums(row, k, blocks[k], b, e, total.model[k]);
      PairChunk<A>* pair = total.pair;
      for (int i = 0; i < row.models && couples; ++i) {
        for (int j = i + 1; j < row.models; ++j) skl_sums(blocks[i], blocks[j], b, e, *pair++);
      }
    }
    total.add_to(out, kUnit);
  }

  [[gnu::flatten]] static void skl_sums(const Block& i, const Block& j, int64_t begin, int64_t end,
                                        PairChunk<A>& out) {
    PairChunk<A> sums = out;
    const V unit(kUnit);
    each_vector(begin, end, [&](int v, int64_t, int) {
      const V less = i.tempered[v] - j.tempered[v], D = i.d[v] * unit - j.d[v] * unit;
      rows::add_skl(sums.skl, i.tempered[v], less, D);
      plus_product(sums.skl.other, j.tempered[v], D);
      if constexpr (!kExact) plus(sums.skl.gap, less);  // exact mode gets it from the masses
      const V differ = i.live[v] - j.live[v];
      plus_product(sums.mismatch, differ, differ);
    });
    out = sums;
  }

  // Bounds of the row's terms (ModelBound, PairBound).
  static void bounds(const RowView& row, int64_t begin, int64_t end, double* out) {
    void* memory = CK_STACK(row.models * sizeof(Block));
    const int size = row.models * kModelBounds + pairs(row) * kPairBounds;
    V* largest = static_cast<V*>(CK_STACK(size * sizeof(V)));
    for (int i = 0; i < size; ++i) largest[i] = V(S(0));
    for (int p = 0; p < pairs(row); ++p) {
      V* bound = largest + row.models * kModelBounds + p * kPairBounds;
      bound[kHighest] = bound[kMinusLowest] = V(-kInfinity);
    }
    const auto extend = [](V& bound, V x) { bound = max(max(x, V(S(0)) - x), bound); };
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      for (int k = 0; k < row.models; ++k) {
        const bool top = row.options->regularizes_top_k() && k < row.students;
        V* bound = largest + k * kModelBounds;
        each_vector(b, e, [&](int v, int64_t c, int n) {
          const V d = blocks[k].d[v];
          extend(bound[kReach], d);
          if (top) {
            const V member = members(row, k, blocks[k].logit[v], blocks[k].live[v], c);
            extend(bound[kTopReach], member * d);
          }
          extend(bound[kWeightedReach], weigh(class_weights(row, c, n), d));
        });
      }
      V* bound = largest + row.models * kModelBounds;
      const auto couple = [&](const Block& i, const Block& j) {
        each_vector(b, e, [&](int v, int64_t, int) {
          const V D = i.d[v] - j.d[v], p = i.tempered[v], q = j.tempered[v];
          extend(bound[kFirstReach], p * D);
          extend(bound[kSecondReach], (p - q) * D);
          extend(bound[kOtherReach], q * D);
          // Both ignore the NaN of a class at -inf in both models.
          bound[kHighest] = max(i.logit[v] - j.logit[v], bound[kHighest]);
          bound[kMinusLowest] = max(j.logit[v] - i.logit[v], bound[kMinusLowest]);
        });
      };
      const auto teach = [&](int v, int64_t, int) {
        const V none(S(0)), one(S(1));
        V most = none, least = one;
        for (int t = row.students; t < row.models; ++t) {
          const V q = blocks[t].tempered[v];
          extend(bound[kFirstReach], where_greater(q, none, blocks[0].d[v] - blocks[t].d[v], none));
          most = max(most, q);
          least = min(least, q);
        }
        const V untaught(S(rows::kUntaught));
        extend(bound[kSecondReach], where_greater(untaught, most, blocks[0].tempered[v], none));
        extend(bound[kOtherReach],
               where_greater(least, none, none, where_greater(most, none, one, none)));
      };
      if (row.options->teachers > 0) {
        each_vector(b, e, teach);
      } else if (pairs(row) > 0) {
        for (int i = 0; i < row.models; ++i) {
          for (int j = i + 1; j < row.models; ++j, bound += kPairBounds) {
            couple(blocks[i], blocks[j]);
          }
        }
      }
    }
    for (int i = 0; i < size; ++i) out[i] = std::max(out[i], largest_lane(largest[i]));
  }

  // The teachers' mean softmax.
  static V teacher_mean(const RowView& row, const Block* blocks, int v) {
    V q(S(0));
    for (int t = row.students; t < row.models; ++t) {
      q = mul_add(blocks[t].tempered[v], V(static_cast<S>(row.inverse_masses[t])), q);
    }
    return q * V(static_cast<S>(1.0 / row.options->teachers));
  }

  static void second_sums(const RowView& row, int64_t begin, int64_t end, Sum* out) {
    void* memory = CK_STACK(row.models * sizeof(Block));
    const Chunk<A> total(CK_STACK(Chunk<A>::bytes(row, pairs(row))), row, pairs(row));
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      if (row.options->divergence == Divergence::kDistill) {
        distill_sums(row, blocks, b, e, *total.pair);
        continue;
      }
      PairChunk<A>* pair = total.pair;
      for (int i = 0; i < row.models; ++i) {
        for (int j = i + 1; j < row.models; ++j) l1_sums(row, blocks, i, j, b, e, *pair++);
      }
    }
    total.add_to(out, 1.0);
  }

  [[gnu::flatten]] static void distill_sums(const RowView& row, const Block* blocks, int64_t begin,
                                            int64_t end, PairChunk<A>& out) {
    PairChunk<A> sums = out;
    const V inverse_temperature(static_cast<S>(1.0 / row.options->temperature));
    const V log_mass(static_cast<S>(row.log_masses[0]));
    const V smallest(std::numeric_limits<S>::min()), lowest(kLowest<S>);
    each_vector(begin, end, [&](int v, int64_t, int) {
      const V q = teacher_mean(row, blocks, v), live = blocks[0].live[v];
      const V p = probability(row, blocks, 0, v);
      const V log_p = max(lowest, blocks[0].d[v] * inverse_temperature) - log_mass;
      plus(sums.skl.first, rows::kl_term(p, q, log_p, smallest) * live);
      V taught(S(0));
      for (int t = row.students; t < row.models; ++t) taught = max(taught, blocks[t].live[v]);
      plus(sums.mismatch, taught * (V(S(1)) - live));
    });
    out = sums;
  }

  [[gnu::flatten]] static void l1_sums(const RowView& row, const Block* blocks, int i, int j,
                                       int64_t begin, int64_t end, PairChunk<A>& out) {
    PairChunk<A> sums = out;
    const auto& [level, difference] = pair_scalars(row, i, j);
    const V shared(static_cast<S>(difference.shared)), more_i(static_cast<S>(difference.more_i));
    const V minus_more_j(static_cast<S>(difference.minus_more_j));
    const S at = static_cast<S>(level);
    each_vector(begin, end, [&](int v, int64_t, int) {
      const V e_i = blocks[i].tempered[v], e_j = blocks[j].tempered[v];
      const V less = rows::probability_difference(e_i, e_j, shared, more_i, minus_more_j);
      rows::add_l1(sums.skl, e_i, e_j, less, sign(blocks[i], blocks[j], v, at));
    });
    out = sums;
  }

  static V probability(const RowView& row, const Block* blocks, int k, int v) {
    return blocks[k].tempered[v] * V(static_cast<S>(row.inverse_masses[k]));
  }

  // The scalars of pair (i, j), i < j, in the order (0, 1), (0, 2), .., (1, 2), ..
  static const rows::PairScalars& pair_scalars(const RowView& row, int i, int j) {
    const int p = i * (2 * row.models - i - 1) / 2 + j - i - 1;
    return reinterpret_cast<const rows::PairScalars*>(row.pair_scalars)[p];
  }

  // Sign of p_i - p_j, from the logits: p itself has fewer digits. 0 where `level` is NaN.
  static V sign(const Block& i, const Block& j, int v, S level) {
    const V D = i.d[v] - j.d[v], at(level);
    const V alive = level == level ? i.live[v] - j.live[v] : V(S(0));
    return where_equal(alive, V(S(0)), greater(D, at) - greater(at, D), alive);
  }

  static void gradient(const RowView& row, int64_t begin, int64_t end) {
    void* memory = CK_STACK(row.models * sizeof(Block));
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      for (int i = 0; i < row.students; ++i) {
        const Gradient gradient(row, i, blocks);
        T* out = static_cast<T*>(row.gradients[i]);
        each_vector(b, e, [&](int v, int64_t c, int n) {
          V g = gradient.at(v, c, n);
          if (row.target >= c && row.target < c + n) {
            g.lanes()[row.target - c] -= static_cast<S>(row.gradient[i * kGradientScalars + 7]);
          }
          g = result<A>(g);
          n == kWidth ? store<false>(out + c, g) : store_first(out + c, n, g);
        });
      }
    }
  }

  // Model i's gradient of a block, without the target's 1. The order of operations is that of
  // Fused, so that exact mode has the same result with either kernel.
  struct Gradient {
    const RowView& row;
    const int i;
    const Block* blocks;
    const rows::PartnerGradient* partners;
    const bool couples, tempers, top, smooths;
    V constant, slope, uniform, top_constant, top_slope, top_uniform, minus_smoothing;
    V tempered_constant;

    Gradient(const RowView& row, int i, const Block* blocks)
        : row(row),
          i(i),
          blocks(blocks),
          partners(reinterpret_cast<const rows::PartnerGradient*>(row.partners) + i * row.models),
          couples(pairs(row) > 0),
          tempers(row.options->temperature != 1.0),
          top(row.options->regularizes_top_k()),
          smooths(row.options->label_smoothing != 0.0) {
      const auto& g = reinterpret_cast<const rows::ModelGradient*>(row.gradient)[i];
      constant = cast(tempers ? g.constant : g.constant + g.tempered_constant);
      slope = cast(g.slope);
      uniform = cast(g.uniform);
      top_constant = cast(g.top_constant);
      top_slope = cast(g.top_slope);
      top_uniform = cast(g.top_uniform);
      minus_smoothing = cast(-g.smoothing);
      tempered_constant = cast(g.tempered_constant);
    }
    static V cast(double x) { return V(static_cast<S>(x)); }

    V at(int v, int64_t c, int n) const {
      const Block& block = blocks[i];
      const V e = block.e[v], live = block.live[v];
      const V d = max(cast(kWeightless), block.d[v]);
      V inner = mul_add(slope, d, constant), rest = uniform * live;
      if (couples && tempers) {
        V coupled = tempered_constant;
        add_partners(coupled, rest, v);
        rest = mul_add(block.tempered[v], coupled, rest);
      } else if (couples) {
        add_partners(inner, rest, v);
      }
      if (top) {
        const V more = rows::softmax_gradient(e, d, top_constant, top_slope, top_uniform);
        const V member = members(row, i, block.logit[v], live, c);
        rest = rest + where_equal(member, V(S(1)), more, V(S(0)));
      }
      if (smooths) rest = mul_add(minus_smoothing, class_weights(row, c, n), rest);
      return mul_add(e, inner, rest);
    }

    void add_partners(V& inner, V& rest, int v) const {
      for (int j = 0; j < row.models; ++j) {
        // Skip uncoupled models: 0 times a NaN in them would be NaN.
        const rows::PartnerGradient& partner = partners[j];
        if (j == i) continue;
        if (row.options->divergence == Divergence::kL1) {
          if (partner.slope == 0.0) continue;
          const double level = pair_scalars(row, std::min(i, j), std::max(i, j)).level;
          const V s = sign(blocks[i], blocks[j], v, static_cast<S>(i < j ? level : -level));
          inner = rows::add_to_inner(inner, s - cast(partner.mean), cast(partner.slope));
        } else if (partner.shared != 0.0 || partner.other != 0.0) {
          const V e = blocks[i].tempered[v], e_j = blocks[j].tempered[v], none(S(0));
          rest = rows::add_to_rest(rest, e - e_j, e_j, cast(partner.shared), cast(-partner.other));
          if (row.options->divergence != Divergence::kSkl) continue;
          // A class of weight 0 adds 0 even if its difference overflows.
          const V away = blocks[i].d[v] - blocks[j].d[v] - cast(partner.mean);
          inner = rows::add_to_inner(inner, where_equal(e, none, none, away), cast(partner.slope));
        }
      }
    }
  };

  // A type in this namespace, so that the standard library's heap functions are instantiated for
  // this instruction set alone.
  struct Smallest {
    bool operator()(S a, S b) const { return a > b; }
  };

  static void top_k(const RowView& row, int model, int64_t k, void* memory, double* threshold,
                    int64_t* last_tie) {
    S* heap = static_cast<S*>(memory);  // min-heap of the k largest so far
    int64_t held = 0;
    const auto offer = [&](S z) {
      if (held < k) {
        heap[held++] = z;
        std::push_heap(heap, heap + held, Smallest());
      } else if (z > heap[0]) {
        std::pop_heap(heap, heap + k, Smallest());
        heap[k - 1] = z;
        std::push_heap(heap, heap + k, Smallest());
      }
    };
    for (int64_t c = 0; c < row.classes; c += kWidth) {
      const int n = static_cast<int>(std::min<int64_t>(kWidth, row.classes - c));
      const V z = load_any(row, model, c, n, -kInfinity);
      if (held == k && !any_nonzero(greater(z, V(heap[0])))) continue;
      for (int i = 0; i < n; ++i) offer(z.lanes()[i]);
    }
    const S smallest = heap[0];
    int64_t ties = 0;
    for (int64_t i = 0; i < k; ++i) ties += heap[i] == smallest;
    *threshold = static_cast<double>(smallest);
    *last_tie = nth_equal(row, model, smallest, ties);
  }

  // Index of the nth class (from 1) whose logit equals x; classes - 1 if there are fewer.
  static int64_t nth_equal(const RowView& row, int model, S x, int64_t nth) {
    for (int64_t c = 0; c < row.classes; c += kWidth) {
      const int n = static_cast<int>(std::min<int64_t>(kWidth, row.classes - c));
      const V z = load_any(row, model, c, n, -kInfinity);
      if (!any_nonzero(where_equal(z, V(x), V(S(1)), V(S(0))))) continue;
      for (int i = 0; i < n; ++i) {
        if (z.lanes()[i] == x && --nth == 0) return c + i;
      }
    }
    return row.classes - 1;
  }

  static void top_two(const RowView& row, int model, TopTwo* out) {
    two_largest(row, model, 0, row.classes).fold_into(out->first, out->second);
    out->index = nth_equal(row, model, static_cast<S>(out->first), 1);
  }

  static bool shares_maximum(const RowView& row, int i, int j, int64_t begin, int64_t end) {
    const V none(S(0)), one(S(1));
    const V largest_i(static_cast<S>(row.maxima[i])), largest_j(static_cast<S>(row.maxima[j]));
    for (int64_t c = begin; c < end; c += kWidth) {
      const int n = static_cast<int>(std::min<int64_t>(kWidth, end - c));
      const V in_i = where_equal(load_any(row, i, c, n, -kInfinity), largest_i, one, none);
      const V in_j = where_equal(load_any(row, j, c, n, -kInfinity), largest_j, one, none);
      if (any_nonzero(in_i * in_j)) return true;
    }
    return false;
  }

  static double logit(const RowView& row, int model, int64_t index) {
    const T* z = static_cast<const T*>(row.logits[model]);
    return static_cast<double>(to_compute(z[index * row.column_strides[model]]));
  }
#undef CK_STACK
};

}  // namespace CK_ISA
}  // namespace ck
