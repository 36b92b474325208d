// Loads and stores of what a step handles besides vectors of floats: doubles, and masks of bytes. As vec.h: only for
// files compiled once per instruction set.
#pragma once
#include "vec.h"

namespace fuserl {
namespace {

FUSERL_INLINE double load(const double* p) { return *p; }
FUSERL_INLINE void store(double* p, double x) { *p = x; }
FUSERL_INLINE Ints load_mask(const unsigned char* p, Ints) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtepu8_epi32(every, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) != 0;
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))) != 0;
#else
  Ints mask;
  for (int i = 0; i < width; ++i) mask[i] = -(p[i] != 0);
  return mask;
#endif
}
FUSERL_INLINE bool load_mask(const unsigned char* p, bool) { return *p != 0; }

}  // namespace
}  // namespace fuserl
