// Row kernels of softmax_rows, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "softmax_rows_kernels.h"

#include "vec.h"

namespace fuserl {
namespace {

constexpr int group = 4 * width;           // elements an iteration handles
constexpr std::int64_t block = 2048;       // elements that stay in L1 between the two passes over them
constexpr std::int64_t ahead = 12 * 1024;  // bytes: far enough to hide memory, near enough for a 32 KiB L1
constexpr float floor_exponent = -100.0f;  // exp2 from here down counts as 0: its square is never subnormal, hence slow
constexpr float infinity = __builtin_inff();

FUSERL_INLINE void set_minus_infinity(float* p) { *p = -infinity; }
FUSERL_INLINE void set_minus_infinity(Bf16* p) { p->bits = 0xff80; }
FUSERL_INLINE void set_minus_infinity(F16* p) { p->bits = 0xfc00; }

template <class T>
FUSERL_INLINE void prefetch_ahead(const T* p) {
  for (std::int64_t byte = 0; byte < static_cast<std::int64_t>(group * sizeof(T)); byte += 64) prefetch(p, ahead + byte);
}

// The elements past the last whole group, followed by -inf.
template <class T>
struct Tail {
  T data[group];

  FUSERL_INLINE Tail(const T* p, std::int64_t n) {
    for (int i = 0; i < group; ++i)
      if (i < n)
        data[i] = p[i];
      else
        set_minus_infinity(data + i);
  }
};

template <class T>
FUSERL_INLINE double sum_of_first(const Tail<T>& tail, std::int64_t n) {
  float x[group];
  for (int i = 0; i < group; i += width) store(x + i, load(tail.data + i));
  double sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]);
  return sum;
}

template <class T>
FUSERL_INLINE float block_max(const T* p, std::int64_t n) {
  Floats m = broadcast(-infinity);
  for (std::int64_t i = 0; i < n; i += group) {
    const Floats a = maximum(load(p + i), load(p + i + width));
    const Floats b = maximum(load(p + i + 2 * width), load(p + i + 3 * width));
    m = maximum(m, maximum(a, b));
  }
  float largest = m[0];
  for (int i = 1; i < width; ++i) largest = m[i] > largest ? m[i] : largest;
  return largest;
}

// Lane sums over one block are floats (at most block / group terms each), those over a row doubles.
struct BlockSums {
  Floats exp = {}, weighted_exp = {}, logit = {}, squared_exp = {}, shifted = {};
};
typedef double Lanes[width];

FUSERL_INLINE void accumulate(Lanes& into, Floats x) {
  for (int i = 0; i < width; ++i) into[i] += static_cast<double>(x[i]);
}

FUSERL_INLINE double total_of(Floats x) {
  double sum = 0;
  for (int i = 0; i < width; ++i) sum += static_cast<double>(x[i]);
  return sum;
}

FUSERL_INLINE double total(const Lanes& x) {
  double sum = 0;
  for (int i = 0; i < width; ++i) sum += x[i];
  return sum;
}

// Sums of a row relative to the largest logit met so far.
struct Running {
  double max = -__builtin_inf();
  Lanes exp = {}, weighted_exp = {}, logit = {}, squared_exp = {};
  double shifted = 0;  // relative to 0, by way of each block's reference: exact enough in double

  FUSERL_INLINE void raise(double new_max, double exp2_scale) {
    if (!(new_max > max)) return;
    if (max > -__builtin_inf()) {
      const double shift = max - new_max, factor = __builtin_exp2(shift * exp2_scale);
      for (int i = 0; i < width; ++i) {
        weighted_exp[i] = factor * (weighted_exp[i] + shift * exp[i]);
        exp[i] *= factor;
        squared_exp[i] *= factor * factor;
      }
    }
    max = new_max;
  }
};

template <bool All, class T>
FUSERL_INLINE void add_group(BlockSums& sums, const T* p, float reference, float exp2_scale, Floats floor,
                             Floats floor_exp) {
  Floats x[4], e[4], d[4];
  for (int k = 0; k < 4; ++k) {
    x[k] = load(p + k * width);
    const Floats distance = x[k] - reference;
    if (All) sums.shifted += distance;
    d[k] = maximum(floor, distance);
  }
  exp2_scaled(e, d, exp2_scale);
  for (int k = 0; k < 4; ++k) {
    e[k] -= floor_exp;
    if (All) sums.squared_exp += maximum(broadcast(0x1p-60f), e[k]) * e[k];
  }
  if (All) sums.logit += (x[0] + x[1]) + (x[2] + x[3]);
  sums.exp += (e[0] + e[1]) + (e[2] + e[3]);
  sums.weighted_exp += (d[0] * e[0] + d[1] * e[1]) + (d[2] * e[2] + d[3] * e[3]);
}

