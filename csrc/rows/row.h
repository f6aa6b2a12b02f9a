// The scalars of one row, in float64: the loss terms from the row's sums, and the coefficients
// that the gradient sweep multiplies into each class. A few dozen operations per row.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "math.h"
#include "options.h"

namespace ck {
inline namespace CK_ISA {
namespace rows {

// Sums of one model over a row. d = logit - max over the classes whose logit is not -inf.
struct ModelSums {
  double mass;           // sum exp(d)
  double moment;         // sum exp(d) d
  double live;           // classes not at -inf
  double tempered_mass;  // sum exp(d / T)
  double spread;         // sum d
  double excess;         // sum (exp(d) - 1) d
  double lift;           // sum (exp(d) - 1) = mass - live
  double top_mass;       // the same over the k largest
  double top_moment;
  double top_spread;
  double top_excess;
  double top_lift;
  double weighted_spread;  // sum class_weight d
  double lost;             // classes at -inf whose weight is not 0
  double broken;           // not 0 if there was a NaN, which fixed point cannot represent
  // mass - 1 and top_mass - 1, in exact mode with more digits than the masses. Derived; the sweeps
  // compute only the members above.
  double tail, top_tail;
};

// Sums of one pair of models; see divergence.h. `mismatch` counts classes at -inf in only one.
struct PairSums64 {
  double first, second, gap, other, mismatch;
};

// The coefficients of p_i - p_j, see probability_difference() in divergence.h.
struct DifferenceScalars {
  double shared, more_i, minus_more_j;
};

// A pair's scalars in the sweep for L1: p_i > p_j where d_i - d_j > level.
struct PairScalars {
  double level;
  DifferenceScalars difference;
};

// One model's gradient at a class, before the divergence:
//   e (constant + slope d) + uniform [+ e (top_constant + top_slope d) + top_uniform in the top k]
//   - smoothing class_weight - target [at the target]
// and its divergence, f = exp(d / T), D = d - d_j: f tempered_constant + sum over models j of
//   slope_j f (D - mean_j) + shared_j (f - f_j) - other_j f_j     (symmetric KL)
//   -other_j f_j                                                  (cross entropy, distillation)
//   slope_j f (sign(p - p_j) - mean_j)                            (L1)
struct ModelGradient {
  double constant, slope, uniform;
  double top_constant, top_slope, top_uniform;
  double smoothing, target;
  double tempered_constant;
};

// The coefficients that partner j adds to model i; see above.
struct PartnerGradient {
  double slope, mean, shared, other;
};

CK_HD double log_or_nan(double x) { return x != x ? x : log_pos(x); }
CK_HD double log_mass(const ModelSums& s) {
  return s.tail != s.tail ? s.tail : log1p_nonneg(s.tail);
}
CK_HD double entropy(const ModelSums& s) { return log_mass(s) - s.moment / s.mass; }

CK_HD double top_count(const ModelSums& s, int64_t top_k) {
  return s.live < static_cast<double>(top_k) ? s.live : static_cast<double>(top_k);
}

// (1 - eps) w_y (lse - z_y) + eps / C sum_c w_c (lse - z_c), as torch's cross_entropy, except that
// a class of weight 0 adds 0 even if its logit is -inf.
CK_HD double cross_entropy(const ModelSums& s, double d_target, double target_weight,
                           double total_weight, double smoothing, double classes) {
  if (s.mass != s.mass) return s.mass;
  const double hard = target_weight == 0.0 ? 0.0 : target_weight * (log_mass(s) - d_target);
  if (smoothing == 0.0) return hard;
  if (s.lost > 0.0) return std::numeric_limits<double>::infinity();
  const double soft = (total_weight * log_mass(s) - s.weighted_spread) / classes;
  return (1.0 - smoothing) * hard + smoothing * soft;
}

// SKL(p, U) = E_p d - mean d of n classes. If the classes have similar weight, the two means nearly
// cancel; then sum (exp(d) - mass / n) d is more accurate.
CK_HD double uniform_skl(double mass, double moment, double spread, double excess, double lift,
                         double n) {
  return mass > 0.5 * n ? (excess - lift / n * spread) / mass : moment / mass - spread / n;
}

// H(p), or minus SKL(p, U): over all classes, or over the k largest.
CK_HD double regularizer(const ModelSums& s, const LossOptions& o) {
  const bool entropic = o.regularizer == Regularizer::kEntropy;
  if (!o.regularizes_top_k()) {
    return entropic ? entropy(s)
                    : -uniform_skl(s.mass, s.moment, s.spread, s.excess, s.lift, s.live);
  }
  const double k = top_count(s, o.top_k);
  if (o.renormalize_top_k) {
    if (!entropic) {
      return -uniform_skl(s.top_mass, s.top_moment, s.top_spread, s.top_excess, s.top_lift, k);
    }
    const double log_top_mass = s.top_tail != s.top_tail ? s.top_tail : log1p_nonneg(s.top_tail);
    return log_top_mass - s.top_moment / s.top_mass;
  }
  const double log_s = log_mass(s);
  if (entropic) return (log_s * s.top_mass - s.top_moment) / s.mass;
  const double shift = log_pos(s.live) - log_s;
  if (s.mass > 0.5 * s.live) {  // as in uniform_skl
    return (s.lift / s.live * (s.top_spread + k * shift) - (s.top_excess + shift * s.top_lift)) /
           s.mass;
  }
  return (s.top_spread + k * shift) / s.live - (s.top_moment + shift * s.top_mass) / s.mass;
}

// Adds the gradient of `weight` times the regulariser.
CK_HD void add_regularizer_gradient(ModelGradient& g, const ModelSums& s, const LossOptions& o,
                                    double weight) {
  const bool entropic = o.regularizer == Regularizer::kEntropy;
  if (!o.regularizes_top_k() || o.renormalize_top_k) {
    // dH/dz = -p (d - E_p d); d(-SKL)/dz = -p (d - E_p d) - p + 1/n, over n classes.
    const bool top = o.regularizes_top_k();
    const double mass = top ? s.top_mass : s.mass;
    const double mean = (top ? s.top_moment : s.moment) / mass;
    const double constant = weight * (mean - (entropic ? 0.0 : 1.0)) / mass;
    const double slope = -weight / mass;
    const double uniform = entropic ? 0.0 : weight / (top ? top_count(s, o.top_k) : s.live);
    (top ? g.top_constant : g.constant) += constant;
    (top ? g.top_slope : g.slope) += slope;
    (top ? g.top_uniform : g.uniform) += uniform;
    return;
  }
  // R = sum over the top k of r(log p), so dR/dz = r' [in the top k] - p sum r'.
  //   entropy: r' = -p (log p + 1);  minus SKL: r' = -p (log p + log n + 1) + 1/n.
  const double shift = 1.0 - log_or_nan(s.mass) + (entropic ? 0.0 : log_pos(s.live));
  const double uniform = entropic ? 0.0 : 1.0 / s.live;
  const double total =
      uniform * top_count(s, o.top_k) - (s.top_moment + shift * s.top_mass) / s.mass;
  g.top_slope -= weight / s.mass;
  g.top_constant -= weight * shift / s.mass;
  g.top_uniform += weight * uniform;
  g.constant -= weight * total / s.mass;
}

CK_HD void add_cross_entropy_gradient(ModelGradient& g, const ModelSums& s, double weight,
                                      double target_weight, double total_weight, double smoothing,
                                      double classes) {
  const double hard = weight * (1.0 - smoothing) * target_weight;
  const double soft = weight * smoothing / classes;
  g.constant += (hard + soft * total_weight) / s.mass;
  g.smoothing += soft;
  g.target += hard;
}

// Value of one pair's divergence. `first` already holds the KL to the teachers.
CK_HD double divergence(const PairSums64& pair, const ModelSums& i, const ModelSums& j,
                        const LossOptions& o) {
  double value;
  if (o.divergence == Divergence::kL1) {
    value = pair.gap;
  } else if (o.divergence == Divergence::kDistill) {
    value = pair.first;
  } else {
    value =
        (pair.second - pair.first * (pair.gap / i.tempered_mass)) / j.tempered_mass / o.temperature;
  }
  if (i.mass != i.mass) return i.mass;
  if (j.mass != j.mass) return j.mass;
  if (o.divergence == Divergence::kDistill && value != value) return value;  // a teacher's NaN
  if (pair.mismatch > 0.0 && o.divergence != Divergence::kL1) {
    return std::numeric_limits<double>::infinity();
  }
  return value < 0.0 ? 0.0 : value;  // rounding only: a divergence is never negative; NaN stays
}

// The coefficients of probability_difference(): the shared part is over the larger mass.
CK_HD DifferenceScalars difference_scalars(double mass_i, double mass_j, double gap) {
  const double more = gap / (mass_i * mass_j);
  return {1.0 / (mass_i < mass_j ? mass_j : mass_i), gap < 0.0 ? -more : 0.0,
          gap < 0.0 ? 0.0 : -more};
}

CK_HD PairScalars pair_scalars(double mass_i, double mass_j, double gap, double temperature) {
  return {temperature * (log_or_nan(mass_i) - log_or_nan(mass_j)),
          difference_scalars(mass_i, mass_j, gap)};
}

// A mean rounded to S, as the sweeps use it. The remainder matters where the difference from the
// mean is small.
template <class S>
CK_HD double rounded(double x) {
  return static_cast<double>(static_cast<S>(x));
}

// The gradient of weight * D_ij with respect to model i: adds to its constant and to the partner's
// scalars. `mean` = E_i[d_i - d_j] (E_i[sign] for L1) and gap = mass_i - mass_j, relative to i. S
// is the compute dtype of the sweeps.
template <class S>
CK_HD void add_divergence_gradient(ModelGradient& g, PartnerGradient& partner, double mass_i,
                                   double mass_j, double mean, double gap, double weight,
                                   const LossOptions& o) {
  const double w = weight / o.temperature;
  if (o.divergence == Divergence::kL1) {
    partner.slope += w / mass_i;
    partner.mean = mean;
    g.tempered_constant -= partner.slope * (mean - rounded<S>(mean));
    return;
  }
  if (o.divergence != Divergence::kSkl) {
    partner.other += w / mass_j;
    g.tempered_constant += w / mass_i;
    return;
  }
  const DifferenceScalars scalars = difference_scalars(mass_i, mass_j, gap);
  const double slope = w / (o.temperature * mass_i);
  partner.slope += slope;
  partner.mean = mean;
  partner.shared += w * scalars.shared;
  partner.other -= w * scalars.minus_more_j;
  g.tempered_constant += w * scalars.more_i - slope * (mean - rounded<S>(mean));
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
