// Instantiates csrc/rows for a GPU, one thread per row, to check that the headers compile for the
// device. The tests compile it and check registers and spills; nothing links it.
#include <cstdint>

#include "../rows/divergence.h"
#include "../rows/exact.h"
#include "../rows/row.h"
#include "../rows/softmax.h"
#include "../rows/superaccumulator.h"
#include "../rows/topk.h"

namespace {

using namespace ck;
using namespace ck::rows;

template <class S>
struct Sums {
  SoftmaxSums<S> model[2];
  UniformSums<S, S> flat;
  rows::PairSums<S> skl, l1;
  S kl, top;
};

template <class S>
__device__ S row_max(const S* z, int64_t classes) {
  S best = z[0];
  for (int64_t c = 1; c < classes; ++c) best = rows::max(best, z[c]);
  return best;
}

template <class S>
__device__ Sums<S> row_sums(const S* a, const S* b, S max_a, S max_b, int64_t classes,
                            int64_t last_tie) {
  Sums<S> s{};
  for (int64_t c = 0; c < classes; ++c) {
    const S d_a = a[c] - max_a, d_b = b[c] - max_b;
    const S e_a = exp_nonpos(d_a), e_b = exp_nonpos(d_b);
    add(s.model[0], e_a, d_a);
    add(s.model[1], e_b, d_b);
    add_uniform(s.flat, e_a, d_a, S(1));
    add_skl(s.skl, e_a, e_a - e_b, d_a - d_b);
    s.skl.gap += e_a - e_b;
    const S less = probability_difference(e_a, e_b, S(0.5), S(0.25), S(0));
    add_l1(s.l1, e_a, e_b, less, S(e_a > e_b) - S(e_a < e_b));
    s.kl += kl_term(e_b, e_a, d_b, S(1e-30));
    s.top += in_top_k(a[c], c, max_a, last_tie) ? e_a : S(0);
  }
  return s;
}

template <class S>
__global__ void row_pair(const S* a, const S* b, S* grad_a, S* grad_b, double* loss,
                         int64_t classes, int64_t target, LossOptions options) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  a += row * classes, b += row * classes, grad_a += row * classes, grad_b += row * classes;
  const S max_a = row_max(a, classes), max_b = row_max(b, classes);
  const Sums<S> s = row_sums(a, b, max_a, max_b, classes, int64_t{0});
  const double n = double(classes);
  ModelSums m_a{}, m_b{};
  m_a.mass = m_a.tempered_mass = s.model[0].mass, m_a.moment = s.model[0].moment;
  m_a.spread = s.flat.spread, m_a.excess = s.flat.excess, m_a.lift = s.flat.lift;
  m_a.live = n, m_a.top_mass = m_a.top_moment = m_a.top_spread = s.top;
  m_a.tail = s.model[0].mass - S(1), m_a.top_tail = s.top - S(1);
  m_b.mass = m_b.tempered_mass = s.model[1].mass, m_b.moment = s.model[1].moment;
  m_b.live = n, m_b.tail = s.model[1].mass - S(1);
  PairSums64 pair{};
  pair.first = s.skl.first, pair.second = s.skl.second, pair.gap = s.skl.gap;
  loss[row] = cross_entropy(m_a, double(a[target] - max_a), 1.0, n, options.label_smoothing, n) +
              regularizer(m_a, options) + divergence(pair, m_a, m_b, options) + s.kl + s.l1.gap;

  ModelGradient g{};
  PartnerGradient partner{};
  add_cross_entropy_gradient(g, m_a, 1.0, 1.0, n, options.label_smoothing, n);
  add_regularizer_gradient(g, m_a, options, 1.0);
  add_divergence_gradient<S>(g, partner, m_a.mass, m_b.mass, pair.first / m_a.mass, pair.gap, 1.0,
                             options);
  for (int64_t c = 0; c < classes; ++c) {
    const S d_a = a[c] - max_a, d_b = b[c] - max_b;
    const S e_a = exp_nonpos(d_a), e_b = exp_nonpos(d_b);
    const S inner = add_to_inner(mul_add(S(g.slope), d_a, S(g.constant)),
                                 d_a - d_b - S(partner.mean), S(partner.slope));
    grad_a[c] =
        mul_add(e_a, inner,
                add_to_rest(S(g.uniform), e_a - e_b, e_b, S(partner.shared), S(-partner.other)));
    grad_b[c] = softmax_gradient(e_b, d_b, S(g.top_constant), S(g.top_slope), S(g.top_uniform));
  }
}

template __global__ void row_pair<float>(const float*, const float*, float*, float*, double*,
                                         int64_t, int64_t, LossOptions);
template __global__ void row_pair<double>(const double*, const double*, double*, double*, double*,
                                          int64_t, int64_t, LossOptions);

// Entropy and its gradient in exact mode: sums in fixed point, scalars in float64.
template <class S>
__global__ void exact_entropy(const S* z, S* gradient, S* value, int64_t classes) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  z += row * classes, gradient += row * classes;
  const float maximum = row_max(z, classes);
  float second = -INFINITY;
  for (int64_t c = 0; c < classes; ++c) {
    if (z[c] < maximum) second = rows::max(second, z[c]);
  }
  const int bits = peak_exponent(double(second) - double(maximum));
  const double unit = power_of_two(places(classes) - bits), apart = bits < 0 ? 1.0 : 0.0;
  int64_t mass = 0, moment = 0, spread = 0;
  const float reach = float(power_of_two(places(classes) - reach_exponent(double(-second))));
  for (int64_t c = 0; c < classes; ++c) {
    const float d = z[c] - maximum;
    const float e = d == 0.0f && bits < 0 ? 0.0f : exp_nonpos(d) * float(unit);
    mass += static_cast<int64_t>(e);
    moment += static_cast<int64_t>(e * d);
    spread += static_cast<int64_t>(d * reach);
  }
  ModelSums s{};
  s.tail = double(mass) / unit + apart - 1.0;
  s.mass = double(mass) / unit + apart;
  s.moment = double(moment) / unit;
  value[row] = canonical(float(entropy(s) + double(spread) / double(reach)));
  for (int64_t c = 0; c < classes; ++c) {
    const float d = z[c] - maximum;
    gradient[c] =
        canonical(softmax_gradient(exp_nonpos(d), d, float(s.moment), float(s.mass), 0.0f));
  }
}

template __global__ void exact_entropy<float>(const float*, float*, float*, int64_t);

// Each thread sums consecutive numbers; returns the sum so far, and its value in S.
template <class S>
__global__ void sum_exactly(const float* x, int64_t size, Superaccumulator* sums, S* values) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  Superaccumulator sum{};
  for (int64_t i = 0; i < size; ++i) sum.add(x[thread * size + i]);
  sum.merge(sums[thread]);
  sum.normalize();
  sums[thread] = sum;
  values[thread] = sum.round<S>();
}

template __global__ void sum_exactly<float>(const float*, int64_t, Superaccumulator*, float*);
template __global__ void sum_exactly<double>(const float*, int64_t, Superaccumulator*, double*);

}  // namespace
