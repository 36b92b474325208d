// What preference_loss.cpp asks of the code that is compiled once per instruction set: sums over the tokens of a rollout.
#pragma once
#include <cstdint>

namespace fuserl {

struct PreferenceSums {
  double score, logprob, tokens;  // of x - ref, or of x where ref is null; of x; of 1
};

// Over the tokens that `mask` keeps, or all where it is null; in doubles and one order, whatever the instruction set.
struct PreferenceLossKernels {
  PreferenceSums (*f32)(const float* x, const float* ref, const unsigned char* mask, std::int64_t n);
  PreferenceSums (*f64)(const double* x, const double* ref, const unsigned char* mask, std::int64_t n);
};

}  // namespace fuserl
