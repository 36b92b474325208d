// Tiles of tree_attention, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "tree_attention_kernels.h"

#include "tree_tiles.h"

namespace fuserl {
namespace {

constexpr std::int64_t side = tree_tile;

// The scores of query `i` out of q . k, -infinity where it may not see the key; `slope`, if any, is their derivative.
template <class T>
FUSERL_INLINE void score_row(const TreeLayout& tree, const TreeScores& scores, const T* row, std::int64_t i,
                             std::int64_t key, bool whole, Vector<T> (&x)[vectors<T>], Vector<T>* slope) {
  constexpr int size = Step<T>::size;
  constexpr const T* type = nullptr;
  for (int n = 0; n < vectors<T>; ++n) {
    x[n] = score<T>(load(row + n * size), scores, slope ? slope + n : nullptr);
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
    product<T, false>(q, dim, 1, x.k_t + at, side, weights, side, side, side, dim);
    for (std::int64_t r = 0; r < side; ++r) {
      Vector<T> row[vectors<T>];
      score_row<T>(tree, scores, weights + r * side, query * side + r, key, whole, row, nullptr);
      weigh<T>(row, highest[r], totals[r], sums + r * dim, dim, weights + r * side);
    }
    product<T, true>(weights, side, 1, x.v + at, dim, sums, dim, side, dim, side);
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
        product<T, false>(q, dim, 1, x.k_t + at, side, weights, side, side, side, dim);
        product<T, false>(d_out, dim, 1, x.v_t + at, side, slopes, side, side, side, dim);
        gradient_rows(tree, scores, query, key, x.lse + row * side, x.lse_rest + row * side, x.delta + row * side,
                      weights, slopes);
        T* dk = key < part.begin ? part.dk + part.place[key] * tile : x.dk + at;
        T* dv = key < part.begin ? part.dv + part.place[key] * tile : x.dv + at;
        product<T, true>(weights, 1, side, d_out, dim, dv, dim, side, dim, side);
        product<T, true>(slopes, 1, side, q, dim, dk, dim, side, dim, side);
        product<T, true>(slopes, side, 1, x.k + at, dim, x.dq + row * tile, dim, side, dim, side);
      }
    }
}

}  // namespace

namespace FUSERL_ISA {
extern const TreeTable tree_attention;
const TreeTable tree_attention = {{forward<float>, backward<float>}, {forward<double>, backward<double>}};
}  // namespace FUSERL_ISA
}  // namespace fuserl
