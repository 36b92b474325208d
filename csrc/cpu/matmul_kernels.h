// What matmul.cpp asks of the code that is compiled once per instruction set: blocks of the output.
#pragma once
#include <cstdint>

namespace fuserl {

// c (rows, columns) = start + alpha a (rows, depth) b (depth, columns), where start is nothing, c itself or the bias.
struct MatmulArrays {
  const float* a;
  std::int64_t a_row, a_depth;  // strides; one of them is 1
  const void* b;
  std::int64_t b_depth, b_column;  // strides; one of them is 1
  float* c;
  std::int64_t c_row;
  const float* bias;  // (columns,), null for none
  std::int64_t rows, columns, depth;
  float alpha;
  bool add;
};

struct MatmulBlock {
  std::int64_t row, row_end, column, column_end;  // beginning at multiples of the table's tile
};

struct MatmulTable {
  std::int64_t tile_rows, tile_columns;
  std::int64_t panel_room, strip_room;  // floats of scratch: for one panel of b, and for the rows of a tile of a
  // By the dtype of b: f32, bf16, f16. scratch: panel_room + strip_room x (tiles of the block's rows).
  void (*block[3])(const MatmulArrays& x, const MatmulBlock& block, float* scratch);
};

}  // namespace fuserl
