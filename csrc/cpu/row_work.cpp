#include "row_work.h"

#include <algorithm>
#include <cmath>

#include "../rows/constants.h"
#include "../rows/exact.h"
#include "../rows/superaccumulator.h"
#include "class_shard.h"

namespace ck {
namespace {

double sum_of_weights(const LossInputs& in) {
  double total = 0.0;
  rows::Superaccumulator exact{};
  for (int64_t c = 0; c < in.all_classes(); ++c) {
    in.options.exact() ? exact.add(static_cast<float>(in.weight_of(c)))
                       : void(total += in.weight_of(c));
  }
  return in.options.exact() ? exact.round<double>() : total;
}

// A class index stored as a float64; 0 if the number is not an index.
int64_t to_index(double x) { return std::abs(x) <= 0x1p53 ? static_cast<int64_t>(x) : 0; }

}  // namespace

bool folds_into_one_sweep(const LossInputs& in) {
  const LossOptions& o = in.options;
  const auto side_by_side = [](const Matrix& m) { return m.column_stride == 1; };
  return !in.shard && in.models() <= 2 && o.teachers == 0 && o.temperature == 1.0 &&
         !o.regularizes_top_k() && o.label_smoothing == 0.0 && !o.needs_second_sweep() &&
         std::all_of(in.logits.begin(), in.logits.end(), side_by_side);
}

RowWork::RowWork(const LossInputs& in)
    : in_(in),
      set_(kernel_set(in.isa, in.dtype, in.options.exact())),
      preferred_(folds_into_one_sweep(in) ? &set_.fused[in.models() - 1] : &set_.general),
      kernels_(preferred_),
      total_weight_(static_cast<double>(in.all_classes())),
      target_(-1),
      sums_(in.models() * kModelSums + pair_count(in.models(), in.options.teachers) * kPairSums),
      scales_(sums_.size(), 1.0f),
      bounds_(in.models() * kModelBounds + in.pairs() * kPairBounds),
      peaks_(in.models(), 1.0f),
      maxima_(in.options.exact() ? 3 * in.models() + kPairBounds : 2 * in.models()),
      thresholds_(in.models()),
      inverse_masses_(in.models()),
      log_masses_(in.models()),
      last_ties_(in.models()),
      pair_scalars_(in.pairs()),
      gradient_(in.students()),
      partners_(in.students() * in.models()),
      logits_(in.models()),
      gradients_(in.students()),
      heap_(in.options.regularizes_top_k() ? std::min(in.options.top_k, in.classes) : 0),
      winners_(in.shard ? in.models() : 0),
      target_logits_(in.shard ? in.students() : 0) {
  for (const Matrix& m : in.logits) column_strides_.push_back(m.column_stride);
  if (in.class_weight && in.options.label_smoothing != 0.0) total_weight_ = sum_of_weights(in);
  const void* weights = in.class_weight;
  if (in.shard && weights) weights = static_cast<const float*>(weights) + in.first_class();
  view_ = {&in.options,
           in.classes,
           in.models(),
           in.students(),
           logits_.data(),
           column_strides_.data(),
           0,
           gradients_.data(),
           weights,
           -1,
           false,
           nullptr,
           0,
           scales_.data(),
           peaks_.data(),
           maxima_.data(),
           thresholds_.data(),
           last_ties_.data(),
           inverse_masses_.data(),
           log_masses_.data(),
           reinterpret_cast<const double*>(pair_scalars_.data()),
           reinterpret_cast<const double*>(gradient_.data()),
           reinterpret_cast<const double*>(partners_.data())};
}

void RowWork::keep_exponentials(void* memory) {
  const int64_t size = in_.dtype == DType::kFloat64 ? 8 : 4;
  const int64_t lanes = kVectorBytes / size;
  const int64_t stride = (view_.classes + lanes - 1) / lanes * lanes;
  if (stride * size * view_.models > kKeptBytes) return;
  view_.exponentials = memory;
  view_.exponential_stride = stride;
}

bool RowWork::start(int64_t row, const std::vector<void*>* gradients, bool stream) {
  const int64_t size = element_size(in_.dtype);
  for (int k = 0; k < view_.models; ++k) {
    logits_[k] =
        static_cast<const char*>(in_.logits[k].data) + row * in_.logits[k].row_stride * size;
  }
  const bool ignored = in_.target && in_.target[row] == in_.options.ignore_index;
  if (gradients) {
    for (int k = 0; k < view_.students; ++k) {
      gradients_[k] = static_cast<char*>((*gradients)[k]) + row * view_.classes * size;
      if (ignored) std::fill_n(static_cast<char*>(gradients_[k]), view_.classes * size, 0);
    }
  }
  target_ = in_.target && !ignored ? in_.target[row] : -1;
  const int64_t place = target_ < 0 ? -1 : target_ - in_.first_class();
  view_.target = place >= 0 && place < view_.classes ? place : -1;
  view_.stream = stream;
  view_.next_row = row + 1 < in_.rows ? in_.logits[0].row_stride : 0;
  kernels_ = preferred_;
  return !ignored;
}

void RowWork::use_general() { kernels_ = &set_.general; }

void RowWork::take_tables(int64_t row) {
  const std::vector<const void*>& tables = in_.shard->tables;
  const auto of_row = [&](Stage stage) -> const Sum* {
    const size_t i = static_cast<size_t>(stage);
    return i < tables.size() ? static_cast<const Sum*>(tables[i]) + row * stage_width(in_, stage)
                             : nullptr;
  };
  const int models = view_.models, students = view_.students;
  if (const Sum* extremes = of_row(Stage::kExtremes)) {
    for (int k = 0; k < models; ++k, extremes += kExtremes) {
      maxima_[k] = extremes[0].real;
      maxima_[models + k] = extremes[1].real;
      winners_[k] = to_index(extremes[2].real);
    }
  }
  const Sum* largest = of_row(Stage::kTopK);
  for (int k = 0; largest && k < students && !heap_.empty(); ++k) {
    largest += 2 * in_.options.top_k;
    thresholds_[k] = largest[-2].real;
    last_ties_[k] = to_index(largest[-1].real) - in_.first_class();
  }
  if (const Sum* bounds = of_row(Stage::kBounds)) {
    for (double& bound : bounds_) bound = (bounds++)->real;
    set_scales();
  }
  const int first_pair = models * kModelSums;
  if (const Sum* sums = of_row(Stage::kSums)) {
    std::copy_n(sums, sums_.size(), sums_.begin());
    for (int k = 0; k < students; ++k) target_logits_[k] = sums[sums_.size() + k].real;
    finish_sums();
    if (in_.options.needs_second_sweep()) prepare_second_sweep();
  }
  if (const Sum* sums = of_row(Stage::kSecondSums); sums && in_.options.needs_second_sweep()) {
    std::copy_n(sums, sums_.size() - first_pair, sums_.begin() + first_pair);
    finish_second_sums();
  }
}

void RowWork::clear_sums() { std::fill(sums_.begin(), sums_.end(), Sum{}); }

void RowWork::make_real(int begin, int end) {
  if (!in_.options.exact()) return;
  for (int i = begin; i < end; ++i) {
    sums_[i].real = static_cast<double>(sums_[i].fixed) / static_cast<double>(scales_[i]);
  }
}

void RowWork::select_top_k() {
  if (heap_.empty()) return;
  for (int k = 0; k < view_.students; ++k) {
    kernels_->top_k(view_, k, in_.options.top_k, heap_.data(), &thresholds_[k], &last_ties_[k]);
  }
}

bool RowWork::falls_back() {
  if (kernels_ == &set_.general) return false;
  bool broken = false;
  for (int k = 0; k < view_.models; ++k) {
    broken = broken || (in_.options.exact() ? sums_[k * kModelSums + kBroken].fixed != 0
                                            : std::isnan(model(k).moment));
  }
  if (!broken) return false;
  use_general();
  clear_sums();
  return true;
}

void RowWork::finish_sums() {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  make_real(0, static_cast<int>(sums_.size()));
  for (int k = 0; k < view_.models; ++k) {
    rows::ModelSums& s = model(k);
    if (s.broken != 0.0) s.mass = nan;
    const double apart = 1.0 - peaks_[k];  // 1 if the largest class is handled separately
    s.tail = s.mass - (1.0 - apart);
    s.top_tail = s.top_mass - (1.0 - apart);
    s.mass += apart;
    s.top_mass += apart;
    // Every class is at -inf, or a NaN that the maximum ignored: the row is undefined.
    if (!(maxima_[k] > -std::numeric_limits<double>::infinity()) || std::isnan(s.mass)) {
      s.mass = s.moment = s.top_mass = s.tempered_mass = s.tail = s.top_tail = nan;
    }
    if (in_.options.temperature == 1.0) s.tempered_mass = s.mass;
  }
  const bool exact = in_.options.exact(), tempers = in_.options.temperature != 1.0;
  each_pair([&](int i, int j, int p) {
    if (!exact) return;
    if (pair_reach(p) < rows::kReach) pair(p).other = pair(p).first - pair(p).second;
    pair(p).gap =
        tempers ? model(i).tempered_mass - model(j).tempered_mass : model(i).tail - model(j).tail;
  });
}

void RowWork::finish_second_sums() {
  if (!in_.options.exact()) return;
  make_real(view_.models * kModelSums, static_cast<int>(sums_.size()));
  // Fixed point cannot represent NaN: propagate it from the masses.
  for (int t = view_.students; t < view_.models; ++t) pair(0).first += model(t).mass * 0.0;
}

void RowWork::prepare_scalars() {
  for (int k = 0; k < view_.models; ++k) {
    inverse_masses_[k] = 1.0 / model(k).tempered_mass;
    log_masses_[k] = rows::log_or_nan(model(k).tempered_mass);
  }
  if (in_.options.divergence != Divergence::kL1) return;
  each_pair([&](int i, int j, int p) {
    pair_scalars_[p] = rows::pair_scalars(model(i).tempered_mass, model(j).tempered_mass,
                                          pair(p).gap, in_.options.temperature);
  });
}

void RowWork::prepare_second_sweep() {
  prepare_scalars();
  set_second_scales();
  std::fill(sums_.begin() + view_.models * kModelSums, sums_.end(), Sum{});
}

double RowWork::target_weight() const { return target_ < 0 ? 0.0 : in_.weight_of(target_); }

double RowWork::target_logit(int k) const {
  return in_.shard ? target_logits_[k] : kernels_->logit(view_, k, view_.target);
}

TopTwo RowWork::top_two(int k) const {
  if (in_.shard) return {maxima_[k], maxima_[view_.models + k], winners_[k]};
  TopTwo top;
  kernels_->top_two(view_, k, &top);
  return top;
}

void RowWork::terms(double* out) const {
  const LossOptions& o = in_.options;
  const int students = view_.students;
  for (int k = 0; k < students; ++k) {
    const rows::ModelSums& s = model(k);
    out[k] = 0.0;
    if (target_ >= 0) {
      const double z = target_logit(k), away = z - maxima_[k];
      const double lowest = in_.dtype == DType::kFloat64 ? kLowest<double> : kLowest<float>;
      const double d = z == -std::numeric_limits<double>::infinity() ? z : rows::max(away, lowest);
      out[k] = rows::cross_entropy(s, d, target_weight(), total_weight_, o.label_smoothing,
                                   static_cast<double>(in_.all_classes()));
    }
    out[students + k] = o.regularizer == Regularizer::kNone ? 0.0 : rows::regularizer(s, o);
  }
  double* divergences = out + 2 * students;
  const int pairs = in_.pairs();
  if (pairs == 0) {
    std::fill(divergences, out + in_.row_terms(), 0.0);
  } else if (o.teachers > 0) {
    divergences[0] = rows::divergence(pair(0), model(0), model(0), o);
  } else {
    for (int i = 0, p = 0; i < view_.models; ++i) {
      for (int j = i + 1; j < view_.models; ++j, ++p) {
        divergences[p] = rows::divergence(pair(p), model(i), model(j), o);
      }
    }
  }
}

void RowWork::report(const double* terms, double* out) const {
  const int students = view_.students;
  double *accuracy = out + 2 * students, *confidence = out + 3 * students,
         *entropy = out + 4 * students, *divergence = out + 5 * students;
  const int pairs = in_.row_terms() - 2 * students;
  std::copy_n(terms, 2 * students, out);
  std::copy_n(terms + 2 * students, pairs, divergence);
  // A row with a NaN has no prediction.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  int64_t winner = -1;
  double agree = 1.0;
  for (int k = 0; k < view_.models; ++k) {
    const TopTwo top = top_two(k);
    const bool broken = std::isnan(model(k).mass);
    if (broken) agree = nan;
    if (k > 0 && top.index != winner) agree *= 0.0;
    winner = top.index;
    if (k >= students) continue;
    accuracy[k] = broken ? nan : top.index == target_;
    confidence[k] = (1.0 - rows::exp_nonpos(top.second - top.first)) / model(k).mass;
    entropy[k] = rows::entropy(model(k));
  }
  divergence[pairs] = agree;
}

void RowWork::set_gradient(const double* weights) {
  const LossOptions& o = in_.options;
  const int students = view_.students, models = view_.models;
  std::fill(partners_.begin(), partners_.end(), rows::PartnerGradient{});
  for (int k = 0; k < students; ++k) {
    rows::ModelGradient& g = gradient_[k] = {};
    if (target_ >= 0 && (weights[k] != 0.0 || o.ce_weight != 0.0)) {
      rows::add_cross_entropy_gradient(g, model(k), weights[k], target_weight(), total_weight_,
                                       o.label_smoothing, static_cast<double>(in_.all_classes()));
    }
    if (o.regularizer != Regularizer::kNone && weights[students + k] != 0.0) {
      rows::add_regularizer_gradient(g, model(k), o, weights[students + k]);
    }
  }
  // An undefined row gets NaN gradients, even where all weights are 0.
  for (int k = 0; k < students; ++k) {
    if (std::isnan(model(k).mass)) gradient_[k].constant = model(k).mass;
  }
  if (in_.pairs() == 0) return;
  const double* divergence_weights = weights + 2 * students;
  const auto couple = [&](int i, int j, double mean, double gap, double weight) {
    const auto add = in_.dtype == DType::kFloat64 ? rows::add_divergence_gradient<double>
                                                  : rows::add_divergence_gradient<float>;
    add(gradient_[i], partners_[i * models + j], model(i).tempered_mass, model(j).tempered_mass,
        mean, gap, weight, o);
  };
  for (int t = students; t < models && divergence_weights[0] != 0.0; ++t) {
    couple(0, t, 0.0, 0.0, divergence_weights[0] / o.teachers);
  }
  each_pair([&](int i, int j, int p) {
    if (divergence_weights[p] == 0.0) return;
    const bool skl = o.divergence == Divergence::kSkl;
    double mean_i = pair(p).first / model(i).tempered_mass;
    double mean_j = -(skl ? pair(p).other : pair(p).second) / model(j).tempered_mass;
    // The gradient of an infinite divergence is NaN.
    if (skl && pair(p).mismatch > 0.0) mean_i = mean_j = std::numeric_limits<double>::quiet_NaN();
    couple(i, j, mean_i, pair(p).gap, divergence_weights[p]);
    couple(j, i, mean_j, -pair(p).gap, divergence_weights[p]);
  });
}

void RowWork::save(double* stats) const {
  const bool top = in_.options.regularizes_top_k();
  *stats++ = kernels_ == &set_.general;
  for (int k = 0; k < view_.models; ++k) {
    const rows::ModelSums& s = model(k);
    *stats++ = maxima_[k];
    *stats++ = s.mass;
    *stats++ = top ? s.top_moment : s.moment;
    *stats++ = s.live;
    if (in_.options.temperature != 1.0) *stats++ = s.tempered_mass;
    if (top) {
      *stats++ = thresholds_[k];
      *stats++ = static_cast<double>(last_ties_[k]);
      *stats++ = s.top_mass;
    }
  }
  const bool skl = in_.options.divergence == Divergence::kSkl;
  if (!skl && in_.options.divergence != Divergence::kL1) return;
  for (int p = 0; p < in_.pairs(); ++p) {
    const bool infinite = pair(p).mismatch > 0.0 && skl;
    *stats++ = infinite ? std::numeric_limits<double>::quiet_NaN() : pair(p).first;
    *stats++ = skl ? pair(p).other : pair(p).second;
    if (skl) *stats++ = pair(p).gap;
  }
}

void RowWork::restore(const double* stats) {
  clear_sums();
  if (*stats++ != 0.0) use_general();
  const bool top = in_.options.regularizes_top_k();
  for (int k = 0; k < view_.models; ++k) {
    rows::ModelSums& s = model(k);
    maxima_[k] = *stats++;
    s.mass = *stats++;
    (top ? s.top_moment : s.moment) = *stats++;
    s.live = *stats++;
    s.tempered_mass = in_.options.temperature != 1.0 ? *stats++ : s.mass;
    if (top) {
      thresholds_[k] = *stats++;
      last_ties_[k] = to_index(*stats++);
      s.top_mass = *stats++;
    }
  }
  const bool skl = in_.options.divergence == Divergence::kSkl;
  const bool saves_pairs = skl || in_.options.divergence == Divergence::kL1;
  for (int p = 0; p < in_.pairs() && saves_pairs; ++p) {
    pair(p).first = *stats++;
    (skl ? pair(p).other : pair(p).second) = *stats++;
    if (skl) pair(p).gap = *stats++;
    pair(p).mismatch = std::isnan(pair(p).first) ? 1.0 : 0.0;
  }
  prepare_scalars();
}

int LossInputs::stats_width() const {
  const int of_pair = options.divergence == Divergence::kSkl  ? 3
                      : options.divergence == Divergence::kL1 ? 2
                                                              : 0;
  return 1 + models() * (4 + (options.temperature != 1.0) + 3 * options.regularizes_top_k()) +
         of_pair * pairs();
}

}  // namespace ck
