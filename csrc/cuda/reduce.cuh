// Reductions over the 32 lanes of a warp. Butterflies: every lane ends with the same bits, whatever the schedule.
#pragma once

namespace fuserl::cuda {

constexpr int warp_size = 32;
constexpr unsigned full_warp = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % warp_size; }

template <class T, class Combine>
__device__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2)
    value = combine(value, __shfl_xor_sync(full_warp, value, distance));
  return value;
}

template <class T>
__device__ T warp_sum(T value) {
  return warp_reduce(value, [](T a, T b) { return a + b; });
}

template <class T>
__device__ T warp_min(T value) {
  return warp_reduce(value, [](T a, T b) { return b < a ? b : a; });
}

template <class T>
__device__ T warp_max(T value) {
  return warp_reduce(value, [](T a, T b) { return b > a ? b : a; });
}

}  // namespace fuserl::cuda
