// One row in the sweeps: its scalars, and the arithmetic between sweeps.
#pragma once

#include <cstdint>
#include <vector>

#include "../rows/row.h"
#include "kernels.h"
#include "loss.h"

namespace ck {

static_assert(sizeof(Sum) == sizeof(double));
static_assert(sizeof(rows::ModelSums) == kModelSums * sizeof(Sum));
static_assert(sizeof(rows::PairSums64) == kPairSums * sizeof(Sum));
static_assert(sizeof(rows::PairScalars) == kPairScalars * sizeof(double));
static_assert(sizeof(rows::ModelGradient) == kGradientScalars * sizeof(double));
static_assert(sizeof(rows::PartnerGradient) == kPartnerScalars * sizeof(double));

// Whether a call's options and strides allow the fused sweeps (cpu/fused.h).
bool folds_into_one_sweep(const LossInputs& inputs);

class RowWork {
 public:
  explicit RowWork(const LossInputs& inputs);

  // Lets the fused sweeps store the exponentials of the sums for the gradient, in kKeptBytes of
  // memory, aligned for vectors, that must outlive this object. Wider rows compute them twice:
  // fetching them back from the L2 cache takes as long.
  static constexpr int64_t kKeptBytes = 32 << 10;
  void keep_exponentials(void* memory);

  // Selects a row; false if it is ignored.
  bool start(int64_t row, const std::vector<void*>* gradients, bool stream);

  const RowView& view() const { return view_; }
  const Kernels& kernels() const { return *kernels_; }
  int sums_size() const { return static_cast<int>(sums_.size()); }
  double* maxima() { return maxima_.data(); }
  // Size of Kernels::maxima's output.
  int maxima_size() const { return static_cast<int>(maxima_.size()); }
  Sum* sums() { return sums_.data(); }
  double* bounds() { return bounds_.data(); }
  int bounds_size() const { return static_cast<int>(bounds_.size()); }

  // Loads the row's results from the merged tables of all shards, instead of running the sweeps.
  void take_tables(int64_t row);

  void clear_sums();
  void select_top_k();
  // After the maxima: rows with a class at -inf, or with two logits far apart, go to the general
  // kernel, because products may overflow and exact sums need other scales.
  void choose_kernels();
  // Whether the row's sums are scaled by its bounds, which the caller must then compute.
  bool needs_bounds() const { return in_.options.exact() && kernels_ == &set_.general; }
  void set_scales();
  // After the first sums; true if the row has a NaN and must be summed again by the general kernel.
  bool falls_back();
  void finish_sums();
  void prepare_second_sweep();
  void finish_second_sums();

  // [CE per student | R per student | D per pair], unweighted.
  void terms(double* out) const;
  // The row's reported terms; see LossInputs::reported_terms.
  void report(const double* terms, double* out) const;
  // Weight of the row's cross entropy; 0 without a target.
  double target_weight() const;
  // A model's logit of the target.
  double target_logit(int k) const;

  // weights: upstream gradient of each of terms().
  void set_gradient(const double* weights);

  void save(double* stats) const;
  void restore(const double* stats);

 private:
  rows::ModelSums& model(int k) { return reinterpret_cast<rows::ModelSums*>(sums_.data())[k]; }
  const rows::ModelSums& model(int k) const {
    return reinterpret_cast<const rows::ModelSums*>(sums_.data())[k];
  }
  rows::PairSums64& pair(int p) {
    return reinterpret_cast<rows::PairSums64*>(sums_.data() + view_.models * kModelSums)[p];
  }
  const rows::PairSums64& pair(int p) const { return const_cast<RowWork*>(this)->pair(p); }
  void use_general();
  void prepare_scalars();
  // Calls f(i, j, pair) for each pair of students.
  template <class F>
  void each_pair(F f) const {
    for (int i = 0, p = 0; i < view_.models && in_.options.teachers == 0 && in_.pairs() > 0; ++i) {
      for (int j = i + 1; j < view_.models; ++j, ++p) f(i, j, p);
    }
  }
  const double* pair_bounds(int p) const;
  double reach(int k) const;
  double pair_reach(int p) const;
  void set_second_scales();
  int pair_peak(int i, int j) const;
  bool shares_maximum(int i, int j) const;
  TopTwo top_two(int k) const;
  int peak_exponent(int k, float inverse_temperature) const;
  void make_real(int begin, int end);

  const LossInputs& in_;
  const KernelSet& set_;
  const Kernels* preferred_;  // fused if the options allow it
  const Kernels* kernels_;    // this row's
  double total_weight_;       // sum of class weights, for label smoothing
  int64_t target_;            // of the row, -1: none; view_.target is its index in the shard
  RowView view_;
  std::vector<Sum> sums_;
  std::vector<float> scales_;   // of each sum, 1 without exact mode
  std::vector<double> bounds_;  // exact mode: see kModelBounds
  std::vector<float> peaks_;    // of each model, see RowView
  std::vector<double> maxima_, thresholds_, inverse_masses_, log_masses_;
  std::vector<int64_t> last_ties_, column_strides_;
  std::vector<rows::PairScalars> pair_scalars_;
  std::vector<rows::ModelGradient> gradient_;
  std::vector<rows::PartnerGradient> partners_;  // students x models
  std::vector<const void*> logits_;
  std::vector<void*> gradients_;
  std::vector<double> heap_;
  // For rows in shards.
  std::vector<int64_t> winners_;  // per model: the class of the largest logit
  std::vector<double> target_logits_;
};

}  // namespace ck
