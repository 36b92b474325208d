#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "policy_loss_kernels.h"

namespace fuserl {

FUSERL_KERNELS(PolicyLossKernels, policy_loss)

namespace {

constexpr const char* function = "policy_loss";
template <class T>
constexpr std::int64_t block_tokens = sizeof(T) == sizeof(float) ? 4096 : 512;
constexpr std::int64_t blocks_at_once = 4;  // what is worth handing to another thread
constexpr double infinity = std::numeric_limits<double>::infinity();

const auto& kernel_of(const float*) { return kernels().f32; }
const auto& kernel_of(const double*) { return kernels().f64; }

struct Statistics {
  using At = PolicyStatistic;

  double values[At::all] = {};

  Statistics() {
    values[At::ratio_max] = -infinity;
    values[At::ratio_min] = infinity;
  }

  void add(const Statistics& other) {
    for (int i = 0; i < At::sums; ++i) values[i] += other.values[i];
    values[At::ratio_max] = std::max(values[At::ratio_max], other.values[At::ratio_max]);
    values[At::ratio_min] = std::min(values[At::ratio_min], other.values[At::ratio_min]);
  }

  // A NaN ratio is in their sum and must show in the extremes, whose comparisons pass it over.
  void show_nan() {
    if (std::isnan(values[At::ratio])) values[At::ratio_max] = values[At::ratio_min] = values[At::ratio];
  }
};

template <class T>
PolicyBounds<T> bounds_of(const PolicyRule& rule) {
  const auto t = [](double x) { return static_cast<T>(x); };
  PolicyBounds<T> bounds = {{}, {}, t(rule.log_least), t(rule.log_most), t(rule.below), t(rule.above), t(rule.beta),
                            t(rule.entropy_coef), rule.surrogate, rule.kl, rule.score, rule.kl_weighted};
  std::transform(rule.factors.begin(), rule.factors.end(), bounds.factors, t);
  std::transform(rule.log_ratios.begin(), rule.log_ratios.end(), bounds.log_ratios, t);
  return bounds;
}

template <class T>
struct Problem {
  PolicyBlock<T> all;
  PolicyBounds<T> bounds;
  std::int64_t count;
  std::vector<Statistics> blocks;
};

template <class T>
PolicyBlock<T> from(PolicyBlock<T> block, std::int64_t begin) {
  for (const T*& p : block.input) p += p ? begin : 0;
  block.mask += block.mask ? begin : 0;
  block.losses += begin;
  block.derivative += block.derivative ? begin : 0;
  return block;
}

template <class T>
void run_blocks(void* context, std::int64_t begin, std::int64_t end) {
  Problem<T>& problem = *static_cast<Problem<T>*>(context);
  const auto& kernel = kernel_of(static_cast<T*>(nullptr));
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t first = i * block_tokens<T>;
    kernel(from(problem.all, first), std::min(block_tokens<T>, problem.count - first), problem.bounds,
           problem.blocks[static_cast<std::size_t>(i)].values);
  }
}

template <class T>
void run(const cpu::PolicyTensors& x, const PolicyRule& rule, int threads) {
  const auto data = [](const TensorView* view) { return view ? view->as<T>() : nullptr; };
  const std::int64_t count = x.logprobs.size(), blocks = (count + block_tokens<T> - 1) / block_tokens<T>;
  const unsigned char* mask = x.mask ? x.mask->as<unsigned char>() : nullptr;
  Problem<T> problem = {{{data(&x.logprobs), data(&x.advantages), data(x.old_logprobs), data(x.ref_logprobs),
                          data(x.rollout_logprobs), data(x.log_weights), data(x.entropy), data(x.weights)},
                         mask, data(&x.losses), data(x.derivative)},
                        bounds_of<T>(rule),
                        count,
                        std::vector<Statistics>(static_cast<std::size_t>(blocks))};
  parallel_for(blocks, blocks_at_once, threads, run_blocks<T>, &problem);
  // In pairs, and pairs of those: doubles are as exact as the tokens', and a long sum would not be.
  for (std::size_t step = 1; step < problem.blocks.size(); step *= 2)
    for (std::size_t i = 0; i + step < problem.blocks.size(); i += 2 * step)
      problem.blocks[i].add(problem.blocks[i + step]);
  Statistics& total = problem.blocks.front();
  total.show_nan();
  if (!x.rollout_logprobs && !x.log_weights)
    total.values[PolicyStatistic::importance] = total.values[PolicyStatistic::tokens];
  std::transform(total.values, total.values + PolicyStatistic::all, x.statistics.as<T>(),
                 [](double value) { return static_cast<T>(value); });
}

void check(const cpu::PolicyTensors& x, const PolicyRule& rule) {
  const DType dtype = x.logprobs.dtype;
  if (dtype != DType::f32 && dtype != DType::f64)
    refuse(function, "logprobs must be float32 or float64", name(dtype), "Convert them with .float().");
  const std::int64_t n = x.logprobs.size();
  const auto require = [&](const char* argument, const TensorView* view, DType wanted) {
    if (view) check_dense(function, argument, *view, wanted, Device::cpu, {n});
  };
  require("logprobs", &x.logprobs, dtype);
  require("advantages", &x.advantages, dtype);
  require("old_logprobs", x.old_logprobs, dtype);
  require("ref_logprobs", x.ref_logprobs, dtype);
  require("rollout_logprobs", x.rollout_logprobs, dtype);
  require("log_weights", x.log_weights, dtype);
  require("entropy", x.entropy, dtype);
  require("weights", x.weights, dtype);
  require("mask", x.mask, DType::boolean);
  require("losses", &x.losses, dtype);
  require("derivative", x.derivative, dtype);
  check_dense(function, "statistics", x.statistics, dtype, Device::cpu, {PolicyStatistic::all});
  if (x.rollout_logprobs && x.log_weights)
    refuse(function, "rollout_logprobs must be None with log_weights", "both", "Give one of them.");
  if (rule.kl != KlEstimator::none && !x.ref_logprobs)
    refuse(function, "ref_logprobs must be given with an estimator of KL", "none", "Pass kl = 0 without them.");
}

}  // namespace

namespace cpu {

void policy_loss(const PolicyTensors& tensors, const PolicyRule& rule, int threads) {
  check(tensors, rule);
  if (tensors.logprobs.dtype == DType::f64)
    run<double>(tensors, rule, threads);
  else
    run<float>(tensors, rule, threads);
}

}  // namespace cpu
}  // namespace fuserl
