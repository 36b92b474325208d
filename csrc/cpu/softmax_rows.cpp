#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "rows.h"

namespace fuserl {

FUSERL_KERNELS(SoftmaxRowsKernels, softmax_rows)

namespace {

float exp2_scale(double temperature) { return static_cast<float>(1.4426950408889634 / temperature); }

// Vectors are f32, or f64 when the logits are.
struct Vector {
  const TensorView* view;

  double get(std::int64_t i) const {
    return view->dtype == DType::f64 ? view->as<double>()[i] : static_cast<double>(view->as<float>()[i]);
  }
  void set(std::int64_t i, double x) const {
    if (view->dtype == DType::f64)
      view->as<double>()[i] = x;
    else
      view->as<float>()[i] = static_cast<float>(x);
  }
};

struct Problem {
  DType dtype;
  const SoftmaxRowsKernels* kernels;
  int kernel;
  Rows logits;
  std::int64_t vocab, rows;
  const std::int64_t* ids;
  const TensorView* row_temperature;
  double temperature;

  double temperature_of(std::int64_t n) const { return row_temperature ? Vector{row_temperature}.get(n) : temperature; }

  double logit(const char* row, std::int64_t id) const {
    const char* element = row + id * bytes_of(dtype);
    if (dtype != DType::f64) return static_cast<double>(kernels->load[kernel](element));
    return *reinterpret_cast<const double*>(element);
  }
};

// ---- checks

Problem checked(const char* function, const TensorView& logits, const TensorView& ids,
                const TensorView* row_temperature, double temperature) {
  check_logits(function, "logits", logits);
  const std::int64_t rows = logits.shape[0] * logits.shape[1], vocab = logits.shape[2];
  check_dense(function, "ids", ids, DType::i64, Device::cpu, {rows});
  for (std::int64_t n = 0; n < rows; ++n) {
    const std::int64_t id = ids.as<std::int64_t>()[n];
    if (id < 0 || id >= vocab)
      refuse(function, "ids must lie in [0, " + std::to_string(vocab) + ")",
             std::to_string(id) + " in row " + std::to_string(n), "Map ignored tokens to any valid id and mask them.");
  }
  if (row_temperature) {
    const DType dtype = logits.dtype == DType::f64 ? DType::f64 : DType::f32;
    check_dense(function, "row_temperature", *row_temperature, dtype, Device::cpu, {rows});
    for (std::int64_t n = 0; n < rows; ++n)
      check_temperature(function, Vector{row_temperature}.get(n), "row_temperature[" + std::to_string(n) + "]");
  } else {
    check_temperature(function, temperature, "temperature");
  }
  return {logits.dtype, &kernels(), index_of(logits.dtype), Rows(logits), vocab, rows, ids.as<std::int64_t>(),
          row_temperature, temperature};
}

// ---- forward

struct Forward : Problem {
  TensorView statistics;
};

// Neumaier's sum: f64 is there to be exact, and a plain sum over a vocabulary loses two digits.
struct ExactSum {
  double sum = 0, lost = 0;

