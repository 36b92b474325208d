// Advantages within ragged groups, in one launch, without atomics. A warp per rollout: it leaves if an earlier rollout
// is of its group, which the first look back tells where groups are contiguous; a group's first rollout walks over the
// batch and writes the whole group. So the work is (number of groups) x B, in a fixed order.
#include <algorithm>
#include <cstdint>
#include <limits>

#include "advantage_terms.h"
#include "cuda/device.cuh"
#include "cuda/reduce.cuh"

namespace fuserl::cuda {
namespace {

constexpr const char* function = "group_advantage";
constexpr int most_warps = 8, shared_bytes = 48 << 10;

// What the kernel reads, and the out it writes; null as in AdvantageTensors.
template <class T>
struct Arrays {
  const T* rewards;
  const std::int64_t *group, *rounds;
  const T *weights, *baselines, *scales, *channel_weights;
  T* out;
  int n, channels, members;
};

// The members of one group: those from `first` on, before `last`, that share its group and its round.
template <class T>
struct Members {
  const Arrays<T>& x;
  int first, last;

  __device__ Members(const Arrays<T>& arrays, int row) : x(arrays), first(row), last(arrays.n) {
    if (x.group == nullptr) last = (row / x.members + 1) * x.members;
  }
  __device__ bool operator()(int i) const {
    return (x.group == nullptr || x.group[i] == x.group[first]) &&
           (x.rounds == nullptr || x.rounds[i] == x.rounds[first]);
  }
  __device__ bool any_earlier() const {
    constexpr int looks = 4;
    const int begin = x.group == nullptr ? last - x.members : 0;
    for (int end = first; end > begin; end -= looks * warp_size) {
      bool found = false;
#pragma unroll
      for (int look = 0; look < looks; ++look) {
        const int i = end - 1 - look * warp_size - lane();
        found |= i >= begin && (*this)(i);
      }
      if (__any_sync(full_warp, found)) return true;
    }
    return false;
  }
};

struct Everyone {
  int first, last;
  __device__ bool operator()(int) const { return true; }
};

template <class T>
__device__ double or_number(const T* given, std::int64_t at, double number) {
  return given ? static_cast<double>(given[at]) : number;
}

template <class T, class Selected>
__device__ Moments moments(const Arrays<T>& x, int channel, const Selected& selected, int ddof) {
  Moments m;
#pragma unroll 4
  for (int i = selected.first + lane(); i < selected.last; i += warp_size) {
    const std::int64_t at = static_cast<std::int64_t>(i) * x.channels + channel;
    if (selected(i)) m.add(static_cast<double>(x.rewards[at]), or_number(x.weights, at, 1.0));
  }
  m.weight = warp_sum(m.weight);
  m.weight_sq = warp_sum(m.weight_sq);
  m.sum = warp_sum(m.sum);
  m.least = warp_min(m.least);
  m.most = warp_max(m.most);
  m.set_mean();
#pragma unroll 4
  for (int i = selected.first + lane(); i < selected.last; i += warp_size) {
    const std::int64_t at = static_cast<std::int64_t>(i) * x.channels + channel;
    if (selected(i)) m.add_deviation(static_cast<double>(x.rewards[at]), or_number(x.weights, at, 1.0));
  }
  m.deviation_sq = warp_sum(m.deviation_sq);
  m.set_std(ddof);
  return m;
}

template <class T>
__device__ void write(const Arrays<T>& x, int i, const Moments* own, const Moments* all, const AdvantageRule& rule) {
  double sum = 0;
  for (int c = 0; c < x.channels; ++c) {
    const std::int64_t at = static_cast<std::int64_t>(i) * x.channels + c;
    const Scored scored{static_cast<double>(x.rewards[at]), or_number(x.weights, at, 1.0),
                        or_number(x.baselines, at, rule.given_baseline), or_number(x.scales, at, rule.given_scale)};
    const double found = advantage(scored, own[c], all[c], rule);
    if (x.channel_weights)
      sum += static_cast<double>(x.channel_weights[c]) * found;
    else
      x.out[at] = static_cast<T>(kept(found, rule.keep));
  }
  if (x.channel_weights) x.out[i] = static_cast<T>(kept(sum, rule.keep));
}

template <class T>
__device__ void write_nan(const Arrays<T>& x, int i) {
  const int width = x.channel_weights ? 1 : x.channels;
  for (int c = lane(); c < width; c += warp_size) x.out[static_cast<std::int64_t>(i) * width + c] = static_cast<T>(NAN);
}

// Of one block, so that ptxas gives a thread the 80 registers it needs: for sm_100 it would take 64 and spill.
template <class T>
__global__ void __launch_bounds__(most_warps* warp_size, 1) group_advantage_kernel(Arrays<T> x, AdvantageRule rule) {
  extern __shared__ double shared[];
  Moments* own = reinterpret_cast<Moments*>(shared) + threadIdx.x / warp_size * 2 * x.channels;
  Moments* all = own + x.channels;
  const int row = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / warp_size);
  if (row >= x.n) return;
  if (x.group != nullptr && (x.group[row] < 0 || x.group[row] >= x.n)) return write_nan(x, row);
  const Members<T> members(x, row);
  if (members.any_earlier()) return;
  const bool of_all = rule.scale == Scale::batch_std || rule.baseline == Baseline::batch_mean;
  for (int c = 0; c < x.channels; ++c) {
    const Moments of_group = moments(x, c, members, rule.ddof);
    const Moments of_batch = of_all ? moments(x, c, Everyone{0, x.n}, rule.ddof) : of_group;
    if (lane() == 0) own[c] = of_group, all[c] = of_batch;
  }
  __syncwarp();
  for (int i = members.first + lane(); i < members.last; i += warp_size)
    if (members(i)) write(x, i, own, all, rule);
}

template <class T>
void launch(const AdvantageTensors& tensors, const AdvantageRule& rule, cudaStream_t stream) {
  const int n = static_cast<int>(tensors.rewards.shape[0]), channels = static_cast<int>(channels_of(tensors));
  const auto ids = [](const TensorView* x) { return x ? x->as<const std::int64_t>() : nullptr; };
  const auto data = [](const TensorView* x) { return x ? x->as<const T>() : nullptr; };
  const int bytes = 2 * channels * static_cast<int>(sizeof(Moments)), warps = std::min(most_warps, shared_bytes / bytes);
  group_advantage_kernel<T><<<(n + warps - 1) / warps, warps * warp_size, warps * bytes, stream>>>(
      {data(&tensors.rewards), ids(tensors.group), ids(tensors.rounds), data(tensors.weights), data(tensors.baselines),
       data(tensors.scales), data(tensors.channel_weights), tensors.out.as<T>(), n, channels,
       static_cast<int>(tensors.members)},
      rule);
}

void check(const AdvantageTensors& tensors, const AdvantageRule& rule) {
  check_advantage(tensors, rule, Device::cuda);
  const std::int64_t n = tensors.rewards.shape[0], channels = channels_of(tensors);
  if (n > std::numeric_limits<int>::max() / warp_size)
    refuse(function, "rewards must be fewer than 2^26", std::to_string(n), "Split the batch by groups.");
  constexpr std::int64_t most = shared_bytes / (2 * sizeof(Moments));
  if (channels > most)
    refuse(function, "channels must be at most " + std::to_string(most), std::to_string(channels), "Split them.");
}

}  // namespace

void group_advantage(const AdvantageTensors& tensors, const AdvantageRule& rule, void* stream) {
  check(tensors, rule);
  if (tensors.rewards.size() == 0) return;
  const DeviceGuard guard(function, tensors.rewards.device_index);
  const auto handle = static_cast<cudaStream_t>(stream);
  if (tensors.rewards.dtype == DType::f64)
    launch<double>(tensors, rule, handle);
  else
    launch<float>(tensors, rule, handle);
  require(function, cudaGetLastError());
}

}  // namespace fuserl::cuda
