// fuserl._C: the CPU operations. Arguments are checked in csrc; here they only change form, and the GIL is released.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "caster.h"
#include "check.h"
#include "cpu/isa.h"
#include "ops.h"
#include "parallel.h"

namespace py = pybind11;
using namespace pybind11::literals;
using fuserl::TensorView;

namespace {

// The threads of the OpenMP runtime that torch was linked with, if any. Looked up by name, so that nothing is linked.
void share_torch_threads() {
  static const bool once = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    void* run = torch ? dlsym(torch, "GOMP_parallel") : nullptr;
    if (run) fuserl::lend_team(reinterpret_cast<fuserl::TeamRunner>(run));
    return true;
  }();
  static_cast<void>(once);
}

const TensorView* pointer(const std::optional<TensorView>& view) { return view ? &*view : nullptr; }

void softmax_rows_forward(const TensorView& logits, const TensorView& ids,
                          const std::optional<TensorView>& row_temperature, double temperature,
                          const TensorView& statistics, int threads) {
  share_torch_threads();
  fuserl::cpu::softmax_rows_forward(logits, ids, pointer(row_temperature), temperature, statistics, threads);
}

void softmax_rows_gradient(const TensorView& logits, const TensorView& ids, const TensorView& lse,
                           const TensorView& coefficients, const std::optional<TensorView>& row_temperature,
                           double temperature, const TensorView& out, int threads, bool through_tanh) {
  share_torch_threads();
  fuserl::cpu::softmax_rows_gradient(logits, ids, lse, coefficients, pointer(row_temperature), temperature, out,
                                     threads, through_tanh);
}

void group_advantage(const TensorView& rewards, const std::optional<TensorView>& group, const std::optional<TensorView>& rounds,
                     const std::optional<TensorView>& weights, const std::optional<TensorView>& baselines,
                     const std::optional<TensorView>& scales, const std::optional<TensorView>& channel_weights,
                     const TensorView& out, std::int64_t members, int baseline, int scale, int keep,
                     double given_baseline, double given_scale, int ddof, double eps) {
  fuserl::check_codes("group_advantage", baseline, scale, keep);
  const fuserl::AdvantageRule rule{static_cast<fuserl::Baseline>(baseline), static_cast<fuserl::Scale>(scale),
                                   static_cast<fuserl::Keep>(keep), given_baseline, given_scale, ddof, eps};
  fuserl::cpu::group_advantage({rewards, pointer(group), pointer(rounds), pointer(weights), pointer(baselines),
                                pointer(scales), pointer(channel_weights), out, members},
                               rule);
}

void pass_at_k_advantage(const TensorView& rewards, const TensorView& group, const TensorView& out, std::int64_t k,
                         int baseline, int scale, double eps) {
  fuserl::check_best_of_codes("pass_at_k_advantage", baseline, scale);
  const fuserl::BestOfRule rule{k, static_cast<fuserl::BestOfBaseline>(baseline),
                                static_cast<fuserl::BestOfScale>(scale), eps};
  fuserl::cpu::pass_at_k_advantage(rewards, group, rule, out);
}

void policy_loss(const TensorView& logprobs, const TensorView& advantages, const std::optional<TensorView>& old_logprobs,
                 const std::optional<TensorView>& ref_logprobs, const std::optional<TensorView>& rollout_logprobs,
                 const std::optional<TensorView>& log_weights, const std::optional<TensorView>& entropy,
                 const std::optional<TensorView>& weights, const std::optional<TensorView>& mask, int surrogate,
                 const std::array<double, 4>& factors, const std::array<double, 4>& log_ratios,
                 const std::array<double, 4>& correction, double beta, int kl, bool score, bool kl_weighted,
                 double entropy_coef, const TensorView& losses, const std::optional<TensorView>& derivative,
                 const TensorView& statistics, int threads) {
  share_torch_threads();
  fuserl::check_surrogate_code("policy_loss", surrogate);
  fuserl::check_kl_code("policy_loss", kl);
  const auto& [log_least, log_most, below, above] = correction;
  const fuserl::PolicyRule rule{static_cast<fuserl::Surrogate>(surrogate), factors, log_ratios, log_least, log_most,
                                below, above, beta, static_cast<fuserl::KlEstimator>(kl), score, kl_weighted,
                                entropy_coef};
  fuserl::cpu::policy_loss({logprobs, advantages, pointer(old_logprobs), pointer(ref_logprobs),
                            pointer(rollout_logprobs), pointer(log_weights), pointer(entropy), pointer(weights),
                            pointer(mask), losses, pointer(derivative), statistics},
                           rule, threads);
}

