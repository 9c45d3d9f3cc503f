// Sums over a warp; every lane ends with the result, in an order that never changes.
#pragma once

namespace pyrl::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T, class Merge>
__device__ __forceinline__ T warp_reduce(T value, Merge merge) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) {
    value = merge(value, __shfl_xor_sync(kAllLanes, value, lane));
  }
  return value;
}

}  // namespace pyrl::cuda
