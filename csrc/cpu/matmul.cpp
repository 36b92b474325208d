#include <algorithm>
#include <vector>

#include "check.h"
#include "isa.h"
#include "matmul_kernels.h"
#include "ops.h"
#include "parallel.h"

namespace fuserl {

FUSERL_KERNELS(MatmulTable, matmul)

namespace {

constexpr const char* function = "matmul";
// Of the output at once: rows of a that a processor's second cache holds, columns that make packing worth their while.
constexpr std::int64_t block_rows = 256, block_columns = 1536, least_rows = 96;
constexpr std::int64_t tasks_per_thread = 8;  // so that a thread that is held up does not hold up all

std::int64_t up(std::int64_t n, std::int64_t d) { return (n + d - 1) / d; }

struct Product {
  MatmulArrays x;
  const MatmulTable& table;
  int dtype;
  std::int64_t rows, columns;  // of a block, multiples of a tile
};

// Blocks as large as is allowed, and enough of them for all threads.
void cut(Product& product, int threads) {
  const MatmulArrays& x = product.x;
  const std::int64_t strips = up(x.rows, product.table.tile_rows), panels = up(x.columns, product.table.tile_columns);
  const std::int64_t wanted = threads > 1 ? threads * tasks_per_thread : 1, one = 1;
  std::int64_t high = up(x.rows, block_rows), wide = up(x.columns, block_columns);
  const auto cut_rows = [&] {
    high = std::clamp(std::max(high, up(wanted, wide)), one, std::max(one, x.rows / least_rows));
  };
  const auto cut_columns = [&] { wide = std::clamp(std::max(wide, up(wanted, high)), one, panels); };
  // A cut of rows packs the panels of b once more, a cut of columns those rows of a that are packed.
  if (x.a_depth != 1 && x.b_column == 1) {
    cut_rows();
    cut_columns();
  } else {
    cut_columns();
    cut_rows();
  }
  product.rows = up(strips, high) * product.table.tile_rows;
  product.columns = up(panels, wide) * product.table.tile_columns;
}

void multiply(void* context, std::int64_t begin, std::int64_t end) {
  const Product& product = *static_cast<Product*>(context);
  thread_local std::vector<float> scratch;  // lives as long as the thread: its pages are touched once
  const std::int64_t strips = product.rows / product.table.tile_rows;
  const auto room = static_cast<std::size_t>(product.table.panel_room + product.table.strip_room * strips);
  if (scratch.size() < room) scratch.resize(room);
  const std::int64_t high = up(product.x.rows, product.rows);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = i % high * product.rows, column = i / high * product.columns;
    const MatmulBlock block = {row, std::min(row + product.rows, product.x.rows), column,
                               std::min(column + product.columns, product.x.columns)};
    product.table.block[product.dtype](product.x, block, scratch.data());
  }
}

void require_matrix(const char* argument, const TensorView& view, bool half, bool either) {
  check_device(function, argument, view, Device::cpu);
  const bool known = view.dtype == DType::f32 || (half && (view.dtype == DType::bf16 || view.dtype == DType::f16));
  if (!known)
    refuse(function, std::string(argument) + (half ? " must be float32, bfloat16 or float16" : " must be float32"),
           name(view.dtype), "Convert it with .to().");
  if (view.ndim != 2 || !(view.stride[1] == 1 || view.shape[1] == 1 || (either && view.stride[0] == 1)))
    refuse(function, std::string(argument) + " must be a matrix whose " + (either ? "rows or columns" : "rows") +
                         " stand together", shape_text(view) + " of other strides", "Call .contiguous() first.");
}

}  // namespace

namespace cpu {

void matmul(const TensorView& a, const TensorView& b, const TensorView* bias, double alpha, bool add,
            const TensorView& c, int threads) {
  require_matrix("a", a, false, true);
  require_matrix("b", b, true, true);
  require_matrix("c", c, false, false);
  const std::int64_t rows = a.shape[0], depth = a.shape[1], columns = b.shape[1];
  if (b.shape[0] != depth || c.shape[0] != rows || c.shape[1] != columns)
    refuse(function, "a, b and c must be (n, k), (k, m) and (n, m)",
           shape_text(a) + ", " + shape_text(b) + " and " + shape_text(c), "Check which tensors were passed.");
  if (bias) check_dense(function, "bias", *bias, DType::f32, Device::cpu, {columns});
  if (rows == 0 || columns == 0) return;
  // Where one step is all there is, its stride is whatever the tensor says: 1 is as good.
  const bool a_rows_apart = a.stride[1] == 1 || depth == 1, b_columns_apart = b.stride[1] != 1 && columns > 1;
  const MatmulArrays x = {a.as<const float>(), a_rows_apart ? a.stride[0] : 1, a_rows_apart ? 1 : a.stride[1],
                          b.data, b_columns_apart ? 1 : b.stride[0], b_columns_apart ? b.stride[1] : 1,
                          c.as<float>(), c.stride[0], bias ? bias->as<const float>() : nullptr,
                          rows, columns, depth, static_cast<float>(alpha), add};
  Product product = {x, kernels(), b.dtype == DType::f32 ? 0 : b.dtype == DType::bf16 ? 1 : 2, 0, 0};
  cut(product, threads);
  parallel_for(up(rows, product.rows) * up(columns, product.columns), 1, threads, multiply, &product);
}

}  // namespace cpu
}  // namespace fuserl
