// Row kernels of divergence, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "divergence_kernels.h"

#include "divergence_terms.h"
#include "elements.h"

namespace fuserl {
namespace {

constexpr std::int64_t block = 2048;       // elements whose sums are floats before they are added to doubles
constexpr std::int64_t ahead = 8 * 1024;   // bytes to prefetch
constexpr float floor_exponent = -100.0f;  // exp2 from here down counts as 0

FUSERL_INLINE double sum_of(Floats x) {
  double sum = 0;
  for (int i = 0; i < width; ++i) sum += static_cast<double>(x[i]);
  return sum;
}
FUSERL_INLINE double sum_of(double x) { return x; }

// ---- elements as T, whatever their dtype: an array in place, or widened into a buffer; past the end -inf

template <class From>
FUSERL_INLINE void widen(const From* from, float* to, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + width <= n; i += width) {
    prefetch(from + i, ahead);
    store(to + i, load(from + i));
  }
  From rest[width] = {};
  for (std::int64_t k = i; k < n; ++k) rest[k - i] = from[k];
  if (i < n) store(to + i, load(rest));
}

template <class To>
FUSERL_INLINE void narrow(const float* from, To* to, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + width <= n; i += width) store(to + i, load(from + i));
  To rest[width];
  if (i < n) store(rest, load(from + i));
  for (std::int64_t k = i; k < n; ++k) to[k] = rest[k - i];
}

template <class T>
FUSERL_INLINE void pad(T* x, std::int64_t n) {
  for (; n % Step<T>::size; ++n) x[n] = static_cast<T>(-infinity);
}

FUSERL_INLINE const double* elements(const void* row, DType, std::int64_t begin, std::int64_t, double*) {
  return static_cast<const double*>(row) + begin;
}
FUSERL_INLINE const float* elements(const void* row, DType dtype, std::int64_t begin, std::int64_t n, float* buffer) {
  if (dtype == DType::f32 && n % width == 0) {
    const float* p = static_cast<const float*>(row) + begin;
    return p;
  }
  if (dtype == DType::f32) widen(static_cast<const float*>(row) + begin, buffer, n);
  if (dtype == DType::bf16) widen(static_cast<const Bf16*>(row) + begin, buffer, n);
  if (dtype == DType::f16) widen(static_cast<const F16*>(row) + begin, buffer, n);
  pad(buffer, n);
  return buffer;
}

// Where to write: in place, or into the buffer, from which `finish` takes it.
FUSERL_INLINE double* place(void* row, DType, std::int64_t begin, std::int64_t, double*) {
  return row ? static_cast<double*>(row) + begin : nullptr;
}
FUSERL_INLINE float* place(void* row, DType dtype, std::int64_t begin, std::int64_t n, float* buffer) {
  if (!row) return nullptr;
  return dtype == DType::f32 && n % width == 0 ? static_cast<float*>(row) + begin : buffer;
}
FUSERL_INLINE void finish(void*, DType, std::int64_t, std::int64_t, const double*, const double*) {}
FUSERL_INLINE void finish(void* row, DType dtype, std::int64_t begin, std::int64_t n, const float* written,
                          const float* buffer) {
  if (written != buffer) return;
  if (dtype == DType::f32) narrow(buffer, static_cast<float*>(row) + begin, n);
  if (dtype == DType::bf16) narrow(buffer, static_cast<Bf16*>(row) + begin, n);
  if (dtype == DType::f16) narrow(buffer, static_cast<F16*>(row) + begin, n);
}

// ---- one vector

// A row's constants, and those that follow from them: below `floor` a probability counts as 0.
template <class T>
struct Constants {
  DivergenceRow<T> row;
  typename Step<T>::Vector p_floor, q_floor, p_least, q_least;

  explicit Constants(const DivergenceRow<T>& given)
      : row(given), p_floor(floor_of(given.p)), q_floor(floor_of(given.q)), p_least(whole_exp2(p_floor, given.p)),
        q_least(whole_exp2(q_floor, given.q)) {}

  static FUSERL_INLINE typename Step<T>::Vector floor_of(const DivergenceSide<T>& side) {
    return typename Step<T>::Vector{} + static_cast<T>(floor_exponent) / side.scale;
  }
  static FUSERL_INLINE Floats whole_exp2(Floats x, const DivergenceSide<float>& side) {
    return exp2_scaled(x, side.scale);
  }
  static FUSERL_INLINE double whole_exp2(double, const DivergenceSide<double>&) { return 0; }
};

FUSERL_INLINE double probability(double x, const DivergenceSide<double>& side, double, double) {
  return __builtin_exp((x - side.reference) * side.inverse - side.shift);
}
FUSERL_INLINE Floats probability(Floats x, const DivergenceSide<float>& side, Floats floor, Floats least) {
  return (exp2_scaled(maximum(floor, x - side.reference), side.scale) - least) * side.factor;
}

