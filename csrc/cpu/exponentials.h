// e^x and what is left of it near 0, on vectors of floats and on doubles. As vec.h, on which it stands: only for files
// compiled once per instruction set, internal linkage, nothing of std::.
#pragma once
#include "vec.h"

namespace fuserl {
namespace {

// A step handles a vector of floats, or one double.
template <class T>
struct Step;
template <>
struct Step<float> {
  typedef Floats Vector;
  typedef Ints Mask;
  static constexpr int size = width;
  static constexpr int terms = 9;  // of the series below, enough for |x| < 1
};
template <>
struct Step<double> {
  typedef double Vector;
  typedef bool Mask;
  static constexpr int size = 1;
  static constexpr int terms = 17;
};

// e^x, e^x - 1 and e^x - 1 - x, each good to its own last digits: the differences would cancel near 0.
template <class V>
struct Exponentials {
  V exp, less_one, rest;
};

template <class T>
struct Series {
  T coefficient[Step<T>::terms];  // 1 / k! from the last term down to k = 2

  constexpr Series() : coefficient() {
    T inverse = 1;
    for (int k = 2; k < Step<T>::terms + 2; ++k)
      coefficient[Step<T>::terms + 1 - k] = inverse /= static_cast<T>(k);
  }
};

template <class T, class V>
FUSERL_INLINE Exponentials<V> near_zero(V x) {
  constexpr Series<T> series;
  V p = V{} + series.coefficient[0];
  for (int i = 1; i < Step<T>::terms; ++i) p = p * x + series.coefficient[i];
  const V rest = p * x * x, less_one = x + rest;
  return {less_one + T(1), less_one, rest};
}

FUSERL_INLINE double whole_exp(double x) { return __builtin_exp(x); }
FUSERL_INLINE Floats whole_exp(Floats x) {
  constexpr float least = -87.33f, most = 88.72283f;  // beyond: less than the smallest normal float, more than any
  constexpr float log2e = 0x1.715476p0f, lost = 0x1.cb1p-27f;  // lost = (log2(e) - log2e) ln(2)
  const Floats inside = x < most ? maximum(broadcast(least), x) : broadcast(most);
  Floats e = exp2_scaled(inside, log2e);
  e += e * (inside * lost);
  e = x < least ? Floats{} : e;
  e = x > most ? broadcast(__builtin_inff()) : e;
  return x == x ? e : x;
}

template <class T, class V>
FUSERL_INLINE Exponentials<V> exponentials(V x) {
  const Exponentials<V> near = near_zero<T>(x);
  const V exp = whole_exp(x), less_one = exp - T(1);
  const auto small = (x < T(1)) & (x > T(-1));
  return {small ? near.exp : exp, small ? near.less_one : less_one, small ? near.rest : less_one - x};
}

}  // namespace
}  // namespace fuserl
