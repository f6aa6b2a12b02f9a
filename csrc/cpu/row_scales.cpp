// Exact mode: the scales of a row's sums, from its extremes and bounds.
#include <algorithm>
#include <cmath>

#include "../rows/constants.h"
#include "../rows/exact.h"
#include "row_work.h"

namespace ck {
namespace {

float scale_of(int places, int exponent) {
  return static_cast<float>(rows::power_of_two(places - exponent));
}

void set_pair(float* scales, int places, const rows::PairExponents& exponents) {
  scales[kFirst] = scale_of(places, exponents.first);
  scales[kSecond] = scale_of(places, exponents.second);
  scales[kGap] = scale_of(places, exponents.gap);
  scales[kOther] = scale_of(places, exponents.other);
}

}  // namespace

// The pair's bounds, from the fused or the general sweeps.
const double* RowWork::pair_bounds(int p) const {
  return kernels_ == &set_.general ? &bounds_[view_.models * kModelBounds + p * kPairBounds]
                                   : &maxima_[3 * view_.models];
}

// The largest |d| of a model; in the fused sweeps, the distance of its smallest logit.
double RowWork::reach(int k) const {
  if (kernels_ == &set_.general) return bounds_[k * kModelBounds + kReach];
  const double minus_least = maxima_[(in_.options.exact() ? 2 : 1) * view_.models + k];
  if (in_.dtype == DType::kFloat64) return maxima_[k] + minus_least;
  return static_cast<float>(maxima_[k]) + static_cast<float>(minus_least);
}

double RowWork::pair_reach(int p) const {
  const double* bounds = pair_bounds(p);
  return rows::pair_reach(bounds[kHighest], -bounds[kMinusLowest], in_.options.temperature);
}

void RowWork::choose_kernels() {
  if (kernels_ == &set_.general) return;
  constexpr double kFar = 0x1p60;
  const bool exact = in_.options.exact();
  bool far = exact && in_.pairs() > 0 && pair_reach(0) >= rows::kReach;
  if (!exact || in_.options.regularizer == Regularizer::kUniformSkl) {
    for (int k = 0; k < view_.models; ++k) far = far || reach(k) >= (exact ? rows::kReach : kFar);
  }
  if (far) use_general();
}

void RowWork::set_scales() {
  if (!in_.options.exact()) return;
  const int places = rows::places(in_.all_classes());
  for (int k = 0; k < view_.models; ++k) {
    const double* bound = &bounds_[k * kModelBounds];
    float* s = &scales_[k * kModelSums];
    const int peak = peak_exponent(k, 1.0f);
    peaks_[k] = peak < 0 ? 0.0f : 1.0f;
    s[kMass] = s[kMoment] = s[kTopMass] = s[kTopMoment] = scale_of(places, peak);
    s[kTemperedMass] = scale_of(places, 0);
    if (in_.options.regularizer == Regularizer::kUniformSkl) {
      s[kSpread] = scale_of(places, rows::reach_exponent(reach(k)));
      s[kExcess] = scale_of(places, rows::excess_exponent(reach(k)));
      s[kLift] = scale_of(places, rows::lift_exponent(reach(k)));
      s[kTopSpread] = scale_of(places, rows::reach_exponent(bound[kTopReach]));
      s[kTopExcess] = scale_of(places, rows::excess_exponent(bound[kTopReach]));
      s[kTopLift] = scale_of(places, rows::lift_exponent(bound[kTopReach]));
    }
    s[kWeightedSpread] = scale_of(places, rows::reach_exponent(bound[kWeightedReach]));
  }
  each_pair([&](int i, int j, int p) {
    const double *bound = pair_bounds(p), reach = pair_reach(p);
    set_pair(
        &scales_[view_.models * kModelSums + p * kPairSums], places,
        reach < rows::kReach
            ? rows::skl_exponents(reach, in_.options.temperature, pair_peak(i, j))
            : rows::far_exponents(bound[kFirstReach], bound[kSecondReach], bound[kOtherReach]));
  });
}

// Exponents of sums over probabilities.
void RowWork::set_second_scales() {
  if (!in_.options.exact()) return;
  const int64_t classes = in_.all_classes();
  const int places = rows::places(classes), first_pair = view_.models * kModelSums;
  each_pair([&](int i, int j, int p) {
    set_pair(&scales_[first_pair + p * kPairSums], places,
             rows::l1_exponents(std::fmax(inverse_masses_[i], inverse_masses_[j]),
                                pair_reach(p) / in_.options.temperature, pair_peak(i, j), classes));
  });
  if (in_.options.teachers == 0) return;
  int peak = rows::kLeastPeak;
  double log_masses = 0.0;
  for (int t = view_.students; t < view_.models; ++t) {
    peak = std::max(peak, pair_peak(0, t));
    log_masses = std::fmax(log_masses, std::abs(log_masses_[0] - log_masses_[t]));
  }
  const double* bound = pair_bounds(0);
  double reach = bound[kFirstReach] / in_.options.temperature + log_masses;
  if (bound[kOtherReach] > 0.0) reach += rows::bits_of(in_.options.teachers);
  const double untaught = bound[kSecondReach] * inverse_masses_[0];
  scales_[first_pair + kFirst] =
      scale_of(places, rows::kl_exponent(reach, log_masses, untaught, peak));
}

int RowWork::pair_peak(int i, int j) const {
  const auto inverse_temperature = static_cast<float>(1.0 / in_.options.temperature);
  const int peak_i = peak_exponent(i, inverse_temperature);
  const int peak_j = peak_exponent(j, inverse_temperature);
  const bool shares = peak_i < 0 && peak_j < 0 && shares_maximum(i, j);
  return rows::pair_peak(shares, peak_i, peak_j);
}

bool RowWork::shares_maximum(int i, int j) const {
  return in_.shard ? winners_[i] == winners_[j]
                   : kernels_->shares_maximum(view_, i, j, 0, view_.classes);
}

int RowWork::peak_exponent(int k, float inverse_temperature) const {
  const double gap = maxima_[view_.models + k] - maxima_[k];
  return rows::peak_exponent(rows::max(gap, double{kLowest<float>}) *
                             static_cast<double>(inverse_temperature));
}

}  // namespace ck
