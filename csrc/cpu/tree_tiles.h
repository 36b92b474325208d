// Products and softmax of tiles, for the files of tree_attention and tree_decode that are compiled once per instruction
// set; internal linkage, nothing of std::.
#pragma once
#include "elements.h"
#include "exponentials.h"
#include "tree_attention_kernels.h"

namespace fuserl {
namespace {

constexpr float infinity = __builtin_inff();

template <class T>
using Vector = typename Step<T>::Vector;
template <class T>
using Mask = typename Step<T>::Mask;
template <class T>
constexpr int vectors = tree_tile / Step<T>::size;  // of a row of scores

typedef Ints UnalignedInts __attribute__((aligned(4), may_alias));

FUSERL_INLINE Ints integers(const std::int32_t* p, const float*) { return *reinterpret_cast<const UnalignedInts*>(p); }
FUSERL_INLINE std::int32_t integers(const std::int32_t* p, const double*) { return *p; }
FUSERL_INLINE Ints counted(const float*) {
  Ints x;
  for (int i = 0; i < width; ++i) x[i] = i;
  return x;
}
FUSERL_INLINE std::int32_t counted(const double*) { return 0; }

FUSERL_INLINE float largest(Floats x) {
  float a[width];
  store(a, x);
  for (int half = width / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
}
FUSERL_INLINE double largest(double x) { return x; }
FUSERL_INLINE float sum_of(Floats x) {
  float a[width];
  store(a, x);
  for (int half = width / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
}
FUSERL_INLINE double sum_of(double x) { return x; }

// x[i] = e^x[i], where x[i] is at most a little above 0.
template <int count>
FUSERL_INLINE void exponentiate(Floats (&x)[count]) {
  constexpr float least = -87.33f, log2e = 0x1.715476p0f, lost = 0x1.cb1p-27f;  // as in exponentials.h
  Floats inside[count], e[count];
  for (int i = 0; i < count; ++i) inside[i] = maximum(broadcast(least), x[i]);
  exp2_scaled(e, inside, log2e);
  for (int i = 0; i < count; ++i) e[i] += e[i] * (inside[i] * lost);
  for (int i = 0; i < count; ++i) e[i] = x[i] < least ? Floats{} : e[i];
  for (int i = 0; i < count; ++i) x[i] = x[i] == x[i] ? e[i] : x[i];
}
template <int count>
FUSERL_INLINE void exponentiate(double (&x)[count]) {
  for (int i = 0; i < count; ++i) x[i] = __builtin_exp(x[i]);
}

// height x (size x step vectors) of c (=, or += where `add`) a b; element (r, k) of a is a[r a_row + k a_step].
template <class T, int step, int height>
FUSERL_INLINE void product_block(const T* a, std::int64_t a_row, std::int64_t a_step, const T* b, std::int64_t b_row,
                                 T* c, std::int64_t c_row, std::int64_t depth, bool add) {
  constexpr int size = Step<T>::size;
  Vector<T> sums[height][step] = {};
  for (std::int64_t k = 0; k < depth; ++k)
    for (int j = 0; j < step; ++j) {
      const Vector<T> column = load(b + k * b_row + j * size);
      for (int i = 0; i < height; ++i) sums[i][j] += a[i * a_row + k * a_step] * column;
    }
  for (int i = 0; i < height; ++i)
    for (int j = 0; j < step; ++j) {
      // What is there comes last: before, it would round every product to its own digits.
      if (add) sums[i][j] += load(c + i * c_row + j * size);
      store(c + i * c_row + j * size, sums[i][j]);
    }
}

template <class T, int step>
FUSERL_INLINE void product_panel(const T* a, std::int64_t a_row, std::int64_t a_step, const T* b, std::int64_t b_row,
                                 T* c, std::int64_t c_row, std::int64_t rows, std::int64_t depth, bool add) {
  constexpr int height = 4;
  std::int64_t r = 0;
  for (; r + height <= rows; r += height)
    product_block<T, step, height>(a + r * a_row, a_row, a_step, b, b_row, c + r * c_row, c_row, depth, add);
  for (; r < rows; ++r)
    product_block<T, step, 1>(a + r * a_row, a_row, a_step, b, b_row, c + r * c_row, c_row, depth, add);
}

constexpr std::int64_t product_stretch = 32;

// c (rows x columns) = or += a (rows x depth) b (depth x columns); columns a multiple of 16. Summed in short stretches
// of the depth, for one long row of sums rounds off more.
template <class T, bool add>
FUSERL_INLINE void product(const T* a, std::int64_t a_row, std::int64_t a_step, const T* b, std::int64_t b_row, T* c,
                           std::int64_t c_row, std::int64_t rows, std::int64_t columns, std::int64_t depth) {
  constexpr int size = Step<T>::size, step = size == 16 ? 4 : 2;
  for (std::int64_t k = 0; k < depth; k += product_stretch) {
    const std::int64_t some = depth - k < product_stretch ? depth - k : product_stretch;
    const bool more = add || k > 0;
    std::int64_t n = 0;
    for (; n + step * size <= columns; n += step * size)
      product_panel<T, step>(a, a_row, a_step, b + n, b_row, c + n, c_row, rows, some, more);
    for (; n < columns; n += size)
      product_panel<T, 1>(a, a_row, a_step, b + n, b_row, c + n, c_row, rows, some, more);
    a += product_stretch * a_step;
    b += product_stretch * b_row;
  }
}

// The score out of q . k; `slope`, if any, is its derivative.
template <class T>
FUSERL_INLINE Vector<T> score(Vector<T> raw, const TreeScores& scores, Vector<T>* slope) {
  const T scale = static_cast<T>(scores.scale), cap = static_cast<T>(scores.softcap);
  const Vector<T> x = raw * scale;
  if (scores.softcap == 0) return x;
  const Vector<T> grown = exponentials<T>(x * (2 / cap)).less_one;
  // tanh, which is 1 where the exponential overflows.
  const Vector<T> tanh = grown > T(1e30) ? Vector<T>{} + T(1) : grown / (grown + T(2));
  if (slope) *slope = T(1) - tanh * tanh;
  return tanh * cap;
}

// (dim, tree_tile) out of `count` rows, zeros behind them.
template <class T, class K>
FUSERL_INLINE void transpose(const K* k, std::int64_t stride, std::int64_t count, std::int64_t dim, T* to) {
  constexpr int size = Step<T>::size, step = 16;
  for (std::int64_t j = 0; j < tree_tile; j += step)
    for (std::int64_t d = 0; d < dim; d += step) {
      T block[step][step];
      for (int r = 0; r < step; ++r)
        for (int c = 0; c < step; c += size)
          store(&block[r][c], j + r < count ? Vector<T>(load(k + (j + r) * stride + d + c)) : Vector<T>{});
      for (int c = 0; c < step; ++c)
        for (int r = 0; r < step; ++r) to[(d + c) * tree_tile + j + r] = block[r][c];
    }
}

}  // namespace
}  // namespace fuserl
