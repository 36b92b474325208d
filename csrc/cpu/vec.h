// Vectors of floats in the widest registers the current compile flags allow, and loads, stores and exp2 on them.
// Included only by files compiled once per instruction set (FUSERL_ISA names the copy). Everything here has internal
// linkage, and nothing of std:: may be used: a template instantiated in such a file could be emitted with AVX-512
// instructions and then be picked by the linker for the whole program.
#pragma once
#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define FUSERL_INLINE inline __attribute__((always_inline))

namespace fuserl {
namespace {

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif

typedef float Floats __attribute__((vector_size(width * 4)));
typedef std::int32_t Ints __attribute__((vector_size(width * 4)));
typedef std::uint32_t Words __attribute__((vector_size(width * 4)));
typedef std::uint16_t Halves __attribute__((vector_size(width * 2)));
typedef Floats UnalignedFloats __attribute__((aligned(4), may_alias));
typedef Halves UnalignedHalves __attribute__((aligned(2), may_alias));

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

FUSERL_INLINE Floats broadcast(float x) { return x - Floats{}; }
FUSERL_INLINE Words as_words(Floats x) { return reinterpret_cast<Words>(x); }
FUSERL_INLINE Floats as_floats(Words x) { return reinterpret_cast<Floats>(x); }
// The second argument where either is NaN.
FUSERL_INLINE Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// Fetches what lies some bytes behind p, to be read or written; past the end of an array nothing happens.
template <bool write = false, class T>
FUSERL_INLINE void prefetch(const T* p, std::int64_t bytes) {
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(p) + static_cast<std::uintptr_t>(bytes);
  __builtin_prefetch(reinterpret_cast<const void*>(address), write);
}

FUSERL_INLINE Floats load(const float* p) { return *reinterpret_cast<const UnalignedFloats*>(p); }
FUSERL_INLINE void store(float* p, Floats x) { *reinterpret_cast<UnalignedFloats*>(p) = x; }

// Intrinsics where GCC 12 takes the vectors apart for __builtin_convertvector, and in their masked form, because the
// plain one makes it warn about its own header.
#if defined(__AVX512F__)
constexpr __mmask16 every = 0xffff;
FUSERL_INLINE Words load_words(const void* p) {
  return (Words)_mm512_maskz_cvtepu16_epi32(every, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
FUSERL_INLINE void store_words(void* p, Words x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_maskz_cvtepi32_epi16(every, (__m512i)x));
}
#else
FUSERL_INLINE Words load_words(const void* p) {
#if defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*static_cast<const UnalignedHalves*>(p), Words);
#endif
}
FUSERL_INLINE void store_words(void* p, Words x) {
  *static_cast<UnalignedHalves*>(p) = __builtin_convertvector(x, Halves);
}
#endif

FUSERL_INLINE Floats load(const Bf16* p) { return as_floats(load_words(p) << 16); }
FUSERL_INLINE void store(Bf16* p, Floats x) {
  const Words bits = as_words(x);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  store_words(p, x == x ? rounded : (bits >> 16 | 0x40));
}

#if defined(__AVX512F__)
FUSERL_INLINE Floats load(const F16* p) {
  return (Floats)_mm512_maskz_cvtph_ps(every, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
FUSERL_INLINE void store(F16* p, Floats x) {
  const __m256i bits = _mm512_maskz_cvtps_ph(every, (__m512)x, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
#elif defined(__F16C__)
FUSERL_INLINE Floats load(const F16* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FUSERL_INLINE void store(F16* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
FUSERL_INLINE Floats load(const F16* p) {
  const Words bits = load_words(p);
  const Words magnitude = (bits & 0x7fff) << 13;
  const Words normal = magnitude + (112u << 23);
  // A subnormal half is its bits times 2^-24: built as 2^-14 (1 + bits/1024) - 2^-14, which is exact.
  const Words tiny = as_words(as_floats(magnitude + (113u << 23)) - 0x1p-14f);
  const Words special = magnitude + (224u << 23);
  const Words finite = magnitude < (1u << 23) ? tiny : normal;
  return as_floats((magnitude >= (31u << 23) ? special : finite) | (bits & 0x8000) << 16);
}
FUSERL_INLINE void store(F16* p, Floats x) {
  const Words bits = as_words(x), magnitude = bits & 0x7fffffff;
  const Words odd = magnitude >> 13 & 1;
  const Words normal = (magnitude - (112u << 23) + 0xfff + odd) >> 13;
  // Adding 1/2 shifts a subnormal half's bits to the bottom of the mantissa and rounds them to nearest even.
  const Words tiny = as_words(as_floats(magnitude) + 0.5f) - (126u << 23);
  const Words infinite = magnitude > (255u << 23) ? Words{} + 0x7e00 : Words{} + 0x7c00;
  const Words finite = magnitude < (113u << 23) ? tiny : normal;
  store_words(p, (magnitude >= (143u << 23) ? infinite : finite) | (bits >> 16 & 0x8000));
}
#endif

// x[i] = 2^(x[i] scale) for -126 <= x scale < 128, to 1 ulp where the product is exact (FMA); exactly 1 at x = 0.
// Several vectors a step: one alone would wait for the latency of each operation of its polynomial.
template <int count>
FUSERL_INLINE void exp2_scaled(Floats (&result)[count], const Floats (&x)[count], float scale) {
  constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  constexpr float coefficients[] = {0x1.5f3e52p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f,
                                    0x1.ebfbdcp-3f,  0x1.62e43p-1f,  1.0f};
  Floats shifted[count], f[count], p[count];
  for (int i = 0; i < count; ++i) shifted[i] = x[i] * scale + round;
  for (int i = 0; i < count; ++i) f[i] = x[i] * scale - (shifted[i] - round);
  for (int i = 0; i < count; ++i) p[i] = broadcast(0x1.41fbbcp-13f);
  for (const float c : coefficients)
    for (int i = 0; i < count; ++i) p[i] = p[i] * f[i] + c;
  for (int i = 0; i < count; ++i) result[i] = as_floats(as_words(p[i]) + (as_words(shifted[i]) << 23));
}

FUSERL_INLINE Floats exp2_scaled(Floats x, float scale) {
  Floats result[1];
  exp2_scaled<1>(result, {x}, scale);
  return result[0];
}

}  // namespace
}  // namespace fuserl
