// logits_policy.h on a GPU with thread-block clusters (Hopper and later): rows come into the shared
// memory of a cluster by bulk copies, partial sums travel through distributed shared memory, and
// the gradient leaves by bulk copies: 2 reads and writes of a logit instead of 3.
//
// Clusters are persistent, two CTAs share an SM: where one waits for its exchange, the other
// computes. Nothing but the ring holds a row, so every byte is asked for once.
#include "logits_policy.h"

#include "logits_row.cuh"

namespace pyrl::cuda {
namespace {

using one_read::kLanes;
using one_read::kWarps;
using one_read::Partial;
using one_read::Plan;

constexpr int kThreads = kWarps * kLanes;
constexpr int kCtasPerSm = 2;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The device's half of logits_policy.h: one thread of a cluster.
class Team {
 public:
  __device__ Team(unsigned char* shared, int slots) : slots_(slots) {
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank_));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(ctas_));
    const int warp = threadIdx.x / kLanes;
    ring_ = shared + static_cast<int64_t>(warp) * slots * one_read::kSegmentBytes;
    unsigned char* rest = shared + kWarps * slots * one_read::kSegmentBytes;
    board_ = reinterpret_cast<Partial*>(rest);
    rest += 2 * ctas_ * kWarps * sizeof(Partial);
    arrived_ = shared_address(rest) + warp * slots * 8;
    plan_ = reinterpret_cast<Plan*>(rest + kWarps * slots * 8);
    if (lane() == 0) {
      for (int i = 0; i < slots; ++i) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived_ + 8 * i) : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    cluster_sync();  // every CTA is there before anybody posts to it
  }
  __device__ static float to_float(float v) { return v; }
  __device__ static float to_float(__nv_bfloat16 v) { return cuda::to_float(v); }
  __device__ static float to_float(__half v) { return cuda::to_float(v); }
  template <class T>
  __device__ static T from_float(float v) {
    return cuda::from_float<T>(v);
  }
  __device__ int lane() const { return threadIdx.x % kLanes; }
  __device__ int warp() const { return threadIdx.x / kLanes; }
  __device__ int rank() const { return rank_; }
  __device__ int ctas() const { return ctas_; }
  __device__ int slots() const { return slots_; }
  template <class P>
  __device__ P* ring(int slot) const {
    return reinterpret_cast<P*>(ring_ + slot * one_read::kSegmentBytes);
  }

  // By lane 0: the copy of `bytes` into a slot begins.
  __device__ void load(int slot, const void* from, int bytes) {
    const uint32_t barrier = arrived_ + 8 * slot;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(ring_) + slot * one_read::kSegmentBytes),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
        : "memory");
  }
  __device__ void wait_load(int slot, int phase) {
    uint32_t done = 0;
    while (!done) {
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(arrived_ + 8 * slot), "r"(phase)
          : "memory");
    }
  }
  // What this warp wrote into its ring is seen by copies that lane 0 begins after this.
  __device__ void written() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
  }
  // By lane 0: the copy out of a slot begins.
  __device__ void store(void* to, int slot, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(to)),
                 "r"(shared_address(ring_) + slot * one_read::kSegmentBytes), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
  // All copies out but the `newest` have read their slots. Of lane 0, the one that begins copies.
  __device__ void wait_stores(int newest) {
    if (lane() != 0) return;
    if (newest == 0) {
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    } else {
      asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    }
  }

  __device__ float warp_max(float v) const {
    return warp_reduce(v, [](float a, float b) { return fmaxf(a, b); });
  }
  template <class V>
  __device__ V warp_sum(V v) const {
    return warp_reduce(v, [](V a, V b) { return a + b; });
  }
  // Entry `at` of the board of CTA `to`. Two boards: a slow CTA may still read the other.
  __device__ void post(int to, int parity, int at, const Partial& p) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(remote)
                 : "r"(shared_address(board_ + parity * ctas_ * kWarps + at)), "r"(to));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(p.m),
                 "f"(p.s), "f"(p.t), "f"(p.unused)
                 : "memory");
  }
  __device__ Partial board(int parity, int at) const {
    return board_[parity * ctas_ * kWarps + at];
  }
  __device__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }
  __device__ void block_sync() { __syncthreads(); }
  __device__ Plan& plan() { return *plan_; }

 private:
  int slots_;
  int rank_, ctas_;
  unsigned char* ring_;
  Partial* board_;
  uint32_t arrived_;
  Plan* plan_;
};

#endif

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    policy_kernel(const __grid_constant__ LogitsPolicy b, const __grid_constant__ ObjectiveParams p,
                  int n, int slots) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  Team team(shared, slots);
  const int ctas = team.ctas();
  one_read::policy_rows<T, kCapped>(team, b, p, n, blockIdx.x / ctas, gridDim.x / ctas);
#endif
}

int attribute(cudaDeviceAttr name) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : 0;
}

int element_size(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

one_read::Spread spread(DType dtype, int64_t vocab, int wanted) {
  if (!attribute(cudaDevAttrClusterLaunch) || attribute(cudaDevAttrComputeCapabilityMajor) < 9) {
    return {0, 0};
  }
  const int64_t block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t share = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kCtasPerSm -
                        attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  return one_read::spread_of(vocab * element_size(dtype), block < share ? block : share, wanted);
}

template <class T, bool kCapped>
int launch(const LogitsPolicy& b, const ObjectiveParams& p, int64_t n, one_read::Spread of,
           cudaStream_t stream) {
  const auto kernel = policy_kernel<T, kCapped>;
  const auto shared = static_cast<int>(one_read::shared_bytes(of.ctas, of.slots));
  int error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) {  // or L1 may be left so much that one CTA fits where two should
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && of.ctas > one_read::kPortableCtas) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(of.ctas), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(of.ctas);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  config.gridDim.x *= static_cast<unsigned>(n < clusters ? n : clusters);
  return cudaLaunchKernelEx(&config, kernel, b, p, static_cast<int>(n), of.slots);
}

template <class T>
int launch(const LogitsPolicy& b, const ObjectiveParams& p, int64_t n, one_read::Spread of,
           cudaStream_t stream) {
  return b.rows.softcap > 0 ? launch<T, true>(b, p, n, of, stream)
                            : launch<T, false>(b, p, n, of, stream);
}

}  // namespace

int logits_policy_ctas(const LogitsPolicy& batch, int64_t matrix_rows, int ctas) {
  if (matrix_rows > int64_t{1} << 30) return 0;  // the kernel counts rows in 32 bits
  return spread(batch.rows.dtype, batch.rows.vocab, ctas).ctas;
}

int logits_policy(const LogitsPolicy& batch, const double* params, int64_t n, int ctas,
                  void* stream) {
  if (n == 0) return cudaSuccess;
  const one_read::Spread of = spread(batch.rows.dtype, batch.rows.vocab, ctas);
  if (of.ctas == 0) return cudaErrorInvalidConfiguration;
  const ObjectiveParams p = ObjectiveParams::from(params);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (batch.rows.dtype) {
    case DType::kF32:
      return launch<float>(batch, p, n, of, s);
    case DType::kBF16:
      return launch<__nv_bfloat16>(batch, p, n, of, s);
    default:
      return launch<__half>(batch, p, n, of, s);
  }
}

}  // namespace pyrl::cuda
