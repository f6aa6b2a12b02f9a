// One element of the divergences between two models i and j of the same row. e are exponentials of
// d = (logit - row maximum) / temperature, D = d_i - d_j; p = e / mass.
#pragma once

#include "math.h"

namespace ck {
inline namespace CK_ISA {
namespace rows {

// Symmetric KL: first = sum of e_i D, other = sum of e_j D, second = sum of (e_i - e_j) D and gap =
// sum of e_i - e_j. The first two give the means of D, and SKL = (second - first gap / mass_i) /
// mass_j: if the models nearly agree, the differences are small and nothing large cancels.
// L1: first = sum of s e_i, second = sum of s e_j, gap = sum of s (p_i - p_j), which is the value;
// s = sign(p_i - p_j).
template <class A>
struct PairSums {
  A first, second, gap, other;
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

// p_i - p_j, without cancellation for nearly equal models: the difference of the exponentials over
// the larger mass, plus a correction for the model with the smaller mass; the row's scalars are in
// `PairScalars`.
template <class V>
CK_HD V probability_difference(V e_i, V e_j, V shared, V more_i, V minus_more_j) {
  return mul_add(shared, e_i - e_j, mul_add(more_i, e_i, minus_more_j * e_j));
}

// One class of KL(q || p) = sum q (exp(D) - 1 - D), D = log p - log q: no term is negative, and
// none is a difference of large numbers if p is nearly q. q is the teachers' mean softmax, treated
// as 0 below `smallest`; log_p = d - log(mass) of the student.
template <class V>
CK_HD V kl_term(V p, V q, V log_p, V smallest) {
  const V D = log_p - log_pos(max(q, smallest));
  const V near = q * (D * D * exp_series(D));
  const V far = (p - q) - q * D;
  const V without_q = p - zero_below(q, smallest, p);
  return zero_below(q, smallest, where_near(D, near, far)) + without_q;
}

// A partner's contribution to the gradient of a class of model i, e_i inner + rest; `away` =
// D - mean (L1: sign - mean) and less = e_i - e_j are relative to i, and the row's scalars include
// the weights.
template <class V>
CK_HD V add_to_inner(V inner, V away, V slope) {
  return mul_add(slope, away, inner);
}
template <class V>
CK_HD V add_to_rest(V rest, V less, V e_j, V shared, V minus_other) {
  return mul_add(shared, less, mul_add(minus_other, e_j, rest));
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
