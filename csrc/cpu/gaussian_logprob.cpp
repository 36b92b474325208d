#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "gaussian_logprob_kernels.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"

namespace fuserl {

FUSERL_KERNELS(GaussianTable, gaussian_logprob)

namespace {

constexpr std::int64_t group_elements = 1 << 14;  // at least
constexpr std::int64_t most_groups = 32, least_summed = 4;  // groups, and rows of each, where it has sums of its own

const auto& kernels_of(const float*) { return kernels().f32; }
const auto& kernels_of(const double*) { return kernels().f64; }

template <class T>
T* data(const TensorView* view) {
  return view ? view->as<T>() : nullptr;
}

bool per_dimension(const TensorView& scale, const TensorView& actions) {
  return scale.shape[scale.ndim - 1] == actions.shape[1];
}

template <class T>
GaussianScale<T> scale_of(const TensorView& scale, const TensorView& actions) {
  const bool per_row = scale.ndim == 2;
  return {scale.as<T>(), per_row, per_dimension(scale, actions) && (per_row || actions.shape[1] > 1)};
}

template <class T>
GaussianRows<T> rows_of(const cpu::GaussianTensors& x) {
  GaussianRows<T> rows = {x.actions.shape[1], data<T>(&x.actions), data<T>(&x.mean), data<T>(x.ref_mean),
                          scale_of<T>(x.scale, x.actions), {}, data<unsigned char>(x.mask),
                          x.mask && x.mask->ndim == 2, x.logs};
  if (x.ref_scale) rows.ref_scale = scale_of<T>(*x.ref_scale, x.actions);
  return rows;
}

// Rows from first to last of each group, which depend on the shape alone.
struct Groups {
  std::int64_t rows, size;

  Groups(const TensorView& actions, bool summed) : rows(actions.shape[0]), size(1 + group_elements / actions.shape[1]) {
    if (summed) size = std::max({size, least_summed, (rows + most_groups - 1) / most_groups});
  }

