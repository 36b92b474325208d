// Tiles of tree_attention, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "tree_attention_kernels.h"

#include "exponentials.h"

namespace fuserl {
namespace {

constexpr std::int64_t side = tree_tile;
constexpr float infinity = __builtin_inff();

template <class T>
using Vector = typename Step<T>::Vector;
template <class T>
using Mask = typename Step<T>::Mask;
template <class T>
constexpr int vectors = side / Step<T>::size;  // of a row of scores

typedef Ints UnalignedInts __attribute__((aligned(4), may_alias));

FUSERL_INLINE double load(const double* p) { return *p; }
FUSERL_INLINE void store(double* p, double x) { *p = x; }
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

// rows x (size x step vectors) of c (=, or += where `add`) a b; element (r, k) of a is a[r a_row + k a_step].
template <class T, int step, bool add>
FUSERL_INLINE void product_panel(const T* a, std::int64_t a_row, std::int64_t a_step, const T* b, std::int64_t b_row,
                                 T* c, std::int64_t c_row, std::int64_t rows, std::int64_t depth) {
  constexpr int size = Step<T>::size, height = 4;
  for (std::int64_t r = 0; r < rows; r += height, a += height * a_row, c += height * c_row) {
    Vector<T> sums[height][step];
    for (int i = 0; i < height; ++i)
      for (int j = 0; j < step; ++j) sums[i][j] = add ? load(c + i * c_row + j * size) : Vector<T>{};
    for (std::int64_t k = 0; k < depth; ++k)
      for (int j = 0; j < step; ++j) {
        const Vector<T> column = load(b + k * b_row + j * size);
        for (int i = 0; i < height; ++i) sums[i][j] += a[i * a_row + k * a_step] * column;
      }
    for (int i = 0; i < height; ++i)
      for (int j = 0; j < step; ++j) store(c + i * c_row + j * size, sums[i][j]);
  }
}

// c (side x columns) = or += a (side x depth) b (depth x columns); columns a multiple of 16.
template <class T, bool add>
FUSERL_INLINE void product(const T* a, std::int64_t a_row, std::int64_t a_step, const T* b, std::int64_t b_row, T* c,
                           std::int64_t c_row, std::int64_t columns, std::int64_t depth) {
  constexpr int size = Step<T>::size, step = size == 16 ? 4 : 2;
  std::int64_t n = 0;
  for (; n + step * size <= columns; n += step * size)
    product_panel<T, step, add>(a, a_row, a_step, b + n, b_row, c + n, c_row, side, depth);
  for (; n < columns; n += size)
    product_panel<T, 1, add>(a, a_row, a_step, b + n, b_row, c + n, c_row, side, depth);
}

// The scores of query `i` out of q . k, -infinity where it may not see the key; `slope`, if any, is their derivative.
template <class T>
FUSERL_INLINE void score_row(const TreeLayout& tree, const TreeScores& scores, const T* row, std::int64_t i,
                             std::int64_t key, bool whole, Vector<T> (&x)[vectors<T>], Vector<T>* slope) {
  constexpr int size = Step<T>::size;
  constexpr const T* type = nullptr;
  const T scale = static_cast<T>(scores.scale), cap = static_cast<T>(scores.softcap);
  for (int n = 0; n < vectors<T>; ++n) {
    x[n] = load(row + n * size) * scale;
    if (scores.softcap != 0) {
      const Vector<T> grown = exponentials<T>(x[n] * (2 / cap)).less_one;
      // tanh, which is 1 where the exponential overflows.
      const Vector<T> tanh = grown > T(1e30) ? Vector<T>{} + T(1) : grown / (grown + T(2));
      x[n] = tanh * cap;
      if (slope) slope[n] = T(1) - tanh * tanh;
    }
    if (!whole) {
      const std::int64_t j = key * side + n * size;
      const auto before = counted(type) + static_cast<std::int32_t>(j) <= static_cast<std::int32_t>(i);
      const auto alive = integers(tree.last + j, type) > static_cast<std::int32_t>(i);
      const auto behind = tree.position[i] - integers(tree.position + j, type);
      const auto near = behind < static_cast<std::int32_t>(tree.window);
      x[n] = (before & alive & near) ? x[n] : Vector<T>{} - T(infinity);
    }
  }
}

// Whether every query of tile `query` sees every key of tile `key`.
FUSERL_INLINE bool sees_all(const TreeLayout& tree, std::int64_t query, std::int64_t key) {
  const std::int64_t end = (query + 1) * side < tree.tokens ? (query + 1) * side : tree.tokens;
  return key < query && tree.least_last[key] >= end &&
         tree.most_position[query] - tree.least_position[key] < tree.window;
}
FUSERL_INLINE bool sees_none(const TreeLayout& tree, std::int64_t query, std::int64_t key) {
  return tree.least_position[query] - tree.most_position[key] >= tree.window;
}

template <class T>
void forward(const TreeLayout& tree, const TreeScores& scores, const TreeForward<T>& x, std::int64_t head,
             std::int64_t query, T* scratch) {
  constexpr int size = Step<T>::size;
  const std::int64_t dim = x.dim, kv_head = head / x.repeat, tile = side * dim;
  const T* q = x.q + (head * tree.tiles + query) * tile;
  T *weights = scratch, *sums = scratch + side * side, highest[side], totals[side];
  for (std::int64_t r = 0; r < side; ++r) {
    highest[r] = -T(infinity);
    totals[r] = 0;
  }
  for (std::int64_t n = 0; n < tile; ++n) sums[n] = 0;
  TreeWalk walk(tree, query);
  for (std::int64_t key = walk.next(tree); key >= 0; key = walk.next(tree)) {
    if (sees_none(tree, query, key)) continue;
    const bool whole = sees_all(tree, query, key);
    const std::int64_t at = (kv_head * tree.tiles + key) * tile;
    product<T, false>(q, dim, 1, x.k_t + at, side, weights, side, side, dim);
    for (std::int64_t r = 0; r < side; ++r) {
      Vector<T> row[vectors<T>];
      score_row<T>(tree, scores, weights + r * side, query * side + r, key, whole, row, nullptr);
      Vector<T> most = row[0];
      for (int n = 1; n < vectors<T>; ++n) most = row[n] > most ? row[n] : most;
      const T old = highest[r], top = largest(most);
      if (top > old) {
        highest[r] = top;
        if (old > -T(infinity)) {
          const T factor = __builtin_exp(old - top);
          totals[r] *= factor;
          for (std::int64_t n = 0; n < dim; n += size) store(sums + r * dim + n, load(sums + r * dim + n) * factor);
        }
      }
      // A row that has seen nothing yet: no infinity less infinity.
      const T shift = highest[r] > -T(infinity) ? highest[r] : T(0);
      Vector<T> total = {};
      for (int n = 0; n < vectors<T>; ++n) row[n] -= shift;
      exponentiate(row);
      for (int n = 0; n < vectors<T>; ++n) {
        total += row[n];
        store(weights + r * side + n * size, row[n]);
      }
      totals[r] += sum_of(total);
    }
    product<T, true>(weights, side, 1, x.v + at, dim, sums, dim, dim, side);
  }
  T *out = x.out + (head * tree.tiles + query) * tile, *lse = x.lse + (head * tree.tiles + query) * side;
  T* rest = x.lse_rest + (head * tree.tiles + query) * side;
  for (std::int64_t r = 0; r < side; ++r) {
    const T inverse = query * side + r < tree.tokens ? 1 / totals[r] : T(0);
    for (std::int64_t n = 0; n < dim; n += size) store(out + r * dim + n, load(sums + r * dim + n) * inverse);
    const double exact = static_cast<double>(highest[r]) + __builtin_log(static_cast<double>(totals[r]));
    lse[r] = static_cast<T>(exact);
    rest[r] = static_cast<T>(exact - static_cast<double>(lse[r]));
  }
}

// Weights p in place of `weights`, and dL/d(q . k) in place of `slopes`, which holds d_out . v.
template <class T>
FUSERL_INLINE void gradient_rows(const TreeLayout& tree, const TreeScores& scores, std::int64_t query,
                                 std::int64_t key, const T* lse, const T* lse_rest, const T* delta, T* weights,
                                 T* slopes) {
  constexpr int size = Step<T>::size;
  const bool whole = sees_all(tree, query, key), capped = scores.softcap != 0;
  const T scale = static_cast<T>(scores.scale);
  for (std::int64_t r = 0; r < side; ++r, weights += side, slopes += side) {
    Vector<T> row[vectors<T>], slope[vectors<T>];
    score_row<T>(tree, scores, weights, query * side + r, key, whole, row, capped ? slope : nullptr);
    for (int n = 0; n < vectors<T>; ++n) row[n] = (row[n] - lse[r]) - lse_rest[r];
    exponentiate(row);
    for (int n = 0; n < vectors<T>; ++n) {
      store(weights + n * size, row[n]);
      Vector<T> d = row[n] * (load(slopes + n * size) - delta[r]) * scale;
      if (capped) d *= slope[n];
      store(slopes + n * size, d);
    }
  }
}

template <class T>
void backward(const TreeLayout& tree, const TreeScores& scores, const TreeBackward<T>& x, std::int64_t kv_head,
              const TreePartial<T>& part, T* scratch) {
  const std::int64_t dim = x.dim, tile = side * dim;
  T *weights = scratch, *slopes = scratch + side * side;
  for (std::int64_t query = part.begin; query < part.end; ++query)
    for (std::int64_t head = kv_head * x.repeat; head < (kv_head + 1) * x.repeat; ++head) {
      const std::int64_t row = head * tree.tiles + query;
      const T *q = x.q + row * tile, *d_out = x.d_out + row * tile;
      TreeWalk walk(tree, query);
      for (std::int64_t key = walk.next(tree); key >= 0; key = walk.next(tree)) {
        if (sees_none(tree, query, key)) continue;
        const std::int64_t at = (kv_head * tree.tiles + key) * tile;
        product<T, false>(q, dim, 1, x.k_t + at, side, weights, side, side, dim);
        product<T, false>(d_out, dim, 1, x.v_t + at, side, slopes, side, side, dim);
        gradient_rows(tree, scores, query, key, x.lse + row * side, x.lse_rest + row * side, x.delta + row * side,
                      weights, slopes);
        T* dk = key < part.begin ? part.dk + part.place[key] * tile : x.dk + at;
        T* dv = key < part.begin ? part.dv + part.place[key] * tile : x.dv + at;
        product<T, true>(weights, 1, side, d_out, dim, dv, dim, dim, side);
        product<T, true>(slopes, 1, side, q, dim, dk, dim, dim, side);
        product<T, true>(slopes, side, 1, x.k + at, dim, x.dq + row * tile, dim, dim, side);
      }
    }
}

}  // namespace

namespace FUSERL_ISA {
extern const TreeTable tree_attention;
const TreeTable tree_attention = {{forward<float>, backward<float>}, {forward<double>, backward<double>}};
}  // namespace FUSERL_ISA
}  // namespace fuserl
