// Natural logarithms of vectors of floats and of doubles. As vec.h, on which it stands: only for files compiled once
// per instruction set, internal linkage, nothing of std::.
#pragma once
#include "vec.h"

namespace fuserl {
namespace {

// log(u) + lost for normal u, to 1 ulp: the mantissa's logarithm by a series in f / (2 + f).
FUSERL_INLINE Floats log_with(Floats u, Floats lost) {
  constexpr float ln2 = 6.9313812256e-01f, ln2_rest = 9.0580006145e-06f;
  const Ints bits = (Ints)as_words(u) - 0x3f3504f3;
  const Ints exponent = bits >> 23;
  const Floats f = as_floats((Words)((bits & 0x7fffff) + 0x3f3504f3)) - 1.0f;
  const Floats k = __builtin_convertvector(exponent, Floats);
  const Floats s = f / (2.0f + f), z = s * s, w = z * z, half = 0.5f * f * f;
  const Floats even = z * (0xaaaaaa.0p-24f + w * 0x91e9ee.0p-25f), odd = w * (0xccce13.0p-25f + w * 0xf89e26.0p-26f);
  return s * (half + (even + odd)) + (k * ln2_rest + lost) - half + f + k * ln2;
}

FUSERL_INLINE double log_one_plus(double x) { return __builtin_log1p(x); }
// For x > -1, to 1 ulp.
FUSERL_INLINE Floats log_one_plus(Floats x) {
  const Floats u = x + 1.0f;
  return log_with(u, (x - (u - 1.0f)) / u);
}

// As std::log, but for numbers below the least normal one, which count as it; plus `lost`.
FUSERL_INLINE Floats whole_log(Floats x, Floats lost) {
  constexpr float least = 0x1p-126f, infinity = __builtin_inff();
  const Floats log = log_with(maximum(broadcast(least), x), lost);
  const Floats beyond = x > 0.0f ? x : (x == 0.0f ? broadcast(-infinity) : broadcast(__builtin_nanf("")));
  return (x > 0.0f) & (x < infinity) ? log : beyond;
}
FUSERL_INLINE Floats whole_log(Floats x) { return whole_log(x, Floats{}); }
FUSERL_INLINE double whole_log(double x) { return __builtin_log(x); }

// Of a quotient that is known less one, too: to its own last digits near 1, by that.
FUSERL_INLINE Floats log_of(Floats quotient, Floats less_one) {
  const auto close = (less_one < 0.5f) & (less_one > -0.5f);
  const Floats u = less_one + 1.0f;
  return whole_log(close ? u : quotient, close ? (less_one - (u - 1.0f)) / u : Floats{});
}
FUSERL_INLINE double log_of(double quotient, double less_one) {
  return less_one < 0.5 && less_one > -0.5 ? __builtin_log1p(less_one) : __builtin_log(quotient);
}

}  // namespace
}  // namespace fuserl