  void add(double x) {
    const double next = sum + x;
    lost += std::abs(sum) >= std::abs(x) ? (sum - next) + x : (x - next) + sum;
    sum = next;
  }
  double total() const { return std::isfinite(lost) ? sum + lost : sum; }
};

RowSums sums_f64(const double* x, std::int64_t vocab, double temperature) {
  double max = -std::numeric_limits<double>::infinity();
  for (std::int64_t v = 0; v < vocab; ++v) max = x[v] > max ? x[v] : max;
  const double reference = std::isinf(max) && max < 0 ? 0 : max;
  ExactSum exp, weighted, logit, squared, shifted;
  for (std::int64_t v = 0; v < vocab; ++v) {
    const double d = x[v] - reference, e = std::exp(d / temperature);
    exp.add(e);
    weighted.add(e == 0 ? 0 : d * e);
    logit.add(x[v]);
    squared.add(e * e);
    shifted.add(d);
  }
  return {max, exp.total(), weighted.total(), logit.total(), squared.total(), shifted.total()};
}

void write_statistics(const Forward& problem, std::int64_t n, const RowSums& sums, double chosen, double temperature) {
  const Vector out{&problem.statistics};
  const std::int64_t rows = problem.rows;
  std::int64_t i = n;
  const auto put = [&](double x) {
    out.set(i, std::isnan(sums.weighted_exp) ? sums.weighted_exp : x);
    i += rows;
  };
  const double top = sums.max / temperature, log_sum = std::log(sums.exp), lse = top + log_sum;
  put((chosen - sums.max) / temperature - log_sum);
  put(log_sum - sums.weighted_exp / sums.exp / temperature);
  put(lse);
  const std::int64_t kinds = problem.statistics.shape[0];
  if (kinds == 4 || kinds == 8) put(std::isfinite(lse) ? (top - out.get(i - rows)) + log_sum : 0.0);
  if (kinds < 7) return;
  put(sums.logit / temperature / static_cast<double>(problem.vocab));
  put(sums.squared_exp / (sums.exp * sums.exp));
  put(chosen == sums.max);
  put(sums.shifted / static_cast<double>(problem.vocab) / temperature - log_sum);
}

void forward_rows(void* context, std::int64_t begin, std::int64_t end) {
  const Forward& problem = *static_cast<const Forward*>(context);
  const bool all = problem.statistics.shape[0] >= 7;
  for (std::int64_t n = begin; n < end; ++n) {
    const char* row = problem.logits[n];
    const double temperature = problem.temperature_of(n);
    const RowSums sums = softmax_row_sums(problem.dtype, row, problem.vocab, temperature, all);
    write_statistics(problem, n, sums, problem.logit(row, problem.ids[n]), temperature);
  }
}

// ---- gradient

struct Gradient : Problem {
  Rows out;
  TensorView lse, coefficients;
  bool through_tanh;
};

struct Coefficients {
  double a, b, c, d, e;
  bool through_tanh;

  double at(double x, double logp, double temperature, bool chosen) const {
    const double p = std::exp(logp), slope = p == 0 ? 0 : p * (b + c * logp + d * p), y = x < -1 ? -1 : x;
    const double gradient = (a + slope + (chosen ? e : 0)) / temperature;
    return through_tanh ? gradient * (1 - y * y) : gradient;
  }
};

// lse in two parts, for f64 too: log p is then as exact as its own rounding allows.
struct Lse {
  double rounded, error;

