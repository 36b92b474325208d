// What policy_loss.cpp asks of the code that is compiled once per instruction set: one block of tokens at a time.
#pragma once
#include <cstdint>

#include "ops.h"

namespace fuserl {

// The rule as a token meets it: a factor in place of the ratio beyond each bound, and the bound on the log-ratio.
template <class T>
struct PolicyBounds {
  T low, high, dual;  // 1 - low, 1 + high, dual
  T log_low, log_high, log_dual;
  T beta;
  KlEstimator kl;
};

// The first two are always there; a null old_logprobs, ref_logprobs, weights, mask or derivative is as in ops.h.
template <class T>
struct PolicyBlock {
  enum Input : int { logprobs, advantages, old_logprobs, ref_logprobs, weights, inputs };

  const T* input[inputs];
  const unsigned char* mask;
  T* losses;
  T* derivative;
};

struct PolicyLossKernels {
  // Writes n losses and derivatives, and the block's statistics in the order of PolicyStatistic.
  void (*f32)(const PolicyBlock<float>& block, std::int64_t n, const PolicyBounds<float>& bounds, double* statistics);
  void (*f64)(const PolicyBlock<double>& block, std::int64_t n, const PolicyBounds<double>& bounds, double* statistics);
};

}  // namespace fuserl
