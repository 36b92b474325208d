// Advantages within ragged groups, in one launch, without atomics. A warp per rollout: it leaves if an earlier rollout
// is of its group, which the first look back tells where groups are contiguous; a group's first rollout walks over the
// batch and writes the whole group. So the work is (number of groups) x B, in a fixed order.
#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"
#include "cuda/device.cuh"
#include "cuda/reduce.cuh"
#include "ops.h"

namespace fuserl::cuda {
namespace {

constexpr const char* function = "group_advantage";
constexpr int warps_per_block = 8;

struct Rule {
  Baseline baseline;
  Scale scale;
  int ddof;
  double eps;
};

struct Moments {
  double count, sum, mean, std;
  bool spread;
};

struct Everyone {
  __device__ bool operator()(int) const { return true; }
};

struct Members {
  const std::int64_t* group;
  std::int64_t id;
  __device__ bool operator()(int i) const { return group[i] == id; }
};

// Two passes from `first` on: the mean, then the squared deviations from it. Spread is told by comparison, for rounding
// may leave a deviation where all rewards are equal; a NaN counts as spread, for it must show.
template <class T, class Selected>
__device__ Moments moments(const T* __restrict__ rewards, int first, int n, Selected selected, int ddof) {
  int count = 0;
  double sum = 0;
  T least = static_cast<T>(INFINITY), most = static_cast<T>(-INFINITY);
#pragma unroll 4
  for (int i = first + lane(); i < n; i += warp_size) {
    const T r = rewards[i];
    if (!selected(i)) continue;
    ++count;
    sum += static_cast<double>(r);
    least = r < least ? r : least;
    most = r > most ? r : most;
  }
  count = warp_sum(count);
  sum = warp_sum(sum);
  const double mean = sum / count;
  double squares = 0;
#pragma unroll 4
  for (int i = first + lane(); i < n; i += warp_size) {
    const double deviation = static_cast<double>(rewards[i]) - mean;
    if (selected(i)) squares += deviation * deviation;
  }
  const double std = sqrt(warp_sum(squares) / (count - ddof));
  return {static_cast<double>(count), sum, mean, std, warp_min(least) < warp_max(most) || sum != sum};
}

__device__ bool has_earlier_member(const std::int64_t* __restrict__ group, int row, std::int64_t id) {
  constexpr int looks = 4;
  for (int end = row; end > 0; end -= looks * warp_size) {
    bool found = false;
#pragma unroll
    for (int look = 0; look < looks; ++look) {
      const int i = end - 1 - look * warp_size - lane();
      found |= i >= 0 && group[i] == id;
    }
    if (__any_sync(full_warp, found)) return true;
  }
  return false;
}

__device__ double advantage(double r, const Moments& own, const Moments& all, const Rule& rule) {
  const bool within_group = rule.baseline != Baseline::none || rule.scale == Scale::group_std;
  if (within_group && !own.spread) return 0.0;
  if (rule.scale == Scale::batch_std && !all.spread) return 0.0;
  if (rule.baseline == Baseline::mean) r -= own.mean;
  if (rule.baseline == Baseline::leave_one_out) r -= (own.sum - r) / (own.count - 1.0);
  if (rule.scale == Scale::group_std) r /= own.std + rule.eps;
  if (rule.scale == Scale::batch_std) r /= all.std + rule.eps;
  return r;
}

template <class T>
__global__ void __launch_bounds__(warps_per_block* warp_size)
    group_advantage_kernel(const T* __restrict__ rewards, const std::int64_t* __restrict__ group, T* __restrict__ out,
                           int n, Rule rule) {
  const int row = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / warp_size);
  if (row >= n) return;
  const std::int64_t id = group[row];
  if (id < 0 || id >= n) {
    if (lane() == 0) out[row] = static_cast<T>(NAN);
    return;
  }
  if (has_earlier_member(group, row, id)) return;
  const Members members{group, id};
  const Moments own = moments(rewards, row, n, members, rule.ddof);
  const Moments all = rule.scale == Scale::batch_std ? moments(rewards, 0, n, Everyone{}, rule.ddof) : own;
  for (int i = row + lane(); i < n; i += warp_size)
    if (members(i)) out[i] = static_cast<T>(advantage(static_cast<double>(rewards[i]), own, all, rule));
}

void check(const TensorView& rewards, const TensorView& group, const TensorView& out, int ddof, double eps) {
  if (rewards.dtype != DType::f32 && rewards.dtype != DType::f64)
    refuse(function, "rewards must be float32 or float64", name(rewards.dtype), "Convert them with .float().");
  const std::int64_t n = rewards.size();
  check_dense(function, "rewards", rewards, rewards.dtype, Device::cuda, {n});
  check_dense(function, "group", group, DType::i64, Device::cuda, {n});
  check_dense(function, "out", out, rewards.dtype, Device::cuda, {n});
  for (const TensorView* other : {&group, &out})
    if (other->device_index != rewards.device_index)
      refuse(function, "all tensors must be on cuda:" + std::to_string(rewards.device_index),
             "cuda:" + std::to_string(other->device_index), "Move them with .to().");
  if (out.data == rewards.data && n > 0)
    refuse(function, "out must not be rewards", "the same memory", "Warps read what others would have overwritten.");
  if (n > std::numeric_limits<int>::max() / warp_size)
    refuse(function, "rewards must be fewer than 2^26", std::to_string(n), "Split the batch by groups.");
  if (ddof != 0 && ddof != 1) refuse(function, "ddof must be 0 or 1", std::to_string(ddof), "Pass one of them.");
  if (!(eps >= 0)) refuse(function, "eps must be at least 0", std::to_string(eps), "Pass a small positive number.");
}

template <class T>
void launch(const TensorView& rewards, const TensorView& group, const TensorView& out, const Rule& rule,
            cudaStream_t stream) {
  const int n = static_cast<int>(rewards.size());
  const int blocks = (n + warps_per_block - 1) / warps_per_block;
  group_advantage_kernel<T><<<blocks, warps_per_block * warp_size, 0, stream>>>(
      rewards.as<const T>(), group.as<const std::int64_t>(), out.as<T>(), n, rule);
}

}  // namespace

void group_advantage(const TensorView& rewards, const TensorView& group, const TensorView& out, Baseline baseline,
                     Scale scale, int ddof, double eps, void* stream) {
  check(rewards, group, out, ddof, eps);
  if (rewards.size() == 0) return;
  const DeviceGuard guard(function, rewards.device_index);
  const Rule rule{baseline, scale, ddof, eps};
  const auto handle = static_cast<cudaStream_t>(stream);
  if (rewards.dtype == DType::f64)
    launch<double>(rewards, group, out, rule, handle);
  else
    launch<float>(rewards, group, out, rule, handle);
  require(function, cudaGetLastError());
}

}  // namespace fuserl::cuda