template <bool All, class T>
FUSERL_INLINE void add_block(Running& running, const T* p, std::int64_t n, float exp2_scale) {
  running.raise(block_max(p, n), exp2_scale);
  const bool nothing_yet = running.max == -__builtin_inf();
  const float reference = nothing_yet ? 0.0f : static_cast<float>(running.max);
  const Floats floor = broadcast(floor_exponent / exp2_scale), floor_exp = exp2_scaled(floor, exp2_scale);
  BlockSums sums;
  for (std::int64_t i = 0; i < n; i += group) {
    prefetch_ahead(p + i);
    add_group<All>(sums, p + i, reference, exp2_scale, floor, floor_exp);
  }
  accumulate(running.exp, sums.exp);
  accumulate(running.weighted_exp, sums.weighted_exp);
  if (All) accumulate(running.logit, sums.logit);
  if (All) running.shifted += total_of(sums.shifted) + static_cast<double>(n) * static_cast<double>(reference);
  if (All) accumulate(running.squared_exp, sums.squared_exp);
}

template <bool All, class T>
void forward_row(const T* row, std::int64_t vocab, float exp2_scale, RowSums* out) {
  Running running;
  const std::int64_t whole = vocab / group * group;
  for (std::int64_t i = 0; i < whole; i += block)
    add_block<All>(running, row + i, whole - i < block ? whole - i : block, exp2_scale);
  double logit = total(running.logit), shifted = running.shifted;  // before the tail, whose padding is -inf
  if (whole < vocab) {
    const Tail<T> tail(row + whole, vocab - whole);
    add_block<All>(running, tail.data, group, exp2_scale);
    if (All) logit += sum_of_first(tail, vocab - whole);
    if (All) shifted += sum_of_first(tail, vocab - whole);
  }
  if (All) shifted -= static_cast<double>(vocab) * running.max;
  *out = {running.max, total(running.exp), total(running.weighted_exp), logit, total(running.squared_exp), shifted};
}

template <class T>
void forward(const void* row, std::int64_t vocab, float exp2_scale, bool all, RowSums* sums) {
  const auto f = all ? forward_row<true, T> : forward_row<false, T>;
  f(static_cast<const T*>(row), vocab, exp2_scale, sums);
}

struct GradientConstants {
  RowGradient g;
  Floats floor, floor_exp;
};

template <bool ThroughTanh, class T>
FUSERL_INLINE void gradient_group(const T* p, T* out, const GradientConstants& k) {
  Floats x[4], d[4], prob[4];
  for (int i = 0; i < 4; ++i) {
    x[i] = load(p + i * width);
    d[i] = maximum(k.floor, x[i] - k.g.reference);
  }
  exp2_scaled(prob, d, k.g.exp2_scale);
  for (int i = 0; i < 4; ++i) {
    prob[i] = (prob[i] - k.floor_exp) * k.g.p_factor;
    const Floats logp = d[i] * k.g.inverse_temperature - k.g.shift;
    const Floats slope = prob[i] * (k.g.d * prob[i] + (k.g.c * logp + k.g.b)) + k.g.a;
    // A tanh is at least -1; -inf stands there for a token that is not allowed, and its slope is 0.
    const Floats y = ThroughTanh ? maximum(broadcast(-1.0f), x[i]) : x[i];
    store(out + i * width, ThroughTanh ? slope * (1.0f - y * y) : slope);
  }
}

template <bool ThroughTanh, class T>
void gradient_row(const T* p, T* out, std::int64_t vocab, const RowGradient& row_gradient) {
  GradientConstants k;
  k.g = row_gradient;
  k.floor = broadcast(floor_exponent / k.g.exp2_scale);
  k.floor_exp = exp2_scaled(k.floor, k.g.exp2_scale);
  const std::int64_t whole = vocab / group * group;
  for (std::int64_t i = 0; i < whole; i += group) {
    prefetch_ahead(p + i);
    gradient_group<ThroughTanh>(p + i, out + i, k);
  }
  if (whole == vocab) return;
  Tail<T> tail(p + whole, vocab - whole);
  gradient_group<ThroughTanh>(tail.data, tail.data, k);
  for (std::int64_t i = whole; i < vocab; ++i) out[i] = tail.data[i - whole];
}

template <class T>
void gradient(const void* row, void* out, std::int64_t vocab, const RowGradient& row_gradient) {
  const auto f = row_gradient.through_tanh ? gradient_row<true, T> : gradient_row<false, T>;
  f(static_cast<const T*>(row), static_cast<T*>(out), vocab, row_gradient);
}

template <class T>
float load_one(const void* element) {
  return load(Tail<T>(static_cast<const T*>(element), 1).data)[0];
}

template <class T>
void store_one(void* element, float value) {
  T lanes[width];
  store(lanes, broadcast(value));
  *static_cast<T*>(element) = lanes[0];
}

}  // namespace

namespace FUSERL_ISA {
extern const SoftmaxRowsKernels softmax_rows;
const SoftmaxRowsKernels softmax_rows = {
    {forward<float>, forward<Bf16>, forward<F16>},
    {gradient<float>, gradient<Bf16>, gradient<F16>},
    {load_one<float>, load_one<Bf16>, load_one<F16>},
    {store_one<float>, store_one<Bf16>, store_one<F16>},
};
}  // namespace FUSERL_ISA
}  // namespace fuserl
