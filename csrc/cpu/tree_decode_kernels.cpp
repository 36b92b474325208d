// Stretches of keys of tree_decode, compiled once per instruction set: FUSERL_ISA names the copy's namespace.
#include "tree_decode_kernels.h"

#include "tree_tiles.h"

namespace fuserl {
namespace {

constexpr std::int64_t side = tree_tile;

// `count` rows of values as products read them: where they are, or converted into `room`.
FUSERL_INLINE const float* as_read(const float* v, std::int64_t& stride, std::int64_t, std::int64_t, float*) {
  (void)stride;
  return v;
}
FUSERL_INLINE const double* as_read(const double* v, std::int64_t& stride, std::int64_t, std::int64_t, double*) {
  (void)stride;
  return v;
}
template <class K>
FUSERL_INLINE const float* as_read(const K* v, std::int64_t& stride, std::int64_t count, std::int64_t dim,
                                   float* room) {
  for (std::int64_t j = 0; j < count; ++j)
    for (std::int64_t d = 0; d < dim; d += width) store(room + j * dim + d, load(v + j * stride + d));
  stride = dim;
  return room;
}

// Weights e^(score - top) in place of a row of scores, and the sums so far of weights (and of values by them) brought
// to the highest score so far.
template <class T>
FUSERL_INLINE void weigh(Vector<T> (&row)[vectors<T>], T& top, T& total, T* sums, std::int64_t dim, T* weights) {
  constexpr int size = Step<T>::size;
  Vector<T> most = row[0];
  for (int n = 1; n < vectors<T>; ++n) most = row[n] > most ? row[n] : most;
  const T old = top, now = largest(most);
  if (now > old) {
    top = now;
    if (old > -T(infinity)) {
      const T factor = __builtin_exp(old - now);
      total *= factor;
      for (std::int64_t n = 0; n < dim; n += size) store(sums + n, load(sums + n) * factor);
    }
  }
  // A row that has seen nothing yet: no infinity less infinity.
  const T shift = top > -T(infinity) ? top : T(0);
  for (int n = 0; n < vectors<T>; ++n) row[n] -= shift;
  exponentiate(row);
  Vector<T> added = {};
  for (int n = 0; n < vectors<T>; ++n) {
    added += row[n];
    store(weights + n * size, row[n]);
  }
  total += sum_of(added);
}

template <class T, class K>
void attend(const TreeScores& scores, const DecodeArrays<T>& x, const DecodeItem& item, std::int64_t heads,
            std::int64_t kv_head, T* scratch) {
  constexpr int size = Step<T>::size;
  constexpr const T* type = nullptr;
  const std::int64_t dim = x.dim, rows = (item.end - item.begin) * x.repeat, height = decode_rows(item, x.repeat);
  T *queries = scratch, *sums = queries + height * dim, *weights = sums + height * dim;
  T *top = weights + height * side, *total = top + height, *keys = total + height, *room = keys + side * dim;
  for (std::int64_t r = 0; r < height; ++r) {
    const std::int64_t query = x.member[item.begin + (r < rows ? r / x.repeat : 0)];
    const T* from = x.q + (query * heads + kv_head * x.repeat + r % x.repeat) * dim;
    for (std::int64_t d = 0; d < dim; ++d) queries[r * dim + d] = r < rows ? from[d] : T(0);
    for (std::int64_t d = 0; d < dim; ++d) sums[r * dim + d] = 0;
    top[r] = -T(infinity);
    total[r] = 0;
  }
  for (std::int64_t at = 0; at < item.keys; at += side) {
    const std::int64_t count = item.keys - at < side ? item.keys - at : side;
    // A tile of paged rows is one page: every item begins with a page.
    const std::int64_t row = x.page ? side * x.page[(item.first + at) / side] : item.first + at;
    const K* k = static_cast<const K*>(x.k) + row * x.k_token + kv_head * x.k_head;
    const K* v = static_cast<const K*>(x.v) + row * x.v_token + kv_head * x.v_head;
    transpose<T>(k, x.k_token, count, dim, keys);
    product<T, false>(queries, dim, 1, keys, side, weights, side, height, side, dim);
    for (std::int64_t r = 0; r < height; ++r) {
      // Of this tile the query sees the keys up to its own, and of those the ones nearer than the window.
      const std::int64_t query = x.member[item.begin + (r < rows ? r / x.repeat : 0)];
      const std::int64_t own = x.last[query] - item.place - at, first = own - x.window + 1;
      const auto from = static_cast<std::int32_t>(first < 0 ? 0 : first < side ? first : side);
      const auto to = static_cast<std::int32_t>(own + 1 < 0 ? 0 : own + 1 < count ? own + 1 : count);
      Vector<T> row[vectors<T>];
      for (int n = 0; n < vectors<T>; ++n) {
        row[n] = score<T>(load(weights + r * side + n * size), scores, nullptr);
        const auto j = counted(type) + n * size;
        row[n] = (j >= from) & (j < to) ? row[n] : Vector<T>{} - T(infinity);
      }
      weigh<T>(row, top[r], total[r], sums + r * dim, dim, weights + r * side);
    }
    std::int64_t stride = x.v_token;
    const T* values = as_read(v, stride, count, dim, room);
    product<T, true>(weights, side, 1, values, stride, sums, dim, height, dim, count);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::int64_t to = (item.begin + r / x.repeat) * heads + kv_head * x.repeat + r % x.repeat;
    for (std::int64_t d = 0; d < dim; ++d) x.sums[to * dim + d] = sums[r * dim + d];
    x.top[to] = top[r];
    x.total[to] = total[r];
  }
}

}  // namespace

namespace FUSERL_ISA {
extern const DecodeTable tree_decode;
const DecodeTable tree_decode = {{attend<float, float>}, {attend<float, Bf16>}, {attend<float, F16>},
                                 {attend<double, double>}};
}  // namespace FUSERL_ISA
}  // namespace fuserl
