// fuserl._cuda: the CUDA C++ operations, on the stream that the caller hands over as an integer. Arguments are checked
// in csrc; here they only change form, and the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>

#include "caster.h"
#include "check.h"
#include "ops.h"

namespace py = pybind11;
using namespace pybind11::literals;
using fuserl::TensorView;

namespace {

const TensorView* pointer(const std::optional<TensorView>& view) { return view ? &*view : nullptr; }

void group_advantage(const TensorView& rewards, const std::optional<TensorView>& group, const std::optional<TensorView>& rounds,
                     const std::optional<TensorView>& weights, const std::optional<TensorView>& baselines,
                     const std::optional<TensorView>& scales, const std::optional<TensorView>& channel_weights,
                     const TensorView& out, std::int64_t members, int baseline, int scale, int keep,
                     double given_baseline, double given_scale, int ddof, double eps, std::uintptr_t stream) {
  fuserl::check_codes("group_advantage", baseline, scale, keep);
  const fuserl::AdvantageRule rule{static_cast<fuserl::Baseline>(baseline), static_cast<fuserl::Scale>(scale),
                                   static_cast<fuserl::Keep>(keep), given_baseline, given_scale, ddof, eps};
  fuserl::cuda::group_advantage({rewards, pointer(group), pointer(rounds), pointer(weights), pointer(baselines),
                                pointer(scales), pointer(channel_weights), out, members},
                               rule, reinterpret_cast<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ operations of fuserl.";
  m.def("group_advantage", group_advantage, "rewards"_a, "group"_a, "rounds"_a, "weights"_a, "baselines"_a, "scales"_a,
        "channel_weights"_a, "out"_a, "members"_a, "baseline"_a, "scale"_a, "keep"_a, "given_baseline"_a,
        "given_scale"_a, "ddof"_a, "eps"_a, "stream"_a,
        py::call_guard<py::gil_scoped_release>());
}
