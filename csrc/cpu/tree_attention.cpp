#include <algorithm>
#include <limits>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "tree_attention_kernels.h"

namespace fuserl {

FUSERL_KERNELS(TreeTable, tree_attention)

namespace {

constexpr const char* function = "tree_attention";
// The backward's tasks: fixed numbers of query tiles, so that no sum depends on the number of threads.
constexpr std::int64_t most_parts = 8, least_tiles = 8;

const TreeKernels<double>& kernels_of(const double*, DType) { return kernels().f64; }
const TreeKernels<float>& kernels_of(const float*, DType dtype) {
  return dtype == DType::bf16 ? kernels().bf16 : dtype == DType::f16 ? kernels().f16 : kernels().f32;
}

TreeRows rows_of(const TensorView& x) { return {x.data, x.stride[0], x.stride[1]}; }

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
  DType dtype;
};

template <class T>
void forward_tiles(void* context, std::int64_t begin, std::int64_t end) {
  const Forward<T>& all = *static_cast<Forward<T>*>(context);
  std::vector<T> scratch(static_cast<std::size_t>(tree_tile * (tree_tile + 4 * all.x.dim)));
  for (std::int64_t i = begin; i < end; ++i)
    kernels_of(scratch.data(), all.dtype)
        .forward(all.tree, all.scores, all.x, i / all.tree.tiles, i % all.tree.tiles, scratch.data());
}

// The parts of one key head add to the tiles of earlier ones in their order: one that is done early leaves its sums.
template <class T>
struct Turns {
  std::mutex lock;
  std::int64_t next = 0;
  std::vector<std::vector<T>> waiting;  // by part
  std::vector<char> done;
};

template <class T>
struct Backward {
  const Layout& tree;
  TreeScores scores;
  TreeBackward<T> x;
  DType dtype;
  std::int64_t parts, tiles_per_part, kv_heads;
  std::vector<std::int32_t> place;   // (parts, tiles), -1 for a tile that a part does not see or that is its own
  std::vector<std::int64_t> places;  // by part
  std::vector<Turns<T>> turns;       // by key head

  Backward(const Layout& tree, TreeScores scores, const TreeBackward<T>& x, DType dtype, std::int64_t kv_heads)
      : tree(tree), scores(scores), x(x), dtype(dtype), kv_heads(kv_heads), turns(static_cast<std::size_t>(kv_heads)) {
    tiles_per_part = std::max(least_tiles, (tree.tiles + most_parts - 1) / most_parts);
    parts = (tree.tiles + tiles_per_part - 1) / tiles_per_part;
    place.assign(static_cast<std::size_t>(parts * tree.tiles), -1);
    places.assign(static_cast<std::size_t>(parts), 0);
    for (std::int64_t part = 0; part < parts; ++part) {
      // What any tile of the part sees before its first one, that one sees too: they share these ancestors.
      const std::int64_t first = part * tiles_per_part;
      std::int64_t& count = places[static_cast<std::size_t>(part)];
      TreeWalk walk(tree, first);
      for (std::int64_t key = walk.next(tree); key >= 0; key = walk.next(tree))
        if (key < first) place[static_cast<std::size_t>(part * tree.tiles + key)] = static_cast<std::int32_t>(count++);
    }
    for (Turns<T>& turn : turns) {
      turn.waiting.resize(static_cast<std::size_t>(parts));
      turn.done.assign(static_cast<std::size_t>(parts), 0);
    }
  }

  // Adds dK and dV of a part, (2, places, tile, dim), to those of the whole.
  void add(std::int64_t part, std::int64_t kv_head, const std::vector<T>& sums) {
    const std::int64_t size = tree_tile * x.dim, dv = static_cast<std::int64_t>(sums.size()) / 2;
    for (std::int64_t key = 0; key < part * tiles_per_part; ++key) {
      const std::int32_t from = place[static_cast<std::size_t>(part * tree.tiles + key)];
      if (from < 0) continue;
      const T* tile = sums.data() + from * size;
      for (std::int64_t j = 0; j < tree_tile; ++j, tile += x.dim) {
        const std::int64_t to = ((key * tree_tile + j) * kv_heads + kv_head) * x.dim;
        for (std::int64_t d = 0; d < x.dim; ++d) {
          x.dk[to + d] += tile[d];
          x.dv[to + d] += tile[dv + d];
        }
      }
    }
  }

  void finish(std::int64_t part, std::int64_t kv_head, std::vector<T>&& sums) {
    Turns<T>& turn = turns[static_cast<std::size_t>(kv_head)];
    const std::lock_guard<std::mutex> guard(turn.lock);
    turn.waiting[static_cast<std::size_t>(part)] = std::move(sums);
    turn.done[static_cast<std::size_t>(part)] = 1;
    for (; turn.next < parts && turn.done[static_cast<std::size_t>(turn.next)]; ++turn.next) {
      std::vector<T>& ready = turn.waiting[static_cast<std::size_t>(turn.next)];
      add(turn.next, kv_head, ready);
      std::vector<T>().swap(ready);
    }
  }
};

template <class T>
void backward_parts(void* context, std::int64_t begin, std::int64_t end) {
  Backward<T>& all = *static_cast<Backward<T>*>(context);
  std::vector<T> scratch(static_cast<std::size_t>(tree_tile * (2 * tree_tile + 7 * all.x.dim)));
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t part = i / all.kv_heads, kv_head = i % all.kv_heads, first = part * all.tiles_per_part;
    const std::int64_t size = all.places[static_cast<std::size_t>(part)] * tree_tile * all.x.dim;
    std::vector<T> sums(static_cast<std::size_t>(2 * size));
    const TreePartial<T> partial = {first, std::min(first + all.tiles_per_part, all.tree.tiles),
                                    all.place.data() + part * all.tree.tiles, sums.data(), sums.data() + size};
    kernels_of(scratch.data(), all.dtype).backward(all.tree, all.scores, all.x, kv_head, partial, scratch.data());
    all.finish(part, kv_head, std::move(sums));
  }
}

