#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "isa.h"
#include "ops.h"
#include "parallel.h"
#include "preference_loss_kernels.h"
#include "segments.h"

namespace fuserl {

FUSERL_KERNELS(PreferenceLossKernels, preference_loss)

namespace {

constexpr const char* function = "preference_loss";
constexpr std::int64_t part_tokens = 32768;  // of a rollout, summed by one thread
constexpr std::int64_t block_items = 256;
constexpr std::int64_t blocks_at_once = 8;  // what is worth handing to another thread
constexpr double log_half = -0.69314718055994530942;

const auto& kernel_of(const float*) { return kernels().f32; }
const auto& kernel_of(const double*) { return kernels().f64; }

double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }
double sigmoid(double x) { return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x)); }
double log_one_less_exp(double x) { return x > log_half ? std::log(-std::expm1(x)) : std::log1p(-std::exp(x)); }

// A loss, and its derivatives to the scores of the chosen and of the rejected.
struct Linked {
  double loss, chosen, rejected;
};

// Of odds p / (1 - p), p = exp(score); a mean above 0, which rounding can make, counts as 0. Written so that neither
// derivative is 0 times infinity where a p is 1 or 0.
Linked odds(double chosen, double rejected, double weight) {
  chosen = chosen > 0 ? 0 : chosen;
  rejected = rejected > 0 ? 0 : rejected;
  const double rest_c = -std::expm1(chosen), rest_r = -std::expm1(rejected);
  const double ratio = chosen - rejected - (log_one_less_exp(chosen) - log_one_less_exp(rejected));
  return {weight * softplus(-ratio), -weight / (std::exp(chosen - rejected) * rest_r + rest_c),
          weight / (rest_r * (1 + std::exp(ratio)))};
}

// The loss of a margin, and its derivative to it in `chosen`.
Linked linked(double margin, const PreferenceRule& rule, double weight) {
  switch (rule.link) {
    case PreferenceLink::logistic: {
      // A weight of 0 must not meet the infinity of an infinite margin.
      const double turned = rule.negative == 0 ? 0 : rule.negative * softplus(margin);
      return {rule.positive * softplus(-margin) + turned,
              rule.negative * sigmoid(margin) - rule.positive * sigmoid(-margin), 0};
    }
    case PreferenceLink::hinge:
      if (std::isnan(margin)) return {margin, margin, 0};
      return {rule.positive * std::max(1 - margin, 0.0), margin < 1 ? -rule.positive : 0, 0};
    case PreferenceLink::square:
      return {rule.positive * margin * margin, 2 * rule.positive * margin, 0};
    default:
      return {weight * sigmoid(-margin), -weight * sigmoid(margin) * sigmoid(-margin), 0};
  }
}

struct Statistics {
  double values[PreferenceStatistic::all] = {};

  void add(const Statistics& other) {
    for (int i = 0; i < PreferenceStatistic::all; ++i) values[i] += other.values[i];
  }
};

struct Sizes {
  Segments tokens;  // of each rollout; scores are rollouts of one
  std::int64_t items;
};

template <class T>
struct Problem {
  struct Part {
    std::int64_t rollout, begin, end;
    PreferenceSums sums;
  };

  const cpu::PreferenceTensors& tensors;
  const PreferenceRule& rule;
  const Sizes sizes;
  std::vector<Part> parts;
  std::vector<PreferenceSums> rollout;  // sums of all its tokens
  std::vector<Statistics> blocks;

  static const T* of(const TensorView* view) { return view ? view->as<T>() : nullptr; }

  PreferenceSums sum(std::int64_t begin, std::int64_t end) const {
    const T *x = of(&tensors.logprobs), *ref = of(tensors.ref_logprobs);
    const unsigned char* mask = tensors.mask ? tensors.mask->as<unsigned char>() : nullptr;
    return kernel_of(x)(x + begin, ref ? ref + begin : nullptr, mask ? mask + begin : nullptr, end - begin);
  }

