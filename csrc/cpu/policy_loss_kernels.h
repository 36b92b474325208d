// What policy_loss.cpp asks of the code that is compiled once per instruction set: one block of tokens at a time.
#pragma once
#include <cstdint>

#include "ops.h"

namespace fuserl {

// The rule as a token meets it, in its own type.
template <class T>
struct PolicyBounds {
  T factors[4], log_ratios[4];  // as in PolicyRule
  T log_least, log_most, below, above;
  T beta, entropy_coef;
  Surrogate surrogate;
  KlEstimator kl;
  bool score, kl_weighted;
};

// The first two are always there; what else may be null is as in ops.h.
template <class T>
struct PolicyBlock {
  enum Input : int {
    logprobs, advantages, old_logprobs, ref_logprobs, rollout_logprobs, log_weights, entropy, weights, inputs
  };

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
