// What discounted_scan.cpp and gae.cpp ask of the code that is compiled once per instruction set: a block of tokens.
#pragma once
#include <cstdint>

namespace fuserl {

// What a tile hands from block to block: its scan as if nothing came before the tile, the product of its links, and the
// link to the next token (forward).
template <class T>
struct ScanState {
  T local = 0, product = 1, link = 1;
};

// x[t] = b[t] + a[t] x[t + 1] from the last token to the first; forward x[t] = b[t] + a[t - 1] x[t - 1]. Only the last
// block of a segment may have another count than a multiple of 16.
template <class T>
struct ScanBlock {
  const T* b;
  const T* a;  // or null: `factor` for all
  T factor;
  T carry;  // the scan where the tile begins
  T* x;     // may be b; null where only the state is wanted
  std::int64_t count;
};

// Temporal differences of a block, delta = r + gamma V' - v, and the links gamma lam; masked tokens get 0 and 1.
template <class T>
struct DifferenceBlock {
  const T *rewards, *values;
  const T *gamma, *lam;  // or null: one number for all
  T gamma_of_all, lam_of_all;
  const unsigned char* mask;  // or null
  T next;                     // V' of the last token
  T *delta, *links;
  std::int64_t count;
};

struct ScanKernels {
  void (*f32[2])(const ScanBlock<float>& block, ScanState<float>& state);  // reverse, forward
  void (*f64[2])(const ScanBlock<double>& block, ScanState<double>& state);
  void (*differences_f32)(const DifferenceBlock<float>& block);
  void (*differences_f64)(const DifferenceBlock<double>& block);
  // returns = advantages + values, and both 0 where masked.
  void (*finish_f32)(float* advantages, float* returns, const float* values, const unsigned char* mask,
                     std::int64_t count);
  void (*finish_f64)(double* advantages, double* returns, const double* values, const unsigned char* mask,
                     std::int64_t count);
};

const ScanKernels& scan_kernels();  // of this machine

}  // namespace fuserl
