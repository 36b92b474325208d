#include "isa.h"
#include "ops.h"
#include "scan_tiles.h"

namespace fuserl {

FUSERL_KERNELS(ScanKernels, scan)

const ScanKernels& scan_kernels() { return kernels(); }

namespace {

constexpr const char* function = "discounted_scan";

template <class T>
struct Links {
  using Number = T;

  const T* b;
  const T* a;
  T factor;
  T* x;
  void (*kernel)(const ScanBlock<T>&, ScanState<T>&);
  const Segments& segments;

  void tile(std::int64_t segment, std::int64_t begin, std::int64_t end, T carry, bool write,
            ScanState<T>& state) const {
    if (a && begin > segments.begin(segment)) state.link = a[begin - 1];
    kernel({b + begin, a ? a + begin : nullptr, factor, carry, write ? x + begin : nullptr, end - begin}, state);
  }
};

template <class T>
void run(const TensorView& b, const TensorView* a, double factor, const Segments& segments, bool forward,
         const TensorView& x, void (*kernel)(const ScanBlock<T>&, ScanState<T>&), int threads) {
  const Links<T> links{b.as<T>(), a ? a->as<T>() : nullptr, static_cast<T>(factor), x.as<T>(), kernel, segments};
  TiledScan<Links<T>>(links, segments, forward, threads).run();
}

}  // namespace

namespace cpu {

void discounted_scan(const TensorView& b, const TensorView* a, double factor, const TensorView* offsets, bool forward,
                     const TensorView& x, int threads) {
  if (b.dtype != DType::f32 && b.dtype != DType::f64)
    refuse(function, "b must be float32 or float64", name(b.dtype), "Convert it with .float().");
  const auto require = [&](const char* argument, const TensorView& view) {
    check_dense(function, argument, view, b.dtype, Device::cpu, {b.shape[0], b.shape[1]});
  };
  require("b", b);
  if (a) require("a", *a);
  require("x", x);
  const Segments segments = segments_of(function, b, offsets);
  if (b.dtype == DType::f64)
    run<double>(b, a, factor, segments, forward, x, scan_kernels().f64[forward], threads);
  else
    run<float>(b, a, factor, segments, forward, x, scan_kernels().f32[forward], threads);
}

}  // namespace cpu
}  // namespace fuserl