void preference_loss(const TensorView& logprobs, const std::array<std::optional<TensorView>, 8>& others, int link,
                     bool mean, const std::array<double, 6>& numbers, const TensorView& losses,
                     const TensorView& rewards, const TensorView& derivative, const TensorView& statistics,
                     int threads) {
  share_torch_threads();
  fuserl::check_preference_code("preference_loss", link);
  const auto& [offsets, mask, chosen, rejected, ref_logprobs, margins, desirable, baseline] = others;
  const auto& [scale, shift, positive, negative, nll, centre] = numbers;
  fuserl::cpu::preference_loss(
      {logprobs, pointer(offsets), pointer(mask), pointer(chosen), pointer(rejected), pointer(ref_logprobs),
       pointer(margins), pointer(desirable), pointer(baseline), losses, rewards, derivative, statistics},
      {static_cast<fuserl::PreferenceLink>(link), mean, scale, shift, positive, negative, nll, centre}, threads);
}

void preference_gradient(const TensorView& g, const TensorView& derivative,
                         const std::array<std::optional<TensorView>, 4>& spread, bool paired, const TensorView& out,
                         int threads) {
  share_torch_threads();
  const auto& [offsets, mask, chosen, rejected] = spread;
  fuserl::cpu::preference_gradient(
      {g, derivative, pointer(offsets), pointer(mask), pointer(chosen), pointer(rejected), paired, out}, threads);
}

using MaybeViews = std::array<std::optional<TensorView>, 3>;

void gaussian_logprob_forward(const TensorView& actions, const TensorView& mean, const TensorView& scale,
                              const MaybeViews& others, bool logs, const MaybeViews& out, int threads) {
  share_torch_threads();
  const auto& [ref_mean, ref_scale, mask] = others;
  fuserl::cpu::gaussian_logprob_forward(
      {actions, mean, scale, pointer(ref_mean), pointer(ref_scale), pointer(mask), logs},
      {pointer(out[0]), pointer(out[1]), pointer(out[2])}, threads);
}

void gaussian_logprob_backward(const TensorView& actions, const TensorView& mean, const TensorView& scale,
                               const MaybeViews& others, bool logs, const MaybeViews& g,
                               const std::array<std::optional<TensorView>, 5>& out, int threads) {
  share_torch_threads();
  const auto& [ref_mean, ref_scale, mask] = others;
  fuserl::cpu::gaussian_logprob_backward(
      {actions, mean, scale, pointer(ref_mean), pointer(ref_scale), pointer(mask), logs},
      {pointer(g[0]), pointer(g[1]), pointer(g[2])},
      {pointer(out[0]), pointer(out[1]), pointer(out[2]), pointer(out[3]), pointer(out[4])}, threads);
}

void sample(const TensorView& logits, const std::optional<TensorView>& row_temperature, double temperature,
            std::int64_t top_k, double top_p, double log_min_p, std::int64_t seed, const TensorView& rollout_ids,
            const TensorView& positions, const TensorView& ids, const TensorView& logprobs, int threads) {
  share_torch_threads();
  fuserl::cpu::sample({logits, pointer(row_temperature), rollout_ids, positions, ids, logprobs},
                      {temperature, top_k, top_p, log_min_p, seed}, threads);
}

fuserl::DivergenceRule divergence_rule(int kind, double parameter, double scale) {
  fuserl::check_divergence_code("divergence", kind);
  return {static_cast<fuserl::DivergenceKind>(kind), parameter, scale};
}

void divergence_forward(const TensorView& logits_p, const TensorView& logits_q, const TensorView& temperatures,
                        int kind, double parameter, double scale, const TensorView& statistics, int threads) {
  share_torch_threads();
  fuserl::cpu::divergence_forward(logits_p, logits_q, temperatures, divergence_rule(kind, parameter, scale),
                                  statistics, threads);
}

void divergence_gradient(const TensorView& logits_p, const TensorView& logits_q, const TensorView& temperatures,
                         int kind, double parameter, double scale, const TensorView& statistics, const TensorView& g,
                         const std::optional<TensorView>& out_p, const std::optional<TensorView>& out_q, int threads) {
  share_torch_threads();
  fuserl::cpu::divergence_gradient(logits_p, logits_q, temperatures, divergence_rule(kind, parameter, scale),
                                   statistics, g, pointer(out_p), pointer(out_q), threads);
}

void sampled_divergence(const TensorView& logprobs, const TensorView& ref_logprobs, int estimator, bool score, int kind,
                        double parameter, double scale, double clamp, const TensorView& values,
                        const std::optional<TensorView>& derivative, int threads) {
  share_torch_threads();
  fuserl::check_kl_code("sampled_divergence", estimator);
  fuserl::check_divergence_code("sampled_divergence", kind);
  const auto sampled = estimator ? fuserl::Sampled::from_policy : fuserl::Sampled::from_reference;
  const fuserl::SampledRule rule{sampled, static_cast<fuserl::KlEstimator>(estimator), score,
                                 static_cast<fuserl::DivergenceKind>(kind), parameter, scale, clamp};
  fuserl::cpu::sampled_divergence(logprobs, ref_logprobs, rule, values, pointer(derivative), threads);
}