  double logp(double x, double temperature) const { return (x / temperature - rounded) - error; }
};

void gradient_f64(const double* x, double* out, std::int64_t vocab, std::int64_t id, const Lse& lse, double temperature,
                  const Coefficients& k) {
  for (std::int64_t v = 0; v < vocab; ++v) out[v] = k.at(x[v], lse.logp(x[v], temperature), temperature, v == id);
}

RowGradient row_gradient(const Coefficients& k, const Lse& parts, double temperature) {
  const double lse = parts.rounded + parts.error;
  RowGradient g;
  g.reference = static_cast<float>(lse * temperature);
  g.inverse_temperature = static_cast<float>(1 / temperature);
  g.exp2_scale = exp2_scale(temperature);
  const double shift = std::isfinite(lse) ? lse - static_cast<double>(g.reference) / temperature : 0;
  g.shift = static_cast<float>(shift);
  g.p_factor = static_cast<float>(std::exp(-shift));
  g.a = static_cast<float>(k.a / temperature);
  g.b = static_cast<float>(k.b / temperature);
  g.c = static_cast<float>(k.c / temperature);
  g.d = static_cast<float>(k.d / temperature);
  g.through_tanh = k.through_tanh;
  return g;
}

void gradient_rows(void* context, std::int64_t begin, std::int64_t end) {
  const Gradient& problem = *static_cast<const Gradient*>(context);
  const Vector lse_of{&problem.lse}, coefficient{&problem.coefficients};
  const std::int64_t rows = problem.rows, size = bytes_of(problem.dtype);
  for (std::int64_t n = begin; n < end; ++n) {
    char* out = problem.out[n];
    const auto k = [&](int i) { return coefficient.get(i * rows + n); };
    const Coefficients c = {k(0), k(1), k(2), k(3), k(4), problem.through_tanh};
    if (c.a == 0 && c.b == 0 && c.c == 0 && c.d == 0 && c.e == 0) {
      std::memset(out, 0, static_cast<std::size_t>(problem.vocab * size));
      continue;
    }
    const char* row = problem.logits[n];
    const std::int64_t id = problem.ids[n];
    const double temperature = problem.temperature_of(n);
    const Lse lse = {lse_of.get(n), problem.lse.ndim == 2 ? lse_of.get(rows + n) : 0};
    if (problem.dtype == DType::f64) {
      gradient_f64(reinterpret_cast<const double*>(row), reinterpret_cast<double*>(out), problem.vocab, id, lse,
                   temperature, c);
      continue;
    }
    // In double: 1 - p of a likely token would lose all its digits in float. Read first, for `out` may be `row`.
    const double x = problem.logit(row, id), chosen = c.at(x, lse.logp(x, temperature), temperature, true);
    problem.kernels->gradient[problem.kernel](row, out, problem.vocab, row_gradient(c, lse, temperature));
    problem.kernels->store[problem.kernel](out + id * size, static_cast<float>(chosen));
  }
}

}  // namespace

RowSums softmax_row_sums(DType dtype, const void* row, std::int64_t vocab, double temperature, bool all) {
  if (dtype == DType::f64) return sums_f64(static_cast<const double*>(row), vocab, temperature);
  RowSums sums;
  kernels().forward[index_of(dtype)](row, vocab, exp2_scale(temperature), all, &sums);
  return sums;
}

namespace cpu {

void softmax_rows_forward(const TensorView& logits, const TensorView& ids, const TensorView* row_temperature,
                          double temperature, const TensorView& statistics, int threads) {
  constexpr const char* function = "softmax_rows_forward";
  Forward problem = {checked(function, logits, ids, row_temperature, temperature), statistics};
  const DType dtype = logits.dtype == DType::f64 ? DType::f64 : DType::f32;
  const std::int64_t kinds = statistics.ndim == 2 ? statistics.shape[0] : 0;
  if (kinds != 3 && kinds != 4 && kinds != 7 && kinds != 8)
    refuse(function, "statistics must have 3, 4, 7 or 8 rows", shape_text(statistics), "Allocate one of those.");
  check_dense(function, "statistics", statistics, dtype, Device::cpu, {kinds, problem.rows});
  parallel_for(problem.rows, rows_at_once(problem.rows, problem.vocab, threads), threads, forward_rows, &problem);
}

void softmax_rows_gradient(const TensorView& logits, const TensorView& ids, const TensorView& lse,
                           const TensorView& coefficients, const TensorView* row_temperature, double temperature,
                           const TensorView& out, int threads, bool through_tanh) {
  constexpr const char* function = "softmax_rows_gradient";
  check_logits(function, "out", out);
  Gradient problem = {checked(function, logits, ids, row_temperature, temperature), Rows(out), lse, coefficients,
                      through_tanh};
  const DType dtype = logits.dtype == DType::f64 ? DType::f64 : DType::f32;
  check_dtype(function, "out", out, logits.dtype);
  if (std::memcmp(out.shape, logits.shape, 3 * sizeof(out.shape[0])) != 0)
    refuse(function, "out must have the shape of logits", shape_text(out), "Allocate it with empty_like(logits).");
  if ((out.stride[0] == 0 && out.shape[0] > 1) || (out.stride[1] == 0 && out.shape[1] > 1))
    refuse(function, "out must give each row its own memory", "an expanded view", "Use empty_like(logits).");
  if (lse.ndim == 2)
    check_dense(function, "lse", lse, dtype, Device::cpu, {2, problem.rows});
  else
    check_dense(function, "lse", lse, dtype, Device::cpu, {problem.rows});
  check_dense(function, "coefficients", coefficients, dtype, Device::cpu, {5, problem.rows});
  parallel_for(problem.rows, rows_at_once(problem.rows, problem.vocab, threads), threads, gradient_rows, &problem);
}

}  // namespace cpu
}  // namespace fuserl
