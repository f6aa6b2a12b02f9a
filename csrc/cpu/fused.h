// The sweeps for one or two models side by side in memory: everything that folds into
// e (c + s d + s' d') + u - o e' with three or four scalars a model. The fast path.
#pragma once

#include "../rows/divergence.h"
#include "../rows/row.h"
#include "../rows/softmax.h"
#include "kernels.h"
#include "memory.h"

namespace ck {
inline namespace CK_ISA {

template <class T, int K>
struct Fused {
  using S = Compute<T>;
  using V = Vec<S>;
  static constexpr int kWidth = kLanes<S>;
  // Far below any exp's range, so that lanes past the end of a row weigh exactly nothing.
  static constexpr S kNowhere = S(-1e4);

  static const T* logits(const RowView& row, int k) { return static_cast<const T*>(row.logits[k]); }

  static void maxima(const RowView& row, int64_t begin, int64_t end, double* out) {
    constexpr int kUnroll = 4;  // a maximum has no order, so independent chains are free
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

  static void sums(const RowView& row, int64_t begin, int64_t end, double* out) {
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

  template <bool kKeep>
  static void sums(const RowView& row, int64_t begin, int64_t end, double* out) {
    rows::SoftmaxSums<V> model[K];
    rows::PairSums<V> pair{V(S(0)), V(S(0))};
    V maximum[K];
    const T* z[K];
    for (int k = 0; k < K; ++k) {
      model[k] = {V(S(0)), V(S(0)), V(S(0))};
      maximum[k] = V(static_cast<S>(row.maxima[k]));
      z[k] = logits(row, k);
    }
    const bool spread = row.options->regularizer == Regularizer::kUniformSkl;
    const auto step = [&](const V* d, int64_t c) {
      V e[K];
      for (int k = 0; k < K; ++k) {
        e[k] = rows::exp_nonpos(d[k]);
        rows::add(model[k], e[k], d[k]);
        if constexpr (kKeep) store<false>(exponentials(row, k) + c, e[k]);
      }
      if constexpr (K == 2) rows::add_skl(pair, e[0], e[1], d[0] - d[1]);
    };
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) {
      V d[K];
      for (int k = 0; k < K; ++k) {
        fetch_ahead(row, k, c);
        d[k] = load(z[k] + c) - maximum[k];
      }
      step(d, c);
      if (spread) {
        for (int k = 0; k < K; ++k) rows::add_spread(model[k], d[k]);
      }
    }
    if (c < end) {
      const int n = static_cast<int>(end - c);
      V d[K];
      for (int k = 0; k < K; ++k) {
        d[k] = keep_first(load_first(z[k] + c, n, S(0)) - maximum[k], n, kNowhere);
      }
      step(d, c);
      for (int k = 0; k < K; ++k) rows::add_spread(model[k], keep_first(d[k], n, S(0)));
    }
    for (int k = 0; k < K; ++k) {
      double* s = out + k * kModelSums;
      s[0] += fold(model[k].mass);
      s[1] += fold(model[k].moment);
      if (spread) s[2] += fold(model[k].spread);
      s[3] += static_cast<double>(end - begin);
    }
    if constexpr (K == 2) {
      double* s = out + K * kModelSums;
      s[0] += fold(pair.first);
      s[1] += fold(pair.second);
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
      for (int k = 0; k < K; ++k) d[k] = max(X(kLowest<S>), z[k] - maximum[k]);
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
      for (int k = 0; k < K; ++k) store<kStream>(out[k] + c, g[k]);
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
    for (int k = 0; k < K; ++k) store_first(static_cast<T*>(row.gradients[k]) + c, n, g[k]);
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
      static_cast<T*>(row.gradients[k])[row.target] = from_compute<T>(g[k] - one_hot);
    }
  }
};

}  // namespace CK_ISA
}  // namespace ck
