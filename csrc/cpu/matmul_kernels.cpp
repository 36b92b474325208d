// A block of a matrix product: panels of b are packed so that a step of the depth is read as whole vectors, and each
// tile of the output stays in registers while its depth is summed. A row's sums do not depend on what rows there are.
#include "matmul_kernels.h"

#include "vec.h"

namespace fuserl {
namespace {

// A tile of accumulators fills the registers but for a step of b and one number of a.
#if defined(__AVX512F__) || !defined(__x86_64__)
constexpr int rows = 8, vectors = 3;
#elif defined(__AVX2__)
constexpr int rows = 6, vectors = 2;
#else
constexpr int rows = 4, vectors = 2;
#endif
constexpr int columns = vectors * width;
constexpr std::int64_t depth_block = 384;  // of a panel, which a processor's second cache holds beside rows of a
constexpr std::int64_t chain = 192;  // of sums that begin at 0: the shorter, the smaller their rounding errors
constexpr std::int64_t strip = rows * depth_block + 16;  // no power of two, whose multiples share a place in the cache

// Where a tile's sums go.
struct Tile {
  float* c;
  std::int64_t c_row;
  const float* bias;  // of these columns, null for none
  float alpha;
  bool add;
};

template <int height>
FUSERL_INLINE void multiply(const float* a, std::int64_t a_row, std::int64_t a_depth, const float* panel,
                            std::int64_t depth, const Tile& to) {
  std::int64_t k = 0;
  do {
    const std::int64_t end = depth - k < chain ? depth : k + chain;
    const bool add = to.add || k > 0;
    Floats sum[height][vectors] = {};
    for (; k < end; ++k, a += a_depth, panel += columns) {
      Floats step[vectors];
      for (int j = 0; j < vectors; ++j) step[j] = load(panel + j * width);
#pragma GCC unroll 8
      for (int i = 0; i < height; ++i) {
        const Floats x = broadcast(a[i * a_row]);
#pragma GCC unroll 3
        for (int j = 0; j < vectors; ++j) sum[i][j] += x * step[j];
      }
    }
    for (int i = 0; i < height; ++i)
      for (int j = 0; j < vectors; ++j) {
        float* const c = to.c + i * to.c_row + j * width;
        const Floats start = add ? load(c) : to.bias ? load(to.bias + j * width) : Floats{};
        store(c, start + to.alpha * sum[i][j]);
      }
  } while (k < depth);
}

void multiply(int height, const float* a, std::int64_t a_row, std::int64_t a_depth, const float* panel,
              std::int64_t depth, const Tile& to) {
  if (height == rows) return multiply<rows>(a, a_row, a_depth, panel, depth, to);
  // What is left of a block, two rows and one at a time.
  int i = 0;
  const auto at = [&](int row) { return Tile{to.c + row * to.c_row, to.c_row, to.bias, to.alpha, to.add}; };
  for (; i + 2 <= height; i += 2) multiply<2>(a + i * a_row, a_row, a_depth, panel, depth, at(i));
  if (i < height) multiply<1>(a + i * a_row, a_row, a_depth, panel, depth, at(i));
}

// Rows of vectors to columns: pairs of rows swap the squares off their diagonal, of 1, 2, 4, ... elements.
FUSERL_INLINE void transpose(Floats (&x)[width]) {
#pragma GCC unroll 4
  for (int side = 1; side < width; side *= 2) {
    Ints upper, lower;
    for (int lane = 0; lane < width; ++lane) {
      upper[lane] = lane & side ? width + lane - side : lane;
      lower[lane] = lane & side ? width + lane : lane + side;
    }
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) {
      if (i & side) continue;
      const Floats above = x[i], below = x[i + side];
      x[i] = __builtin_shuffle(above, below, upper);
      x[i + side] = __builtin_shuffle(above, below, lower);
    }
  }
}

FUSERL_INLINE float number(const float* p) { return *p; }
template <class T>
FUSERL_INLINE float number(const T* p) {
  T copy[width] = {};
  copy[0] = *p;
  return load(copy)[0];
}

// (depth, columns) of b to panel, whose missing columns are 0.
template <class T>
void pack(const T* b, std::int64_t b_depth, std::int64_t b_column, std::int64_t depth, std::int64_t count,
          float* panel) {
  if (count < columns)
    for (std::int64_t i = 0; i < depth * columns; ++i) panel[i] = 0;
  if (b_column == 1 && count == columns) {
    for (std::int64_t k = 0; k < depth; ++k)
      for (int j = 0; j < vectors; ++j) store(panel + k * columns + j * width, load(b + k * b_depth + j * width));
    return;
  }
  std::int64_t done = 0;
  if (b_depth == 1)
    for (; done + width <= count; done += width) {
      std::int64_t k = 0;
      for (; k + width <= depth; k += width) {
        Floats square[width];
        for (int i = 0; i < width; ++i) square[i] = load(b + (done + i) * b_column + k);
        transpose(square);
        for (int i = 0; i < width; ++i) store(panel + (k + i) * columns + done, square[i]);
      }
      for (; k < depth; ++k)
        for (int i = 0; i < width; ++i) panel[k * columns + done + i] = number(b + k + (done + i) * b_column);
    }
  for (; done < count; ++done)
    for (std::int64_t k = 0; k < depth; ++k) panel[k * columns + done] = number(b + k * b_depth + done * b_column);
}

// Rows of a whose neighbours in memory are other rows, to strips of `rows`, a step of the depth after the other.
void pack_strips(const MatmulArrays& x, const MatmulBlock& block, std::int64_t from, std::int64_t depth, float* strips) {
  for (std::int64_t k = 0; k < depth; ++k) {
    const float* const a = x.a + (from + k) * x.a_depth;
    for (std::int64_t row = block.row; row < block.row_end; row += rows) {
      float* const step = strips + (row - block.row) / rows * strip + k * rows;
      if (row + rows <= block.row_end)
        __builtin_memcpy(step, a + row, sizeof(float) * rows);
      else
        for (std::int64_t i = 0; row + i < block.row_end; ++i) step[i] = a[row + i];
    }
  }
}

template <class T>
void run(const MatmulArrays& x, const MatmulBlock& block, float* scratch) {
  float* const panel = scratch;
  float* const strips = scratch + columns * depth_block;
  float edge[rows * columns], edge_bias[columns] = {};
  for (std::int64_t from = 0; from < x.depth || from == 0; from += depth_block) {
    const std::int64_t depth = x.depth - from < depth_block ? x.depth - from : depth_block;
    const bool packed = x.a_depth != 1, add = x.add || from > 0;
    if (packed) pack_strips(x, block, from, depth, strips);
    for (std::int64_t column = block.column; column < block.column_end; column += columns) {
      const std::int64_t count = block.column_end - column < columns ? block.column_end - column : columns;
      pack(static_cast<const T*>(x.b) + column * x.b_column + from * x.b_depth, x.b_depth, x.b_column, depth, count,
           panel);
      for (std::int64_t row = block.row; row < block.row_end; row += rows) {
        const int height = block.row_end - row < rows ? static_cast<int>(block.row_end - row) : rows;
        const float* const a = packed ? strips + (row - block.row) / rows * strip : x.a + row * x.a_row + from;
        const std::int64_t a_row = packed ? 1 : x.a_row, a_depth = packed ? rows : 1;
        float* const c = x.c + row * x.c_row + column;
        const float* const bias = x.bias && !add ? x.bias + column : nullptr;
        if (count == columns) {
          multiply(height, a, a_row, a_depth, panel, depth, {c, x.c_row, bias, x.alpha, add});
          continue;
        }
        for (int i = 0; i < height && add; ++i)
          for (std::int64_t j = 0; j < count; ++j) edge[i * columns + j] = c[i * x.c_row + j];
        for (std::int64_t j = 0; j < count && bias; ++j) edge_bias[j] = bias[j];
        multiply(height, a, a_row, a_depth, panel, depth, {edge, columns, bias ? edge_bias : nullptr, x.alpha, add});
        for (int i = 0; i < height; ++i)
          for (std::int64_t j = 0; j < count; ++j) c[i * x.c_row + j] = edge[i * columns + j];
      }
    }
  }
}

}  // namespace

namespace FUSERL_ISA {
extern const MatmulTable matmul;
const MatmulTable matmul = {rows, columns, columns * depth_block, strip, {run<float>, run<Bf16>, run<F16>}};
}  // namespace FUSERL_ISA
}  // namespace fuserl
