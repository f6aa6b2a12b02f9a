// One element of the divergences between two models i and j of the same row. e are exponentials of
// d = (logit - row maximum) / temperature, D = d_i - d_j; p = e / mass.
#pragma once

#include "math.h"

namespace ck {
inline namespace CK_ISA {
namespace rows {

// Symmetric KL: the two log masses cancel, SKL = first / mass_i - second / mass_j.
// L1: first = sum of s p_i, second = sum of s p_j with s = sign(p_i - p_j); L1 = first - second.
template <class A>
struct PairSums {
  A first, second;
};

template <class A, class V>
CK_HD void add_skl(PairSums<A>& sums, V e_i, V e_j, V difference) {
  plus_product(sums.first, e_i, difference);
  plus_product(sums.second, e_j, difference);
}

template <class A, class V>
CK_HD void add_l1(PairSums<A>& sums, V p_i, V p_j, V sign) {
  plus_product(sums.first, sign, p_i);
  plus_product(sums.second, sign, p_j);
}

// KL(q || p) with q the teachers' mean softmax; 0 log 0 = 0. `log_p` = d - log(mass) of the
// student.
template <class V>
CK_HD V kl_term(V q, V log_p, V smallest) {
  return q * zero_below(q, smallest, log_pos(max(q, smallest)) - log_p);
}

// Gradient of one class of model i under two coupled models; the row's scalars carry the weights:
// e_i (constant + slope_i d_i + slope_j d_j) + uniform - other e_j.
template <class V>
CK_HD V pair_gradient(V e_i, V e_j, V d_i, V d_j, V constant, V slope_i, V slope_j, V uniform,
                      V minus_other) {
  const V inner = mul_add(slope_j, d_j, mul_add(slope_i, d_i, constant));
  return mul_add(e_i, inner, mul_add(minus_other, e_j, uniform));
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
