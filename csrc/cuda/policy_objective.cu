// objective.h over a batch in one launch, with no wait for the host.
//
// Without bounds the threads of all blocks share the tokens. With bounds a block works one sequence
// after another, each in the three sweeps of objective.h.
//
// Blocks leave their sums in scratch; the block that finishes last adds them, always in the same
// order, so equal inputs give equal bits. "Last" comes from a ticket counter that wraps to 0 by
// itself: no launch to clear it.
#include "objective.h"

#include <cuda_runtime.h>

#include <atomic>

#include "kernels.h"
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

// Depends on T and B only, not on the GPU: so does the order of the sums.
int64_t blocks_for(const ObjectiveBatch& b) {
  const int64_t per_block = kThreads * kTokensPerThread;
  const int64_t blocks = b.bounds ? b.sequences : (b.tokens + per_block - 1) / per_block;
  return blocks < 1 ? 1 : (blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

struct MergeMetric {
  int metric;
  __device__ double operator()(double a, double b) const { return merge_metric(metric, a, b); }
};
struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};

// Each of the block's `kCount` sums over its threads; every thread ends with all of them.
template <int kCount>
__device__ void block_sum(double (&value)[kCount]) {
  __shared__ double per_warp[kWarps][kCount];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const double total = warp_reduce(value[i], Add{});
    if (lane == 0) per_warp[warp][i] = total;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = per_warp[0][i];
    for (int w = 1; w < kWarps; ++w) value[i] += per_warp[w][i];
  }
  __syncthreads();  // read by all before the next call writes
}

// The block's sums to scratch; in the last block, all blocks' sums to the loss and the metrics.
__device__ void finish(const ObjectiveSums& sums, const ObjectiveBatch& b, double* partial,
                       unsigned slot) {
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
  if (threadIdx.x == 0) *b.loss = static_cast<float>(total_loss(totals));
}

__global__ void __launch_bounds__(kThreads)
    token_kernel(ObjectiveBatch b, ObjectiveParams p, double* partial, unsigned slot) {
  ObjectiveSums sums;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < b.tokens;
       i += stride) {
    objective_at(p, b, i, Sequence(), sums);
  }
  finish(sums, b, partial, slot);
}

// The first two sweeps over tokens [begin, end): every thread gets the whole sequence's.
__device__ Sequence sequence_of(const ObjectiveParams& p, const ObjectiveBatch& b, int64_t begin,
                                int64_t end) {
  SequenceSums mine;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) mine.add(p, b, i);
  block_sum(mine.value);
  Sequence sequence(p, mine);
  if (p.shares_ratio()) {
    double through[1] = {0.0};
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      through[0] += objective_through(p, b, i, sequence);
    }
    block_sum(through);
    sequence.through = through[0];
  }
  return sequence;
}

__global__ void __launch_bounds__(kThreads)
    sequence_kernel(ObjectiveBatch b, ObjectiveParams p, double* partial, unsigned slot) {
  ObjectiveSums sums;
  for (int64_t s = blockIdx.x; s < b.sequences; s += gridDim.x) {
    // Bounds on a GPU are not checked, which would wait for it; they must not lead outside.
    const int64_t first = b.bounds[s], past = b.bounds[s + 1];
    const int64_t begin = first < 0 ? 0 : first, end = past > b.tokens ? b.tokens : past;
    const Sequence sequence = sequence_of(p, b, begin, end);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      objective_at(p, b, i, sequence, sums);
    }
  }
  finish(sums, b, partial, slot);
}

}  // namespace

int64_t policy_objective_scratch(const ObjectiveBatch& batch) {
  return blocks_for(batch) * kMetrics;
}

int policy_objective(const ObjectiveBatch& batch, const double* params, double* scratch,
                     void* stream) {
  static std::atomic<unsigned> launches{0};
  const unsigned slot = launches.fetch_add(1, std::memory_order_relaxed) % kTickets;
  const auto kernel = batch.bounds ? sequence_kernel : token_kernel;
  kernel<<<static_cast<unsigned>(blocks_for(batch)), kThreads, 0,
           static_cast<cudaStream_t>(stream)>>>(batch, ObjectiveParams::from(params), scratch,
                                                slot);
  return cudaGetLastError();
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pyrl::cuda
