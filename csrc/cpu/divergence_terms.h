// The summand of each divergence and its derivatives, on vectors of floats and on doubles. As vec.h: only for files
// compiled once per instruction set. kernels/divergence.py has the equations.
#pragma once
#include "exponentials.h"
#include "logarithms.h"
#include "ops.h"

namespace fuserl {
namespace {

constexpr float infinity = __builtin_inff();

// F(p, q), p dF/dp and q dF/dq.
template <class V>
struct Terms {
  V value, p_slope, q_slope;
};

// Both probabilities, their logarithms, and the difference of those, which may be infinite.
template <class V>
struct Pair {
  V p, q, log_p, log_q, d;
};

template <class V>
FUSERL_INLINE V greater(V a, V b) {
  return a > b ? a : b;
}

template <class V>
FUSERL_INLINE V magnitude(V x) {
  return x < V{} ? -x : x;
}

// sum p log (p / q) - p + q, no term of which is negative.
template <class T, class V>
FUSERL_INLINE Terms<V> kullback_leibler(V p, V q, V d) {
  const Exponentials<V> near = near_zero<T>(-d);
  const auto close = magnitude(d) < T(1);
  // A token that p lacks has no part, one that only q lacks is infinite even where p is too small for its format.
  const auto infinite = d == V{} + T(infinity);
  const V finite = greater(d, V{} - T(1e30)), far = q + p * (finite - T(1));
  return {close ? p * near.rest : (infinite ? d : far), infinite ? d : p * finite, close ? p * near.less_one : q - p};
}

template <class T, class V>
FUSERL_INLINE Terms<V> jensen_shannon(const Pair<V>& x, T beta) {
  const V far = greater(V{} - T(1e30), x.d < V{} + T(1e30) ? x.d : V{} + T(1e30)), size = magnitude(far);
  const auto close = size < T(1), above = far >= V{};
  const V part = above ? V{} + beta : V{} + (T(1) - beta);
  const V less = close ? near_zero<T>(-size).less_one : whole_exp(-size) - T(1);
  const V log_near = log_one_plus(part * less);  // of the mixture over the greater of p and q
  const V over_p = above ? log_near : log_near - far, over_q = above ? log_near + far : log_near;
  const V p_slope = (beta - T(1)) * x.p * over_p, q_slope = -beta * x.q * over_q;
  const V rest = beta * x.q * near_zero<T>(over_q).rest + (T(1) - beta) * x.p * near_zero<T>(over_p).rest;
  return {close ? rest : p_slope + q_slope, p_slope, q_slope};
}

template <class T, class V>
FUSERL_INLINE Terms<V> alpha_divergence(const Pair<V>& x, T a) {
  const T b = T(1) - a;
  const V power_p = -b * x.d, power_q = a * x.d;  // log of p^a q^b over p, over q
  const V both = whole_exp(x.d >= V{} ? x.log_p + power_p : x.log_q + power_q);
  const Exponentials<V> near_p = near_zero<T>(power_p), near_q = near_zero<T>(power_q);
  const auto close_p = magnitude(power_p) < T(1), close_q = magnitude(power_q) < T(1), close = magnitude(x.d) < T(1);
  const V p_slope = (close_p ? x.p * near_p.less_one : both - x.p) / -b;
  const V q_slope = (close_q ? x.q * near_q.less_one : both - x.q) / -a;
  // Of two forms that are equal the one that stands at a = 1, where this is reverse_kl, or at 0, where forward_kl.
  const V rest = a > T(0.5) ? x.p * (near_p.rest - b * near_zero<T>(-x.d).rest)
                            : x.q * (near_q.rest - a * near_zero<T>(x.d).rest);
  const V far = both == V{} + T(infinity) ? both : p_slope + q_slope;
  return {close & close_p & close_q ? rest / (-a * b) : far, p_slope, q_slope};
}

template <class T, class V>
FUSERL_INLINE Terms<V> total_variation(const Pair<V>& x) {
  const V size = magnitude(x.d), larger = greater(x.p, x.q);
  const V gap = size < T(1) ? larger * -near_zero<T>(-size).less_one : magnitude(x.p - x.q);
  const V sign = x.d > V{} ? V{} + T(0.5) : (x.d < V{} ? V{} - T(0.5) : V{});
  return {T(0.5) * gap, sign * x.p, -sign * x.q};
}

template <class T, DivergenceKind kind, class V>
FUSERL_INLINE Terms<V> terms(const Pair<V>& x, T parameter) {
  if constexpr (kind == DivergenceKind::reverse_kl) return kullback_leibler<T>(x.p, x.q, x.d);
  if constexpr (kind == DivergenceKind::jensen_shannon) return jensen_shannon<T>(x, parameter);
  if constexpr (kind == DivergenceKind::alpha) return alpha_divergence<T>(x, parameter);
  if constexpr (kind == DivergenceKind::total_variation) return total_variation<T>(x);
  const Terms<V> swapped = kullback_leibler<T>(x.q, x.p, -x.d);
  return {swapped.value, swapped.q_slope, swapped.p_slope};
}

}  // namespace
}  // namespace fuserl
