// One element of softmax, entropy and the divergence to uniform. d = logit - row maximum,
// e = exp(d), p = e / mass.
#pragma once

#include "math.h"

namespace ck {
inline namespace CK_ISA {
namespace rows {

// The sums to which a row of one model reduces:
//   CE = log(mass) - d_target,  H = log(mass) - moment / mass,
//   SKL(p, U) = moment / mass - spread / classes; see row.h for rows that are nearly flat.
// A is the accumulator type: V itself, or fixed point.
template <class A>
struct SoftmaxSums {
  A mass;    // sum of e
  A moment;  // sum of e d
};

template <class A, class V>
CK_HD void add(SoftmaxSums<A>& sums, V e, V d) {
  plus(sums.mass, e);
  plus_product(sums.moment, e, d);
}

// Further sums for SKL(p, U). B is the accumulator type for numbers as large as d.
template <class A, class B>
struct UniformSums {
  B spread;  // sum of d
  A excess;  // sum of (e - 1) d
  A lift;    // sum of e - 1
};

// `live` is 1, or 0 for an excluded class, whose e and d are 0.
template <class A, class B, class V>
CK_HD void add_uniform(UniformSums<A, B>& sums, V e, V d, V live) {
  const V lift = e - live;
  plus(sums.spread, d);
  plus_product(sums.excess, lift, d);
  plus(sums.lift, lift);
}

// Every softmax term's gradient has this shape in one row: e (constant + slope d) + uniform.
template <class V>
CK_HD V softmax_gradient(V e, V d, V constant, V slope, V uniform) {
  return mul_add(e, mul_add(slope, d, constant), uniform);
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
