// The ops that look at the members of a group in the order of their rewards.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "groups.h"
#include "ops.h"

namespace fuserl {
namespace {

struct Member {
  double reward;
  std::int64_t rollout;
};

// found(members, n, out) writes a number for each of the n members of a group, the best first. One with a NaN gets NaN.
template <class T, class Found>
void by_group(const TensorView& rewards, const TensorView& group, const TensorView& out, Found found) {
  const std::int64_t n = rewards.size(), *ids = group.as<std::int64_t>();
  std::vector<std::int64_t> end(static_cast<std::size_t>(n) + 1);
  for (std::int64_t i = 0; i < n; ++i) ++end[static_cast<std::size_t>(ids[i])];
  for (std::int64_t g = 0, total = 0; g < n; ++g) {
    total += end[static_cast<std::size_t>(g)];
    end[static_cast<std::size_t>(g)] = total - end[static_cast<std::size_t>(g)];
  }
  std::vector<Member> members(static_cast<std::size_t>(n));
  for (std::int64_t i = 0; i < n; ++i)
    members[static_cast<std::size_t>(end[static_cast<std::size_t>(ids[i])]++)] = {
        static_cast<double>(rewards.as<T>()[i]), i};
  std::vector<double> numbers(static_cast<std::size_t>(n));
  Member* first = members.data();
  for (std::int64_t g = 0; first != members.data() + n; ++g) {
    Member* last = members.data() + end[static_cast<std::size_t>(g)];
    if (std::any_of(first, last, [](const Member& x) { return std::isnan(x.reward); })) {
      std::fill_n(numbers.begin(), last - first, NAN);
    } else {
      std::sort(first, last, [](const Member& a, const Member& b) { return a.reward > b.reward; });
      if (first != last) found(first, last - first, numbers.data());
    }
    for (std::size_t j = 0; first != last; ++j) out.as<T>()[first++->rollout] = static_cast<T>(numbers[j]);
  }
}

// The place after the last member with the reward of the one at `first`.
std::int64_t end_of_ties(const Member* members, std::int64_t n, std::int64_t first) {
  std::int64_t end = first + 1;
  while (end < n && members[end].reward == members[first].reward) ++end;
  return end;
}

void ranks(const Member* members, std::int64_t n, bool best, double* out) {
  for (std::int64_t first = 0, end; first < n; first = end) {
    end = end_of_ties(members, n, first);
    const double worse = static_cast<double>(n - end), ties = static_cast<double>(end - first - 1);
    std::fill(out + first, out + end, n > 1 ? (worse + (best ? ties : ties / 2)) / static_cast<double>(n - 1) : 0.5);
  }
}

// Of a group, its members by falling reward, for the best of `tries` of them; rewards are taken less the best one.
class Best {
 public:
  Best(const Member* members, std::int64_t n, std::int64_t k)
      : members_(members), n_(n), tries_(static_cast<double>(std::min(k, n))) {}

  double below(std::int64_t j) const { return members_[j].reward - members_[0].reward; }

  // Mean over the subsets with a member of the best reward in them.
  void with_it(double* out) const {
    double taken = 0, better = 0, chance = first_other();
    for (std::int64_t first = 0, end; first < n_; first = end) {
      end = end_of_ties(members_, n_, first);
      std::fill(out + first, out + end, better + below(first) * (1 - taken));
      for (std::int64_t j = first; j < end; ++j) {
        better += chance * below(j);
        taken += chance;
        chance *= next_other(j);
      }
    }
  }

  // Mean over the subsets with a member of how far it is above the best of the others, 0 where it is not.
  void lead(double* out) const {
    std::vector<double> chance(static_cast<std::size_t>(n_));  // without the rollout, the worse ones move up by a place
    for (std::int64_t j = 1; j < n_; ++j)
      chance[static_cast<std::size_t>(j)] = j == 1 ? first_other() : chance[static_cast<std::size_t>(j - 1)] * next_other(j - 2);
    double taken = 0, worse = 0;
    for (std::int64_t end = n_, first; end > 0; end = first) {
      first = end - 1;
      while (first > 0 && members_[first - 1].reward == members_[end - 1].reward) --first;
      std::fill(out + first, out + end, below(first) * taken - worse + 0 * below(0));
      for (std::int64_t j = end - 1; j >= first; --j) {
        worse += chance[static_cast<std::size_t>(j)] * below(j);
        taken += chance[static_cast<std::size_t>(j)];
      }
    }
  }