template <class T>
void run_forward(const cpu::TreeTensors& x, const TensorView& q, const TensorView& k, const TensorView& v,
                 const cpu::TreeRule& rule, const TensorView& out, const TensorView& lse, int threads) {
  const Layout tree(x, rule);
  const std::int64_t heads = q.shape[1];
  Forward<T> all = {tree,
                    {rule.scale, rule.softcap},
                    {heads, heads / k.shape[1], q.shape[2], rows_of(q), rows_of(k), rows_of(v), out.as<T>(),
                     lse.as<T>()},
                    q.dtype};
  parallel_for(heads * tree.tiles, 1, threads, forward_tiles<T>, &all);
}

template <class T>
void run_backward(const cpu::TreeTensors& x, const cpu::TreeGradients& g, const cpu::TreeRule& rule, int threads) {
  const Layout tree(x, rule);
  const std::int64_t heads = g.q.shape[1], kv_heads = g.k.shape[1];
  const TreeBackward<T> arrays = {heads, heads / kv_heads, g.q.shape[2], rows_of(g.q), rows_of(g.k), rows_of(g.v),
                                  rows_of(g.d_out), g.out.as<T>(), g.lse.as<T>(),
                                  g.d_lse ? g.d_lse->as<T>() : nullptr, g.dq.data, g.dk.as<T>(), g.dv.as<T>()};
  Backward<T> all(tree, {rule.scale, rule.softcap}, arrays, g.q.dtype, kv_heads);
  parallel_for(all.parts * kv_heads, 1, threads, backward_parts<T>, &all);
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

// (tokens, heads, dim) of q's dtype, each row in one stretch.
void check_rows(const char* argument, const TensorView& x, const TensorView& q, std::int64_t tokens,
                std::int64_t heads) {
  check_device(function, argument, x, Device::cpu);
  check_dtype(function, argument, x, q.dtype);
  if (x.ndim != 3 || x.shape[0] != tokens || x.shape[1] != heads || x.shape[2] != q.shape[2] || x.stride[2] != 1)
    refuse(function, std::string(argument) + " must be (L, heads, D), each D numbers in one stretch", shape_text(x),
           "Call .contiguous() first.");
}

// Of q, k and v; returns the dtype of sums.
DType check_inputs(const TensorView& q, const TensorView& k, const TensorView& v, std::int64_t tokens) {
  if (q.dtype != DType::f32 && q.dtype != DType::f64 && q.dtype != DType::bf16 && q.dtype != DType::f16)
    refuse(function, "q must be of a floating dtype", name(q.dtype), "Convert it with .float().");
  if (q.ndim != 3 || q.shape[2] % 16 != 0 || q.shape[2] == 0)
    refuse(function, "q must have shape (L, H, D) with 16 dividing D", shape_text(q), "Pad with zeros.");
  if (k.ndim != 3 || k.shape[1] == 0 || q.shape[1] % k.shape[1] != 0)
    refuse(function, "the heads of k must divide those of q", shape_text(k), "Check which tensor was passed.");
  check_rows("q", q, q, tokens, q.shape[1]);
  for (const auto& [argument, view] : {std::pair{"k", &k}, {"v", &v}})
    check_rows(argument, *view, q, tokens, k.shape[1]);
  return q.dtype == DType::f64 ? DType::f64 : DType::f32;
}

}  // namespace

namespace cpu {

void tree_attention_forward(const TreeTensors& x, const TensorView& q, const TensorView& k, const TensorView& v,
                            const TreeRule& rule, const TensorView& out, const TensorView& lse, int threads) {
  check_layout(x, rule);
  const DType dtype = check_inputs(q, k, v, rule.tokens);
  check_dense(function, "out", out, dtype, Device::cpu, {rule.tokens, q.shape[1], q.shape[2]});
  check_dense(function, "lse", lse, dtype, Device::cpu, {rule.tokens, 2, q.shape[1]});
  (dtype == DType::f64 ? run_forward<double> : run_forward<float>)(x, q, k, v, rule, out, lse, threads);
}

void tree_attention_backward(const TreeTensors& x, const TreeGradients& g, const TreeRule& rule, int threads) {
  check_layout(x, rule);
  const std::int64_t tokens = rule.tokens;
  const DType dtype = check_inputs(g.q, g.k, g.v, tokens);
  const std::int64_t heads = g.q.shape[1], kv_heads = g.k.shape[1], dim = g.q.shape[2];
  check_rows("d_out", g.d_out, g.q, tokens, heads);
  check_dense(function, "out", g.out, dtype, Device::cpu, {tokens, heads, dim});
  check_dense(function, "lse", g.lse, dtype, Device::cpu, {tokens, 2, heads});
  if (g.d_lse) check_dense(function, "d_lse", *g.d_lse, dtype, Device::cpu, {tokens, heads});
  check_dense(function, "dq", g.dq, g.q.dtype, Device::cpu, {tokens, heads, dim});
  for (const auto& [argument, view] : {std::pair{"dk", &g.dk}, {"dv", &g.dv}})
    check_dense(function, argument, *view, dtype, Device::cpu, {tokens, kv_heads, dim});
  (dtype == DType::f64 ? run_backward<double> : run_backward<float>)(x, g, rule, threads);
}

}  // namespace cpu
}  // namespace fuserl