  static void sum_parts(void* context, std::int64_t first, std::int64_t last) {
    Problem& self = *static_cast<Problem*>(context);
    for (std::int64_t i = first; i < last; ++i) {
      Part& part = self.parts[static_cast<std::size_t>(i)];
      part.sums = self.sum(part.begin, part.end);
    }
  }

  const PreferenceSums& at(std::int64_t r) const { return rollout[static_cast<std::size_t>(r)]; }
  double length(std::int64_t r) const { return std::max(at(r).tokens, 1.0); }
  double score(std::int64_t r) const { return rule.mean ? at(r).score / length(r) : at(r).score; }

  // The item's rollouts; -1 where the baseline stands for one.
  std::int64_t side(std::int64_t i, bool chosen) const {
    if (tensors.desirable) return (tensors.desirable->as<unsigned char>()[i] != 0) == chosen ? i : -1;
    const TensorView* index = chosen ? tensors.chosen : tensors.rejected;
    return index ? index->as<std::int64_t>()[i] : (chosen ? i : i + sizes.items);
  }

  void item(std::int64_t i, double* seen) const {
    using At = PreferenceStatistic;
    const std::int64_t c = side(i, true), r = side(i, false);
    const double baseline = tensors.baseline ? static_cast<double>(*of(tensors.baseline)) : 0;
    const double score_c = c < 0 ? baseline : score(c), score_r = r < 0 ? baseline : score(r);
    const double apart = rule.scale * (score_c - score_r);
    const double margin = apart - rule.shift - (tensors.margins ? static_cast<double>(of(tensors.margins)[i]) : 0);
    Linked found;
    if (rule.link == PreferenceLink::odds) {
      found = odds(score_c, score_r, rule.positive);
    } else {
      found = linked(margin, rule, c < 0 ? rule.negative : rule.positive);
      found.chosen *= rule.scale;
      found.rejected = -found.chosen;
    }
    if (rule.centre != 0) {
      const double both = score_c + score_r;
      found.loss += rule.centre * both * both;
      found.chosen += 2 * rule.centre * both;
      found.rejected += 2 * rule.centre * both;
    }
    if (rule.mean) {
      found.chosen /= c < 0 ? 1 : length(c);
      found.rejected /= r < 0 ? 1 : length(r);
    }
    if (rule.nll != 0) {
      const double nll = -at(c).logprob / length(c);
      found.loss += rule.nll * nll;
      found.chosen -= rule.nll / length(c);
      seen[At::nll] += nll;
    }
    tensors.losses.as<T>()[i] = static_cast<T>(found.loss);
    T* derivative = tensors.derivative.as<T>();
    derivative[i] = c < 0 ? 0 : static_cast<T>(found.chosen);
    derivative[i + sizes.items] = r < 0 ? 0 : static_cast<T>(found.rejected);
    seen[At::items] += 1;
    seen[At::margin] += apart;
    seen[At::right] += apart > 0;
    seen[At::chosen] += c >= 0;
    seen[At::rejected] += r >= 0;
    seen[At::chosen_reward] += c < 0 ? 0 : rule.scale * score_c;
    seen[At::rejected_reward] += r < 0 ? 0 : rule.scale * score_r;
  }

  static void link(void* context, std::int64_t first, std::int64_t last) {
    Problem& self = *static_cast<Problem*>(context);
    for (std::int64_t b = first; b < last; ++b)
      for (std::int64_t i = b * block_items; i < std::min((b + 1) * block_items, self.sizes.items); ++i)
        self.item(i, self.blocks[static_cast<std::size_t>(b)].values);
  }

  void run(int threads) {
    rollout.resize(static_cast<std::size_t>(sizes.tokens.count()));
    sum_rollouts(threads);
    for (std::int64_t r = 0; r < sizes.tokens.count(); ++r) tensors.rewards.as<T>()[r] = static_cast<T>(rule.scale * score(r));
    blocks.resize(static_cast<std::size_t>((sizes.items + block_items - 1) / block_items));
    parallel_for(static_cast<std::int64_t>(blocks.size()), blocks_at_once, threads, link, this);
    Statistics total;
    for (const Statistics& block : blocks) total.add(block);
    std::transform(total.values, total.values + PreferenceStatistic::all, tensors.statistics.as<T>(),
                   [](double value) { return static_cast<T>(value); });
  }