void discounted_scan(const TensorView& b, const std::optional<TensorView>& a, double factor,
                     const std::optional<TensorView>& offsets, bool forward, const TensorView& x, int threads) {
  share_torch_threads();
  fuserl::cpu::discounted_scan(b, pointer(a), factor, pointer(offsets), forward, x, threads);
}

void gae(const TensorView& rewards, const TensorView& values, const std::optional<TensorView>& gamma,
         const std::optional<TensorView>& lam, const std::optional<TensorView>& bootstrap,
         const std::optional<TensorView>& mask, const std::optional<TensorView>& offsets, double gamma_of_all,
         double lam_of_all, const TensorView& advantages, const TensorView& returns, int threads) {
  share_torch_threads();
  fuserl::cpu::gae({rewards, values, pointer(gamma), pointer(lam), pointer(bootstrap), pointer(mask), pointer(offsets),
                    advantages, returns},
                   gamma_of_all, lam_of_all, threads);
}

void segment_sum(const TensorView& x, const TensorView& offsets, const TensorView& out, int threads) {
  share_torch_threads();
  fuserl::cpu::segment_sum(x, offsets, out, threads);
}

void to_tokens(const TensorView& x, const TensorView& offsets, const TensorView& out, int threads) {
  share_torch_threads();
  fuserl::cpu::to_tokens(x, offsets, out, threads);
}

using Views = std::array<TensorView, 5>;

fuserl::cpu::TreeTensors tree_of(const Views& tree) { return {tree[0], tree[1], tree[2], tree[3], tree[4]}; }

void tree_attention_forward(const Views& tree, const TensorView& q, const TensorView& k, const TensorView& v,
                            std::int64_t tokens, std::int64_t window, double scale, double softcap,
                            const TensorView& out, const TensorView& lse, int threads) {
  share_torch_threads();
  fuserl::cpu::tree_attention_forward(tree_of(tree), q, k, v, {tokens, window, scale, softcap}, out, lse, threads);
}

void tree_attention_backward(const Views& tree, const TensorView& q, const TensorView& k, const TensorView& v,
                             const TensorView& out, const TensorView& lse, const TensorView& d_out,
                             const std::optional<TensorView>& d_lse, std::int64_t tokens, std::int64_t window,
                             double scale, double softcap, const TensorView& dq, const TensorView& dk,
                             const TensorView& dv, int threads) {
  share_torch_threads();
  fuserl::cpu::tree_attention_backward(tree_of(tree), {q, k, v, out, lse, d_out, pointer(d_lse), dq, dk, dv},
                                       {tokens, window, scale, softcap}, threads);
}

void tree_decode(const std::array<TensorView, 6>& plan, const TensorView& q, const TensorView& k, const TensorView& v,
                 std::int64_t window, double scale, double softcap, const TensorView& out, const TensorView& lse,
                 int threads) {
  share_torch_threads();
  fuserl::cpu::tree_decode({plan[0], plan[1], plan[2], plan[3], plan[4], plan[5]}, q, k, v, {window, scale, softcap},
                           out, lse, threads);
}

