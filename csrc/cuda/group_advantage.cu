// Advantages of samples relative to their group (advantage.h), one warp a group.
//
// Each warp leaves the sums of its groups in scratch; one block adds them, always in the same
// order, so equal inputs give equal bits; where the batch scales the advantages, a last launch does.
#include <cuda_runtime.h>

#include "advantage.h"
#include "reduce.cuh"

namespace pyrl::cuda {
namespace {

constexpr int kThreads = 128;  // at 256 ptxas aims at three blocks an SM, and spills
constexpr int kGroupsPerBlock = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 2048;
constexpr int kMergeThreads = 128;

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Least {
  __device__ double operator()(double a, double b) const { return b < a ? b : a; }
};
struct Greatest {
  __device__ double operator()(double a, double b) const { return b > a ? b : a; }
};

// Depends on the shapes only, not on the GPU: so does the order of the sums.
int64_t blocks_for(const GroupAdvantage& b) {
  const int64_t blocks = (b.groups + kGroupsPerBlock - 1) / kGroupsPerBlock;
  return blocks < 1 ? 1 : (blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

__device__ int64_t sample_at(const GroupAdvantage& b, int64_t i) {
  return b.order ? b.order[i] : i;
}

__global__ void __launch_bounds__(kThreads)
    advantage_kernel(GroupAdvantage b, AdvantageSums* partial, double* value) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = blockIdx.x * static_cast<int64_t>(kGroupsPerBlock) + threadIdx.x / kWarp;
  const int64_t stride = gridDim.x * static_cast<int64_t>(kGroupsPerBlock);
  AdvantageSums sums;
  for (int64_t g = warp; g < b.groups; g += stride) {
    const int64_t begin = b.offsets[g], end = b.offsets[g + 1];
    if (begin >= b.samples) break;  // offsets never fall: this group and all after it are empty
    GroupStats group;
    for (int64_t i = begin + lane; i < end; i += kWarp) group.add(b.rewards[sample_at(b, i)]);
    group.sum = warp_reduce(group.sum, Add{});
    group.square_sum = warp_reduce(group.square_sum, Add{});
    group.count = warp_reduce(group.count, Add{});
    group.low = warp_reduce(group.low, Least{});
    group.high = warp_reduce(group.high, Greatest{});

    const double mean = group.first_mean();
    double deviation = 0, squares = 0;
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      const double r = b.rewards[sample_at(b, i)], d = r == r ? r - mean : 0.0;
      deviation += d;
      squares += d * d;
    }
    group.refine(b, warp_reduce(deviation, Add{}), warp_reduce(squares, Add{}));

    const bool filtered = group.filtered(b.filters);
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      const int64_t sample = sample_at(b, i);
      write_sample(b, group, filtered, sample, b.rewards[sample], value);
    }
    sums.add(b, group, static_cast<double>(end - begin));
  }
  if (lane == 0) partial[warp] = sums;
}

__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(GroupAdvantage b, const AdvantageSums* partial, int64_t rows, BatchScale* scaled) {
  __shared__ double storage[kMergeThreads * sizeof(AdvantageSums) / sizeof(double)];
  AdvantageSums* sums = reinterpret_cast<AdvantageSums*>(storage);
  AdvantageSums mine;
  for (int64_t row = threadIdx.x; row < rows; row += kMergeThreads) mine.merge(partial[row]);
  sums[threadIdx.x] = mine;
  for (int half = kMergeThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x].merge(sums[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) {
    sums[0].write(b.metrics);
    *scaled = BatchScale::of(b, sums[0].batch);
  }
}

__global__ void __launch_bounds__(kThreads)
    scale_kernel(GroupAdvantage b, const double* value, const BatchScale* scaled) {
  const BatchScale scale = *scaled;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < b.samples;
       i += stride) {
    b.advantages[i] = scale(value[i]);
  }
}

constexpr int64_t kRow = sizeof(AdvantageSums) / sizeof(double);
constexpr int64_t kScale = sizeof(BatchScale) / sizeof(double);

}  // namespace

int64_t group_advantage_scratch(const GroupAdvantage& batch) {
  return blocks_for(batch) * kGroupsPerBlock * kRow + kScale +
         (needs_batch(batch.method) ? batch.samples : 0);
}

int group_advantage(const GroupAdvantage& batch, double* scratch, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const int64_t blocks = blocks_for(batch), rows = blocks * kGroupsPerBlock;
  auto* partial = reinterpret_cast<AdvantageSums*>(scratch);
  auto* scaled = reinterpret_cast<BatchScale*>(scratch + rows * kRow);
  double* value = scratch + rows * kRow + kScale;
  advantage_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, on>>>(batch, partial, value);
  if (const cudaError_t error = cudaGetLastError()) return error;
  merge_kernel<<<1, kMergeThreads, 0, on>>>(batch, partial, rows, scaled);
  if (const cudaError_t error = cudaGetLastError()) return error;
  if (needs_batch(batch.method) && batch.samples > 0) {
    const int64_t wanted = (batch.samples + kThreads - 1) / kThreads;
    scale_kernel<<<static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks), kThreads, 0,
                   on>>>(batch, value, scaled);
  }
  return cudaGetLastError();
}

}  // namespace pyrl::cuda
