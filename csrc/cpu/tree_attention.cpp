#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "tree_attention_kernels.h"

namespace fuserl {

namespace baseline {
extern const TreeTable tree_attention;
}
#if defined(__x86_64__)
namespace avx2 {
extern const TreeTable tree_attention;
}
namespace avx512 {
extern const TreeTable tree_attention;
}
#endif

namespace {

constexpr const char* function = "tree_attention";
// The backward's tasks: fixed numbers of query tiles, so that no sum depends on the number of threads.
constexpr std::int64_t most_parts = 8, least_tiles = 8;

const TreeTable& kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::tree_attention;
  if (isa() == Isa::avx2) return avx2::tree_attention;
#endif
  return baseline::tree_attention;
}

const TreeKernels<float>& kernels_of(const float*) { return kernels().f32; }
const TreeKernels<double>& kernels_of(const double*) { return kernels().f64; }

struct Layout : TreeLayout {
  std::vector<std::int32_t> extremes;

  Layout(const cpu::TreeTensors& x, const cpu::TreeRule& rule)
      : TreeLayout{}, extremes(static_cast<std::size_t>(3 * x.segment.size())) {
    tokens = rule.tokens;
    tiles = x.segment.size();
    last = x.last.as<std::int32_t>();
    position = x.position.as<std::int32_t>();
    start = x.start.as<std::int32_t>();
    parent = x.parent.as<std::int32_t>();
    segment = x.segment.as<std::int32_t>();
    window = rule.window;
    std::int32_t *ends = extremes.data(), *least = ends + tiles, *most = least + tiles;
    for (std::int64_t tile = 0; tile < tiles; ++tile) {
      const std::int64_t begin = tile * tree_tile, end = std::min(begin + tree_tile, tokens);
      ends[tile] = *std::min_element(last + begin, last + end);
      least[tile] = *std::min_element(position + begin, position + end);
      most[tile] = *std::max_element(position + begin, position + end);
    }
    least_last = ends;
    least_position = least;
    most_position = most;
  }
};

template <class T>
struct Forward {
  const Layout& tree;
  TreeScores scores;
  TreeForward<T> x;
};

template <class T>
void forward_tiles(void* context, std::int64_t begin, std::int64_t end) {
  const Forward<T>& all = *static_cast<Forward<T>*>(context);
  std::vector<T> scratch(static_cast<std::size_t>(tree_tile * (tree_tile + all.x.dim)));
  for (std::int64_t i = begin; i < end; ++i)
    kernels_of(scratch.data())
        .forward(all.tree, all.scores, all.x, i / all.tree.tiles, i % all.tree.tiles, scratch.data());
}

template <class T>
struct Backward {
  const Layout& tree;
  TreeScores scores;
  TreeBackward<T> x;
  std::int64_t parts, tiles_per_part, places, kv_heads;
  std::vector<std::int32_t> place;  // (parts, tiles), -1 for a tile that a part does not see or that is its own
  std::vector<T> dk, dv;            // (kv_heads, places) tiles

  Backward(const Layout& tree, TreeScores scores, const TreeBackward<T>& x, std::int64_t kv_heads)
      : tree(tree), scores(scores), x(x), places(0), kv_heads(kv_heads) {
    tiles_per_part = std::max(least_tiles, (tree.tiles + most_parts - 1) / most_parts);
    parts = (tree.tiles + tiles_per_part - 1) / tiles_per_part;
    place.assign(static_cast<std::size_t>(parts * tree.tiles), -1);
    for (std::int64_t part = 0; part < parts; ++part) {
      // What any tile of the part sees before its first one, that one sees too: they share these ancestors.
      const std::int64_t first = part * tiles_per_part;
      TreeWalk walk(tree, first);
      for (std::int64_t key = walk.next(tree); key >= 0; key = walk.next(tree))
        if (key < first) place[static_cast<std::size_t>(part * tree.tiles + key)] = static_cast<std::int32_t>(places++);
    }
    const std::int64_t numbers = kv_heads * places * tree_tile * x.dim;
    dk.resize(static_cast<std::size_t>(numbers));
    dv.resize(static_cast<std::size_t>(numbers));
  }