void matmul(const TensorView& a, const TensorView& b, const std::optional<TensorView>& bias, double alpha, bool add,
            const TensorView& c, int threads) {
  share_torch_threads();
  fuserl::cpu::matmul(a, b, pointer(bias), alpha, add, c, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using no_gil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "CPU operations of fuserl.";
  m.def("softmax_rows_forward", softmax_rows_forward, "logits"_a, "ids"_a, "row_temperature"_a, "temperature"_a,
        "statistics"_a, "threads"_a, no_gil());
  m.def("softmax_rows_gradient", softmax_rows_gradient, "logits"_a, "ids"_a, "lse"_a, "coefficients"_a,
        "row_temperature"_a, "temperature"_a, "out"_a, "threads"_a, "through_tanh"_a, no_gil());
  m.def("group_advantage", group_advantage, "rewards"_a, "group"_a, "rounds"_a, "weights"_a, "baselines"_a, "scales"_a,
        "channel_weights"_a, "out"_a, "members"_a, "baseline"_a, "scale"_a, "keep"_a, "given_baseline"_a,
        "given_scale"_a, "ddof"_a, "eps"_a, no_gil());
  m.def("group_ranks", fuserl::cpu::group_ranks, "rewards"_a, "group"_a, "best"_a, "out"_a, no_gil());
  m.def("pass_at_k_advantage", pass_at_k_advantage, "rewards"_a, "group"_a, "out"_a, "k"_a, "baseline"_a, "scale"_a,
        "eps"_a, no_gil());
  m.def("policy_loss", policy_loss, "logprobs"_a, "advantages"_a, "old_logprobs"_a, "ref_logprobs"_a,
        "rollout_logprobs"_a, "log_weights"_a, "entropy"_a, "weights"_a, "mask"_a, "surrogate"_a, "factors"_a,
        "log_ratios"_a, "correction"_a, "beta"_a, "kl"_a, "score"_a, "kl_weighted"_a, "entropy_coef"_a, "losses"_a,
        "derivative"_a, "statistics"_a, "threads"_a, no_gil());
  m.def("preference_loss", preference_loss, "logprobs"_a, "others"_a, "link"_a, "mean"_a, "numbers"_a, "losses"_a,
        "rewards"_a, "derivative"_a, "statistics"_a, "threads"_a, no_gil());
  m.def("preference_gradient", preference_gradient, "g"_a, "derivative"_a, "spread"_a, "paired"_a, "out"_a, "threads"_a,
        no_gil());
  m.def("gaussian_logprob_forward", gaussian_logprob_forward, "actions"_a, "mean"_a, "scale"_a, "others"_a, "logs"_a,
        "out"_a, "threads"_a, no_gil());
  m.def("gaussian_logprob_backward", gaussian_logprob_backward, "actions"_a, "mean"_a, "scale"_a, "others"_a, "logs"_a,
        "g"_a, "out"_a, "threads"_a, no_gil());
  m.def("sample", sample, "logits"_a, "row_temperature"_a, "temperature"_a, "top_k"_a, "top_p"_a, "log_min_p"_a,
        "seed"_a, "rollout_ids"_a, "positions"_a, "ids"_a, "logprobs"_a, "threads"_a, no_gil());
  m.def("divergence_forward", divergence_forward, "logits_p"_a, "logits_q"_a, "temperatures"_a, "kind"_a, "parameter"_a,
        "scale"_a, "statistics"_a, "threads"_a, no_gil());
  m.def("divergence_gradient", divergence_gradient, "logits_p"_a, "logits_q"_a, "temperatures"_a, "kind"_a,
        "parameter"_a, "scale"_a, "statistics"_a, "g"_a, "out_p"_a, "out_q"_a, "threads"_a, no_gil());
  m.def("sampled_divergence", sampled_divergence, "logprobs"_a, "ref_logprobs"_a, "estimator"_a, "score"_a, "kind"_a,
        "parameter"_a, "scale"_a, "clamp"_a, "values"_a, "derivative"_a, "threads"_a, no_gil());
  m.def("discounted_scan", discounted_scan, "b"_a, "a"_a, "factor"_a, "offsets"_a, "forward"_a, "x"_a, "threads"_a,
        no_gil());
  m.def("gae", gae, "rewards"_a, "values"_a, "gamma"_a, "lam"_a, "bootstrap"_a, "mask"_a, "offsets"_a, "gamma_of_all"_a,
        "lam_of_all"_a, "advantages"_a, "returns"_a, "threads"_a, no_gil());
  m.def("segment_sum", segment_sum, "x"_a, "offsets"_a, "out"_a, "threads"_a, no_gil());
  m.def("to_tokens", to_tokens, "x"_a, "offsets"_a, "out"_a, "threads"_a, no_gil());
  m.def("tree_attention_forward", tree_attention_forward, "tree"_a, "q"_a, "k"_a, "v"_a, "tokens"_a, "window"_a,
        "scale"_a, "softcap"_a, "out"_a, "lse"_a, "threads"_a, no_gil());
  m.def("tree_attention_backward", tree_attention_backward, "tree"_a, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a,
        "d_out"_a, "d_lse"_a, "tokens"_a, "window"_a, "scale"_a, "softcap"_a, "dq"_a, "dk"_a, "dv"_a, "threads"_a,
        no_gil());
  m.def("tree_decode", tree_decode, "plan"_a, "q"_a, "k"_a, "v"_a, "window"_a, "scale"_a, "softcap"_a, "out"_a, "lse"_a,
        "threads"_a, no_gil());
  m.def("matmul", matmul, "a"_a, "b"_a, "bias"_a, "alpha"_a, "add"_a, "c"_a, "threads"_a, no_gil());
  m.def("isa", [] { return fuserl::name(fuserl::isa()); }, "The instruction set in use: avx512, avx2 or baseline.");
  m.def("set_isa", fuserl::set_isa, "name"_a, "For tests: run the copy for this instruction set from now on.");
  m.attr("intel") = fuserl::intel();
  m.attr("compiler") = FUSERL_COMPILER;
}
