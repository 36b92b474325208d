// What an advantage within a group is made of, for CPU and GPU alike; equations: kernels/group_advantage.
#pragma once
#include <cmath>
#include <string>

#include "check.h"
#include "ops.h"

#ifdef __CUDACC__
#define FUSERL_BOTH __host__ __device__
#else
#define FUSERL_BOTH
#endif

namespace fuserl {

// Two passes over the members: add, set_mean; then add_deviation, set_std.
struct Moments {
  double weight = 0, weight_sq = 0, sum = 0, deviation_sq = 0, mean = 0, std = 0;
  double least = INFINITY, most = -INFINITY;

  FUSERL_BOTH void add(double r, double w) {
    if (w == 0) return;
    weight += w;
    weight_sq += w * w;
    sum += w * r;
    least = r < least ? r : least;
    most = r > most ? r : most;
  }
  FUSERL_BOTH void add_deviation(double r, double w) {
    if (w != 0) deviation_sq += w * (r - mean) * (r - mean);
  }
  // Where there is no spread every mean is the one value, to the bit.
  FUSERL_BOTH void set_mean() { mean = spread() ? sum / weight : least; }
  FUSERL_BOTH void set_std(int ddof) { std = sqrt(deviation_sq / (weight - ddof * weight_sq / weight)); }
  FUSERL_BOTH double mean_without(double r, double w) const {
    return spread() ? (sum - (w == 0 ? 0 : w * r)) / (weight - w) : least;
  }
  // By comparison, for rounding may leave a deviation where all rewards are equal. A NaN is spread: it must show.
  FUSERL_BOTH bool spread() const { return least < most || sum != sum; }
};

// One rollout's reward, its weight, and what its baseline and its scale are where they are given.
struct Scored {
  double reward, weight, baseline, scale;
};

FUSERL_BOTH inline double advantage(const Scored& x, const Moments& own, const Moments& all, const AdvantageRule& rule) {
  if (x.weight == 0 && x.reward != x.reward) return 0;
  const double known = rule.baseline == Baseline::batch_mean ? all.weight : own.weight;
  double centre = x.baseline;
  if (rule.baseline == Baseline::mean) centre = own.mean;
  if (rule.baseline == Baseline::leave_one_out) centre = own.mean_without(x.reward, x.weight);
  if (rule.baseline == Baseline::batch_mean) centre = all.mean;
  if (rule.baseline != Baseline::given && known == 0) return 0;
  const double above = x.reward - centre;
  switch (rule.scale) {
    case Scale::group_std: return own.spread() ? above / (own.std + rule.eps) : 0;
    case Scale::batch_std: return all.spread() ? above / (all.std + rule.eps) : 0;
    case Scale::sign: return above > 0 ? 1 : above < 0 ? -1 : above;
    default: return above / x.scale;
  }
}

// NaN is neither: it shows.
FUSERL_BOTH inline double kept(double advantage, Keep keep) {
  if (keep == Keep::positive && advantage < 0) return 0;
  if (keep == Keep::negative && advantage > 0) return 0;
  return advantage;
}

inline std::int64_t channels_of(const AdvantageTensors& tensors) {
  return tensors.rewards.ndim == 2 ? tensors.rewards.shape[1] : 1;
}

// One dtype, one device, and the shapes that csrc/ops.h names.
inline void check_advantage(const AdvantageTensors& tensors, const AdvantageRule& rule, Device device) {
  constexpr const char* function = "group_advantage";
  const TensorView& rewards = tensors.rewards;
  if (rewards.dtype != DType::f32 && rewards.dtype != DType::f64)
    refuse(function, "rewards must be float32 or float64", name(rewards.dtype), "Convert them with .float().");
  if (rewards.ndim != 1 && rewards.ndim != 2)
    refuse(function, "rewards must have shape (B,) or (B, C)", shape_text(rewards), "Reshape them.");
  const std::int64_t n = rewards.shape[0], channels = channels_of(tensors);
  const auto same = [&](const char* argument, const TensorView* x, DType dtype, std::initializer_list<std::int64_t> shape) {
    if (x == nullptr) return;
    check_dense(function, argument, *x, dtype, device, shape);
    if (x->device_index != rewards.device_index)
      refuse(function, std::string(argument) + " must be on cuda:" + std::to_string(rewards.device_index),
             "cuda:" + std::to_string(x->device_index), "Move it with .to().");
  };
  const auto as_rewards = [&](const char* argument, const TensorView* x) {
    if (rewards.ndim == 1) same(argument, x, rewards.dtype, {n});
    else same(argument, x, rewards.dtype, {n, channels});
  };
  as_rewards("rewards", &rewards);
  as_rewards("weights", tensors.weights);
  as_rewards("baselines", tensors.baselines);
  as_rewards("scales", tensors.scales);
  same("group", tensors.group, DType::i64, {n});
  same("rounds", tensors.rounds, DType::i64, {n});
  same("channel_weights", tensors.channel_weights, rewards.dtype, {channels});
  if (tensors.channel_weights == nullptr) as_rewards("out", &tensors.out);
  else same("out", &tensors.out, rewards.dtype, {n});
  if (tensors.group == nullptr && (tensors.members < 1 || n % tensors.members != 0) && n > 0)
    refuse(function, "members must divide the number of rewards", std::to_string(tensors.members),
           "Give the size of a group, or give group.");
  if (tensors.out.data == rewards.data && n > 0)
    refuse(function, "out must not be rewards", "the same memory", "A reward is read after advantages are written.");
  if (rule.ddof != 0 && rule.ddof != 1)
    refuse(function, "ddof must be 0 or 1", std::to_string(rule.ddof), "Pass one of them.");
  if (!(rule.eps >= 0))
    refuse(function, "eps must be at least 0", std::to_string(rule.eps), "Pass a small positive number.");
}

}  // namespace fuserl
