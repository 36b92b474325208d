// Token kernels of policy_loss, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "policy_loss_kernels.h"

#include "exponentials.h"
#include "vec.h"

namespace fuserl {
namespace {

constexpr std::int64_t fold = 256;  // tokens whose sums are floats before they are added to doubles

FUSERL_INLINE double load(const double* p) { return *p; }
FUSERL_INLINE void store(double* p, double x) { *p = x; }
FUSERL_INLINE Ints load_mask(const unsigned char* p, Ints) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepu8_epi32(every, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) != 0;
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))) != 0;
#else
  Ints mask;
  for (int i = 0; i < width; ++i) mask[i] = -(p[i] != 0);
  return mask;
#endif
}
FUSERL_INLINE bool load_mask(const unsigned char* p, bool) { return *p != 0; }

template <class V>
struct Divergence {
  V value, derivative;
};

// The estimate of KL(policy || reference) with d = ref_logprob - logprob, and its derivative to logprob.
template <class T, class V>
FUSERL_INLINE Divergence<V> divergence(V d, KlEstimator kl) {
  if (kl == KlEstimator::k1) return {-d, V{} + T(1)};
  if (kl == KlEstimator::k2) return {T(0.5) * d * d, -d};
  const Exponentials<V> e = exponentials<T>(d);
  return {e.rest, -e.less_one};
}

using At = PolicyStatistic;

template <class T>
struct Sums {
  typedef typename Step<T>::Vector V;
  V sum[At::sums] = {};
  V max = V{} - static_cast<T>(__builtin_inf()), min = V{} + static_cast<T>(__builtin_inf());
};

template <class T>
FUSERL_INLINE void step(const PolicyBlock<T>& at, std::int64_t i, const PolicyBounds<T>& bounds, Sums<T>& sums) {
  typedef typename Step<T>::Vector V;
  typedef typename Step<T>::Mask Mask;
  typedef PolicyBlock<T> Block;
  const V zero = {}, one = zero + T(1), infinity = zero + static_cast<T>(__builtin_inf());
  const Mask keep = at.mask ? load_mask(at.mask + i, Mask{}) : zero == zero;
  const auto input = [&](int which) {
    const V x = load(at.input[which] + i);
    return keep ? x : V{};
  };
  const V logprob = input(Block::logprobs), advantage = input(Block::advantages);
  const V log_ratio = logprob - (at.input[Block::old_logprobs] ? input(Block::old_logprobs) : logprob);
  const Exponentials<V> e = exponentials<T>(log_ratio);

  const Mask above = advantage > zero, below = advantage < zero;
  const Mask low = below & (log_ratio < bounds.log_low), high = above & (log_ratio > bounds.log_high);
  const Mask dual = below & (log_ratio > bounds.log_dual), clipped = low | high | dual;
  const V bound = low ? zero + bounds.low : (high ? zero + bounds.high : zero + bounds.dual);
  // A zero advantage has no part in the loss even where the ratio overflows; a NaN log-ratio shows.
  const Mask dead = (advantage == zero) & (log_ratio == log_ratio);
  V loss = dead ? zero : -((clipped ? bound : e.exp) * advantage);
  V derivative = clipped ? zero : loss;
  if (bounds.kl != KlEstimator::none) {
    const Divergence<V> kl = divergence<T>(input(Block::ref_logprobs) - logprob, bounds.kl);
    sums.sum[At::kl] += kl.value;
    if (bounds.beta != 0) {
      loss += bounds.beta * kl.value;
      derivative += bounds.beta * (keep ? kl.derivative : zero);
    }
  }
  if (at.input[Block::weights]) {
    const V weight = input(Block::weights);
    loss *= weight;
    derivative *= weight;
  }
  store(at.losses + i, loss);
  if (at.derivative) store(at.derivative + i, derivative);

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
template <class T>
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
  step(copy, 0, bounds, sums);
  for (std::int64_t i = begin; i < n; ++i) {
    at.losses[i] = losses[i - begin];
    if (at.derivative) at.derivative[i] = derivative[i - begin];
  }
}

template <class T>
void block(const PolicyBlock<T>& at, std::int64_t n, const PolicyBounds<T>& bounds, double* statistics) {
  constexpr int size = Step<T>::size;
  const std::int64_t whole = n / size * size;
  for (std::int64_t begin = 0; begin < n; begin += fold) {
    Sums<T> sums;
    const std::int64_t end = begin + fold < whole ? begin + fold : whole;
    std::int64_t i = begin;
    for (; i < end; i += size) step(at, i, bounds, sums);
    if (begin + fold >= n && i < n) last_step(at, i, n, bounds, sums);
    add(sums, statistics);
  }
}

}  // namespace

namespace FUSERL_ISA {
extern const PolicyLossKernels policy_loss;
const PolicyLossKernels policy_loss = {block<float>, block<double>};
}  // namespace FUSERL_ISA
}  // namespace fuserl
