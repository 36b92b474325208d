// What gaussian_logprob.cpp asks of the code that is compiled once per instruction set: some rows at a time.
#pragma once
#include <cstdint>

namespace fuserl {

// Scales of rows and dimensions, one for all of either that they do not tell apart.
template <class T>
struct GaussianScale {
  const T* data;
  bool per_row, per_dimension;
};

// What may be null is as in ops.h.
template <class T>
struct GaussianRows {
  std::int64_t dimensions;
  const T *actions, *mean, *ref_mean;
  GaussianScale<T> scale, ref_scale;
  const unsigned char* mask;
  bool mask_per_row, logs;  // logs: scales are logarithms of standard deviations
};

// Of each row; null where it is not wanted, or nothing comes from above.
template <class T>
struct GaussianOutputs {
  T *logprob, *entropy, *kl;
};

// As the inputs. A scale for all rows has its gradient in `sums`, where these rows' part is added.
template <class T>
struct GaussianGradients {
  T *actions, *mean, *ref_mean, *scale, *ref_scale;
  double *sums, *ref_sums;
};

template <class T>
struct GaussianKernels {
  void (*forward)(const GaussianRows<T>& rows, std::int64_t begin, std::int64_t end, const GaussianOutputs<T>& out);
  void (*backward)(const GaussianRows<T>& rows, std::int64_t begin, std::int64_t end,
                   const GaussianOutputs<const T>& g, const GaussianGradients<T>& out);
};

struct GaussianTable {
  GaussianKernels<float> f32;
  GaussianKernels<double> f64;
};

}  // namespace fuserl