  std::int64_t elsewhere(std::int64_t kv_head) const { return kv_head * places * tree_tile * x.dim; }
};

template <class T>
void backward_parts(void* context, std::int64_t begin, std::int64_t end) {
  Backward<T>& all = *static_cast<Backward<T>*>(context);
  std::vector<T> scratch(static_cast<std::size_t>(2 * tree_tile * tree_tile));
  for (std::int64_t i = begin; i < end; ++i) {
    // The last part of a long text sees most: it comes first.
    const std::int64_t part = all.parts - 1 - i / all.kv_heads, kv_head = i % all.kv_heads;
    const std::int64_t first = part * all.tiles_per_part, at = all.elsewhere(kv_head);
    const TreePartial<T> partial = {first, std::min(first + all.tiles_per_part, all.tree.tiles),
                                    all.place.data() + part * all.tree.tiles, all.dk.data() + at, all.dv.data() + at};
    kernels_of(scratch.data()).backward(all.tree, all.scores, all.x, kv_head, partial, scratch.data());
  }
}

// Adds what the parts left for one tile of keys of one head, in the order of the parts.
template <class T>
void merge_tiles(void* context, std::int64_t begin, std::int64_t end) {
  Backward<T>& all = *static_cast<Backward<T>*>(context);
  const std::int64_t size = tree_tile * all.x.dim;
  for (std::int64_t i = begin; i < end; ++i)
    for (std::int64_t part = 1; part < all.parts; ++part) {
      const std::int64_t key = i % all.tree.tiles;
      const std::int32_t from = all.place[static_cast<std::size_t>(part * all.tree.tiles + key)];
      if (from < 0) continue;
      const std::int64_t at = all.elsewhere(i / all.tree.tiles) + from * size;
      for (std::int64_t n = 0; n < size; ++n) {
        all.x.dk[i * size + n] += all.dk[static_cast<std::size_t>(at + n)];
        all.x.dv[i * size + n] += all.dv[static_cast<std::size_t>(at + n)];
      }
    }
}

template <class T>
void run_forward(const cpu::TreeTensors& x, const TensorView& q, const TensorView& k_t, const TensorView& v,
                 const cpu::TreeRule& rule, const TensorView& out, const TensorView& lse, int threads) {
  const Layout tree(x, rule);
  Forward<T> all = {tree,
                    {rule.scale, rule.softcap},
                    {q.shape[0] / v.shape[0], q.shape[2], q.as<T>(), k_t.as<T>(), v.as<T>(), out.as<T>(), lse.as<T>(),
                     lse.as<T>() + lse.size() / 2}};
  parallel_for(q.shape[0] * tree.tiles, 1, threads, forward_tiles<T>, &all);
}

template <class T>
void run_backward(const cpu::TreeTensors& x, const cpu::TreeGradients& g, const cpu::TreeRule& rule, int threads) {
  const Layout tree(x, rule);
  const T* lse = g.lse.as<T>();
  const TreeBackward<T> arrays = {
      g.q.shape[0] / g.k.shape[0], g.q.shape[2],  g.q.as<T>(), g.k.as<T>(), g.k_t.as<T>(), g.v_t.as<T>(),
      g.d_out.as<T>(), lse, lse + g.lse.size() / 2, g.delta.as<T>(), g.dq.as<T>(), g.dk.as<T>(), g.dv.as<T>()};
  Backward<T> all(tree, {rule.scale, rule.softcap}, arrays, g.k.shape[0]);
  parallel_for(all.parts * all.kv_heads, 1, threads, backward_parts<T>, &all);
  parallel_for(all.kv_heads * tree.tiles, 1, threads, merge_tiles<T>, &all);
}

void check_layout(const cpu::TreeTensors& x, const cpu::TreeRule& rule) {
  const std::int64_t padded = x.last.size(), tiles = padded / tree_tile;
  check_dense(function, "last", x.last, DType::i32, Device::cpu, {tiles * tree_tile});
  check_dense(function, "position", x.position, DType::i32, Device::cpu, {padded});
  check_dense(function, "segment", x.segment, DType::i32, Device::cpu, {tiles});
  check_dense(function, "parent", x.parent, DType::i32, Device::cpu, {x.parent.size()});
  check_dense(function, "start", x.start, DType::i32, Device::cpu, {x.parent.size() + 1});
  if (!(rule.tokens > padded - tree_tile && rule.tokens <= padded && tiles > 0))
    refuse(function, "tokens must end in the last tile", std::to_string(rule.tokens), "Pad to whole tiles.");
  if (!(rule.window > 0 && rule.window <= std::numeric_limits<std::int32_t>::max()))
    refuse(function, "window must be positive", std::to_string(rule.window), "2^31 - 1 is none.");
}

// (heads, padded tokens, dim); `key_heads` divides the heads of queries.
void check_array(const char* argument, const TensorView& view, DType dtype, std::int64_t heads, std::int64_t rows,
                 std::int64_t dim) {
  check_dense(function, argument, view, dtype, Device::cpu, {heads, rows, dim});
}

void check_heads(const TensorView& q, const TensorView& key, std::int64_t padded) {
  if (q.dtype != DType::f32 && q.dtype != DType::f64)
    refuse(function, "q must be float32 or float64", name(q.dtype), "Convert it with .float().");
  if (q.ndim != 3 || q.shape[1] != padded || q.shape[2] % 16 != 0 || q.shape[2] == 0)
    refuse(function, "q must have shape (H, padded tokens, D) with 16 dividing D", shape_text(q), "Pad with zeros.");
  if (key.ndim < 1 || key.shape[0] == 0 || q.shape[0] % key.shape[0] != 0)
    refuse(function, "the heads of k must divide those of q", shape_text(key), "Check which tensor was passed.");
}

}  // namespace

