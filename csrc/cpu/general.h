// The sweeps for every other case: any number of models, temperature, top-k, label smoothing, L1,
// teachers, classes at -inf, columns that do not lie side by side. A chunk is worked through in
// blocks that stay in the first-level cache, one short loop per term. A loop whose body stayed a
// call would keep its sums in memory: gnu::flatten has it inlined.
#pragma once

#include <alloca.h>

#include <algorithm>

#include "../rows/divergence.h"
#include "../rows/row.h"
#include "../rows/softmax.h"
#include "../rows/topk.h"
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

  // One block of one model. A class at -inf has live = d = e = f = 0; so has what lies past the
  // end.
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

  // 1 in the row's k largest, 0 elsewhere.
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

  // class weight d, a number even where S has none.
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
      S result = best.lanes()[0];
      for (int i = 1; i < kWidth; ++i) result = rows::max(result, best.lanes()[i]);
      out[k] = static_cast<double>(result);
    }
  }

  // Sums of a chunk, one A per number of rows::ModelSums and rows::PairSums64.
  struct Sums {
    A* model;
    A* pair;
    int models, pairs;

    Sums(void* memory, const RowView& row, int pairs)
        : model(static_cast<A*>(memory)),
          pair(model + row.models * kModelSums),
          models(row.models),
          pairs(pairs) {
      for (int i = 0; i < size(models, pairs); ++i) new (model + i) A(row.scales[i]);
    }
    static int size(int models, int pairs) { return models * kModelSums + pairs * kPairSums; }
    void add_to(Sum* out) const {
      for (int i = 0; i < size(models, pairs); ++i) model[i].add_to(out[i]);
    }
  };

  [[gnu::flatten]] static void model_sums(const RowView& row, int k, const Block& block,
                                          int64_t begin, int64_t end, A* out) {
    const bool top = row.options->regularizes_top_k() && k < row.students;
    const bool smooths = row.options->label_smoothing != 0.0;
    rows::SoftmaxSums<A> all{out[0], out[1], out[2]}, largest{out[5], out[6], out[7]};
    const V peak(static_cast<S>(row.peaks[k]));
    V check(S(0));
    each_vector(begin, end, [&](int v, int64_t c, int n) {
      const V d = block.d[v], live = block.live[v];
      const V e = kExact ? where_equal(d, V(S(0)), peak, block.e[v]) * live : block.e[v];
      rows::add(all, e, d);
      rows::add_spread(all, d);
      plus(out[3], live);
      plus(out[4], block.tempered[v]);
      if (top) {
        const V member = members(row, k, block.logit[v], live, c);
        rows::add(largest, member * e, d);
        rows::add_spread(largest, member * d);
      }
      if (smooths) plus(out[8], weigh(class_weights(row, c, n), d));
      if constexpr (kExact) check = check + e;
    });
    out[0] = all.mass;
    out[1] = all.moment;
    out[2] = all.spread;
    out[5] = largest.mass;
    out[6] = largest.moment;
    out[7] = largest.spread;
    if constexpr (kExact) plus(out[kBroken], where_equal(check, check, V(S(0)), V(S(1))));
  }

  static Block* fill_all(const RowView& row, void* memory, int64_t begin, int64_t end) {
    Block* blocks = static_cast<Block*>(memory);
    for (int k = 0; k < row.models; ++k) fill(row, k, begin, end, blocks[k]);
    return blocks;
  }

  // The stack of the calling function, aligned for vectors.
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
    const Sums total(CK_STACK(Sums::size(row.models, pairs(row)) * sizeof(A)), row, pairs(row));
    const bool couples = pairs(row) > 0 && !row.options->needs_second_sweep();
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      for (int k = 0; k < row.models; ++k) {
        model_sums(row, k, blocks[k], b, e, total.model + k * kModelSums);
      }
      if (!couples) continue;
      A* out_pair = total.pair;
      for (int i = 0; i < row.models; ++i) {
        for (int j = i + 1; j < row.models; ++j, out_pair += kPairSums) {
          rows::PairSums<A> pair{out_pair[0], out_pair[1]};
          each_vector(b, e, [&](int v, int64_t, int) {
            rows::add_skl(pair, blocks[i].tempered[v], blocks[j].tempered[v],
                          blocks[i].d[v] - blocks[j].d[v]);
            const V differ = blocks[i].live[v] - blocks[j].live[v];
            plus_product(out_pair[2], differ, differ);
          });
          out_pair[0] = pair.first;
          out_pair[1] = pair.second;
        }
      }
    }
    total.add_to(out);
  }

  // The bounds of kModelBounds. A class counts in a pair where one of its exponentials is not 0.
  static void bounds(const RowView& row, int64_t begin, int64_t end, double* out) {
    void* memory = CK_STACK(row.models * sizeof(Block));
    const int size = row.models * kModelBounds + pairs(row);
    V* largest = static_cast<V*>(CK_STACK(size * sizeof(V)));
    for (int i = 0; i < size; ++i) largest[i] = V(S(0));
    const auto extend = [](V& bound, V x) { bound = max(max(x, V(S(0)) - x), bound); };
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      for (int k = 0; k < row.models; ++k) {
        const bool top = row.options->regularizes_top_k() && k < row.students;
        V* bound = largest + k * kModelBounds;
        each_vector(b, e, [&](int v, int64_t c, int n) {
          const V d = blocks[k].d[v];
          extend(bound[0], d);
          if (top) extend(bound[1], members(row, k, blocks[k].logit[v], blocks[k].live[v], c) * d);
          extend(bound[2], weigh(class_weights(row, c, n), d));
        });
      }
      V* bound = largest + row.models * kModelBounds;
      const auto couple = [&](const Block& i, const Block& j, bool teaches) {
        const V inverse_temperature(static_cast<S>(1.0 / row.options->temperature));
        each_vector(b, e, [&](int v, int64_t, int) {
          if (teaches) {
            const V reach = i.d[v] * inverse_temperature;
            extend(*bound, where_greater(j.tempered[v], V(S(0)), reach, V(S(0))));
          } else {
            const V weight = max(i.tempered[v], j.tempered[v]);
            extend(*bound, where_greater(weight, V(S(0)), i.d[v] - j.d[v], V(S(0))));
          }
        });
      };
      if (row.options->teachers > 0) {
        for (int t = row.students; t < row.models; ++t) couple(blocks[0], blocks[t], true);
      } else if (pairs(row) > 0) {
        for (int i = 0; i < row.models; ++i) {
          for (int j = i + 1; j < row.models; ++j, ++bound) couple(blocks[i], blocks[j], false);
        }
      }
    }
    for (int i = 0; i < size; ++i) {
      const S* lanes = largest[i].lanes();
      for (int l = 0; l < kWidth; ++l) out[i] = std::max(out[i], static_cast<double>(lanes[l]));
    }
  }

  // The teachers' mean softmax, and how many classes only the teachers have.
  static V teacher_mean(const RowView& row, const Block* blocks, int v) {
    V q(S(0));
    for (int t = row.students; t < row.models; ++t) {
      q = mul_add(blocks[t].tempered[v], V(static_cast<S>(row.inverse_masses[t])), q);
    }
    return q * V(static_cast<S>(1.0 / row.options->teachers));
  }

  static void second_sums(const RowView& row, int64_t begin, int64_t end, Sum* out) {
    void* memory = CK_STACK(row.models * sizeof(Block));
    const Sums total(CK_STACK(Sums::size(row.models, pairs(row)) * sizeof(A)), row, pairs(row));
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      if (row.options->divergence == Divergence::kDistill) {
        distill_sums(row, blocks, b, e, total.pair);
      } else {
        l1_sums(row, blocks, b, e, total.pair);
      }
    }
    total.add_to(out);
  }

  [[gnu::flatten]] static void distill_sums(const RowView& row, const Block* blocks, int64_t begin,
                                            int64_t end, A* out) {
    const V inverse_temperature(static_cast<S>(1.0 / row.options->temperature));
    const V log_mass(static_cast<S>(row.log_masses[0]));
    const V smallest(std::numeric_limits<S>::min());
    each_vector(begin, end, [&](int v, int64_t, int) {
      const V q = teacher_mean(row, blocks, v);
      const V log_p = blocks[0].d[v] * inverse_temperature - log_mass;
      plus(out[0], rows::kl_term(q, log_p, smallest) * blocks[0].live[v]);
      plus(out[2], greater(q, V(S(0))) * (V(S(1)) - blocks[0].live[v]));
    });
  }

  static void l1_sums(const RowView& row, const Block* blocks, int64_t begin, int64_t end, A* out) {
    for (int i = 0; i < row.models; ++i) {
      for (int j = i + 1; j < row.models; ++j, out += kPairSums) {
        rows::PairSums<A> pair{out[0], out[1]};
        each_vector(begin, end, [&](int v, int64_t, int) {
          const V p_i = probability(row, blocks, i, v), p_j = probability(row, blocks, j, v);
          rows::add_l1(pair, p_i, p_j, sign(p_i, p_j));
        });
        out[0] = pair.first;
        out[1] = pair.second;
      }
    }
  }

  static V probability(const RowView& row, const Block* blocks, int k, int v) {
    return blocks[k].tempered[v] * V(static_cast<S>(row.inverse_masses[k]));
  }
  static V sign(V a, V b) { return greater(a, b) - greater(b, a); }

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

  // Model i's gradient of a block, but for the 1 of the target. The order of operations is that of
  // Fused, so that exact mode has one result whichever kernel a row takes.
  struct Gradient {
    const RowView& row;
    const int i;
    const Block* blocks;
    const double* slopes;
    const double* others;
    const bool couples, tempers, top, smooths, l1, linear;
    V constant, slope, uniform, top_constant, top_slope, top_uniform, minus_smoothing;
    V tempered_constant;

    Gradient(const RowView& row, int i, const Block* blocks)
        : row(row),
          i(i),
          blocks(blocks),
          slopes(row.slopes + i * row.models),
          others(row.others + i * row.models),
          couples(pairs(row) > 0),
          tempers(row.options->temperature != 1.0),
          top(row.options->regularizes_top_k()),
          smooths(row.options->label_smoothing != 0.0),
          l1(row.options->divergence == Divergence::kL1),
          linear(row.options->divergence == Divergence::kSkl) {
      const double* g = row.gradient + i * kGradientScalars;
      const auto cast = [](double x) { return V(static_cast<S>(x)); };
      constant = cast(tempers ? g[0] : g[0] + g[8]);
      slope = cast(tempers || l1 ? g[1] : g[1] + slopes[i]);
      uniform = cast(g[2]);
      top_constant = cast(g[3]);
      top_slope = cast(g[4]);
      top_uniform = cast(g[5]);
      minus_smoothing = cast(-g[6]);
      tempered_constant = cast(g[8]);
    }

    V at(int v, int64_t c, int n) const {
      const Block& block = blocks[i];
      const V d = block.d[v], e = block.e[v], live = block.live[v];
      V inner = mul_add(slope, d, constant);
      V rest = uniform * live;
      if (couples) {
        if (!tempers) inner = add_partners(inner, v);
        for (int j = 0; j < row.models && !l1; ++j) {
          if (j == i || others[j] == 0.0) continue;
          rest = mul_add(V(static_cast<S>(-others[j])), blocks[j].tempered[v], rest);
        }
        if (tempers) {
          const V own(l1 ? S(0) : static_cast<S>(slopes[i]));
          const V coupled = add_partners(mul_add(own, d, tempered_constant), v);
          rest = mul_add(block.tempered[v], coupled, rest);
        }
      }
      if (top) {
        const V more = rows::softmax_gradient(e, d, top_constant, top_slope, top_uniform);
        const V member = members(row, i, block.logit[v], live, c);
        rest = rest + where_equal(member, V(S(1)), more, V(S(0)));
      }
      if (smooths) rest = mul_add(minus_smoothing, class_weights(row, c, n), rest);
      return mul_add(e, inner, rest);
    }

    // inner + sum over the partners j of slope_j d_j; with L1, of slope_j sign(p - p_j). A model
    // that is not coupled in stays out, whatever it holds: 0 times NaN is NaN.
    V add_partners(V inner, int v) const {
      for (int j = 0; j < row.models && (l1 || linear); ++j) {
        if (j == i || slopes[j] == 0.0) continue;
        const V by = l1 ? sign(probability(row, blocks, i, v), probability(row, blocks, j, v))
                        : blocks[j].d[v];
        inner = mul_add(V(static_cast<S>(slopes[j])), by, inner);
      }
      return inner;
    }
  };

  // A type of this namespace, so that the heap functions of the standard library are instantiated
  // for this instruction set alone.
  struct Smallest {
    bool operator()(S a, S b) const { return a > b; }
  };

  static void top_k(const RowView& row, int model, int64_t k, void* memory, double* threshold,
                    int64_t* last_tie) {
    S* heap = static_cast<S*>(memory);  // the k largest so far, the smallest of them first
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