  void sum_rollouts(int threads) {
    for (std::int64_t r = 0; r < sizes.tokens.count(); ++r)
      for (std::int64_t i = sizes.tokens.begin(r), end = sizes.tokens.end(r); i < end; i += part_tokens)
        parts.push_back({r, i, std::min(i + part_tokens, end), {}});
    const std::int64_t count = static_cast<std::int64_t>(parts.size());
    parallel_for(count, sizes.tokens.grain(part_tokens), threads, sum_parts, this);
    for (const Part& part : parts) {
      PreferenceSums& total = rollout[static_cast<std::size_t>(part.rollout)];
      total.score += part.sums.score;
      total.logprob += part.sums.logprob;
      total.tokens += part.sums.tokens;
    }
  }
};

// The tokens of each rollout, in a tensor of logprobs' shape.
Segments rollouts_of(const char* function, const TensorView& logprobs, const TensorView* offsets) {
  TensorView rows = logprobs;
  rows.shape[0] = offsets ? 1 : logprobs.shape[0];
  rows.shape[1] = offsets ? logprobs.size() : logprobs.ndim == 2 ? logprobs.shape[1] : 1;
  return segments_of(function, rows, offsets);
}

void check_tokens(const char* function, const char* argument, const TensorView* view, DType dtype,
                  const TensorView& logprobs) {
  if (!view) return;
  if (logprobs.ndim == 2)
    check_dense(function, argument, *view, dtype, Device::cpu, {logprobs.shape[0], logprobs.shape[1]});
  else
    check_dense(function, argument, *view, dtype, Device::cpu, {logprobs.size()});
}

// Every index must name a rollout.
void check_sides(const char* function, const char* argument, const TensorView* view, std::int64_t items,
                 std::int64_t rollouts) {
  if (!view) return;
  check_dense(function, argument, *view, DType::i64, Device::cpu, {items});
  const auto* index = view->as<std::int64_t>();
  for (std::int64_t i = 0; i < items; ++i)
    if (index[i] < 0 || index[i] >= rollouts)
      refuse(function, std::string(argument) + " must name rollouts, 0 to " + std::to_string(rollouts - 1),
             std::to_string(index[i]), "Give the index of a rollout for each pair.");
}

Sizes checked(const cpu::PreferenceTensors& x, const PreferenceRule& rule) {
  const DType dtype = x.logprobs.dtype;
  if (dtype != DType::f32 && dtype != DType::f64)
    refuse(function, "logprobs must be float32 or float64", name(dtype), "Convert them with .float().");
  const std::int64_t items = x.losses.size();
  const auto require = [&](const char* argument, const TensorView* view, DType wanted, std::int64_t size) {
    if (view) check_dense(function, argument, *view, wanted, Device::cpu, {size});
  };
  check_tokens(function, "logprobs", &x.logprobs, dtype, x.logprobs);
  check_tokens(function, "ref_logprobs", x.ref_logprobs, dtype, x.logprobs);
  check_tokens(function, "mask", x.mask, DType::boolean, x.logprobs);
  const Segments tokens = rollouts_of(function, x.logprobs, x.offsets);
  const std::int64_t rollouts = tokens.count();
  check_sides(function, "chosen", x.chosen, items, rollouts);
  check_sides(function, "rejected", x.rejected, items, rollouts);
  require("margins", x.margins, dtype, items);
  require("desirable", x.desirable, DType::boolean, rollouts);
  require("baseline", x.baseline, dtype, 1);
  require("losses", &x.losses, dtype, items);
  require("rewards", &x.rewards, dtype, rollouts);
  check_dense(function, "derivative", x.derivative, dtype, Device::cpu, {2, items});
  require("statistics", &x.statistics, dtype, PreferenceStatistic::all);
  const bool halves = !x.desirable && !x.chosen && !x.rejected;
  if (halves ? rollouts != 2 * items : x.desirable ? items != rollouts : !x.chosen || !x.rejected)
    refuse(function, "chosen and rejected must be given together, or two rollouts for each pair",
           std::to_string(rollouts) + " rollouts for " + std::to_string(items) + " losses", "See kernels/preference_loss.");
  if (rule.nll != 0 && x.desirable)
    refuse(function, "nll must be 0 for rollouts without a pair", std::to_string(rule.nll), "Leave it out.");
  return {tokens, items};
}

