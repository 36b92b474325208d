// Token kernels of policy_loss, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "policy_loss_kernels.h"

#include "vec.h"

namespace fuserl {
namespace {

constexpr std::int64_t fold = 256;  // tokens whose sums are floats before they are added to doubles

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
