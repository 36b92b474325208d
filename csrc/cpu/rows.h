// Rows of logits as the CPU operations walk them: where each is, what it must be, and the sums of its softmax.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "check.h"
#include "softmax_rows_kernels.h"
#include "tensor_view.h"

namespace fuserl {

// The row kernels' index of a dtype; f64 has its own scalar path.
inline int index_of(DType dtype) { return dtype == DType::f32 ? 0 : dtype == DType::bf16 ? 1 : 2; }
inline int bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

struct Rows {
  char* data;
  std::int64_t inner, stride_outer, stride_inner;

  explicit Rows(const TensorView& view)
      : data(view.as<char>()), inner(view.shape[1]), stride_outer(view.stride[0] * bytes_of(view.dtype)),
        stride_inner(view.stride[1] * bytes_of(view.dtype)) {}

  char* operator[](std::int64_t n) const { return data + n / inner * stride_outer + n % inner * stride_inner; }
};

// The sums of one row, with any logits dtype; all five only where asked for.
RowSums softmax_row_sums(DType dtype, const void* row, std::int64_t vocab, double temperature, bool all);

inline void check_temperature(const char* function, double value, const std::string& argument) {
  if (!(value >= 1e-30 && value <= 1e30))
    refuse(function, argument + " must be positive and finite (1e-30 to 1e30)", std::to_string(value),
           "Use 1.0 for the model's own distribution.");
}

inline void check_logits(const char* function, const char* argument, const TensorView& view) {
  check_device(function, argument, view, Device::cpu);
  if (view.dtype != DType::f32 && view.dtype != DType::f64 && view.dtype != DType::bf16 && view.dtype != DType::f16)
    refuse(function, std::string(argument) + " must be float32, float64, bfloat16 or float16", name(view.dtype),
           "Convert it with .to().");
  if (view.ndim != 3 || (view.shape[2] == 0 && view.shape[0] * view.shape[1] > 0))
    refuse(function, std::string(argument) + " must have shape (A, R, V) with V > 0", shape_text(view),
           "View it as three dimensions.");
  if (view.stride[2] != 1 && view.shape[2] > 1)
    refuse(function, std::string(argument) + " must have stride 1 in its last dimension",
           "stride " + std::to_string(view.stride[2]), "Call .contiguous() first.");
}

// Rows a thread takes at once: 32k logits at least, for handing over costs; up to 256k where rows are many, for what
// was prefetched beyond the last one is lost.
inline std::int64_t rows_at_once(std::int64_t rows, std::int64_t vocab, int threads) {
  const std::int64_t least = 1 + 32768 / (vocab + 1), most = 1 + 262144 / (vocab + 1);
  return std::max(least, std::min(most, rows / (8 * std::max(threads, 1))));
}

}  // namespace fuserl
