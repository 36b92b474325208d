// Token kernels of policy_loss, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "policy_loss_kernels.h"

#include "elements.h"
#include "exponentials.h"
#include "vec.h"

namespace fuserl {
namespace {

// Tokens whose sums are kept apart before they are added to the block's, in double: a few roundings for each lane.
template <class T>
constexpr std::int64_t fold = sizeof(T) == sizeof(float) ? 256 : 32;
constexpr std::int64_t ahead = 4096;  // bytes to prefetch: there are more streams than the processor follows over pages

template <class V>
struct Term {
  V value, derivative;
};

// The estimate of KL(policy || reference) with d = ref_logprob - logprob, and its derivative to logprob.
template <class T, class V>
FUSERL_INLINE Term<V> divergence(V d, V ratio, const PolicyBounds<T>& rule) {
  Term<V> kl;
  V both;  // value and derivative, exactly where they cancel
  if (rule.kl == KlEstimator::k1) {
    kl = {-d, V{} + T(1)};
    both = T(1) - d;
  } else if (rule.kl == KlEstimator::k2) {
    kl = {T(0.5) * d * d, -d};
    both = kl.value - d;
  } else {
    const Exponentials<V> e = exponentials<T>(d);
    kl = {e.rest, -e.less_one};
    both = -d;
  }
  if (rule.kl_weighted) return {ratio * kl.value, ratio * both};
  if (rule.score) kl.derivative = -d;
  return kl;
}

// The loss of a surrogate for -w A, and its derivative to logprob; `bound` is tau where it is a gate.
template <Surrogate surrogate, class T, class V, class M>
FUSERL_INLINE Term<V> policy(V cost, V logprob, V log_ratio, const Exponentials<V>& e, M held, V bound) {
  const V zero = {};
  // A zero advantage has no part in the loss even where the ratio overflows; a NaN log-ratio shows.
  const M dead = (cost == zero) & (log_ratio == log_ratio);
  if constexpr (surrogate == Surrogate::gate) {
    const V x = bound * e.less_one, t = whole_exp(x < zero ? x : -x), near = T(1) / (T(1) + t);
    const V slope = T(4) * t * near * near, gate = T(4) / bound * (x < zero ? t * near : near);
    return {dead ? zero : gate * cost, (dead | (slope == zero)) ? zero : slope * e.exp * cost};
  }
  const V factor = dead ? zero : (held ? bound : e.exp) * cost;
  if constexpr (surrogate == Surrogate::weight) return {factor == zero ? zero : factor * logprob, factor};
  return {factor, held ? zero : factor};
}

using At = PolicyStatistic;

template <class T>
struct Sums {
  typedef typename Step<T>::Vector V;
  V sum[At::sums] = {};
  V max = V{} - static_cast<T>(__builtin_inf()), min = V{} + static_cast<T>(__builtin_inf());
};

// The advantage times the importance weight, which it counts.
template <class T, class V, class M>
FUSERL_INLINE V corrected(V advantage, V log_weight, M keep, const PolicyBounds<T>& bounds, Sums<T>& sums) {
  const V zero = {};
  const M low = log_weight < bounds.log_least, high = log_weight > bounds.log_most;
  const V weight = low ? zero + bounds.below : (high ? zero + bounds.above : whole_exp(log_weight));
  sums.sum[At::importance] += keep ? weight : zero;
  sums.sum[At::importance_cut] += (keep & (low | high)) ? zero + T(1) : zero;
  return ((advantage == zero) & (weight == weight)) ? zero : weight * advantage;
}

// A clip has no bound below where the advantage is positive.
template <Surrogate surrogate, class T, class M>
FUSERL_INLINE typename Step<T>::Vector of_sign(M above, T positive, T negative) {
  typedef typename Step<T>::Vector V;
  if constexpr (surrogate == Surrogate::clip) return V{} + negative;
  return above ? V{} + positive : V{} + negative;
}

template <Surrogate surrogate, class T>
FUSERL_INLINE void step(const PolicyBlock<T>& at, std::int64_t i, const PolicyBounds<T>& bounds, Sums<T>& sums) {
  typedef typename Step<T>::Vector V;
  typedef typename Step<T>::Mask Mask;
  typedef PolicyBlock<T> Block;
  const V zero = {}, one = zero + T(1), infinity = zero + static_cast<T>(__builtin_inf());
  const Mask keep = at.mask ? load_mask(at.mask + i, Mask{}) : zero == zero;
  const auto input = [&](int which) {
    prefetch(at.input[which] + i, ahead);
    const V x = load(at.input[which] + i);
    return keep ? x : V{};
  };
  const V logprob = input(Block::logprobs), old = at.input[Block::old_logprobs] ? input(Block::old_logprobs) : logprob;
  const V log_ratio = logprob - old;
  const Exponentials<V> e = exponentials<T>(log_ratio);
  V advantage = input(Block::advantages);
  if (at.input[Block::rollout_logprobs])
    advantage = corrected(advantage, old - input(Block::rollout_logprobs), keep, bounds, sums);
  if (at.input[Block::log_weights]) advantage = corrected(advantage, input(Block::log_weights), keep, bounds, sums);

  const Mask above = advantage > zero, below = advantage < zero;
  const V low_bound = of_sign<surrogate>(above, bounds.log_ratios[0], bounds.log_ratios[2]);
  const Mask low = (surrogate == Surrogate::clip ? below : above | below) & (log_ratio < low_bound);
  const Mask high = above & (log_ratio > bounds.log_ratios[1]), dual = below & (log_ratio > bounds.log_ratios[3]);
  const Mask held = low | high | dual;
  const V low_factor = of_sign<surrogate>(above, bounds.factors[0], bounds.factors[2]);
  const V bound = low ? low_factor : (above ? zero + bounds.factors[1] : zero + bounds.factors[3]);
  auto [loss, derivative] = policy<surrogate, T>(-advantage, logprob, log_ratio, e, held, bound);
  if (bounds.kl != KlEstimator::none) {
    const Term<V> kl = divergence<T>(input(Block::ref_logprobs) - logprob, e.exp, bounds);
    sums.sum[At::kl] += kl.value;
    if (bounds.beta != 0) {
      loss += bounds.beta * kl.value;
      derivative += bounds.beta * (keep ? kl.derivative : zero);
    }
  }
  if (at.input[Block::entropy]) loss -= bounds.entropy_coef * input(Block::entropy);
  if (at.input[Block::weights]) {
    const V weight = input(Block::weights);
    loss *= weight;
    derivative *= weight;
  }
  prefetch<true>(at.losses + i, ahead);
  store(at.losses + i, loss);
  if (at.derivative) {
    prefetch<true>(at.derivative + i, ahead);
    store(at.derivative + i, derivative);
  }

  sums.sum[At::tokens] += keep ? one : zero;
  sums.sum[At::clipped_low] += low ? one : zero;
  sums.sum[At::clipped_high] += high ? one : zero;
  sums.sum[At::clipped_dual] += dual ? one : zero;
  sums.sum[At::approx_kl] += e.rest;
  const V ratio = keep ? e.exp : zero, top = keep ? e.exp : -infinity, bottom = keep ? e.exp : infinity;
  sums.sum[At::ratio] += ratio;
  sums.sum[At::ratio_sq] += ratio * ratio;
  sums.max = sums.max > top ? sums.max : top;
  sums.min = sums.min < bottom ? sums.min : bottom;
}

FUSERL_INLINE double lane(Floats x, int i) { return static_cast<double>(x[i]); }
FUSERL_INLINE double lane(double x, int) { return x; }

template <class T>
FUSERL_INLINE void add(const Sums<T>& sums, double* statistics) {
  for (int i = 0; i < Step<T>::size; ++i) {
    for (int k = 0; k < At::sums; ++k) statistics[k] += lane(sums.sum[k], i);
    const double max = lane(sums.max, i), min = lane(sums.min, i);
    if (max > statistics[At::ratio_max]) statistics[At::ratio_max] = max;
    if (min < statistics[At::ratio_min]) statistics[At::ratio_min] = min;
  }
}

// The tokens past the last whole step, in a step of their own whose other places are masked.
template <Surrogate surrogate, class T>
void last_step(const PolicyBlock<T>& at, std::int64_t begin, std::int64_t n, const PolicyBounds<T>& bounds,
               Sums<T>& sums) {
  constexpr int size = Step<T>::size;
  T input[PolicyBlock<T>::inputs][size] = {}, losses[size], derivative[size];
  unsigned char mask[size] = {};
  PolicyBlock<T> copy = {{}, mask, losses, derivative};
  for (int k = 0; k < PolicyBlock<T>::inputs; ++k) {
    copy.input[k] = at.input[k] ? input[k] : nullptr;
    if (at.input[k])
      for (std::int64_t i = begin; i < n; ++i) input[k][i - begin] = at.input[k][i];
  }
  for (std::int64_t i = begin; i < n; ++i) mask[i - begin] = at.mask ? at.mask[i] : 1;
  step<surrogate>(copy, 0, bounds, sums);
  for (std::int64_t i = begin; i < n; ++i) {
    at.losses[i] = losses[i - begin];
    if (at.derivative) at.derivative[i] = derivative[i - begin];
  }
}

template <Surrogate surrogate, class T>
void block_of(const PolicyBlock<T>& at, std::int64_t n, const PolicyBounds<T>& bounds, double* statistics) {
  constexpr int size = Step<T>::size;
  const std::int64_t whole = n / size * size;
  for (std::int64_t begin = 0; begin < n; begin += fold<T>) {
    Sums<T> sums;
    const std::int64_t end = begin + fold<T> < whole ? begin + fold<T> : whole;
    std::int64_t i = begin;
    for (; i < end; i += size) step<surrogate>(at, i, bounds, sums);
    if (begin + fold<T> >= n && i < n) last_step<surrogate>(at, i, n, bounds, sums);
    add(sums, statistics);
  }
}

template <class T>
void block(const PolicyBlock<T>& at, std::int64_t n, const PolicyBounds<T>& bounds, double* statistics) {
  switch (bounds.surrogate) {
    case Surrogate::clip: return block_of<Surrogate::clip>(at, n, bounds, statistics);
    case Surrogate::weight: return block_of<Surrogate::weight>(at, n, bounds, statistics);
    case Surrogate::gate: return block_of<Surrogate::gate>(at, n, bounds, statistics);
  }
}

}  // namespace

namespace FUSERL_ISA {
extern const PolicyLossKernels policy_loss;
const PolicyLossKernels policy_loss = {block<float>, block<double>};
}  // namespace FUSERL_ISA
}  // namespace fuserl