  std::int64_t count() const { return (rows + size - 1) / size; }
  std::int64_t end(std::int64_t group) const { return std::min(rows, (group + 1) * size); }
};

template <class T>
struct Forward {
  GaussianRows<T> rows;
  Groups groups;
  GaussianOutputs<T> out;
};

template <class T>
void forward_groups(void* context, std::int64_t begin, std::int64_t end) {
  const Forward<T>& x = *static_cast<const Forward<T>*>(context);
  kernels_of(static_cast<T*>(nullptr)).forward(x.rows, begin * x.groups.size, x.groups.end(end - 1), x.out);
}

template <class T>
struct Backward {
  GaussianRows<T> rows;
  Groups groups;
  GaussianOutputs<const T> g;
  GaussianGradients<T> out;
  std::vector<double> sums, ref_sums;  // a row for each group
  std::int64_t width = 0, ref_width = 0;
};

template <class T>
void backward_groups(void* context, std::int64_t begin, std::int64_t end) {
  Backward<T>& x = *static_cast<Backward<T>*>(context);
  for (std::int64_t group = begin; group < end; ++group) {
    GaussianGradients<T> out = x.out;
    if (x.width) out.sums = x.sums.data() + group * x.width;
    if (x.ref_width) out.ref_sums = x.ref_sums.data() + group * x.ref_width;
    kernels_of(static_cast<T*>(nullptr)).backward(x.rows, group * x.groups.size, x.groups.end(group), x.g, out);
  }
}

template <class T>
void add_groups(const std::vector<double>& sums, std::int64_t width, std::int64_t groups, const TensorView* out) {
  for (std::int64_t i = 0; i < width; ++i) {
    double total = 0;
    for (std::int64_t group = 0; group < groups; ++group) total += sums[static_cast<std::size_t>(group * width + i)];
    out->as<T>()[i] = static_cast<T>(total);
  }
}

template <class T>
void run_backward(const cpu::GaussianTensors& x, const cpu::GaussianResults& g, const cpu::GaussianGradientViews& out,
                  int threads) {
  const auto summed = [](const TensorView* scale) { return scale && scale->ndim == 1; };
  const bool scale = summed(out.scale), ref_scale = summed(out.ref_scale);
  Backward<T> problem = {rows_of<T>(x),
                         Groups(x.actions, scale || ref_scale),
                         {data<T>(g.logprob), data<T>(g.entropy), data<T>(g.kl)},
                         {data<T>(out.actions), data<T>(out.mean), data<T>(out.ref_mean),
                          scale ? nullptr : data<T>(out.scale), ref_scale ? nullptr : data<T>(out.ref_scale), nullptr,
                          nullptr},
                         {}, {}};
  const std::int64_t groups = problem.groups.count();
  problem.width = scale ? out.scale->size() : 0;
  problem.ref_width = ref_scale ? out.ref_scale->size() : 0;
  problem.sums.resize(static_cast<std::size_t>(groups * problem.width));
  problem.ref_sums.resize(static_cast<std::size_t>(groups * problem.ref_width));
  parallel_for(groups, 1, threads, backward_groups<T>, &problem);
  add_groups<T>(problem.sums, problem.width, groups, out.scale);
  add_groups<T>(problem.ref_sums, problem.ref_width, groups, out.ref_scale);
}

// D entries for each row or for all of them, or `fewer`.
void check_rows(const char* function, const char* argument, const TensorView& view, const TensorView& actions,
                 DType dtype, std::int64_t fewer) {
  const std::int64_t n = actions.shape[0], d = actions.shape[1];
  const std::int64_t columns = view.ndim > 0 && view.shape[view.ndim - 1] == fewer ? fewer : d;
  if (view.ndim == 1)
    check_dense(function, argument, view, dtype, Device::cpu, {columns});
  else
    check_dense(function, argument, view, dtype, Device::cpu, {n, columns});
}

void check(const char* function, const cpu::GaussianTensors& x, const cpu::GaussianResults& results) {
  const TensorView& actions = x.actions;
  if (actions.dtype != DType::f32 && actions.dtype != DType::f64)
    refuse(function, "actions must be float32 or float64", name(actions.dtype), "Convert them with .float().");
  if (actions.ndim != 2 || actions.shape[1] == 0)
    refuse(function, "actions must be (N, D) with D > 0", shape_text(actions), "Reshape them.");
  const std::int64_t n = actions.shape[0], d = actions.shape[1];
  check_dense(function, "actions", actions, actions.dtype, Device::cpu, {n, d});
  check_dense(function, "mean", x.mean, actions.dtype, Device::cpu, {n, d});
  check_rows(function, "scale", x.scale, actions, actions.dtype, 1);
  if (x.ref_mean) check_dense(function, "ref_mean", *x.ref_mean, actions.dtype, Device::cpu, {n, d});
  if (x.ref_scale) check_rows(function, "ref_scale", *x.ref_scale, actions, actions.dtype, 1);
  if (x.mask) check_rows(function, "mask", *x.mask, actions, DType::boolean, d);
  if (results.kl && (!x.ref_mean || !x.ref_scale))
    refuse(function, "ref_mean and ref_scale must be given with kl", "none", "Leave kl out.");
  const auto require = [&](const char* argument, const TensorView* view) {
    if (view) check_dense(function, argument, *view, actions.dtype, Device::cpu, {n});
  };
  require("logprob", results.logprob);
  require("entropy", results.entropy);
  require("kl", results.kl);
}

void check_gradients(const char* function, const cpu::GaussianTensors& x, const cpu::GaussianGradientViews& out) {
  const auto require = [&](const char* argument, const TensorView* view, const TensorView* like) {
    if (!view) return;
    if (!like) refuse(function, std::string(argument) + " must be given for its gradient", "none", "Leave it out.");
    if (like->ndim == 1)
      check_dense(function, argument, *view, x.actions.dtype, Device::cpu, {like->shape[0]});
    else
      check_dense(function, argument, *view, x.actions.dtype, Device::cpu, {like->shape[0], like->shape[1]});
  };
  require("actions", out.actions, &x.actions);
  require("mean", out.mean, &x.mean);
  require("scale", out.scale, &x.scale);
  require("ref_mean", out.ref_mean, x.ref_mean);
  require("ref_scale", out.ref_scale, x.ref_scale);
}

}  // namespace

namespace cpu {

void gaussian_logprob_forward(const GaussianTensors& tensors, const GaussianResults& out, int threads) {
  check("gaussian_logprob_forward", tensors, out);
  const Groups groups(tensors.actions, false);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Forward<T> problem = {rows_of<T>(tensors), groups, {data<T>(out.logprob), data<T>(out.entropy), data<T>(out.kl)}};
    parallel_for(groups.count(), 1, threads, forward_groups<T>, &problem);
  };
  if (tensors.actions.dtype == DType::f64)
    run(0.0);
  else
    run(0.0f);
}

void gaussian_logprob_backward(const GaussianTensors& tensors, const GaussianResults& g,
                               const GaussianGradientViews& out, int threads) {
  check("gaussian_logprob_backward", tensors, g);
  check_gradients("gaussian_logprob_backward", tensors, out);
  if ((out.ref_mean || out.ref_scale) && !g.kl)
    refuse("gaussian_logprob_backward", "kl of g must be given for a gradient to the reference", "none", "Leave it out.");
  if (tensors.actions.dtype == DType::f64)
    run_backward<double>(tensors, g, out, threads);
  else
    run_backward<float>(tensors, g, out, threads);
}

}  // namespace cpu
}  // namespace fuserl
