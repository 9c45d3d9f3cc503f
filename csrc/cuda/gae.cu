// Generalised advantage estimation, one warp a sequence, in one launch.
//
// With u = gamma V + gamma lam A of the kept token after t (gamma bootstrap after the last one),
// A_t = r_t - V_t + u and the token before sees gamma lam u + gamma (1 - lam) V_t + gamma lam r_t:
// maps u -> c u + d, which a warp composes for 32 tokens at a time. An unkept token is the identity.
#include <cuda_runtime.h>

#include "kernels.h"
#include "reduce.cuh"

namespace pyrl::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kSequencesPerBlock = kThreads / kWarp;
constexpr int64_t kMaxBlocks = 1 << 16;

__global__ void __launch_bounds__(kThreads) gae_kernel(Gae b) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = gridDim.x * static_cast<int64_t>(kSequencesPerBlock);
  for (int64_t s = blockIdx.x * static_cast<int64_t>(kSequencesPerBlock) + threadIdx.x / kWarp;
       s < b.sequences; s += stride) {
    const int64_t begin = b.bounds[s];
    double carry = b.gamma * b.bootstrap[s];  // u of the tokens after `top`
    for (int64_t top = b.bounds[s + 1]; top > begin; top -= kWarp) {
      const int64_t t = top - 1 - lane;  // lane 0 has the last token
      const bool inside = t >= begin, kept = inside && b.keep[t];
      const double r = kept ? b.rewards[t] : 0.0, v = kept ? b.values[t] : 0.0;
      double c = kept ? b.gamma * b.lam : 1.0;
      double d = kept ? b.gamma * (1 - b.lam) * v + b.gamma * b.lam * r : 0.0;
#pragma unroll
      for (int back = 1; back < kWarp; back *= 2) {
        const double c_later = __shfl_up_sync(kAllLanes, c, back);
        const double d_later = __shfl_up_sync(kAllLanes, d, back);
        if (lane >= back) {
          d += c * d_later;
          c *= c_later;
        }
      }
      const double after = c * carry + d;
      const double neighbour = __shfl_up_sync(kAllLanes, after, 1);
      const double u = lane == 0 ? carry : neighbour;
      carry = __shfl_sync(kAllLanes, after, kWarp - 1);
      if (inside) {
        b.advantages[t] = kept ? static_cast<float>(r - v + u) : 0.0f;
        b.returns[t] = kept ? static_cast<float>(r + u) : 0.0f;
      }
    }
  }
}

}  // namespace

int gae(const Gae& batch, void* stream) {
  if (batch.tokens == 0) return cudaSuccess;
  const int64_t blocks = (batch.sequences + kSequencesPerBlock - 1) / kSequencesPerBlock;
  gae_kernel<<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0,
               static_cast<cudaStream_t>(stream)>>>(batch);
  return cudaGetLastError();
}

}  // namespace pyrl::cuda
