// What tree_decode.cpp asks of the code that is compiled once per instruction set: one stretch of keys at a time.
#pragma once
#include "tree_attention_kernels.h"

namespace fuserl {

// A stretch of one segment's keys, and the queries that see it.
struct DecodeItem {
  std::int32_t first, keys, place;  // its first row, how many, and the first one's position in its text
  std::int32_t begin, end;          // in `member`: one partial result each
};

template <class T>
struct DecodeArrays {
  std::int64_t repeat, dim;  // query heads per key head; `dim` a multiple of 16
  const std::int32_t *member, *last;  // the query of each partial result; the position of each query
  const std::int32_t* page;           // which tree_tile rows of the storage rows 0..63, 64..127, ... are; or null
  std::int64_t window;
  const T* q;          // (queries, heads, dim)
  const void *k, *v;   // rows of `dim` numbers each, by token and key head
  std::int64_t k_token, k_head, v_token, v_head;
  T *sums, *top, *total;  // (partials, heads, dim), (partials, heads) each
};

template <class T>
struct DecodeKernel {
  // One item of one key head. scratch: decode_scratch(rows, dim) numbers.
  void (*attend)(const TreeScores& scores, const DecodeArrays<T>& x, const DecodeItem& item, std::int64_t heads,
                 std::int64_t kv_head, T* scratch);
};

namespace {

// Rows are the queries of an item times the query heads of a key head, in steps of 4 as products take them. Of internal
// linkage, as all code that is compiled once per instruction set.
inline std::int64_t decode_rows(const DecodeItem& item, std::int64_t repeat) {
  return ((item.end - item.begin) * repeat + 3) / 4 * 4;
}
inline std::int64_t decode_scratch(std::int64_t rows, std::int64_t dim) {
  return rows * (2 * dim + tree_tile + 2) + 2 * tree_tile * dim;
}

}  // namespace

struct DecodeTable {
  DecodeKernel<float> f32, bf16, f16;
  DecodeKernel<double> f64;
};

}  // namespace fuserl
