// csrc/rows on its own: no torch, no Python. Prints one line per check that fails; exit status 1
// then.
//
// Accuracy of exp and log over every float32 argument in range (every n-th with an argument n),
// float64 samples, and the row formulas against long double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "../../csrc/rows/divergence.h"
#include "../../csrc/rows/row.h"
#include "../../csrc/rows/softmax.h"
#include "../../csrc/rows/topk.h"

namespace {

using namespace ck::rows;

int failures = 0;

void expect(bool ok, const char* what, double got, double bound) {
  std::printf("%s %s: %.4g (bound %.4g)\n", ok ? "ok  " : "FAIL", what, got, bound);
  failures += !ok;
}

template <class S>
double ulps(S got, long double want) {
  const S rounded = static_cast<S>(want);
  const S next = std::nextafter(rounded, std::numeric_limits<S>::infinity());
  return static_cast<double>(std::fabs((static_cast<long double>(got) - want) / (next - rounded)));
}

// Every `step`-th float in [low, 0], by its bits.
double exp_error_float(uint32_t step) {
  double worst = 0.0;
  const uint32_t end = bits_as<uint32_t>(-87.0f);
  for (uint32_t bits = 0x80000000u; bits <= end; bits += step) {
    const float d = bits_as<float>(bits);
    worst = std::fmax(worst, ulps(exp_nonpos(d), static_cast<long double>(std::exp(double(d)))));
  }
  return worst;
}

double log_error_float(uint32_t step) {
  double worst = 0.0;
  for (uint32_t bits = 0x00800000u; bits < 0x7f800000u; bits += step) {
    const float x = bits_as<float>(bits);
    const double want = std::log(double(x));
    if (want != 0.0) worst = std::fmax(worst, ulps(log_pos(x), want));
  }
  return worst;
}

double exp_error_double() {
  double worst = 0.0;
  for (double d = 0.0; d > -708.0; d -= 0.00137) {
    worst = std::fmax(worst, ulps(exp_nonpos(d), std::exp(static_cast<long double>(d))));
  }
  return worst;
}

double log_error_double() {
  double worst = 0.0;
  for (double x = 1e-300; x < 1e300; x *= 1.00931) {
    worst = std::fmax(worst, ulps(log_pos(x), std::log(static_cast<long double>(x))));
  }
  return worst;
}

// Entropy and symmetric KL of two small rows, from the sums and from the definition.
double row_error() {
  constexpr int kClasses = 7;
  const double a[kClasses] = {0.0, -1.0, -0.3, -4.0, -2.5, -0.01, -9.0};
  const double b[kClasses] = {-2.0, 0.0, -0.7, -1.0, -3.5, -1.01, -0.2};
  ModelSums s_a{}, s_b{};
  ck::rows::PairSums<double> pair{};
  SoftmaxSums<double> m_a{}, m_b{};
  for (int c = 0; c < kClasses; ++c) {
    const double e_a = exp_nonpos(a[c]), e_b = exp_nonpos(b[c]);
    add(m_a, e_a, a[c]);
    add(m_b, e_b, b[c]);
    add_skl(pair, e_a, e_a - e_b, a[c] - b[c]);
    pair.gap += e_a - e_b;
  }
  s_a.mass = s_a.tempered_mass = m_a.mass, s_a.moment = m_a.moment, s_a.live = kClasses;
  s_b.mass = s_b.tempered_mass = m_b.mass, s_b.moment = m_b.moment, s_b.live = kClasses;
  s_a.tail = m_a.mass - 1.0, s_b.tail = m_b.mass - 1.0;
  long double h = 0, skl = 0;
  for (int c = 0; c < kClasses; ++c) {
    const long double p = std::exp(static_cast<long double>(a[c])) / m_a.mass;
    const long double q = std::exp(static_cast<long double>(b[c])) / m_b.mass;
    h -= p * std::log(p);
    skl += (p - q) * std::log(p / q);
  }
  ck::LossOptions options{};
  options.divergence = ck::Divergence::kSkl;
  options.temperature = 1.0;
  const double got = divergence({pair.first, pair.second, pair.gap, 0.0, 0.0}, s_a, s_b, options);
  return std::fmax(std::fabs(double(entropy(s_a) - h)), std::fabs(double(got - skl)));
}

}  // namespace

int main(int argc, char** argv) {
  const uint32_t step = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : 1;
  const auto below = [](const char* what, double got, double bound) {
    expect(got <= bound, what, got, bound);
  };
  // Without fma a polynomial rounds twice a step; the float64 of a row's scalars always does.
  const double exp_bound = 1.25;
#if defined(__FMA__)
  below("exp float32, ulp", exp_error_float(step), 1.0);
#else
  below("exp float32, ulp", exp_error_float(step), exp_bound);
#endif
  below("log float32, ulp", log_error_float(step), 1.0);
  below("exp float64, ulp", exp_error_double(), exp_bound);
  below("log float64, ulp", log_error_double(), 1.0);
  below("entropy and symmetric KL of a row", row_error(), 1e-15);

  const float infinity = std::numeric_limits<float>::infinity();
  expect(exp_nonpos(0.0f) == 1.0f, "exp(0) is 1", exp_nonpos(0.0f), 1);
  expect(exp_nonpos(-infinity) == 0.0f, "exp(-inf) is 0", exp_nonpos(-infinity), 0);
  expect(exp_nonpos(-87.1f) == 0.0f, "exp below -87 is 0", exp_nonpos(-87.1f), 0);
  expect(std::isnan(exp_nonpos(std::nanf(""))), "exp(nan) is nan", 0, 0);
  expect(std::isnan(log_or_nan(std::nan(""))), "log(nan) is nan", 0, 0);
  expect(in_top_k(2.0f, 9, 1.0f, 3) && in_top_k(1.0f, 3, 1.0f, 3) && !in_top_k(1.0f, 4, 1.0f, 3),
         "ties of the top k go to the lowest index", 0, 0);
  return failures != 0;
}
