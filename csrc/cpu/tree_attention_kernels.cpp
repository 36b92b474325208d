// Tiles of tree_attention, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "tree_attention_kernels.h"

#include "tree_tiles.h"

namespace fuserl {
namespace {

constexpr std::int64_t side = tree_tile;

// `count` rows of a tile from `first` on, of one head: where they are in the caller's array.
template <class K>
FUSERL_INLINE const K* rows_of(const TreeRows& x, std::int64_t first, std::int64_t head) {
  return static_cast<const K*>(x.data) + first * x.token + head * x.head;
}

// The same side by side, as a product reads them again and again.
template <class T, class K>
FUSERL_INLINE void pack(const K* from, std::int64_t stride, std::int64_t count, std::int64_t dim, T* to) {
  for (std::int64_t r = 0; r < count; ++r)
    for (std::int64_t d = 0; d < dim; d += Step<T>::size) store(to + r * dim + d, load(from + r * stride + d));
}

// The scores of one key by the queries of a tile out of k . q, -infinity where a query may not see the key; `slope`, if
// any, is their derivative.
template <class T>
FUSERL_INLINE void score_row(const TreeLayout& tree, const TreeScores& scores, const T* row, std::int64_t query,
                             std::int64_t j, bool whole, Vector<T> (&x)[vectors<T>], Vector<T>* slope) {
  constexpr int size = Step<T>::size;
  constexpr const T* type = nullptr;
  const std::int32_t key = static_cast<std::int32_t>(j), window = static_cast<std::int32_t>(tree.window);
  for (int n = 0; n < vectors<T>; ++n) {
    x[n] = score<T>(load(row + n * size), scores, slope ? slope + n : nullptr);
    if (!whole) {
      const std::int64_t first = query * side + n * size;
      const auto i = counted(type) + static_cast<std::int32_t>(first);
      const auto near = integers(tree.position + first, type) - tree.position[j] < window;
      x[n] = ((i >= key) & (i < tree.last[j]) & near) ? x[n] : Vector<T>{} - T(infinity);
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

FUSERL_INLINE std::int64_t tokens_of(const TreeLayout& tree, std::int64_t tile) {
  return tree.tokens - tile * side < side ? tree.tokens - tile * side : side;
}

// Of each query of a tile: the highest score so far, and the sum of all weights.
template <class T>
struct Softmax {
  T highest[side], totals[side];
};

// Weights e^(score - highest) in place of the products of `count` keys, and the sums so far of weights (and of values
// by them, in `sums`) brought to the highest score so far.
template <class T>
FUSERL_INLINE void weigh(const TreeLayout& tree, const TreeScores& scores, std::int64_t query, std::int64_t key,
                         Softmax<T>& softmax, T* weights, T* sums, std::int64_t dim) {
  constexpr int size = Step<T>::size;
  const std::int64_t count = tokens_of(tree, key);
  const bool whole = sees_all(tree, query, key);
  Vector<T> most[vectors<T>], row[vectors<T>], added[vectors<T>];
  for (int n = 0; n < vectors<T>; ++n) most[n] = load(softmax.highest + n * size);
  for (std::int64_t j = 0; j < count; ++j) {
    score_row<T>(tree, scores, weights + j * side, query, key * side + j, whole, row, nullptr);
    for (int n = 0; n < vectors<T>; ++n) {
      store(weights + j * side + n * size, row[n]);
      most[n] = row[n] > most[n] ? row[n] : most[n];
    }
  }
  T factors[side];
  for (int n = 0; n < vectors<T>; ++n) {
    const Vector<T> old = load(softmax.highest + n * size);
    store(softmax.highest + n * size, most[n]);
    // A row that has seen nothing yet: no infinity less infinity.
    most[n] = most[n] > -T(infinity) ? most[n] : Vector<T>{};
    row[n] = old - most[n];
    added[n] = Vector<T>{};
  }
  exponentiate(row);
  for (int n = 0; n < vectors<T>; ++n) store(factors + n * size, row[n]);
  for (std::int64_t r = 0; r < side; ++r) {
    if (factors[r] == 1) continue;
    for (std::int64_t d = 0; d < dim; d += size) store(sums + r * dim + d, load(sums + r * dim + d) * factors[r]);
  }
  // Eight keys at a time: the sum of all of them in one row would round off more.
  for (std::int64_t from = 0; from < count; from += 8) {
    Vector<T> few[vectors<T>] = {};
    for (std::int64_t j = from; j < count && j < from + 8; ++j) {
      for (int n = 0; n < vectors<T>; ++n) row[n] = load(weights + j * side + n * size) - most[n];
      exponentiate(row);
      for (int n = 0; n < vectors<T>; ++n) {
        store(weights + j * side + n * size, row[n]);
        few[n] += row[n];
      }
    }
    for (int n = 0; n < vectors<T>; ++n) added[n] += few[n];
  }
  for (int n = 0; n < vectors<T>; ++n)
    store(softmax.totals + n * size, load(softmax.totals + n * size) * load(factors + n * size) + added[n]);
}

template <class T, class K>
void forward(const TreeLayout& tree, const TreeScores& scores, const TreeForward<T>& x, std::int64_t head,
             std::int64_t query, T* scratch) {
  constexpr int size = Step<T>::size;
  const std::int64_t dim = x.dim, tile = side * dim, kv_head = head / x.repeat, rows = tokens_of(tree, query);
  T *weights = scratch, *sums = weights + side * side, *turned = sums + tile, *keys = turned + tile;
  T* values = keys + tile;
  Softmax<T> softmax;
  for (std::int64_t r = 0; r < side; ++r) {
    softmax.highest[r] = -T(infinity);
    softmax.totals[r] = 0;
  }
  for (std::int64_t n = 0; n < tile; ++n) sums[n] = 0;
  transpose(rows_of<K>(x.q, query * side, head), x.q.token, rows, dim, turned);
  TreeWalk walk(tree, query);
  for (std::int64_t key = walk.next(tree); key >= 0; key = walk.next(tree)) {
    if (sees_none(tree, query, key)) continue;
    const std::int64_t count = tokens_of(tree, key);
    pack(rows_of<K>(x.k, key * side, kv_head), x.k.token, count, dim, keys);
    product<T, false>(keys, dim, 1, turned, side, weights, side, count, side, dim);
    weigh(tree, scores, query, key, softmax, weights, sums, dim);
    pack(rows_of<K>(x.v, key * side, kv_head), x.v.token, count, dim, values);
    product<T, true>(weights, 1, side, values, dim, sums, dim, rows, dim, count);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t i = query * side + r;
    T *out = x.out + (i * x.heads + head) * dim, *lse = x.lse + 2 * i * x.heads + head;
    const T inverse = 1 / softmax.totals[r];
    for (std::int64_t d = 0; d < dim; d += size) store(out + d, load(sums + r * dim + d) * inverse);
    const double total = softmax.totals[r], exact = softmax.highest[r] + __builtin_log(total);
    lse[0] = static_cast<T>(exact);
    lse[x.heads] = static_cast<T>(exact - static_cast<double>(lse[0]));
  }
}

// Of each query of a tile: lse, what rounding took from it, and d_out . out - d_lse.
template <class T>
struct Arriving {
  T lse[side], rest[side], delta[side];
};

// d_out . out is summed as products sum d_out . v: of a query that sees one key both are the same, and cancel.
template <class T>
FUSERL_INLINE void arrive(const TreeBackward<T>& x, std::int64_t first, std::int64_t head, std::int64_t rows,
                          const T* d_out_turned, T* out_turned, Arriving<T>& of) {
  constexpr int size = Step<T>::size;
  transpose(x.out + (first * x.heads + head) * x.dim, x.heads * x.dim, rows, x.dim, out_turned);
  for (std::int64_t n = 0; n < side; n += size) {
    Vector<T> inner = {};
    for (std::int64_t from = 0; from < x.dim; from += product_stretch) {
      Vector<T> some = {};
      for (std::int64_t d = from; d < x.dim && d < from + product_stretch; ++d)
        some += load(d_out_turned + d * side + n) * load(out_turned + d * side + n);
      inner = some + inner;
    }
    store(of.delta + n, inner);
  }
  for (std::int64_t r = 0; r < side; ++r) {
    const std::int64_t i = first + (r < rows ? r : 0);
    if (x.d_lse && r < rows) of.delta[r] -= x.d_lse[i * x.heads + head];
    of.lse[r] = x.lse[2 * i * x.heads + head];
    of.rest[r] = x.lse[(2 * i + 1) * x.heads + head];
  }
}

// Weights p in place of `weights`, and dL/d(q . k) in place of `slopes`, which holds v . d_out.
template <class T>
FUSERL_INLINE void gradient_rows(const TreeLayout& tree, const TreeScores& scores, std::int64_t query,
                                 std::int64_t key, const Arriving<T>& of, T* weights, T* slopes) {
  constexpr int size = Step<T>::size;
  const bool whole = sees_all(tree, query, key), capped = scores.softcap != 0;
  const std::int64_t count = tokens_of(tree, key);
  const T scale = static_cast<T>(scores.scale);
  for (std::int64_t j = 0; j < count; ++j, weights += side, slopes += side) {
    Vector<T> row[vectors<T>], slope[vectors<T>];
    score_row<T>(tree, scores, weights, query, key * side + j, whole, row, capped ? slope : nullptr);
    for (int n = 0; n < vectors<T>; ++n) row[n] = (row[n] - load(of.lse + n * size)) - load(of.rest + n * size);
    exponentiate(row);
    for (int n = 0; n < vectors<T>; ++n) {
      store(weights + n * size, row[n]);
      Vector<T> d = row[n] * (load(slopes + n * size) - load(of.delta + n * size)) * scale;
      if (capped) d *= slope[n];
      store(slopes + n * size, d);
    }
  }
}

template <class T, class K>
void backward(const TreeLayout& tree, const TreeScores& scores, const TreeBackward<T>& x, std::int64_t kv_head,
              const TreePartial<T>& part, T* scratch) {
  const std::int64_t dim = x.dim, tile = side * dim, kv_token = x.heads / x.repeat * dim;
  T *weights = scratch, *slopes = weights + side * side, *queries = slopes + side * side, *turned = queries + tile;
  T *arriving = turned + tile, *arriving_turned = arriving + tile, *keys = arriving_turned + tile;
  T *values = keys + tile, *dq = values + tile;
  Arriving<T> of;
  for (std::int64_t query = part.begin; query < part.end; ++query)
    for (std::int64_t head = kv_head * x.repeat; head < (kv_head + 1) * x.repeat; ++head) {
      const std::int64_t first = query * side, rows = tokens_of(tree, query);
      pack(rows_of<K>(x.q, first, head), x.q.token, rows, dim, queries);
      pack(rows_of<K>(x.d_out, first, head), x.d_out.token, rows, dim, arriving);
      transpose(arriving, dim, rows, dim, arriving_turned);
      arrive(x, first, head, rows, arriving_turned, turned, of);
      transpose(queries, dim, rows, dim, turned);
      for (std::int64_t n = 0; n < tile; ++n) dq[n] = 0;
      TreeWalk walk(tree, query);
      for (std::int64_t key = walk.next(tree); key >= 0; key = walk.next(tree)) {
        if (sees_none(tree, query, key)) continue;
        const std::int64_t count = tokens_of(tree, key);
        pack(rows_of<K>(x.k, key * side, kv_head), x.k.token, count, dim, keys);
        pack(rows_of<K>(x.v, key * side, kv_head), x.v.token, count, dim, values);
        product<T, false>(keys, dim, 1, turned, side, weights, side, count, side, dim);
        product<T, false>(values, dim, 1, arriving_turned, side, slopes, side, count, side, dim);
        gradient_rows(tree, scores, query, key, of, weights, slopes);
        const bool own = key >= part.begin;
        const std::int64_t at = own ? key * side * kv_token + kv_head * dim : part.place[key] * tile;
        const std::int64_t row = own ? kv_token : dim;
        product<T, true>(weights, side, 1, arriving, dim, (own ? x.dv : part.dv) + at, row, count, dim, rows);
        product<T, true>(slopes, side, 1, queries, dim, (own ? x.dk : part.dk) + at, row, count, dim, rows);
        product<T, true>(slopes, 1, side, keys, dim, dq, dim, rows, dim, count);
      }
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t d = 0; d < dim; d += Step<T>::size)
          store(static_cast<K*>(x.dq) + ((first + r) * x.heads + head) * dim + d, load(dq + r * dim + d));
    }
}

}  // namespace

namespace FUSERL_ISA {
extern const TreeTable tree_attention;
const TreeTable tree_attention = {{forward<float, float>, backward<float, float>},
                                  {forward<float, Bf16>, backward<float, Bf16>},
                                  {forward<float, F16>, backward<float, F16>},
                                  {forward<double, double>, backward<double, double>}};
}  // namespace FUSERL_ISA
}  // namespace fuserl
