// What divergence.cpp asks of the code that is compiled once per instruction set.
#pragma once
#include <cstdint>

#include "ops.h"

namespace fuserl {

// One side of a row: log prob = (x - reference) inverse - shift, prob = exp of that.
template <class T>
struct DivergenceSide {
  T reference;  // lse in units of logits, rounded
  T inverse;    // 1 / temperature
  T shift;      // what rounding left out of `reference`
  T scale;      // log2(e) / temperature
  T factor;     // exp(-shift)
};

// log (p / q) = (x_p - ratio x_q) p.inverse - gap: nothing is lost of it where p is close to q.
template <class T>
struct DivergenceRow {
  DivergenceSide<T> p, q;
  T ratio;  // temperature_p / temperature_q
  T gap;    // lse_p - lse_q
};

// The gradient to logits_p is p_slope p F_p + p (p_constant + p_log log p), that to logits_q without the last term.
template <class T>
struct DivergenceSlopes {
  T p_slope, p_constant, p_log, q_slope, q_constant;
};

// With F the summand of the divergence as kernels/divergence_terms has it, F_p and F_q its derivatives: sums of F, p F_p
// and q F_q. The last two would follow from the first, were the normalisers exact; as they are summed, what is wrong with
// those cancels in the gradient.
struct DivergenceSums {
  double value, p_slope, q_slope;
};

template <class T>
struct DivergenceKernels {
  void (*forward)(const void* p, const void* q, DType dtype_p, DType dtype_q, std::int64_t vocab,
                  const DivergenceRow<T>& row, const DivergenceRule& rule, DivergenceSums* sums);
  // A null out_p or out_q is not written; either may be the row that it is the gradient of, and one alone either row.
  void (*gradient)(const void* p, const void* q, DType dtype_p, DType dtype_q, void* out_p, void* out_q,
                   std::int64_t vocab, const DivergenceRow<T>& row, const DivergenceSlopes<T>& slopes,
                   const DivergenceRule& rule);
  void (*sampled)(const T* logprobs, const T* ref_logprobs, T* values, T* derivative, std::int64_t n,
                  const SampledRule& rule);
};

struct DivergenceTable {
  DivergenceKernels<float> f32;
  DivergenceKernels<double> f64;
};

}  // namespace fuserl
