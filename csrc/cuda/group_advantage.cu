// Advantages of samples relative to their group (advantage.h), one warp a group, one launch.
#include <cuda_runtime.h>

#include "advantage.h"
#include "reduce.cuh"

namespace pyrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kGroupsPerBlock = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 4096;

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const { return a + b; }
};
struct Least {
  __device__ float operator()(float a, float b) const { return b < a ? b : a; }
};
struct Greatest {
  __device__ float operator()(float a, float b) const { return b > a ? b : a; }
};

__global__ void __launch_bounds__(kThreads) advantage_kernel(GroupAdvantage b) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = gridDim.x * kGroupsPerBlock;
  for (int64_t g = blockIdx.x * kGroupsPerBlock + threadIdx.x / kWarp; g < b.samples; g += stride) {
    const int64_t begin = b.offsets[g], end = b.offsets[g + 1];
    if (begin >= b.samples) break;  // offsets never fall: this group and all after it are empty
    GroupStats group;
    for (int64_t i = begin + lane; i < end; i += kWarp) group.add(b.rewards[b.order[i]]);
    group.sum = warp_reduce(group.sum, Add{});
    group.count = warp_reduce(static_cast<long long>(group.count), Add{});
    group.low = warp_reduce(group.low, Least{});
    group.high = warp_reduce(group.high, Greatest{});

    const double mean = group.mean();
    double squares = 0;
    if (b.method == kGrpo) {
      for (int64_t i = begin + lane; i < end; i += kWarp) {
        const double r = b.rewards[b.order[i]];
        if (r == r) squares += (r - mean) * (r - mean);
      }
      squares = warp_reduce(squares, Add{});
    }
    const double std = group_std(group, squares, b.unbiased);
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      const int64_t sample = b.order[i];
      const float r = b.rewards[sample];
      const bool scored = r == r;
      b.advantages[sample] =
          scored ? static_cast<float>(advantage_of(r, group, b.method, std, b.eps)) : 0.0f;
      b.low[sample] = scored ? group.low : nanf("");
      b.high[sample] = scored ? group.high : nanf("");
    }
  }
}

}  // namespace

int group_advantage(const GroupAdvantage& batch, void* stream) {
  if (batch.samples == 0) return cudaSuccess;
  const int64_t blocks = (batch.samples + kGroupsPerBlock - 1) / kGroupsPerBlock;
  advantage_kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0,
                     static_cast<cudaStream_t>(stream)>>>(batch);
  return cudaGetLastError();
}

}  // namespace pyrl::cuda