template <class T>
struct Gradient {
  const cpu::PreferenceGradient& tensors;
  const Segments tokens;
  std::vector<double> rollout;

  void add(const TensorView* index, std::int64_t other, const T* derivative) {
    const T* g = tensors.g.as<T>();
    for (std::int64_t i = 0; i < tensors.g.size(); ++i) {
      const std::int64_t r = index ? index->as<std::int64_t>()[i] : i + other;
      rollout[static_cast<std::size_t>(r)] += static_cast<double>(g[i]) * static_cast<double>(derivative[i]);
    }
  }

  static void spread(void* context, std::int64_t first, std::int64_t last) {
    const Gradient& self = *static_cast<Gradient*>(context);
    const unsigned char* mask = self.tensors.mask ? self.tensors.mask->as<unsigned char>() : nullptr;
    T* out = self.tensors.out.as<T>();
    for (std::int64_t r = first; r < last; ++r) {
      const T value = static_cast<T>(self.rollout[static_cast<std::size_t>(r)]);
      const std::int64_t begin = self.tokens.begin(r), end = self.tokens.end(r);
      if (mask)
        for (std::int64_t t = begin; t < end; ++t) out[t] = mask[t] ? value : T(0);
      else
        std::fill(out + begin, out + end, value);
    }
  }

  void run(int threads) {
    const std::int64_t items = tensors.g.size();
    const T* derivative = tensors.derivative.as<T>();
    rollout.resize(static_cast<std::size_t>(tokens.count()));
    add(tensors.chosen, 0, derivative);
    add(tensors.rejected, tensors.paired ? items : 0, derivative + items);
    parallel_for(tokens.count(), tokens.grain(part_tokens), threads, spread, this);
  }
};

// The tokens of each rollout; without offsets one each.
Segments checked(const cpu::PreferenceGradient& x) {
  constexpr const char* function = "preference_gradient";
  const DType dtype = x.out.dtype;
  if (dtype != DType::f32 && dtype != DType::f64)
    refuse(function, "out must be float32 or float64", name(dtype), "Convert it with .float().");
  const std::int64_t items = x.g.size();
  check_tokens(function, "out", &x.out, dtype, x.out);
  check_tokens(function, "mask", x.mask, DType::boolean, x.out);
  check_dense(function, "g", x.g, dtype, Device::cpu, {items});
  check_dense(function, "derivative", x.derivative, dtype, Device::cpu, {2, items});
  const Segments tokens = rollouts_of(function, x.out, x.offsets);
  check_sides(function, "chosen", x.chosen, items, tokens.count());
  check_sides(function, "rejected", x.rejected, items, tokens.count());
  if (!x.chosen != !x.rejected || (!x.chosen && tokens.count() != (x.paired ? 2 * items : items)))
    refuse(function, "chosen and rejected must be given together, or g for all rollouts",
           std::to_string(items) + " for " + std::to_string(tokens.count()), "See kernels/preference_loss.");
  return tokens;
}

}  // namespace

namespace cpu {

void preference_loss(const PreferenceTensors& tensors, const PreferenceRule& rule, int threads) {
  const Sizes sizes = checked(tensors, rule);
  if (tensors.logprobs.dtype == DType::f64)
    Problem<double>{tensors, rule, sizes, {}, {}, {}}.run(threads);
  else
    Problem<float>{tensors, rule, sizes, {}, {}, {}}.run(threads);
}

void preference_gradient(const PreferenceGradient& tensors, int threads) {
  const Segments tokens = checked(tensors);
  if (tensors.out.dtype == DType::f64)
    Gradient<double>{tensors, tokens, {}}.run(threads);
  else
    Gradient<float>{tensors, tokens, {}}.run(threads);
}

}  // namespace cpu
}  // namespace fuserl