template <class T, class V>
FUSERL_INLINE Pair<V> pair_at(V x_p, V x_q, const Constants<T>& k) {
  const DivergenceRow<T>& row = k.row;
  Pair<V> at;
  at.p = probability(x_p, row.p, k.p_floor, k.p_least);
  at.q = probability(x_q, row.q, k.q_floor, k.q_least);
  at.log_p = (x_p - row.p.reference) * row.p.inverse - row.p.shift;
  at.log_q = (x_q - row.q.reference) * row.q.inverse - row.q.shift;
  const V d = (x_p - row.ratio * x_q) * row.p.inverse - row.gap;
  at.d = d == d ? d : V{};  // neither has the token, or the row is NaN, which its sums tell
  return at;
}

template <class T, DivergenceKind kind>
void forward_row(const void* p_row, const void* q_row, DType dtype_p, DType dtype_q, std::int64_t vocab,
                 const DivergenceRow<T>& row, T parameter, DivergenceSums* sums) {
  typedef typename Step<T>::Vector V;
  alignas(64) T p_buffer[block], q_buffer[block];
  const Constants<T> constants(row);
  *sums = {};
  for (std::int64_t begin = 0; begin < vocab; begin += block) {
    const std::int64_t n = vocab - begin < block ? vocab - begin : block;
    const T* p = elements(p_row, dtype_p, begin, n, p_buffer);
    const T* q = elements(q_row, dtype_q, begin, n, q_buffer);
    Terms<V> sum = {};
    for (std::int64_t i = 0; i < n; i += Step<T>::size) {
      const Terms<V> at = terms<T, kind>(pair_at(load(p + i), load(q + i), constants), parameter);
      sum.value += at.value;
      sum.p_slope += at.p_slope;
      sum.q_slope += at.q_slope;
    }
    sums->value += sum_of(sum.value);
    sums->p_slope += sum_of(sum.p_slope);
    sums->q_slope += sum_of(sum.q_slope);
  }
}

template <class T, DivergenceKind kind>
void gradient_row(const void* p_row, const void* q_row, DType dtype_p, DType dtype_q, void* out_p, void* out_q,
                  std::int64_t vocab, const DivergenceRow<T>& row, const DivergenceSlopes<T>& slopes, T parameter) {
  typedef typename Step<T>::Vector V;
  alignas(64) T p_buffer[block], q_buffer[block], dp_buffer[block], dq_buffer[block];
  const Constants<T> constants(row);
  const DivergenceSlopes<T> k = slopes;
  for (std::int64_t begin = 0; begin < vocab; begin += block) {
    const std::int64_t n = vocab - begin < block ? vocab - begin : block;
    const T* p = elements(p_row, dtype_p, begin, n, p_buffer);
    const T* q = elements(q_row, dtype_q, begin, n, q_buffer);
    T* dp = place(out_p, dtype_p, begin, n, dp_buffer);
    T* dq = place(out_q, dtype_q, begin, n, dq_buffer);
    for (std::int64_t i = 0; i < n; i += Step<T>::size) {
      prefetch(p + i, ahead);
      prefetch(q + i, ahead);
      const Pair<V> x = pair_at(load(p + i), load(q + i), constants);
      const Terms<V> at = terms<T, kind>(x, parameter);
      // Where p is 0 its logarithm is not looked at: 0 log 0 = 0.
      const V log_p = x.p > V{} ? x.log_p : V{};
      // Without a part in the gradient the divergence may be infinite.
      const V steep = k.p_slope != T(0) ? k.p_slope * at.p_slope : V{};
      if (dp) store(dp + i, steep + x.p * (k.p_constant + k.p_log * log_p));
      if (dq) store(dq + i, k.q_slope * at.q_slope + k.q_constant * x.q);
    }
    finish(out_p, dtype_p, begin, n, dp, dp_buffer);
    finish(out_q, dtype_q, begin, n, dq, dq_buffer);
  }
}

template <class T>
void forward(const void* p, const void* q, DType dtype_p, DType dtype_q, std::int64_t vocab,
             const DivergenceRow<T>& row, const DivergenceRule& rule, DivergenceSums* sums) {
  constexpr decltype(&forward_row<T, DivergenceKind::alpha>) kinds[] = {
      forward_row<T, DivergenceKind::forward_kl>, forward_row<T, DivergenceKind::reverse_kl>,
      forward_row<T, DivergenceKind::jensen_shannon>, forward_row<T, DivergenceKind::alpha>,
      forward_row<T, DivergenceKind::total_variation>};
  kinds[static_cast<int>(rule.kind)](p, q, dtype_p, dtype_q, vocab, row, static_cast<T>(rule.parameter), sums);
}

