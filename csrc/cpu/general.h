// The sweeps for every other case: any number of models, temperature, top-k, label smoothing, L1,
// teachers, classes at -inf, columns that do not lie side by side. A chunk is worked through in
// blocks that stay in the first-level cache, one short loop per term.
#pragma once

#include <alloca.h>

#include <algorithm>

#include "../rows/divergence.h"
#include "../rows/row.h"
#include "../rows/softmax.h"
#include "../rows/topk.h"
#include "kernels.h"
#include "memory.h"

namespace ck {
inline namespace CK_ISA {

template <class T>
struct General {
  using S = Compute<T>;
  using V = Vec<S>;
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

  static void fill(const RowView& row, int k, int64_t begin, int64_t end, Block& block) {
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

  static void maxima(const RowView& row, int64_t begin, int64_t end, double* out) {
    for (int k = 0; k < row.models; ++k) {
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

  // Lane sums of a chunk, one V per number of rows::ModelSums and rows::PairSums64.
  struct Lanes {
    V* model;
    V* pair;
    int models, pairs;

    Lanes(V* memory, int models, int pairs)
        : model(memory), pair(memory + models * kModelSums), models(models), pairs(pairs) {
      for (int i = 0; i < size(models, pairs); ++i) memory[i] = V(S(0));
    }
    static int size(int models, int pairs) { return models * kModelSums + pairs * kPairSums; }
    void fold_into(double* out) const {
      for (int i = 0; i < size(models, pairs); ++i) out[i] += fold(model[i]);
    }
  };

  static void model_sums(const RowView& row, int k, const Block& block, int64_t begin, int64_t end,
                         V* out) {
    const bool top = row.options->regularizes_top_k() && k < row.students;
    const bool smooths = row.options->label_smoothing != 0.0;
    rows::SoftmaxSums<V> all{out[0], out[1], out[2]}, largest{out[5], out[6], out[7]};
    each_vector(begin, end, [&](int v, int64_t c, int n) {
      const V d = block.d[v], e = block.e[v], live = block.live[v];
      rows::add(all, e, d);
      rows::add_spread(all, d);
      out[3] = out[3] + live;
      out[4] = out[4] + block.tempered[v];
      if (top) {
        const V member = members(row, k, block.logit[v], live, c);
        rows::add(largest, member * e, d);
        rows::add_spread(largest, member * d);
      }
      if (smooths) out[8] = out[8] + class_weights(row, c, n) * d;
    });
    out[0] = all.mass;
    out[1] = all.moment;
    out[2] = all.spread;
    out[5] = largest.mass;
    out[6] = largest.moment;
    out[7] = largest.spread;
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

  static void sums(const RowView& row, int64_t begin, int64_t end, double* out) {
    void* memory = CK_STACK(row.models * sizeof(Block));
    Lanes lanes(static_cast<V*>(CK_STACK(Lanes::size(row.models, pairs(row)) * sizeof(V))),
                row.models, pairs(row));
    const bool couples = pairs(row) > 0 && !row.options->needs_second_sweep();
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      for (int k = 0; k < row.models; ++k) {
        model_sums(row, k, blocks[k], b, e, lanes.model + k * kModelSums);
      }
      if (!couples) continue;
      V* out_pair = lanes.pair;
      for (int i = 0; i < row.models; ++i) {
        for (int j = i + 1; j < row.models; ++j, out_pair += kPairSums) {
          rows::PairSums<V> pair{out_pair[0], out_pair[1]};
          each_vector(b, e, [&](int v, int64_t, int) {
            rows::add_skl(pair, blocks[i].tempered[v], blocks[j].tempered[v],
                          blocks[i].d[v] - blocks[j].d[v]);
            const V differ = blocks[i].live[v] - blocks[j].live[v];
            out_pair[2] = mul_add(differ, differ, out_pair[2]);
          });
          out_pair[0] = pair.first;
          out_pair[1] = pair.second;
        }
      }
    }
    lanes.fold_into(out);
  }

  // The teachers' mean softmax, and how many classes only the teachers have.
  static V teacher_mean(const RowView& row, const Block* blocks, int v) {
    V q(S(0));
    for (int t = row.students; t < row.models; ++t) {
      q = mul_add(blocks[t].tempered[v], V(static_cast<S>(row.inverse_masses[t])), q);
    }
    return q * V(static_cast<S>(1.0 / row.options->teachers));
  }

  static void second_sums(const RowView& row, int64_t begin, int64_t end, double* out) {
    void* memory = CK_STACK(row.models * sizeof(Block));
    Lanes lanes(static_cast<V*>(CK_STACK(Lanes::size(row.models, pairs(row)) * sizeof(V))),
                row.models, pairs(row));
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      if (row.options->divergence == Divergence::kDistill) {
        distill_sums(row, blocks, b, e, lanes.pair);
      } else {
        l1_sums(row, blocks, b, e, lanes.pair);
      }
    }
    lanes.fold_into(out);
  }

  static void distill_sums(const RowView& row, const Block* blocks, int64_t begin, int64_t end,
                           V* out) {
    const V inverse_temperature(static_cast<S>(1.0 / row.options->temperature));
    const V log_mass(static_cast<S>(row.log_masses[0]));
    const V smallest(std::numeric_limits<S>::min());
    each_vector(begin, end, [&](int v, int64_t, int) {
      const V q = teacher_mean(row, blocks, v);
      const V log_p = blocks[0].d[v] * inverse_temperature - log_mass;
      out[0] = out[0] + rows::kl_term(q, log_p, smallest) * blocks[0].live[v];
      out[2] = out[2] + greater(q, V(S(0))) * (V(S(1)) - blocks[0].live[v]);
    });
  }

  static void l1_sums(const RowView& row, const Block* blocks, int64_t begin, int64_t end, V* out) {
    for (int i = 0; i < row.models; ++i) {
      for (int j = i + 1; j < row.models; ++j, out += kPairSums) {
        rows::PairSums<V> pair{out[0], out[1]};
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
    V* g = static_cast<V*>(CK_STACK(kVectors * sizeof(V)));
    for (int64_t b = begin; b < end; b += kBlock) {
      const int64_t e = std::min(b + kBlock, end);
      const Block* blocks = fill_all(row, memory, b, e);
      for (int i = 0; i < row.students; ++i) {
        softmax_gradient(row, i, blocks[i], b, e, g);
        if (pairs(row) > 0) divergence_gradient(row, i, blocks, b, e, g);
        if (row.target >= b && row.target < e) {
          S* lanes = g[(row.target - b) / kWidth].lanes();
          lanes[(row.target - b) % kWidth] -=
              static_cast<S>(row.gradient[i * kGradientScalars + 7]);
        }
        T* out = static_cast<T*>(row.gradients[i]);
        each_vector(b, e, [&](int v, int64_t c, int n) {
          n == kWidth ? store<false>(out + c, g[v]) : store_first(out + c, n, g[v]);
        });
      }
    }
  }

  static void softmax_gradient(const RowView& row, int i, const Block& block, int64_t begin,
                               int64_t end, V* g) {
    const double* scalar = row.gradient + i * kGradientScalars;
    const auto cast = [](double x) { return V(static_cast<S>(x)); };
    const V constant = cast(scalar[0]), slope = cast(scalar[1]), uniform = cast(scalar[2]);
    const V top_constant = cast(scalar[3]), top_slope = cast(scalar[4]);
    const V top_uniform = cast(scalar[5]), minus_smoothing = cast(-scalar[6]);
    const bool top = row.options->regularizes_top_k();
    const bool smooths = row.options->label_smoothing != 0.0;
    each_vector(begin, end, [&](int v, int64_t c, int n) {
      const V d = block.d[v], e = block.e[v], live = block.live[v];
      g[v] = rows::softmax_gradient(e, d, constant, slope, uniform * live);
      if (top) {
        const V member = members(row, i, block.logit[v], live, c);
        g[v] = mul_add(member, rows::softmax_gradient(e, d, top_constant, top_slope, top_uniform),
                       g[v]);
      }
      if (smooths) g[v] = mul_add(minus_smoothing, class_weights(row, c, n), g[v]);
    });
  }

  static void divergence_gradient(const RowView& row, int i, const Block* blocks, int64_t begin,
                                  int64_t end, V* g) {
    const double* slopes = row.slopes + i * row.models;
    const double* others = row.others + i * row.models;
    const bool l1 = row.options->divergence == Divergence::kL1;
    const bool linear = row.options->divergence == Divergence::kSkl;
    const V constant(static_cast<S>(row.gradient[i * kGradientScalars + 8]));
    each_vector(begin, end, [&](int v, int64_t, int) {
      V inner = constant;
      for (int j = 0; j < row.models; ++j) {
        // A model that is not coupled in stays out, whatever it holds: 0 times NaN is NaN.
        if (slopes[j] == 0.0 && others[j] == 0.0) continue;
        const V slope(static_cast<S>(slopes[j]));
        if (l1 && j != i) {
          const V s = sign(probability(row, blocks, i, v), probability(row, blocks, j, v));
          inner = mul_add(slope, s, inner);
        } else if (linear) {
          inner = mul_add(slope, blocks[j].d[v], inner);
        }
        if (!l1 && j != i) {
          g[v] = mul_add(V(static_cast<S>(-others[j])), blocks[j].tempered[v], g[v]);
        }
      }
      g[v] = mul_add(blocks[i].tempered[v], inner, g[v]);
    });
  }

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
    V first(-kInfinity), second(-kInfinity);
    for (int64_t c = 0; c < row.classes; c += kWidth) {
      const int n = static_cast<int>(std::min<int64_t>(kWidth, row.classes - c));
      const V z = load_any(row, model, c, n, -kInfinity);
      second = max(second, where_greater(z, first, first, z));
      first = max(first, z);
    }
    S a = -kInfinity, b = -kInfinity;
    for (int i = 0; i < kWidth; ++i) {
      const S x = first.lanes()[i], y = second.lanes()[i];
      b = rows::max(b, x > a ? rows::max(a, y) : x);
      a = rows::max(a, x);
    }
    *out = {static_cast<double>(a), static_cast<double>(b), nth_equal(row, model, a, 1)};
  }

  static double logit(const RowView& row, int model, int64_t index) {
    const T* z = static_cast<const T*>(row.logits[model]);
    return static_cast<double>(to_compute(z[index * row.column_strides[model]]));
  }
#undef CK_STACK
};

}  // namespace CK_ISA
}  // namespace ck
