// objective.h over a batch of tokens in one launch, with no wait for the host.
//
// Blocks leave their sums in scratch; the block that finishes last adds them, always in the same
// order, so equal inputs give equal bits. "Last" comes from a ticket counter that wraps to 0 by
// itself: no launch to clear it.
#include <cuda_runtime.h>

#include <atomic>

#include "kernels.h"
#include "objective.h"
#include "reduce.cuh"

namespace pyrl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTokensPerThread = 4;
constexpr int64_t kMaxBlocks = 1024;

// Launches that run at the same time (several streams) need counters of their own.
constexpr unsigned kTickets = 4096;
__device__ unsigned tickets[kTickets];

// Depends on T only, not on the GPU: so does the order of the sums.
int64_t blocks_for(int64_t tokens) {
  const int64_t per_block = kThreads * kTokensPerThread;
  const int64_t blocks = (tokens + per_block - 1) / per_block;
  return blocks < 1 ? 1 : (blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

struct MergeMetric {
  int metric;
  __device__ double operator()(double a, double b) const { return merge_metric(metric, a, b); }
};

__global__ void __launch_bounds__(kThreads)
    objective_kernel(ObjectiveBatch b, ObjectiveParams params, double* partial, unsigned slot) {
  ObjectiveSums sums;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < b.tokens;
       i += stride) {
    TokenGradient gradient{0.0, 0.0};
    if (b.keep[i]) {
      const Token token{b.logprob[i],
                        b.entropy ? b.entropy[i] : 0.0,
                        b.old ? b.old[i] : 0.0,
                        b.ref ? b.ref[i] : 0.0,
                        b.advantage[i],
                        b.weight[i],
                        b.entropy != nullptr,
                        b.old != nullptr,
                        b.ref != nullptr};
      gradient = objective_token(params, token, sums);
    }
    b.c[i] = static_cast<float>(gradient.c);
    b.h[i] = static_cast<float>(gradient.h);
  }

  __shared__ double per_warp[kWarps][kMetrics];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < kMetrics; ++i) {
    const double total = warp_reduce(sums.value[i], MergeMetric{i});
    if (lane == 0) per_warp[warp][i] = total;
  }
  __syncthreads();
  if (threadIdx.x < kMetrics) {
    double total = per_warp[0][threadIdx.x];
    for (int w = 1; w < kWarps; ++w) {
      total = merge_metric(threadIdx.x, total, per_warp[w][threadIdx.x]);
    }
    partial[static_cast<int64_t>(blockIdx.x) * kMetrics + threadIdx.x] = total;
    __threadfence();  // seen by the last block before this block's ticket is
  }
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(&tickets[slot], gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;

  __threadfence();
  __shared__ double totals[kMetrics];
  for (int i = warp; i < kMetrics; i += kWarps) {
    double total = empty_metric(i);
    for (unsigned block = lane; block < gridDim.x; block += kWarp) {
      // Past L1, which may hold nothing newer than this block's own writes.
      total = merge_metric(i, total, __ldcg(partial + static_cast<int64_t>(block) * kMetrics + i));
    }
    total = warp_reduce(total, MergeMetric{i});
    if (lane == 0) b.metrics[i] = totals[i] = total;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    *b.loss = static_cast<float>(totals[kPolicyLoss] + totals[kKlLoss] + totals[kEntropyLoss]);
  }
}

}  // namespace

int64_t policy_objective_scratch(int64_t tokens) { return blocks_for(tokens) * kMetrics; }

int policy_objective(const ObjectiveBatch& batch, const double* params, double* scratch,
                     void* stream) {
  static std::atomic<unsigned> launches{0};
  const unsigned slot = launches.fetch_add(1, std::memory_order_relaxed) % kTickets;
  objective_kernel<<<static_cast<unsigned>(blocks_for(batch.tokens)), kThreads, 0,
                     static_cast<cudaStream_t>(stream)>>>(batch, ObjectiveParams::from(params),
                                                          scratch, slot);
  return cudaGetLastError();
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pyrl::cuda
