// csrc/rows/superaccumulator.h on its own: no torch, no Python. Prints one line per check; exit
// status 1 if one fails.
//
// Sums of two numbers over the whole range against the machine's own addition, which rounds once;
// sums of many numbers of a smaller range against a 128-bit integer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "../../csrc/rows/superaccumulator.h"

namespace {

using ck::kSumLanes;
using ck::kSumWords;
using namespace ck::rows;

int failures = 0;

void expect(bool ok, const char* what) {
  std::printf("%s %s\n", ok ? "ok  " : "FAIL", what);
  failures += !ok;
}

template <class S>
bool same(S a, S b) {
  using Bits = typename Encoding<S>::Bits;
  return bits_as<Bits>(a) == bits_as<Bits>(b);
}

Superaccumulator sum_of(const std::vector<float>& x) {
  Superaccumulator sum{};
  for (const float number : x) sum.add(number);
  sum.normalize();
  return sum;
}

bool same_words(const Superaccumulator& a, const Superaccumulator& b) {
  bool same = true;
  for (int i = 0; i < kSumWords; ++i) same &= a.word[i] == b.word[i];
  return same;
}

// Pairs of random bits; half of them with exponents at most 30 apart, so that rounding matters.
bool pairs_round_as_the_machine_does() {
  std::mt19937 random(1);
  bool ok = true;
  for (int i = 0; i < 2000000; ++i) {
    const uint32_t bits = random();
    uint32_t other = random();
    if (i % 2 == 0) {
      const int exponent =
          static_cast<int>(bits >> 23 & 255) + static_cast<int>(other >> 23) % 61 - 30;
      other = (other & 0x807fffff) | static_cast<uint32_t>(std::min(std::max(exponent, 0), 255))
                                         << 23;
    }
    const float a = bits_as<float>(bits), b = bits_as<float>(other);
    const Superaccumulator sum = sum_of({a, b});
    const float narrow = a + b == 0 ? 0.0f : a + b;
    const double wide = static_cast<double>(a) + b == 0 ? 0.0 : static_cast<double>(a) + b;
    if (std::isnan(wide)) {
      ok &= same(sum.round<float>(), bits_as<float>(0x7fc00000u));
      ok &= same(sum.round<double>(), bits_as<double>(uint64_t{0x7ff8000000000000}));
    } else {
      ok &= same(sum.round<float>(), narrow) && same(sum.round<double>(), wide);
    }
  }
  return ok;
}

// Numbers with exponents in [-30, 30], in units of 2^-53: their sum fits 128 bits.
bool sums_round_as_integers_do() {
  std::mt19937 random(2);
  std::uniform_int_distribution<int> exponent(-30, 30);
  bool ok = true;
  for (int round = 0; round < 2000; ++round) {
    Superaccumulator sum{};
    __int128 units = 0;
    const int size = 1 + round % 100;
    for (int i = 0; i < size; ++i) {
      const float x = std::ldexp(static_cast<float>(static_cast<int32_t>(random()) >> 7) * 0x1p-24f,
                                 exponent(random));
      sum.add(x);
      units += static_cast<__int128>(std::ldexp(static_cast<double>(x), 60));
    }
    ok &= same(sum.round<float>(), std::ldexp(static_cast<float>(units), -60));
    ok &= same(sum.round<double>(), std::ldexp(static_cast<double>(units), -60));
  }
  return ok;
}

bool the_order_shows_nowhere() {
  std::mt19937 random(3);
  std::vector<float> x(1000);
  for (float& number : x) number = bits_as<float>(static_cast<uint32_t>(random()) & 0xbfffffff);
  const Superaccumulator whole = sum_of(x);
  bool ok = true;
  for (int i = 0; i < 20; ++i) {
    std::shuffle(x.begin(), x.end(), random);
    const auto middle = x.begin() + i * 50;
    Superaccumulator merged = sum_of({middle, x.end()});
    merged.merge(sum_of({x.begin(), middle}));
    merged.normalize();
    ok &= same_words(merged, whole) && same_words(sum_of(x), whole);
  }
  return ok;
}

bool wide_steps_are_many_additions() {
  bool ok = true;
  for (int place = 0; place < 254; ++place) {
    for (const int64_t value : {int64_t{1}, (int64_t{1} << 40) - 1, int64_t{0x12345678ab}}) {
      Superaccumulator up{}, down{};
      up.add_at(place, value);
      down.add_at(place, -value);
      const double want = std::ldexp(static_cast<double>(value), place - 149);
      ok &= same(up.round<double>(), want) && same(down.round<double>(), -want);
      up.merge(down);
      up.normalize();
      ok &= same_words(up, Superaccumulator{});
    }
  }
  return ok;
}

float rounded(const std::vector<float>& x) { return sum_of(x).round<float>(); }

}  // namespace

int main() {
  const float infinity = std::numeric_limits<float>::infinity();
  const float largest = std::numeric_limits<float>::max();
  const float smallest = std::numeric_limits<float>::denorm_min();
  const float nan = bits_as<float>(0x7fc00000u);
  expect(pairs_round_as_the_machine_does(), "a pair has the machine's sum, in float32 and float64");
  expect(sums_round_as_integers_do(), "a sum is an integer's, rounded once");
  expect(the_order_shows_nowhere(), "order and merging leave the words as they are");
  expect(wide_steps_are_many_additions(), "add_at takes 40 bits at every place");

  expect(same(rounded({}), 0.0f) && same(rounded({-0.0f, -0.0f}), 0.0f), "a sum of 0 is +0");
  expect(same(rounded({1.0f, 0x1p-24f}), 1.0f), "a tie goes to even");
  expect(same(rounded({1.0f, 0x1p-24f, smallest}), 1.0f + 0x1p-23f),
         "the smallest number tips a tie");
  expect(same(rounded({largest, 0x1p103f, -smallest}), largest), "below the last tie stays finite");
  expect(same(rounded({largest, 0x1p103f}), infinity), "the last tie is an infinity");
  expect(same(rounded({-largest, -largest}), -infinity), "beyond the range is an infinity");
  expect(same(rounded({largest, largest, -largest, -largest, smallest}), smallest),
         "what overflows on the way comes back");
  expect(sum_of({-largest, -largest}).round<double>() == -2.0 * largest,
         "float64 holds what float32 cannot");
  expect(same(rounded({infinity, -largest}), infinity) && same(rounded({-infinity}), -infinity),
         "an infinity stays");
  expect(same(rounded({infinity, -infinity}), nan) &&
             same(rounded({bits_as<float>(0xffffffffu), 1.0f}), nan),
         "NaN has one pattern");
  expect(sum_of({-smallest}).word[kSumLanes - 1] == -1, "the last lane has the sign");
  return failures != 0;
}
