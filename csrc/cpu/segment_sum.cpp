#include <algorithm>
#include <vector>

#include "check.h"
#include "ops.h"
#include "parallel.h"
#include "segments.h"

namespace fuserl {
namespace {

constexpr std::int64_t part_tokens = 32768;  // of a segment, summed by one thread
constexpr int lanes = 16;

// In doubles, in an order of its own that no instruction set changes.
template <class T>
double sum(const T* x, std::int64_t count) {
  double partial[lanes] = {}, total = 0;
  std::int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int lane = 0; lane < lanes; ++lane) partial[lane] += static_cast<double>(x[i + lane]);
  for (; i < count; ++i) partial[i % lanes] += static_cast<double>(x[i]);
  for (const double each : partial) total += each;
  return total;
}

template <class T>
struct Sums {
  struct Part {
    std::int64_t segment, begin, end;
    double sum;
  };

  const T* x;
  std::vector<Part> parts;

  static void work(void* context, std::int64_t first, std::int64_t last) {
    Sums& self = *static_cast<Sums*>(context);
    for (std::int64_t i = first; i < last; ++i) {
      Part& part = self.parts[static_cast<std::size_t>(i)];
      part.sum = sum(self.x + part.begin, part.end - part.begin);
    }
  }
};

template <class T>
void run_sums(const TensorView& x, const Segments& segments, const TensorView& out, int threads) {
  Sums<T> sums{x.as<T>(), {}};
  for (std::int64_t s = 0; s < segments.count(); ++s)
    for (std::int64_t i = segments.begin(s), end = segments.end(s); i < end; i += part_tokens)
      sums.parts.push_back({s, i, std::min(i + part_tokens, end), 0});
  parallel_for(static_cast<std::int64_t>(sums.parts.size()), segments.grain(part_tokens), threads, Sums<T>::work, &sums);
  std::vector<double> total(static_cast<std::size_t>(segments.count()));
  for (const auto& part : sums.parts) total[static_cast<std::size_t>(part.segment)] += part.sum;
  std::transform(total.begin(), total.end(), out.as<T>(), [](double value) { return static_cast<T>(value); });
}

template <class T>
struct Spread {
  const T* x;
  T* out;
  const Segments& segments;

  static void work(void* context, std::int64_t first, std::int64_t last) {
    const Spread& self = *static_cast<Spread*>(context);
    for (std::int64_t s = first; s < last; ++s)
      std::fill(self.out + self.segments.begin(s), self.out + self.segments.end(s), self.x[s]);
  }
};

template <class T>
void run_spread(const TensorView& x, const Segments& segments, const TensorView& out, int threads) {
  Spread<T> spread{x.as<T>(), out.as<T>(), segments};
  parallel_for(segments.count(), segments.grain(part_tokens), threads, Spread<T>::work, &spread);
}

// `tokens` is (C, N), `sums` (C, B).
Segments check(const char* function, const TensorView& tokens, const TensorView& offsets, const TensorView& sums) {
  if (tokens.dtype != DType::f32 && tokens.dtype != DType::f64)
    refuse(function, "the values must be float32 or float64", name(tokens.dtype), "Convert them with .float().");
  check_dense(function, "per-token values", tokens, tokens.dtype, Device::cpu, {tokens.shape[0], tokens.shape[1]});
  const Segments segments = segments_of(function, tokens, &offsets);
  check_dense(function, "per-segment values", sums, tokens.dtype, Device::cpu, {tokens.shape[0], segments.per_row});
  return segments;
}

}  // namespace

namespace cpu {

void segment_sum(const TensorView& x, const TensorView& offsets, const TensorView& out, int threads) {
  const Segments segments = check("segment_sum", x, offsets, out);
  (x.dtype == DType::f64 ? run_sums<double> : run_sums<float>)(x, segments, out, threads);
}

void to_tokens(const TensorView& x, const TensorView& offsets, const TensorView& out, int threads) {
  const Segments segments = check("to_tokens", out, offsets, x);
  (x.dtype == DType::f64 ? run_spread<double> : run_spread<float>)(x, segments, out, threads);
}

}  // namespace cpu
}  // namespace fuserl
