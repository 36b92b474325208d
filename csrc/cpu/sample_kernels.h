// What sample.cpp asks of the code that is compiled once per instruction set. Rows are floats, and everything that
// takes `n` of them takes whole steps of `sample_step`, the last one filled up with -inf.
#pragma once
#include <cstdint>

namespace fuserl {

constexpr std::int64_t sample_step = 64;

// weight = 2^((x - peak) scale + bits), rounded to an integer.
struct SampleScale {
  float peak, scale;
  int bits;
};

struct SampleMeasure {
  std::int64_t count;
  double mass;  // sum of integers below 2^53: exact, so the order of the terms does not show
};

struct SampleKernels {
  // Writes a row of f32, bf16 or f16 as floats, filled up; returns its maximum, or NaN if the row has one.
  float (*read[3])(const void* row, std::int64_t vocab, float* x);
  void (*weigh)(const float* x, std::int64_t n, const SampleScale& scale, float* weights);
  // Of the tokens with x >= threshold; a null `weights` counts only.
  SampleMeasure (*above)(const float* x, const float* weights, std::int64_t n, float threshold);
  // Moves tokens with low <= x < high to the front of `kept`, in their order, and returns how many. Up to a step beyond
  // them is written, too; `kept` may be where they came from.
  std::int64_t (*gather)(const float* x, const float* weights, std::int64_t n, float low, float high, float* kept_x,
                         float* kept_weights);
};

}  // namespace fuserl