namespace cpu {

void tree_attention_forward(const TreeTensors& x, const TensorView& q, const TensorView& k_t, const TensorView& v,
                            const TreeRule& rule, const TensorView& out, const TensorView& lse, int threads) {
  check_layout(x, rule);
  check_heads(q, v, x.last.size());
  const std::int64_t heads = q.shape[0], kv_heads = v.shape[0], rows = q.shape[1], dim = q.shape[2];
  check_array("q", q, q.dtype, heads, rows, dim);
  check_dense(function, "k_t", k_t, q.dtype, Device::cpu, {kv_heads, rows / tree_tile, dim, tree_tile});
  check_array("v", v, q.dtype, kv_heads, rows, dim);
  check_array("out", out, q.dtype, heads, rows, dim);
  check_dense(function, "lse", lse, q.dtype, Device::cpu, {2, heads, rows});
  (q.dtype == DType::f64 ? run_forward<double> : run_forward<float>)(x, q, k_t, v, rule, out, lse, threads);
}

void tree_attention_backward(const TreeTensors& x, const TreeGradients& g, const TreeRule& rule, int threads) {
  check_layout(x, rule);
  check_heads(g.q, g.k, x.last.size());
  const std::int64_t heads = g.q.shape[0], kv_heads = g.k.shape[0], rows = g.q.shape[1], dim = g.q.shape[2];
  for (const auto& [argument, view] : {std::pair{"q", &g.q}, {"d_out", &g.d_out}, {"dq", &g.dq}})
    check_array(argument, *view, g.q.dtype, heads, rows, dim);
  for (const auto& [argument, view] : {std::pair{"k", &g.k}, {"dk", &g.dk}, {"dv", &g.dv}})
    check_array(argument, *view, g.q.dtype, kv_heads, rows, dim);
  for (const auto& [argument, view] : {std::pair{"k_t", &g.k_t}, {"v_t", &g.v_t}})
    check_dense(function, argument, *view, g.q.dtype, Device::cpu, {kv_heads, rows / tree_tile, dim, tree_tile});
  check_dense(function, "lse", g.lse, g.q.dtype, Device::cpu, {2, heads, rows});
  check_dense(function, "delta", g.delta, g.q.dtype, Device::cpu, {heads, rows});
  (g.q.dtype == DType::f64 ? run_backward<double> : run_backward<float>)(x, g, rule, threads);
}

}  // namespace cpu
}  // namespace fuserl
