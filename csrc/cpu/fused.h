// The sweeps for one or two models side by side in memory: everything that folds into
// e (c + s d + s' d') + u - o e' with three or four scalars a model. The fast path.
#pragma once

#include "../rows/divergence.h"
#include "../rows/row.h"
#include "../rows/softmax.h"
#include "kernels.h"
#include "memory.h"
#include "sum.h"

namespace ck {
inline namespace CK_ISA {

template <class T, int K, class A>
struct Fused {
  using S = Compute<T>;
  using V = Vec<S>;
  static constexpr bool kExact = std::is_same_v<A, FixedSum>;
  static constexpr int kWidth = kLanes<S>;
  // Far below any exp's range, so that lanes past the end of a row weigh exactly nothing.
  static constexpr S kNowhere = S(-1e4);

  static const T* logits(const RowView& row, int k) { return static_cast<const T*>(row.logits[k]); }

  static constexpr int kUnroll = 4;  // a maximum has no order, so independent chains are free

  static void two_largest(const RowView& row, int64_t begin, int64_t end, double* out) {
    for (int k = 0; k < K; ++k) {
      const T* z = logits(row, k);
      TwoLargest<S> best[kUnroll];
      int64_t c = begin;
      for (; c + kUnroll * kWidth <= end; c += kUnroll * kWidth) {
        for (int u = 0; u < kUnroll; ++u) best[u].add(load(z + c + u * kWidth));
      }
      for (; c + kWidth <= end; c += kWidth) best[0].add(load(z + c));
      if (c < end) {
        best[1].add(
            load_first(z + c, static_cast<int>(end - c), -std::numeric_limits<S>::infinity()));
      }
      for (int u = 1; u < kUnroll; ++u) best[0].merge(best[u]);
      best[0].fold_into(out[k], out[K + k]);
    }
  }

  static void maxima(const RowView& row, int64_t begin, int64_t end, double* out) {
    if constexpr (kExact) return two_largest(row, begin, end, out);
    for (int k = 0; k < K; ++k) {
      const T* z = logits(row, k);
      V best[kUnroll];
      for (V& b : best) b = V(-std::numeric_limits<S>::infinity());
      int64_t c = begin;
      for (; c + kUnroll * kWidth <= end; c += kUnroll * kWidth) {
        for (int u = 0; u < kUnroll; ++u) best[u] = max(best[u], load(z + c + u * kWidth));
      }
      for (; c + kWidth <= end; c += kWidth) best[0] = max(best[0], load(z + c));
      if (c < end) {
        best[1] = max(best[1], load_first(z + c, static_cast<int>(end - c),
                                          -std::numeric_limits<S>::infinity()));
      }
      const V all = max(max(best[0], best[1]), max(best[2], best[3]));
      S result = all.lanes()[0];
      for (int i = 1; i < kWidth; ++i) result = rows::max(result, all.lanes()[i]);
      out[k] = static_cast<double>(result);
    }
  }

  static S* exponentials(const RowView& row, int k) {
    return static_cast<S*>(row.exponentials) + k * row.exponential_stride;
  }

  static void sums(const RowView& row, int64_t begin, int64_t end, Sum* out) {
    row.exponentials ? sums<true>(row, begin, end, out) : sums<false>(row, begin, end, out);
  }

  // This sweep computes and hardly waits for memory, so it fetches what comes after it: the next
  // row's logits, and the lines that this row's gradient is going to overwrite.
  CK_HD static void fetch_ahead(const RowView& row, int k, int64_t c) {
    __builtin_prefetch(logits(row, k) + c + row.next_row, 0, 2);
    if (row.gradients[k] && !row.stream) {
      __builtin_prefetch(static_cast<T*>(row.gradients[k]) + c, 1, 3);
    }
  }

  // d of logit - maximum; exact sums need a number for a class at -inf, too.
  CK_HD static V finite(V difference) {
    if constexpr (kExact) return max(V(kLowest<S>), difference);
    return difference;
  }

  // What tells that a row is not for this kernel's exact sums: a NaN, or terms out of bounds.
  struct Check {
    V exponentials, reach;

    Check() : exponentials(S(0)), reach(S(0)) {}
    CK_HD void far(V d) { reach = max(max(d, V(S(0)) - d), reach); }
    bool fails() const {
      const V broken = where_equal(exponentials, exponentials, V(S(0)), V(S(1)));
      const V inside = where_greater(V(S(rows::kReach)), reach, V(S(0)), V(S(1)));
      return any_nonzero(broken) || any_nonzero(inside);
    }
  };

  static void add_count(Sum& total, int64_t n) {
    if constexpr (kExact) total.fixed += n;
    else total.real += static_cast<double>(n);
  }

  // Flat, because `step` is called twice, and where it is not inlined the sums live in memory.
  template <bool kKeep>
  [[gnu::flatten]] static void sums(const RowView& row, int64_t begin, int64_t end, Sum* out) {
    const float* scales = row.scales;
    const auto none = [&](int k) {
      const float* s = scales + k * kModelSums;
      return rows::SoftmaxSums<A>{A(s[0]), A(s[1]), A(s[2])};
    };
    rows::SoftmaxSums<A> model[2]{none(0), none(K - 1)};
    const float* pair_scales = scales + (K - 1) * 2 * kModelSums;  // of one model: unused
    rows::PairSums<A> pair{A(pair_scales[0]), A(pair_scales[1])};
    Check check;
    V maximum[K], peak[K];
    const T* z[K];
    for (int k = 0; k < K; ++k) {
      maximum[k] = V(static_cast<S>(row.maxima[k]));
      peak[k] = V(static_cast<S>(row.peaks[k]));
      z[k] = logits(row, k);
    }
    const bool spread = row.options->regularizer == Regularizer::kUniformSkl;
    // `raw` are the d, -inf where the logit is.
    const auto step = [&](const V* d, const V* raw, int64_t c) {
      V e[K];
      for (int k = 0; k < K; ++k) {
        e[k] = rows::exp_nonpos(d[k]);
        rows::add(model[k], kExact ? where_equal(d[k], V(S(0)), peak[k], e[k]) : e[k], d[k]);
        if constexpr (kKeep) store<false>(exponentials(row, k) + c, e[k]);
        if constexpr (kExact) check.exponentials = check.exponentials + e[k];
      }
      if constexpr (K == 2) {
        rows::add_skl(pair, e[0], e[1], d[0] - d[1]);
        if constexpr (kExact) check.far(raw[0] - raw[1]);
      }
    };
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) {
      V d[K], raw[K];
      for (int k = 0; k < K; ++k) {
        fetch_ahead(row, k, c);
        raw[k] = load(z[k] + c) - maximum[k];
        d[k] = finite(raw[k]);
      }
      step(d, raw, c);
      if (spread) {
        for (int k = 0; k < K; ++k) {
          rows::add_spread(model[k], d[k]);
          if constexpr (kExact) check.far(d[k]);
        }
      }
    }
    if (c < end) {
      const int n = static_cast<int>(end - c);
      V d[K], raw[K];
      for (int k = 0; k < K; ++k) {
        raw[k] = keep_first(load_first(z[k] + c, n, S(0)) - maximum[k], n, kNowhere);
        d[k] = finite(raw[k]);
      }
      step(d, raw, c);
      for (int k = 0; k < K; ++k) {
        d[k] = keep_first(d[k], n, S(0));
        rows::add_spread(model[k], d[k]);
        if (kExact && spread) check.far(d[k]);
      }
    }
    for (int k = 0; k < K; ++k) {
      Sum* s = out + k * kModelSums;
      model[k].mass.add_to(s[0]);
      model[k].moment.add_to(s[1]);
      if (spread) model[k].spread.add_to(s[2]);
      add_count(s[3], end - begin);
      if constexpr (kExact) s[kBroken].fixed += check.fails();
    }
    if constexpr (K == 2) {
      Sum* s = out + K * kModelSums;
      pair.first.add_to(s[0]);
      pair.second.add_to(s[1]);
    }
  }

  // The row's scalars, broadcast; X is V in the sweep and S at the target.
  template <class X>
  struct Coefficients {
    X maximum[K], constant[K], slope[K], uniform[K], cross_slope[K], minus_other[K];

    explicit Coefficients(const RowView& row) {
      const auto cast = [](double x) { return X(static_cast<S>(x)); };
      for (int k = 0; k < K; ++k) {
        const double* g = row.gradient + k * kGradientScalars;
        maximum[k] = cast(row.maxima[k]);
        constant[k] = cast(g[0] + g[8]);
        slope[k] = cast(g[1] + row.slopes[k * K + k]);
        uniform[k] = cast(g[2]);
        cross_slope[k] = cast(row.slopes[k * K + (K - 1 - k)]);
        minus_other[k] = cast(-row.others[k * K + (K - 1 - k)]);
      }
    }

    CK_HD void exponentials(const X* z, X* e) const {
      for (int k = 0; k < K; ++k) e[k] = rows::exp_nonpos(z[k] - maximum[k]);
    }

    CK_HD void gradients(const X* z, const X* e, X* g) const {
      using rows::max;
      X d[K];
      for (int k = 0; k < K; ++k) {
        d[k] = max(X(kLowest<S>), z[k] - maximum[k]);
        if constexpr (kExact) {
          const X dead(-std::numeric_limits<S>::infinity());
          d[k] = where_equal(z[k], dead, X(S(0)), d[k]);
        }
      }
      for (int k = 0; k < K; ++k) {
        if constexpr (K == 1) {
          g[k] = rows::softmax_gradient(e[k], d[k], constant[k], slope[k], uniform[k]);
        } else {
          const int j = 1 - k;
          g[k] = rows::pair_gradient(e[k], e[j], d[k], d[j], constant[k], slope[k], cross_slope[k],
                                     uniform[k], minus_other[k]);
        }
      }
    }
  };

  template <bool kStream, bool kKept>
  static int64_t full_vectors(const RowView& row, const Coefficients<V>& coefficients, int64_t c,
                              int64_t end) {
    const T* z[K];
    T* out[K];
    const S* kept[K];
    for (int k = 0; k < K; ++k) {
      z[k] = logits(row, k);
      out[k] = static_cast<T*>(row.gradients[k]);
      kept[k] = kKept ? exponentials(row, k) : nullptr;
    }
    for (; c + kWidth <= end; c += kWidth) {
      V x[K], e[K], g[K];
      for (int k = 0; k < K; ++k) x[k] = load(z[k] + c);
      if constexpr (kKept) {
        for (int k = 0; k < K; ++k) e[k] = load(kept[k] + c);
      } else {
        coefficients.exponentials(x, e);
      }
      coefficients.gradients(x, e, g);
      for (int k = 0; k < K; ++k) store<kStream>(out[k] + c, result<A>(g[k]));
    }
    return c;
  }

  template <bool kStream>
  static int64_t full_vectors(const RowView& row, const Coefficients<V>& coefficients, int64_t c,
                              int64_t end) {
    return row.exponentials ? full_vectors<kStream, true>(row, coefficients, c, end)
                            : full_vectors<kStream, false>(row, coefficients, c, end);
  }

  // Fewer than kWidth classes: a tail, or the head before the first aligned address.
  static void partial_vector(const RowView& row, const Coefficients<V>& coefficients, int64_t c,
                             int n) {
    V x[K], e[K], g[K];
    for (int k = 0; k < K; ++k) x[k] = load_first(logits(row, k) + c, n, S(0));
    coefficients.exponentials(x, e);
    coefficients.gradients(x, e, g);
    for (int k = 0; k < K; ++k) {
      store_first(static_cast<T*>(row.gradients[k]) + c, n, result<A>(g[k]));
    }
  }

  static void gradient(const RowView& row, int64_t begin, int64_t end) {
    const Coefficients<V> coefficients(row);
    constexpr uintptr_t kBytes = kWidth * sizeof(T);
    const auto misaligned = [&](int k, int64_t c) {
      return reinterpret_cast<uintptr_t>(static_cast<T*>(row.gradients[k]) + c) % kBytes;
    };
    int64_t c = begin;
    if (row.stream && misaligned(0, c) == misaligned(K - 1, c)) {
      const auto head = static_cast<int>((kBytes - misaligned(0, c)) % kBytes / sizeof(T));
      if (head > 0 && c + head <= end) {
        partial_vector(row, coefficients, c, head);
        c += head;
      }
      if (misaligned(0, c) == 0) {
        c = full_vectors<true>(row, coefficients, c, end);
#if defined(__x86_64__)
        _mm_sfence();  // streamed stores are not ordered with the ones that tell others of them
#endif
      }
    }
    c = full_vectors<false>(row, coefficients, c, end);
    if (c < end) partial_vector(row, coefficients, c, static_cast<int>(end - c));
    if (row.target >= begin && row.target < end) fix_target(row);
  }

  // The target's element, fixed in the compute dtype and then rounded once.
  static void fix_target(const RowView& row) {
    const Coefficients<S> coefficients(row);
    S x[K], e[K], g[K];
    for (int k = 0; k < K; ++k) x[k] = to_compute(logits(row, k)[row.target]);
    coefficients.exponentials(x, e);
    coefficients.gradients(x, e, g);
    for (int k = 0; k < K; ++k) {
      const S one_hot = static_cast<S>(row.gradient[k * kGradientScalars + 7]);
      static_cast<T*>(row.gradients[k])[row.target] = from_compute<T>(result<A>(g[k] - one_hot));
    }
  }
};

}  // namespace CK_ISA
}  // namespace ck
