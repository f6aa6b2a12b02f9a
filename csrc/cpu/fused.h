// The fast path: sweeps for one or two models with contiguous columns, whose gradients take a few
// scalars per model.
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
  // Far below exp's range, so that lanes past the end of a row have weight exactly 0.
  static constexpr S kNowhere = S(-1e4);

  static const T* logits(const RowView& row, int k) { return static_cast<const T*>(row.logits[k]); }

  static constexpr int kUnroll = 4;  // a maximum does not depend on order: use independent chains

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

  // The largest z_0 - z_1 and the largest z_1 - z_0 of the two models' logits.
  static void differences(const RowView& row, int64_t begin, int64_t end, double* out) {
    const T *a = logits(row, 0), *b = logits(row, 1);
    V highest(-std::numeric_limits<S>::infinity()), minus_lowest = highest;
    const auto step = [&](V x, V y) {  // both ignore the NaN of a class at -inf in both models
      highest = max(x - y, highest);
      minus_lowest = max(y - x, minus_lowest);
    };
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) step(load(a + c), load(b + c));
    if (c < end) {
      const int n = static_cast<int>(end - c);
      const S none = -std::numeric_limits<S>::infinity();
      step(load_first(a + c, n, none), load_first(b + c, n, none));
    }
    out[kHighest] = largest_lane(highest);
    out[kMinusLowest] = largest_lane(minus_lowest);
  }

  static void maxima(const RowView& row, int64_t begin, int64_t end, double* out) {
    if constexpr (kExact) {
      two_largest(row, begin, end, out);
      if constexpr (K == 2) differences(row, begin, end, out + 3 * K);
      if (row.options->regularizer != Regularizer::kUniformSkl) return;
    }
    for (int k = 0; k < K; ++k) {
      const T* z = logits(row, k);
      V best[kUnroll], least[kUnroll];
      const V none(-std::numeric_limits<S>::infinity());
      for (int u = 0; u < kUnroll; ++u) best[u] = none, least[u] = V(S(0)) - none;
      const auto step = [&](int u, V x) {
        best[u] = max(best[u], x);
        least[u] = min(least[u], x);
      };
      int64_t c = begin;
      for (; c + kUnroll * kWidth <= end; c += kUnroll * kWidth) {
        for (int u = 0; u < kUnroll; ++u) step(u, load(z + c + u * kWidth));
      }
      for (; c + kWidth <= end; c += kWidth) step(0, load(z + c));
      if (c < end) {
        const int n = static_cast<int>(end - c);
        best[1] = max(best[1], load_first(z + c, n, -std::numeric_limits<S>::infinity()));
        least[1] = min(least[1], load_first(z + c, n, std::numeric_limits<S>::infinity()));
      }
      for (int u = 1; u < kUnroll; ++u) {
        best[0] = max(best[0], best[u]);
        least[0] = min(least[0], least[u]);
      }
      if constexpr (!kExact) out[k] = largest_lane(best[0]);
      out[(kExact ? 2 : 1) * K + k] = largest_lane(V(S(0)) - least[0]);
    }
  }

  static S* exponentials(const RowView& row, int k) {
    return static_cast<S*>(row.exponentials) + k * row.exponential_stride;
  }

  static void sums(const RowView& row, int64_t begin, int64_t end, Sum* out) {
    row.exponentials ? sums<true>(row, begin, end, out) : sums<false>(row, begin, end, out);
  }

  // This sweep is compute-bound, so it prefetches the next row's logits and the cache lines that
  // this row's gradient will overwrite.
  CK_HD static void fetch_ahead(const RowView& row, int k, int64_t c) {
    __builtin_prefetch(logits(row, k) + c + row.next_row, 0, 2);
    if (row.gradients[k] && !row.stream) {
      __builtin_prefetch(static_cast<T*>(row.gradients[k]) + c, 1, 3);
    }
  }

  // d = logit - maximum; exact sums need a finite d for a class at -inf, too.
  CK_HD static V finite(V difference) {
    if constexpr (kExact) return max(V(kLowest<S>), difference);
    return difference;
  }

  static void add_count(Sum& total, int64_t n) {
    if constexpr (kExact) total.fixed += n;
    else total.real += static_cast<double>(n);
  }

  // gnu::flatten, because `step` is called twice and must be inlined to keep sums in registers.
  template <bool kKeep>
  [[gnu::flatten]] static void sums(const RowView& row, int64_t begin, int64_t end, Sum* out) {
    using Wide = typename WideOf<A>::type;
    const auto scales = [&](int k) { return row.scales + k * kModelSums; };
    const auto none = [&](int k) {
      return rows::SoftmaxSums<A>{A(scales(k)[kMass]), A(scales(k)[kMoment])};
    };
    const auto none_uniform = [&](int k) {
      const float* s = scales(k);
      return rows::UniformSums<A, Wide>{Wide(s[kSpread]), A(s[kExcess]), A(s[kLift])};
    };
    rows::SoftmaxSums<A> model[2]{none(0), none(K - 1)};
    rows::UniformSums<A, Wide> flat[2]{none_uniform(0), none_uniform(K - 1)};
    const float* pair_scales = scales(K == 2 ? 2 : 0);  // unused for one model
    rows::PairSums<A> pair{A(pair_scales[kFirst]), A(pair_scales[kSecond]), A(pair_scales[kGap]),
                           A(pair_scales[kOther])};
    V check(S(0));  // becomes NaN if a logit is, which fixed point cannot represent
    V maximum[K], peak[K];
    const T* z[K];
    for (int k = 0; k < K; ++k) {
      maximum[k] = V(static_cast<S>(row.maxima[k]));
      peak[k] = V(static_cast<S>(row.peaks[k]));
      z[k] = logits(row, k);
    }
    const bool spread = row.options->regularizer == Regularizer::kUniformSkl;
    const auto step = [&](const V* d, V* e, int64_t c) {
      for (int k = 0; k < K; ++k) {
        e[k] = rows::exp_nonpos(d[k]);
        rows::add(model[k], kExact ? where_equal(d[k], V(S(0)), peak[k], e[k]) : e[k], d[k]);
        if constexpr (kKeep) store<false>(exponentials(row, k) + c, e[k]);
        if constexpr (kExact) check = check + e[k];
      }
      if constexpr (K == 2) {
        const V less = e[0] - e[1], D = d[0] - d[1];
        rows::add_skl(pair, e[0], less, D);
        if constexpr (!kExact) {  // exact sums lose no digits in their differences
          plus(pair.gap, less);
          plus_product(pair.other, e[1], D);
        }
      }
    };
    const auto add_uniform = [&](const V* d, const V* e, const V& live) {
      for (int k = 0; k < K; ++k) rows::add_uniform(flat[k], e[k], d[k], live);
    };
    int64_t c = begin;
    for (; c + kWidth <= end; c += kWidth) {
      V d[K], e[K];
      for (int k = 0; k < K; ++k) {
        fetch_ahead(row, k, c);
        d[k] = finite(load(z[k] + c) - maximum[k]);
      }
      step(d, e, c);
      if (spread) add_uniform(d, e, V(S(1)));
    }
    if (c < end) {
      const int n = static_cast<int>(end - c);
      V d[K], e[K];
      for (int k = 0; k < K; ++k) {
        d[k] = finite(keep_first(load_first(z[k] + c, n, S(0)) - maximum[k], n, kNowhere));
      }
      step(d, e, c);
      if (spread) {
        for (int k = 0; k < K; ++k) d[k] = keep_first(d[k], n, S(0));
        add_uniform(d, e, keep_first(V(S(1)), n, S(0)));
      }
    }
    for (int k = 0; k < K; ++k) {
      Sum* s = out + k * kModelSums;
      model[k].mass.add_to(s[kMass]);
      model[k].moment.add_to(s[kMoment]);
      if (spread) {
        flat[k].spread.add_to(s[kSpread]);
        flat[k].excess.add_to(s[kExcess]);
        flat[k].lift.add_to(s[kLift]);
      }
      add_count(s[kLive], end - begin);
      if constexpr (kExact) {
        s[kBroken].fixed += any_nonzero(where_equal(check, check, V(S(0)), V(S(1))));
      }
    }
    if constexpr (K == 2) {
      Sum* s = out + K * kModelSums;
      pair.first.add_to(s[kFirst]);
      pair.second.add_to(s[kSecond]);
      if constexpr (!kExact) {
        pair.gap.add_to(s[kGap]);
        pair.other.add_to(s[kOther]);
      }
    }
  }

  // The row's scalars, broadcast; X is V in the sweep and S at the target.
  template <class X>
  struct Coefficients {
    X maximum[K], constant[K], slope[K], uniform[K];
    // The pair's scalars, for D = d_0 - d_1 and e_0 - e_1 in both models.
    X own[K], mean[K], shared[K], minus_other[K];

    explicit Coefficients(const RowView& row) {
      const auto cast = [](double x) { return X(static_cast<S>(x)); };
      for (int k = 0; k < K; ++k) {
        const auto& g = reinterpret_cast<const rows::ModelGradient*>(row.gradient)[k];
        maximum[k] = cast(row.maxima[k]);
        constant[k] = cast(g.constant + g.tempered_constant);
        slope[k] = cast(g.slope);
        uniform[k] = cast(g.uniform);
        const auto& partner =
            reinterpret_cast<const rows::PartnerGradient*>(row.partners)[k * K + (K - 1 - k)];
        const double sign = k == 0 ? 1.0 : -1.0;
        own[k] = cast(sign * partner.slope);
        mean[k] = cast(sign * partner.mean);
        shared[k] = cast(sign * partner.shared);
        minus_other[k] = cast(-partner.other);
      }
    }

    CK_HD void exponentials(const X* z, X* e) const {
      for (int k = 0; k < K; ++k) e[k] = rows::exp_nonpos(z[k] - maximum[k]);
    }

    CK_HD void gradients(const X* z, const X* e, X* g) const {
      using rows::max, rows::mul_add;
      X d[K];
      for (int k = 0; k < K; ++k) {
        d[k] = z[k] - maximum[k];
        if constexpr (kExact) {
          const X dead(-std::numeric_limits<S>::infinity());
          d[k] = where_equal(z[k], dead, X(S(0)), d[k]);
        }
      }
      for (int k = 0; k < K; ++k) {
        // With one model exact sums take rows of any reach.
        if constexpr (kExact && K == 1) d[k] = max(X(static_cast<S>(kWeightless)), d[k]);
        X inner = mul_add(slope[k], d[k], constant[k]), rest = uniform[k];
        if constexpr (K == 2) {
          inner = rows::add_to_inner(inner, d[0] - d[1] - mean[k], own[k]);
          rest = rows::add_to_rest(rest, e[0] - e[1], e[1 - k], shared[k], minus_other[k]);
        }
        g[k] = mul_add(e[k], inner, rest);
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
        _mm_sfence();  // orders the streamed stores before the ones that signal other threads
#endif
      }
    }
    c = full_vectors<false>(row, coefficients, c, end);
    if (c < end) partial_vector(row, coefficients, c, static_cast<int>(end - c));
    if (row.target >= begin && row.target < end) fix_target(row);
  }

  // The target's element, corrected in the compute dtype and rounded once.
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
