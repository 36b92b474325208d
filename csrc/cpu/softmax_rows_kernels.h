// What softmax_rows.cpp asks of the code that is compiled once per instruction set: one row at a time.
#pragma once
#include <cstdint>

namespace fuserl {

// With m the row's maximum and e = exp((x - m) / temperature).
struct RowSums {
  double max;
  double exp;           // sum e
  double weighted_exp;  // sum (x - m) e; NaN when the row has a NaN or +inf
  double logit;         // sum x       (0 unless `all`)
  double squared_exp;   // sum e^2     (0 unless `all`)
  double shifted;       // sum (x - m) (0 unless `all`): the sum of x has lost its digits where m is large
};

// logp = (x - reference) inverse_temperature - shift,  p = exp(logp),  out = a + p (b + c logp + d p), times 1 - x^2 if
// through_tanh: x is then tanh(u), and the gradient u's.
struct RowGradient {
  float reference;  // lse in units of logits, rounded
  float inverse_temperature;
  float exp2_scale;  // log2(e) / temperature
  float shift;       // what rounding left out of `reference`
  float p_factor;    // exp(-shift)
  float a, b, c, d;
  bool through_tanh;
};

// Arrays are indexed by 0 f32, 1 bf16, 2 f16.
struct SoftmaxRowsKernels {
  void (*forward[3])(const void* row, std::int64_t vocab, float exp2_scale, bool all, RowSums* sums);
  void (*gradient[3])(const void* row, void* out, std::int64_t vocab, const RowGradient& row_gradient);
  float (*load[3])(const void* element);
  void (*store[3])(void* element, float value);
};

}  // namespace fuserl
