// Row kernels of sample, compiled once per instruction set: FUSERL_ISA names the copy's namespace. Compiled without
// fused products, so that every copy, and Triton and torch beside it, rounds a weight in the same places.
#include "sample_kernels.h"

#include "vec.h"

namespace fuserl {
namespace {

constexpr float infinity = __builtin_inff();
constexpr std::int64_t ahead = 4096;  // bytes prefetched before they are read
static_assert(sample_step % (4 * width) == 0, "a step is whole vectors, four at a time");

#if defined(__AVX512F__)
typedef double Doubles __attribute__((vector_size(64)));
FUSERL_INLINE bool any(Ints mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
FUSERL_INLINE Doubles low_half(Floats x) {
  return (Doubles)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 0));
}
FUSERL_INLINE Doubles high_half(Floats x) {
  return (Doubles)_mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, (__m512)x, 1));
}
#elif defined(__AVX2__)
typedef double Doubles __attribute__((vector_size(32)));
FUSERL_INLINE bool any(Ints mask) { return !_mm256_testz_si256((__m256i)mask, (__m256i)mask); }
FUSERL_INLINE Doubles low_half(Floats x) { return (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)); }
FUSERL_INLINE Doubles high_half(Floats x) { return (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)); }
#else
typedef double Doubles __attribute__((vector_size(16)));
FUSERL_INLINE bool any(Ints mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
FUSERL_INLINE Doubles low_half(Floats x) { return Doubles{static_cast<double>(x[0]), static_cast<double>(x[1])}; }
FUSERL_INLINE Doubles high_half(Floats x) { return Doubles{static_cast<double>(x[2]), static_cast<double>(x[3])}; }
#endif

FUSERL_INLINE void set_minus_infinity(float* p) { *p = -infinity; }
FUSERL_INLINE void set_minus_infinity(Bf16* p) { p->bits = 0xff80; }
FUSERL_INLINE void set_minus_infinity(F16* p) { p->bits = 0xfc00; }

struct Peak {
  Floats top = broadcast(-infinity);
  Ints nan = {};

  template <class T>
  FUSERL_INLINE void step(const T* p, float* x) {
    for (int i = 0; i < sample_step; i += width) {
      const Floats value = load(p + i);
      store(x + i, value);
      nan |= value != value;
      top = maximum(top, value);
    }
  }
};

template <class T>
float read(const void* row, std::int64_t vocab, float* x) {
  const T* p = static_cast<const T*>(row);
  const std::int64_t whole = vocab / sample_step * sample_step;
  Peak peak;
  for (std::int64_t i = 0; i < whole; i += sample_step) {
    prefetch(p + i, ahead);
    peak.step(p + i, x + i);
  }
  if (whole < vocab) {
    T tail[sample_step];
    for (std::int64_t i = 0; i < sample_step; ++i)
      if (whole + i < vocab)
        tail[i] = p[whole + i];
      else
        set_minus_infinity(tail + i);
    peak.step(tail, x + whole);
  }
  if (any(peak.nan)) return __builtin_nanf("");
  float largest = peak.top[0];
  for (int i = 1; i < width; ++i) largest = peak.top[i] > largest ? peak.top[i] : largest;
  return largest;
}

FUSERL_INLINE Floats weight(Floats x, const SampleScale& s) {
  constexpr float round = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  constexpr float coefficients[] = {0x1.5f3e52p-10f, 0x1.3b2d4cp-7f, 0x1.c6aee8p-5f,
                                    0x1.ebfbdcp-3f,  0x1.62e43p-1f,  1.0f};
  // From here down the weight is 0.
  const Floats y = maximum(broadcast(static_cast<float>(-s.bits - 2)), (x - s.peak) * s.scale);
  const Floats shifted = y + round, f = y - (shifted - round);
  Floats p = broadcast(0x1.41fbbcp-13f);
  for (const float c : coefficients) p = p * f + c;
  const Words exponent = (as_words(shifted) + static_cast<std::uint32_t>(s.bits)) << 23;
  const Floats exact = as_floats(as_words(p) + exponent) + 0.5f;
  // Beyond 2^23 a float is an integer as it stands.
  const Floats whole = __builtin_convertvector(__builtin_convertvector(exact, Ints), Floats);
  return exact < 0x1p23f ? whole : exact;
}

void weigh(const float* x, std::int64_t n, const SampleScale& scale, float* weights) {
  for (std::int64_t i = 0; i < n; i += sample_step)
    for (int k = 0; k < sample_step; k += width) store(weights + i + k, weight(load(x + i + k), scale));
}

template <bool Weighted>
FUSERL_INLINE SampleMeasure measure(const float* x, const float* weights, std::int64_t n, float threshold) {
  constexpr int chains = 4;  // a sum alone would wait for the latency of each addition
  Ints count[chains] = {};
  Doubles low[chains] = {}, high[chains] = {};
  for (std::int64_t i = 0; i < n; i += chains * width)
    for (int k = 0; k < chains; ++k) {
      const Ints in = load(x + i + k * width) >= threshold;
      count[k] -= in;
      if (!Weighted) continue;
      const Floats kept = in ? load(weights + i + k * width) : Floats{};
      low[k] += low_half(kept);
      high[k] += high_half(kept);
    }
  SampleMeasure total = {0, 0};
  for (int k = 0; k < chains; ++k) {
    for (int i = 0; i < width; ++i) total.count += count[k][i];
    for (int i = 0; i < width / 2; ++i) total.mass += low[k][i] + high[k][i];
  }
  if (!Weighted) total.mass = static_cast<double>(total.count);
  return total;
}

SampleMeasure above(const float* x, const float* weights, std::int64_t n, float threshold) {
  return weights ? measure<true>(x, weights, n, threshold) : measure<false>(x, weights, n, threshold);
}

std::int64_t gather(const float* x, const float* weights, std::int64_t n, float low, float high, float* kept_x,
                    float* kept_weights) {
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; i += width) {
    const Floats value = load(x + i);
    const Ints in = (value >= low) & (value < high);
    if (!any(in)) continue;
#if defined(__AVX512F__)
    const __mmask16 mask = _mm512_test_epi32_mask((__m512i)in, (__m512i)in);
    if (weights) store(kept_weights + count, (Floats)_mm512_maskz_compress_ps(mask, (__m512)load(weights + i)));
    store(kept_x + count, (Floats)_mm512_maskz_compress_ps(mask, (__m512)value));
    count += __builtin_popcount(mask);
#else
    for (int k = 0; k < width; ++k) {
      if (!in[k]) continue;
      if (weights) kept_weights[count] = weights[i + k];
      kept_x[count++] = value[k];
    }
#endif
  }
  return count;
}

}  // namespace

namespace FUSERL_ISA {
extern const SampleKernels sample;
const SampleKernels sample = {{read<float>, read<Bf16>, read<F16>}, weigh, above, gather};
}  // namespace FUSERL_ISA
}  // namespace fuserl