template <class T>
void gradient(const void* p, const void* q, DType dtype_p, DType dtype_q, void* out_p, void* out_q, std::int64_t vocab,
              const DivergenceRow<T>& row, const DivergenceSlopes<T>& slopes, const DivergenceRule& rule) {
  constexpr decltype(&gradient_row<T, DivergenceKind::alpha>) kinds[] = {
      gradient_row<T, DivergenceKind::forward_kl>, gradient_row<T, DivergenceKind::reverse_kl>,
      gradient_row<T, DivergenceKind::jensen_shannon>, gradient_row<T, DivergenceKind::alpha>,
      gradient_row<T, DivergenceKind::total_variation>};
  kinds[static_cast<int>(rule.kind)](p, q, dtype_p, dtype_q, out_p, out_q, vocab, row, slopes,
                                     static_cast<T>(rule.parameter));
}

// ---- estimates from samples

template <class V>
struct Estimate {
  V value, derivative;
};

// Of the log-ratio d of the policy to the reference; a generator's estimate is the summand at q = 1.
template <class T, class V>
FUSERL_INLINE Estimate<V> estimate(V d, const SampledRule& rule) {
  const T parameter = static_cast<T>(rule.parameter);
  if (rule.sampled == Sampled::from_policy) {
    const Exponentials<V> e = exponentials<T>(-d);
    const V k1 = d, k2 = T(0.5) * d * d, k3 = e.rest;
    const V value = rule.estimator == KlEstimator::k1 ? k1 : (rule.estimator == KlEstimator::k2 ? k2 : k3);
    if (rule.score) return {value, d};
    const V one = V{} + T(1);
    return {value, rule.estimator == KlEstimator::k1 ? one : (rule.estimator == KlEstimator::k2 ? d : -e.less_one)};
  }
  const V finite = d < V{} + T(1e30) ? d : V{} + T(1e30);  // its exponential is infinite as well
  const Pair<V> x = {whole_exp(finite), V{} + T(1), finite, V{}, finite};
  Terms<V> at;
  switch (rule.kind) {
    case DivergenceKind::forward_kl: at = terms<T, DivergenceKind::forward_kl>(x, parameter); break;
    case DivergenceKind::reverse_kl: at = terms<T, DivergenceKind::reverse_kl>(x, parameter); break;
    case DivergenceKind::jensen_shannon: at = terms<T, DivergenceKind::jensen_shannon>(x, parameter); break;
    case DivergenceKind::alpha: at = terms<T, DivergenceKind::alpha>(x, parameter); break;
    default: at = terms<T, DivergenceKind::total_variation>(x, parameter);
  }
  const T scale = static_cast<T>(rule.scale);
  return {scale * at.value, scale * at.p_slope};
}

template <class T>
FUSERL_INLINE void sampled_step(const T* logprobs, const T* ref_logprobs, T* values, T* derivative,
                                const SampledRule& rule) {
  typedef typename Step<T>::Vector V;
  const T clamp = static_cast<T>(rule.clamp);
  const V d = load(logprobs) - load(ref_logprobs);
  const auto low = d < -clamp, high = d > clamp;
  const V inside = low ? V{} - clamp : (high ? V{} + clamp : d);
  const Estimate<V> at = estimate<T>(inside, rule);
  const auto flat = low | high | (at.value == V{} + static_cast<T>(infinity));
  store(values, d == d ? at.value : d);
  if (derivative) store(derivative, d == d ? (flat ? V{} : at.derivative) : d);
}

template <class T>
void sampled(const T* logprobs, const T* ref_logprobs, T* values, T* derivative, std::int64_t n,
             const SampledRule& rule) {
  constexpr int size = Step<T>::size;
  std::int64_t i = 0;
  for (; i + size <= n; i += size)
    sampled_step(logprobs + i, ref_logprobs + i, values + i, derivative ? derivative + i : nullptr, rule);
  T rest[4][size] = {};
  for (std::int64_t k = i; k < n; ++k) {
    rest[0][k - i] = logprobs[k];
    rest[1][k - i] = ref_logprobs[k];
  }
  if (i < n) sampled_step(rest[0], rest[1], rest[2], rest[3], rule);
  for (std::int64_t k = i; k < n; ++k) {
    values[k] = rest[2][k - i];
    if (derivative) derivative[k] = rest[3][k - i];
  }
}

}  // namespace

namespace FUSERL_ISA {
extern const DivergenceTable divergence;
const DivergenceTable divergence = {{forward<float>, gradient<float>, sampled<float>},
                                    {forward<double>, gradient<double>, sampled<double>}};
}  // namespace FUSERL_ISA
}  // namespace fuserl
