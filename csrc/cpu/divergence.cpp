#include <cmath>
#include <cstring>
#include <string>
#include <type_traits>

#include "check.h"
#include "divergence_kernels.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace fuserl {

FUSERL_KERNELS(DivergenceTable, divergence)

namespace {

using At = DivergenceStatistic;

const DivergenceKernels<float>& kernels_of(const float*) { return kernels().f32; }
const DivergenceKernels<double>& kernels_of(const double*) { return kernels().f64; }

// T is the type of statistics.
template <class T>
struct Problem {
  const DivergenceKernels<T>* kernels;
  DType dtype_p, dtype_q;
  Rows p, q;
  std::int64_t rows, vocab;
  const T* temperatures;
  DivergenceRule rule;
  T* statistics;

  T& at(int statistic, std::int64_t n) const { return statistics[statistic * rows + n]; }
  long double lse_p(std::int64_t n) const { return static_cast<long double>(at(At::lse_p, n)) + at(At::lse_error_p, n); }
  long double lse_q(std::int64_t n) const { return static_cast<long double>(at(At::lse_q, n)) + at(At::lse_error_q, n); }
};

template <class T>
DivergenceSide<T> side_of(long double lse, T temperature) {
  DivergenceSide<T> side;
  side.reference = static_cast<T>(lse * temperature);
  side.inverse = 1 / temperature;
  const long double inverse = 1 / static_cast<long double>(temperature);
  const long double shift = std::isfinite(lse) ? lse - side.reference * inverse : 0;
  side.shift = static_cast<T>(shift);
  side.scale = static_cast<T>(1.4426950408889634073599L * inverse);
  side.factor = static_cast<T>(std::exp(-shift));
  return side;
}

template <class T>
DivergenceRow<T> row_of(const Problem<T>& problem, std::int64_t n) {
  const T t_p = problem.temperatures[n], t_q = problem.temperatures[problem.rows + n];
  const long double lse_p = problem.lse_p(n), lse_q = problem.lse_q(n);
  return {side_of(lse_p, t_p), side_of(lse_q, t_q), t_p / t_q, static_cast<T>(lse_p - lse_q)};
}

// ---- forward

// Writes lse in two parts and returns the entropy; NaN in both for a row that has no softmax.
template <class T>
double write_lse(const Problem<T>& problem, int statistic, const RowSums& sums, double temperature, std::int64_t n) {
  const bool defined = !std::isnan(sums.weighted_exp) && std::isfinite(sums.max);
  const double top = defined ? sums.max / temperature : std::nan(""), log_sum = std::log(sums.exp);
  T& lse = problem.at(statistic, n);
  lse = static_cast<T>(top + log_sum);
  // What the division and the sum lost, too.
  const double lost = std::fma(-top, temperature, sums.max) / temperature;
  problem.at(statistic + 1, n) = static_cast<T>((top - static_cast<double>(lse)) + log_sum + lost);
  return defined ? log_sum - sums.weighted_exp / sums.exp / temperature : std::nan("");
}

template <class T>
void forward_rows(void* context, std::int64_t begin, std::int64_t end) {
  const Problem<T>& problem = *static_cast<const Problem<T>*>(context);
  for (std::int64_t n = begin; n < end; ++n) {
    const char *p = problem.p[n], *q = problem.q[n];
    const double t_p = problem.temperatures[n], t_q = problem.temperatures[problem.rows + n];
    const RowSums sums_p = softmax_row_sums(problem.dtype_p, p, problem.vocab, t_p, false);
    const RowSums sums_q = softmax_row_sums(problem.dtype_q, q, problem.vocab, t_q, false);
    const double entropy = write_lse(problem, At::lse_p, sums_p, t_p, n);
    const double other = write_lse(problem, At::lse_q, sums_q, t_q, n);
    const bool defined = !std::isnan(entropy) && !std::isnan(other);
    DivergenceSums sums = {std::nan(""), std::nan(""), std::nan("")};
    if (defined)
      problem.kernels->forward(p, q, problem.dtype_p, problem.dtype_q, problem.vocab, row_of(problem, n), problem.rule,
                               &sums);
    problem.at(At::divergence, n) = static_cast<T>(problem.rule.scale * sums.value);
    problem.at(At::entropy, n) = static_cast<T>(entropy);
    problem.at(At::slope_p, n) = static_cast<T>(problem.rule.scale * sums.p_slope);
    problem.at(At::slope_q, n) = static_cast<T>(problem.rule.scale * sums.q_slope);
  }
}

// ---- gradient

template <class T>
struct Gradient : Problem<T> {
  Rows out_p, out_q;
  const T* g;
};

template <class T>
DivergenceSlopes<T> slopes_of(const Gradient<T>& problem, std::int64_t n) {
  const T value = problem.at(At::divergence, n), t_p = problem.temperatures[n];
  const T t_q = problem.temperatures[problem.rows + n];
  const bool infinite = std::isinf(value);
  const T g = infinite ? 0 : problem.g[n], g_entropy = problem.g[problem.rows + n];
  const T slope_p = infinite ? 0 : problem.at(At::slope_p, n), slope_q = infinite ? 0 : problem.at(At::slope_q, n);
  const T scaled = g * static_cast<T>(problem.rule.scale);
  return {scaled / t_p, (-g * slope_p - g_entropy * problem.at(At::entropy, n)) / t_p, -g_entropy / t_p, scaled / t_q,
          -g * slope_q / t_q};
}

template <class T>
void gradient_rows(void* context, std::int64_t begin, std::int64_t end) {
  const Gradient<T>& problem = *static_cast<const Gradient<T>*>(context);
  const auto zero = [&](const Rows& out, std::int64_t n, DType dtype) {
    if (out.data) std::memset(out[n], 0, static_cast<std::size_t>(problem.vocab * bytes_of(dtype)));
  };
  for (std::int64_t n = begin; n < end; ++n) {
    const bool infinite = std::isinf(problem.at(At::divergence, n));
    const bool live = problem.g[n] != 0 && !infinite, live_entropy = problem.g[problem.rows + n] != 0;
    const bool write_p = problem.out_p.data && (live || live_entropy), write_q = problem.out_q.data && live;
    // Read first what is written last: out_p may be where p is.
    if (write_p || write_q)
      problem.kernels->gradient(problem.p[n], problem.q[n], problem.dtype_p, problem.dtype_q,
                                write_p ? problem.out_p[n] : nullptr, write_q ? problem.out_q[n] : nullptr,
                                problem.vocab, row_of(problem, n), slopes_of(problem, n), problem.rule);
    if (!write_p) zero(problem.out_p, n, problem.dtype_p);
    if (!write_q) zero(problem.out_q, n, problem.dtype_q);
  }
}

// ---- checks

void check_rule(const char* function, DivergenceKind kind, double parameter) {
  if (kind == DivergenceKind::jensen_shannon && !(parameter > 0 && parameter < 1))
    refuse(function, "beta must lie between 0 and 1", std::to_string(parameter), "The ends are the two KLs.");
  if (kind == DivergenceKind::alpha && !(std::isfinite(parameter) && parameter != 0 && parameter != 1))
    refuse(function, "alpha must be finite, and neither 0 nor 1", std::to_string(parameter),
           "Those are forward_kl and reverse_kl.");
}

template <class T>
Problem<T> checked(const char* function, const TensorView& logits_p, const TensorView& logits_q,
                   const TensorView& temperatures, const DivergenceRule& rule, const TensorView& statistics) {
  check_logits(function, "logits_p", logits_p);
  check_logits(function, "logits_q", logits_q);
  check_rule(function, rule.kind, rule.parameter);
  const std::int64_t rows = logits_p.shape[0] * logits_p.shape[1], vocab = logits_p.shape[2];
  if (logits_q.shape[0] * logits_q.shape[1] != rows || logits_q.shape[2] != vocab)
    refuse(function, "logits_q must have the rows and columns of logits_p, " + shape_text(logits_p),
           shape_text(logits_q), "Cut both to the vocabulary that they share.");
  if ((logits_p.dtype == DType::f64) != (logits_q.dtype == DType::f64))
    refuse(function, "logits must both be float64 or neither", std::string(name(logits_p.dtype)) + " and " +
           name(logits_q.dtype), "Convert one with .to().");
  const DType dtype = logits_p.dtype == DType::f64 ? DType::f64 : DType::f32;
  check_dense(function, "temperatures", temperatures, dtype, Device::cpu, {2, rows});
  check_dense(function, "statistics", statistics, dtype, Device::cpu, {At::all, rows});
  for (std::int64_t i = 0; i < 2 * rows; ++i)
    check_temperature(function, static_cast<double>(temperatures.as<T>()[i]), "temperature " + std::to_string(i));
  return {&kernels_of(static_cast<T*>(nullptr)), logits_p.dtype, logits_q.dtype, Rows(logits_p), Rows(logits_q), rows,
          vocab, temperatures.as<T>(), rule, statistics.as<T>()};
}

void check_out(const char* function, const char* argument, const TensorView& out, const TensorView& logits) {
  check_logits(function, argument, out);
  check_dtype(function, argument, out, logits.dtype);
  if (std::memcmp(out.shape, logits.shape, 3 * sizeof(out.shape[0])) != 0)
    refuse(function, std::string(argument) + " must have the shape of its logits", shape_text(out),
           "Allocate it with empty_like(logits).");
  if ((out.stride[0] == 0 && out.shape[0] > 1) || (out.stride[1] == 0 && out.shape[1] > 1))
    refuse(function, std::string(argument) + " must give each row its own memory", "an expanded view",
           "Use empty_like(logits).");
}

template <class T>
void run_gradient(const Problem<T>& problem, const TensorView& g, const TensorView* out_p, const TensorView* out_q,
                  int threads) {
  const Rows none{TensorView()};
  Gradient<T> gradient = {problem, out_p ? Rows(*out_p) : none, out_q ? Rows(*out_q) : none, g.as<T>()};
  const std::int64_t grain = rows_at_once(problem.rows, 2 * problem.vocab, threads);
  parallel_for(problem.rows, grain, threads, gradient_rows<T>, &gradient);
}

template <class T>
struct Samples {
  const DivergenceKernels<T>* kernels;
  const T *logprobs, *ref_logprobs;
  T *values, *derivative;
  SampledRule rule;
};

template <class T>
void sampled_part(void* context, std::int64_t begin, std::int64_t end) {
  const Samples<T>& x = *static_cast<const Samples<T>*>(context);
  x.kernels->sampled(x.logprobs + begin, x.ref_logprobs + begin, x.values + begin,
                     x.derivative ? x.derivative + begin : nullptr, end - begin, x.rule);
}

template <class T>
void run_samples(const TensorView& logprobs, const TensorView& ref_logprobs, const SampledRule& rule,
                 const TensorView& values, const TensorView* derivative, int threads) {
  Samples<T> samples = {&kernels_of(static_cast<T*>(nullptr)), logprobs.as<T>(), ref_logprobs.as<T>(),
                        values.as<T>(), derivative ? derivative->as<T>() : nullptr, rule};
  parallel_for(logprobs.size(), 1 << 14, threads, sampled_part<T>, &samples);
}

}  // namespace

