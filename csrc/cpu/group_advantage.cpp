#include <algorithm>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "advantage_terms.h"
#include "groups.h"

namespace fuserl {
namespace {

// Which group each rollout is of, numbered below the number of rollouts.
class Membership {
 public:
  Membership(const AdvantageTensors& tensors, std::int64_t n) {
    if (tensors.group != nullptr && tensors.rounds == nullptr) {
      ids_ = tensors.group->as<std::int64_t>();
    } else {
      own_.resize(static_cast<std::size_t>(n));
      if (tensors.rounds == nullptr)
        for (std::int64_t i = 0; i < n; ++i) own_[static_cast<std::size_t>(i)] = i / tensors.members;
      else
        number(tensors, n);
      ids_ = own_.data();
    }
    groups_ = n ? static_cast<std::size_t>(*std::max_element(ids_, ids_ + n)) + 1 : 0;
  }
  std::size_t operator[](std::int64_t i) const { return static_cast<std::size_t>(ids_[i]); }
  std::size_t groups() const { return groups_; }

 private:
  // Pairs of group and round, in their order.
  void number(const AdvantageTensors& tensors, std::int64_t n) {
    const std::int64_t* rounds = tensors.rounds->as<std::int64_t>();
    const auto key = [&](std::int64_t i) {
      return std::pair(tensors.group ? tensors.group->as<std::int64_t>()[i] : i / tensors.members, rounds[i]);
    };
    std::vector<std::int64_t> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return key(a) < key(b); });
    std::int64_t id = 0;
    for (std::size_t at = 0; at < order.size(); ++at) {
      id += at > 0 && key(order[at - 1]) < key(order[at]);
      own_[static_cast<std::size_t>(order[at])] = id;
    }
  }

  std::vector<std::int64_t> own_;
  const std::int64_t* ids_ = nullptr;
  std::size_t groups_ = 0;
};

struct Statistics {
  std::vector<Moments> groups;
  Moments all;  // only when asked for: its sums are one long chain of dependent additions

  // `reward` and `weight` tell them of a rollout. Passes go in the order of the rollouts.
  template <class Reward, class Weight>
  Statistics(Reward reward, Weight weight, const Membership& member, std::int64_t n, bool of_all, int ddof)
      : groups(member.groups()) {
    for (std::int64_t i = 0; i < n; ++i) {
      groups[member[i]].add(reward(i), weight(i));
      if (of_all) all.add(reward(i), weight(i));
    }
    for (Moments& m : groups) m.set_mean();
    all.set_mean();
    for (std::int64_t i = 0; i < n; ++i) {
      groups[member[i]].add_deviation(reward(i), weight(i));
      if (of_all) all.add_deviation(reward(i), weight(i));
    }
    for (Moments& m : groups) m.set_std(ddof);
    all.set_std(ddof);
  }
};

template <class T>
void advantages(const AdvantageTensors& tensors, const AdvantageRule& rule) {
  const std::int64_t n = tensors.rewards.shape[0], channels = channels_of(tensors);
  const auto data = [](const TensorView* x) { return x ? x->as<const T>() : nullptr; };
  const T *rewards = data(&tensors.rewards), *weights = data(tensors.weights), *mix = data(tensors.channel_weights);
  const T *baselines = data(tensors.baselines), *scales = data(tensors.scales);
  T* out = tensors.out.as<T>();
  const bool of_all = rule.scale == Scale::batch_std || rule.baseline == Baseline::batch_mean;
  const Membership member(tensors, n);

  std::vector<double> sums(mix ? static_cast<std::size_t>(n) : 0);
  for (std::int64_t c = 0; c < channels; ++c) {
    const auto reward = [&](std::int64_t i) { return static_cast<double>(rewards[i * channels + c]); };
    const auto weight = [&](std::int64_t i) { return static_cast<double>(weights[i * channels + c]); };
    const auto one = [](std::int64_t) { return 1.0; };
    const Statistics statistics = weights ? Statistics(reward, weight, member, n, of_all, rule.ddof)
                                          : Statistics(reward, one, member, n, of_all, rule.ddof);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t at = i * channels + c;
      const Scored x{reward(i), weights ? weight(i) : 1.0, baselines ? baselines[at] : rule.given_baseline,
                     scales ? scales[at] : rule.given_scale};
      const double found = advantage(x, statistics.groups[member[i]], statistics.all, rule);
      if (mix)
        sums[static_cast<std::size_t>(i)] += static_cast<double>(mix[c]) * found;
      else
        out[at] = static_cast<T>(kept(found, rule.keep));
    }
  }
  for (std::size_t i = 0; i < sums.size(); ++i) out[i] = static_cast<T>(kept(sums[i], rule.keep));
}

template <class T>
void check_weights(const TensorView& weights) {
  for (std::int64_t i = 0; i < weights.size(); ++i)
    if (const double w = static_cast<double>(weights.as<T>()[i]); !(w >= 0))
      refuse("group_advantage", "weights must be at least 0", std::to_string(w) + " at index " + std::to_string(i),
             "Use 0 to leave a rollout out.");
}

}  // namespace

namespace cpu {

void group_advantage(const AdvantageTensors& tensors, const AdvantageRule& rule) {
  check_advantage(tensors, rule, Device::cpu);
  const bool wide = tensors.rewards.dtype == DType::f64;
  if (tensors.group) check_ids("group_advantage", *tensors.group);
  if (tensors.weights) wide ? check_weights<double>(*tensors.weights) : check_weights<float>(*tensors.weights);
  wide ? advantages<double>(tensors, rule) : advantages<float>(tensors, rule);
}

}  // namespace cpu
}  // namespace fuserl
