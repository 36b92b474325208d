// What tree_attention.cpp asks of the code that is compiled once per instruction set: one tile of queries at a time.
#pragma once
#include <cstdint>

namespace fuserl {

// Queries, and keys, of a tile; `dim` is a multiple of 16.
constexpr std::int64_t tree_tile = 64;

// Who sees whom. Segments are in preorder: what follows one up to its `last` token are its descendants.
struct TreeLayout {
  std::int64_t tokens, tiles;    // tokens without padding
  const std::int32_t* last;      // per token, padded to whole tiles: the token after the last one that sees it
  const std::int32_t* position;  // per token, padded to whole tiles: its place in its own text
  const std::int32_t *start, *parent;  // per segment: its first token, and the segment it continues or -1
  const std::int32_t* segment;   // per tile: the segment of its first token
  const std::int32_t *least_last, *least_position, *most_position;  // per tile
  std::int64_t window;           // a query at position p sees keys at positions > p - window
};

namespace {

// The tiles of keys of which tile `query` may see anything, from its own down, each once. Of internal linkage, as all
// code that is compiled once per instruction set.
struct TreeWalk {
  std::int64_t at, segment;

  TreeWalk(const TreeLayout& tree, std::int64_t query) : at(query + 1), segment(tree.segment[query]) {}

  // The next one, or -1 at the end.
  std::int64_t next(const TreeLayout& tree) {
    for (;;) {
      if (at > tree.start[segment] / tree_tile) return --at;
      segment = tree.parent[segment];
      if (segment < 0) return -1;
      const std::int64_t end = (tree.start[segment + 1] - 1) / tree_tile + 1;
      if (end < at) at = end;
    }
  }
};

}  // namespace

struct TreeScores {
  double scale, softcap;  // softcap 0: none
};

// Rows of `dim` numbers by token and head, strided as the caller has them.
struct TreeRows {
  const void* data;
  std::int64_t token, head;  // strides in numbers
};

// Arrays by token, head and dimension; lse by token, (lse, what rounding took from it) and head: without that rest every
// weight would be off by its size.
template <class T>
struct TreeForward {
  std::int64_t heads, repeat, dim;  // repeat: query heads per key head
  TreeRows q, k, v;
  T *out, *lse;
};
template <class T>
struct TreeBackward {
  std::int64_t heads, repeat, dim;
  TreeRows q, k, v, d_out;
  const T *out, *lse, *d_lse;  // d_lse: by token and head, or null
  void* dq;                    // of the type of q
  T *dk, *dv;
};

// Where a task leaves dK and dV of the tiles before its own first one, which other tasks add to as well.
template <class T>
struct TreePartial {
  std::int64_t begin, end;    // tiles of queries
  const std::int32_t* place;  // of each tile before `begin` in the arrays below, by place, token and dimension
  T *dk, *dv;
};

template <class T>
struct TreeKernels {
  // One tile of queries of one head. scratch: tile x (tile + 4 dim).
  void (*forward)(const TreeLayout& tree, const TreeScores& scores, const TreeForward<T>& x, std::int64_t head,
                  std::int64_t query, T* scratch);
  // The tiles of `part` of all query heads of one key head. scratch: tile x (2 tile + 7 dim).
  void (*backward)(const TreeLayout& tree, const TreeScores& scores, const TreeBackward<T>& x, std::int64_t kv_head,
                   const TreePartial<T>& part, T* scratch);
};

struct TreeTable {
  TreeKernels<float> f32, bf16, f16;
  TreeKernels<double> f64;
};

}  // namespace fuserl