  // Mean over all subsets of the best reward, and its standard deviation.
  double mean() const {
    return over_subsets([&](std::int64_t j) { return below(j); });
  }
  double std(double mean) const {
    return std::sqrt(over_subsets([&](std::int64_t j) { return (below(j) - mean) * (below(j) - mean); }));
  }

  // Standard deviation of the group's rewards.
  double spread() const {
    double sum = 0, squares = 0;
    for (std::int64_t j = 0; j < n_; ++j) sum += below(j);
    const double mean = sum / size();
    for (std::int64_t j = 0; j < n_; ++j) squares += (below(j) - mean) * (below(j) - mean);
    return std::sqrt(squares / std::max(size() - 1, 1.0));
  }

  // What the mean over the subsets without a member lacks to that over all is this much of what those with it have more.
  double leave_one_out(double more) const { return size() > tries_ ? more * size() / (size() - tries_) : 0 * more; }

 private:
  double size() const { return static_cast<double>(n_); }

  // Chances that the member at place 0 is the best of the other tries, and of the next place's as a share of j's.
  double first_other() const { return (tries_ - 1) / std::max(size() - 1, 1.0); }
  double next_other(std::int64_t j) const {
    const double place = static_cast<double>(j);
    return std::max(size() - tries_ - place, 0.0) / std::max(size() - 2 - place, 1.0);
  }

  template <class Value>
  double over_subsets(Value value) const {
    double sum = 0, chance = tries_ / size();
    for (std::int64_t j = 0; j < n_; ++j) {
      sum += chance * value(j);
      const double place = static_cast<double>(j);
      chance *= std::max(size() - tries_ - place, 0.0) / std::max(size() - 1 - place, 1.0);
    }
    return sum;
  }

  const Member* members_;
  const std::int64_t n_;
  const double tries_;
};

void best_of(const Member* members, std::int64_t n, const BestOfRule& rule, double* out) {
  const Best best(members, n, rule.k);
  if (rule.baseline == BestOfBaseline::rest)
    best.lead(out);
  else
    best.with_it(out);
  const double mean = best.mean();
  double scale = 1;
  if (rule.scale == BestOfScale::group) scale = best.spread();
  if (rule.scale == BestOfScale::best) scale = best.std(mean);
  for (std::int64_t j = 0; j < n; ++j) {
    if (rule.baseline == BestOfBaseline::none) out[j] += members[0].reward;
    if (rule.baseline == BestOfBaseline::mean) out[j] -= mean;
    if (rule.baseline == BestOfBaseline::leave_one_out) out[j] = best.leave_one_out(out[j] - mean);
    if (rule.scale != BestOfScale::none) out[j] = scale == 0 ? 0 : out[j] / (scale + rule.eps);
  }
}

void check(const char* function, const TensorView& rewards, const TensorView& group, const TensorView& out) {
  const std::int64_t n = rewards.size();
  if (rewards.dtype != DType::f32 && rewards.dtype != DType::f64)
    refuse(function, "rewards must be float32 or float64", name(rewards.dtype), "Convert them with .float().");
  check_dense(function, "rewards", rewards, rewards.dtype, Device::cpu, {n});
  check_dense(function, "group", group, DType::i64, Device::cpu, {n});
  check_dense(function, "out", out, rewards.dtype, Device::cpu, {n});
  check_ids(function, group);
}

}  // namespace

namespace cpu {

void group_ranks(const TensorView& rewards, const TensorView& group, bool best, const TensorView& out) {
  check("group_ranks", rewards, group, out);
  const auto found = [best](const Member* members, std::int64_t n, double* numbers) { ranks(members, n, best, numbers); };
  if (rewards.dtype == DType::f64) by_group<double>(rewards, group, out, found);
  else by_group<float>(rewards, group, out, found);
}

void pass_at_k_advantage(const TensorView& rewards, const TensorView& group, const BestOfRule& rule,
                         const TensorView& out) {
  check("pass_at_k_advantage", rewards, group, out);
  if (rule.k < 1) refuse("pass_at_k_advantage", "k must be at least 1", std::to_string(rule.k), "Give a number of tries.");
  const auto found = [&](const Member* members, std::int64_t n, double* numbers) { best_of(members, n, rule, numbers); };
  if (rewards.dtype == DType::f64) by_group<double>(rewards, group, out, found);
  else by_group<float>(rewards, group, out, found);
}

}  // namespace cpu
}  // namespace fuserl
