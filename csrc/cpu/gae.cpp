#include <cstring>

#include "ops.h"
#include "scan_tiles.h"

namespace fuserl {
namespace {

constexpr const char* function = "gae";
constexpr std::int64_t block_tokens = 1024;  // temporal differences and links of so many lie in the first cache

template <class T>
struct Calls {
  void (*scan)(const ScanBlock<T>&, ScanState<T>&);
  void (*differences)(const DifferenceBlock<T>&);
  void (*finish)(T*, T*, const T*, const unsigned char*, std::int64_t);
};

template <class T>
struct Temporal {
  using Number = T;

  const T *rewards, *values, *gamma, *lam, *bootstrap;
  const unsigned char* mask;
  T gamma_of_all, lam_of_all;
  T *advantages, *returns;
  Calls<T> call;
  const Segments& segments;

  // The value that follows token `end` - 1: of the next token that counts, or beyond the segment.
  T following(std::int64_t segment, std::int64_t end) const {
    const std::int64_t stop = segments.end(segment);
    while (mask && end < stop && !mask[end]) ++end;
    if (end < stop) return values[end];
    return bootstrap ? bootstrap[segment] : T(0);
  }

  void tile(std::int64_t segment, std::int64_t begin, std::int64_t end, T carry, bool write,
            ScanState<T>& state) const {
    T delta[block_tokens], links[block_tokens];
    const auto from = [](const T* p, std::int64_t i) { return p ? p + i : nullptr; };
    while (end > begin) {
      const std::int64_t i = std::max(end - block_tokens, begin), n = end - i;
      const bool masked = mask && std::memchr(mask + i, 0, static_cast<std::size_t>(n));
      const unsigned char* const kept = masked ? mask + i : nullptr;
      const T next = following(segment, end);
      call.differences({rewards + i, values + i, from(gamma, i), from(lam, i), gamma_of_all, lam_of_all, kept, next,
                        delta, links, n});
      const bool linked = masked || gamma || lam;
      call.scan({delta, linked ? links : nullptr, gamma_of_all * lam_of_all, carry, write ? advantages + i : nullptr, n},
                state);
      if (write) call.finish(advantages + i, returns + i, values + i, kept, n);
      end = i;
    }
  }
};

template <class T>
void run(const cpu::GaeTensors& x, double gamma, double lam, const Segments& segments, const Calls<T>& calls,
         int threads) {
  const auto data = [](const TensorView* view) { return view ? view->as<T>() : nullptr; };
  const Temporal<T> temporal{data(&x.rewards),
                             data(&x.values),
                             data(x.gamma),
                             data(x.lam),
                             data(x.bootstrap),
                             x.mask ? x.mask->as<unsigned char>() : nullptr,
                             static_cast<T>(gamma),
                             static_cast<T>(lam),
                             data(&x.advantages),
                             data(&x.returns),
                             calls,
                             segments};
  TiledScan<Temporal<T>>(temporal, segments, false, threads).run();
}

}  // namespace

namespace cpu {

void gae(const GaeTensors& x, double gamma, double lam, int threads) {
  const DType dtype = x.rewards.dtype;
  if (dtype != DType::f32 && dtype != DType::f64)
    refuse(function, "rewards must be float32 or float64", name(dtype), "Convert them with .float().");
  const std::int64_t rows = x.rewards.shape[0], tokens = x.rewards.shape[1];
  const auto require = [&](const char* argument, const TensorView* view, DType wanted) {
    if (view) check_dense(function, argument, *view, wanted, Device::cpu, {rows, tokens});
  };
  require("rewards", &x.rewards, dtype);
  require("values", &x.values, dtype);
  require("gamma", x.gamma, dtype);
  require("lam", x.lam, dtype);
  require("mask", x.mask, DType::boolean);
  require("advantages", &x.advantages, dtype);
  require("returns", &x.returns, dtype);
  const Segments segments = segments_of(function, x.rewards, x.offsets);
  if (x.bootstrap)
    check_dense(function, "bootstrap", *x.bootstrap, dtype, Device::cpu, {rows, segments.per_row});
  const ScanKernels& kernels = scan_kernels();
  if (dtype == DType::f64)
    run<double>(x, gamma, lam, segments, {kernels.f64[0], kernels.differences_f64, kernels.finish_f64}, threads);
  else
    run<float>(x, gamma, lam, segments, {kernels.f32[0], kernels.differences_f32, kernels.finish_f32}, threads);
}

}  // namespace cpu
}  // namespace fuserl
