// fuserl._cuda: the CUDA C++ operations, on the stream that the caller hands over as an integer. Arguments are checked
// in csrc; here they only change form, and the GIL is released.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "caster.h"
#include "check.h"
#include "ops.h"

namespace py = pybind11;
using namespace pybind11::literals;
using fuserl::TensorView;

namespace {

void group_advantage(const TensorView& rewards, const TensorView& group, const TensorView& out, int baseline, int scale,
                     int ddof, double eps, std::uintptr_t stream) {
  fuserl::check_codes("group_advantage", baseline, scale);
  fuserl::cuda::group_advantage(rewards, group, out, static_cast<fuserl::Baseline>(baseline),
                                static_cast<fuserl::Scale>(scale), ddof, eps, reinterpret_cast<void*>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ operations of fuserl.";
  m.def("group_advantage", group_advantage, "rewards"_a, "group"_a, "out"_a, "baseline"_a, "scale"_a, "ddof"_a, "eps"_a,
        "stream"_a, py::call_guard<py::gil_scoped_release>());
}
