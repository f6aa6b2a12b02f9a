// One element of softmax, entropy and the divergence to uniform. d = logit - row maximum,
// e = exp(d), p = e / mass.
#pragma once

#include "math.h"

namespace ck {
inline namespace CK_ISA {
namespace rows {

// What a row of one model comes down to:
//   CE = log(mass) - d_target,  H = log(mass) - moment / mass,
//   SKL(p, U) = moment / mass - spread / classes.
template <class V>
struct SoftmaxSums {
  V mass;    // sum of e
  V moment;  // sum of e d
  V spread;  // sum of d
};

template <class V>
CK_HD void add(SoftmaxSums<V>& sums, V e, V d) {
  sums.mass = sums.mass + e;
  sums.moment = mul_add(e, d, sums.moment);
}

template <class V>
CK_HD void add_spread(SoftmaxSums<V>& sums, V d) {
  sums.spread = sums.spread + d;
}

// Every softmax term's gradient has this shape in one row: e (constant + slope d) + uniform.
template <class V>
CK_HD V softmax_gradient(V e, V d, V constant, V slope, V uniform) {
  return mul_add(e, mul_add(slope, d, constant), uniform);
}

}  // namespace rows
}  // namespace CK_ISA
}  // namespace ck
