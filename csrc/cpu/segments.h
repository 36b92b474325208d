// Rows of tokens and the segments in them, as the ops that work along segments see them.
#pragma once
#include <algorithm>
#include <string>

#include "check.h"

namespace fuserl {

// Rows of `tokens` numbers each; the segments of every row are offsets[s] to offsets[s + 1], or the whole row.
struct Segments {
  std::int64_t rows, tokens, per_row;
  const std::int64_t* offsets;  // or null

  std::int64_t count() const { return rows * per_row; }
  std::int64_t total() const { return rows * tokens; }
  // How many segments have about `wanted` tokens.
  std::int64_t grain(std::int64_t wanted) const {
    return std::max<std::int64_t>(1, wanted * count() / std::max<std::int64_t>(total(), 1));
  }
  std::int64_t begin(std::int64_t i) const { return at(i, 0); }
  std::int64_t end(std::int64_t i) const { return at(i, 1); }

 private:
  std::int64_t at(std::int64_t i, std::int64_t side) const {
    return i / per_row * tokens + (offsets ? offsets[i % per_row + side] : side * tokens);
  }
};

inline Segments segments_of(const char* function, const TensorView& x, const TensorView* offsets) {
  Segments segments{x.shape[0], x.shape[1], 1, nullptr};
  if (!offsets) return segments;
  segments.per_row = offsets->shape[0] - 1;
  check_dense(function, "offsets", *offsets, DType::i64, Device::cpu, {std::max<std::int64_t>(segments.per_row, 0) + 1});
  segments.offsets = offsets->as<std::int64_t>();
  const std::int64_t* o = segments.offsets;
  for (std::int64_t s = 0; s < segments.per_row; ++s)
    if (o[s] > o[s + 1])
      refuse(function, "offsets must not decrease", std::to_string(o[s]) + " before " + std::to_string(o[s + 1]),
             "Give where each segment begins, and the end of the last.");
  if (o[0] != 0 || o[segments.per_row] != segments.tokens)
    refuse(function, "offsets must begin with 0 and end with " + std::to_string(segments.tokens),
           std::to_string(o[0]) + " and " + std::to_string(o[segments.per_row]),
           "Give where each segment begins, and the end of the last.");
  return segments;
}

}  // namespace fuserl