namespace cpu {

void divergence_forward(const TensorView& logits_p, const TensorView& logits_q, const TensorView& temperatures,
                        const DivergenceRule& rule, const TensorView& statistics, int threads) {
  constexpr const char* function = "divergence_forward";
  const auto run = [&](auto problem) {
    using T = std::remove_pointer_t<decltype(problem.statistics)>;
    const std::int64_t grain = rows_at_once(problem.rows, 2 * problem.vocab, threads);
    parallel_for(problem.rows, grain, threads, forward_rows<T>, &problem);
  };
  if (logits_p.dtype == DType::f64)
    run(checked<double>(function, logits_p, logits_q, temperatures, rule, statistics));
  else
    run(checked<float>(function, logits_p, logits_q, temperatures, rule, statistics));
}

void divergence_gradient(const TensorView& logits_p, const TensorView& logits_q, const TensorView& temperatures,
                         const DivergenceRule& rule, const TensorView& statistics, const TensorView& g,
                         const TensorView* out_p, const TensorView* out_q, int threads) {
  constexpr const char* function = "divergence_gradient";
  if (out_p) check_out(function, "out_p", *out_p, logits_p);
  if (out_q) check_out(function, "out_q", *out_q, logits_q);
  const std::int64_t rows = logits_p.ndim == 3 ? logits_p.shape[0] * logits_p.shape[1] : 0;
  check_dense(function, "g", g, statistics.dtype, Device::cpu, {2, rows});
  if (logits_p.dtype == DType::f64)
    run_gradient(checked<double>(function, logits_p, logits_q, temperatures, rule, statistics), g, out_p, out_q,
                 threads);
  else
    run_gradient(checked<float>(function, logits_p, logits_q, temperatures, rule, statistics), g, out_p, out_q,
                 threads);
}

void sampled_divergence(const TensorView& logprobs, const TensorView& ref_logprobs, const SampledRule& rule,
                        const TensorView& values, const TensorView* derivative, int threads) {
  constexpr const char* function = "sampled_divergence";
  const DType dtype = logprobs.dtype;
  if (dtype != DType::f32 && dtype != DType::f64)
    refuse(function, "logprobs must be float32 or float64", name(dtype), "Convert them with .float().");
  const std::int64_t n = logprobs.size();
  check_dense(function, "logprobs", logprobs, dtype, Device::cpu, {n});
  check_dense(function, "ref_logprobs", ref_logprobs, dtype, Device::cpu, {n});
  check_dense(function, "values", values, dtype, Device::cpu, {n});
  if (derivative) check_dense(function, "derivative", *derivative, dtype, Device::cpu, {n});
  if (rule.sampled == Sampled::from_reference) check_rule(function, rule.kind, rule.parameter);
  if (!(rule.clamp > 0)) refuse(function, "clamp must be positive", std::to_string(rule.clamp), "Infinity is none.");
  if (dtype == DType::f64)
    run_samples<double>(logprobs, ref_logprobs, rule, values, derivative, threads);
  else
    run_samples<float>(logprobs, ref_logprobs, rule, values, derivative, threads);
}

}  // namespace cpu
}  // namespace fuserl
