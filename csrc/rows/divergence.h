// One element of the divergences between two models i and j of the same row. e are exponentials of
// d = (logit - row maximum) / temperature, D = d_i - d_j; p = e / mass.
#pragma once

#include "math.h"

namespace ck {
inline namespace CK_ISA {
namespace rows {

// Symmetric KL: first = sum of e_i D, second = sum of (e_i - e_j) D, gap = sum of e_i - e_j, which
// is mass_i - mass_j; SKL = (second - first gap / mass_i) / mass_j. Models that nearly agree have
// small differences, and nothing large cancels.
// L1: first = sum of s e_i, second = sum of s e_j, gap = sum of s (p_i - p_j), which is the value;
// s = sign(p_i - p_j).
template <class A>
struct PairSums {
  A first, second, gap;
};

template <class A, class V>
CK_HD void add_skl(PairSums<A>& sums, V e_i, V less, V difference) {
  plus_product(sums.first, e_i, difference);
  plus_product(sums.second, less, difference);
}

template <class A, class V>
CK_HD void add_l1(PairSums<A>& sums, V e_i, V e_j, V less, V sign) {
  plus_product(sums.first, sign, e_i);
  plus_product(sums.second, sign, e_j);
  plus_product(sums.gap, sign, less);
}

// p_i - p_j, with the digits that exponentials of nearly equal models still have: the difference of
// these over the larger mass, and what the model of the smaller mass has more; the row's scalars
// are in `PairScalars`.
template <class V>
CK_HD V probability_difference(V e_i, V e_j, V shared, V more_i, V minus_more_j) {
  return mul_add(shared, e_i - e_j, mul_add(more_i, e_i, minus_more_j * e_j));
}

// One class of KL(q || p) = sum q (exp(D) - 1 - D), D = log p - log q: no term is negative, and
// where p is nearly q none is the difference of larger numbers. q is the teachers' mean softmax,
// below `smallest` as good as 0; log_p = d - log(mass) of the student.
template <class V>
CK_HD V kl_term(V p, V q, V log_p, V smallest) {
  const V D = log_p - log_pos(max(q, smallest));
  const V near = q * (D * D * exp_series<2>(D));
  const V far = (p - q) - q * D;
  const V without_q = p - zero_below(q, smallest, p);
  return zero_below(q, smallest, where_near(D, near, far)) + without_q;
}

// What symmetric KL adds to the gradient of a class of model i, away = D - mean and less = e_i - e_j
// seen from i; the row's scalars carry the weights. The product with e_i comes first, so that a
// class without weight adds 0 however large the slope.
template <class V>
CK_HD V add_pair_gradient(V rest, V e_i, V away, V less, V slope, V shared) {
  return mul_add(slope, e_i * away, mul_add(shared, less, rest));
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
