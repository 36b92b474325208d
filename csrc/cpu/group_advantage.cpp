#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "ops.h"

namespace fuserl {
namespace {

// Two passes, in the order of the rollouts: the mean first, then the squared deviations from it.
struct Moments {
  std::int64_t count = 0;
  double sum = 0, squares = 0, mean = 0, std = 0;
  double min = std::numeric_limits<double>::infinity(), max = -std::numeric_limits<double>::infinity();

  void add(double r) {
    ++count;
    sum += r;
    min = r < min ? r : min;
    max = r > max ? r : max;
  }
  void add_deviation(double r) { squares += (r - mean) * (r - mean); }
  void set_mean() { mean = sum / static_cast<double>(count); }
  void set_std(int ddof) { std = std::sqrt(squares / static_cast<double>(count - ddof)); }
  double mean_without(double r) const { return (sum - r) / static_cast<double>(count - 1); }
  // By comparison, for rounding may leave a deviation where all rewards are equal. A NaN is spread: it must show.
  bool spread() const { return min < max || std::isnan(sum); }
};

struct Statistics {
  std::vector<Moments> groups;
  Moments all;  // only when asked for: its sums are one long chain of dependent additions

  template <class T>
  Statistics(const T* rewards, const std::int64_t* group, std::int64_t n, bool of_all, int ddof) : of_all_(of_all) {
    groups.resize(n ? static_cast<std::size_t>(*std::max_element(group, group + n)) + 1 : 0);
    for (std::int64_t i = 0; i < n; ++i) both(group[i], [&](Moments& m) { m.add(static_cast<double>(rewards[i])); });
    each([](Moments& m) { m.set_mean(); });
    for (std::int64_t i = 0; i < n; ++i)
      both(group[i], [&](Moments& m) { m.add_deviation(static_cast<double>(rewards[i])); });
    each([&](Moments& m) { m.set_std(ddof); });
  }

 private:
  template <class F>
  void both(std::int64_t id, F&& f) {
    f(groups[static_cast<std::size_t>(id)]);
    if (of_all_) f(all);
  }
  template <class F>
  void each(F&& f) {
    for (Moments& m : groups) f(m);
    f(all);
  }

  bool of_all_;
};

template <class T>
void advantages(const T* rewards, const std::int64_t* group, T* out, std::int64_t n, Baseline baseline, Scale scale,
                int ddof, double eps) {
  const Statistics statistics(rewards, group, n, scale == Scale::batch_std, ddof);
  const Moments& all = statistics.all;
  const bool within_group = baseline != Baseline::none || scale == Scale::group_std;
  for (std::int64_t i = 0; i < n; ++i) {
    const Moments& own = statistics.groups[static_cast<std::size_t>(group[i])];
    const bool spread = (!within_group || own.spread()) && (scale != Scale::batch_std || all.spread());
    double r = static_cast<double>(rewards[i]);
    if (baseline == Baseline::mean) r -= own.mean;
    if (baseline == Baseline::leave_one_out) r -= own.mean_without(r);
    if (scale == Scale::group_std) r /= own.std + eps;
    if (scale == Scale::batch_std) r /= all.std + eps;
    out[i] = spread ? static_cast<T>(r) : T(0);
  }
}

void check(const TensorView& rewards, const TensorView& group, const TensorView& out, int ddof, double eps) {
  constexpr const char* function = "group_advantage";
  if (rewards.dtype != DType::f32 && rewards.dtype != DType::f64)
    refuse(function, "rewards must be float32 or float64", name(rewards.dtype), "Convert them with .float().");
  const std::int64_t n = rewards.size();
  check_dense(function, "rewards", rewards, rewards.dtype, Device::cpu, {n});
  check_dense(function, "group", group, DType::i64, Device::cpu, {n});
  check_dense(function, "out", out, rewards.dtype, Device::cpu, {n});
  if (ddof != 0 && ddof != 1) refuse(function, "ddof must be 0 or 1", std::to_string(ddof), "Pass one of them.");
  if (!(eps >= 0)) refuse(function, "eps must be at least 0", std::to_string(eps), "Pass a small positive number.");
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t id = group.as<std::int64_t>()[i];
    if (id < 0 || id >= n)
      refuse(function, "group must hold ids in [0, " + std::to_string(n) + ")",
             std::to_string(id) + " at index " + std::to_string(i), "Number the groups from 0.");
  }
}

}  // namespace

namespace cpu {

void group_advantage(const TensorView& rewards, const TensorView& group, const TensorView& out, Baseline baseline,
                     Scale scale, int ddof, double eps) {
  check(rewards, group, out, ddof, eps);
  const std::int64_t n = rewards.size();
  const std::int64_t* ids = group.as<std::int64_t>();
  if (rewards.dtype == DType::f64)
    advantages(rewards.as<double>(), ids, out.as<double>(), n, baseline, scale, ddof, eps);
  else
    advantages(rewards.as<float>(), ids, out.as<float>(), n, baseline, scale, ddof, eps);
}

}  // namespace cpu
}  // namespace fuserl
