// Rows of logits on the GPU: statistics in one read, gradient in one read and one write in place.
// One block a row; 16-byte accesses; every offset is 64-bit (n * V exceeds 2^31).
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"
#include "reduce.cuh"

namespace pyrl::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) { return v; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) { return __float2half_rn(v); }

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// Splits a row into elements before the first 16-byte boundary, whole packs, and the rest: rows of
// an odd vocabulary start anywhere.
template <class T>
struct Row {
  T* start;
  int64_t head, packs, vocab;

  __device__ Row(void* z, int64_t row, int64_t vocab)
      : start(static_cast<T*>(z) + row * vocab), vocab(vocab) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(start) % 16 / sizeof(T);
    head = misaligned ? Pack<T>::kSize - misaligned : 0;
    head = head < vocab ? head : vocab;
    packs = (vocab - head) / Pack<T>::kSize;
  }
  __device__ Pack<T>* pack(int64_t i) const { return reinterpret_cast<Pack<T>*>(start + head) + i; }
  // The i-th element outside the packs, i in [0, singles()).
  __device__ int64_t singles() const { return vocab - packs * Pack<T>::kSize; }
  __device__ T* single(int64_t i) const {
    return start + (i < head ? i : i + packs * Pack<T>::kSize);
  }
};

// Raw logits to softmax inputs, and dx/dz.
template <bool kCapped>
struct Transform {
  float factor, outer, slope_at_0;

  __device__ Transform(const LogitsRows& rows, int64_t row) {
    const float inv_temperature = rows.inv_temperature[row];
    slope_at_0 = inv_temperature * rows.logit_scale;
    factor = kCapped ? rows.logit_scale / rows.softcap : slope_at_0;
    outer = rows.softcap * inv_temperature;
  }
  __device__ float x(float z, float* slope) const {
    if constexpr (kCapped) {
      const float squashed = tanhf(z * factor);
      *slope = slope_at_0 * (1.0f - squashed * squashed);
      return squashed * outer;
    } else {
      *slope = slope_at_0;
      return z * factor;
    }
  }
  __device__ float x(float z) const {
    float unused;
    return x(z, &unused);
  }
};

// exp(d) is 0 from here down; a finite stand-in for d keeps 0 * d at 0.
constexpr float kExpFloor = -104.0f;

// s = sum exp(x - m), t = sum exp(x - m) (x - m), m the maximum so far.
template <class Sum>
struct Online {
  float m = -INFINITY;
  Sum s = 0, t = 0;

  __device__ void raise(float top) {
    if (!(top > m)) return;
    if (m > -INFINITY) {
      const Sum down = static_cast<Sum>(m) - top, factor = exp(down);
      t = factor * (t + s * down);
      s = factor * s;
    }
    m = top;
  }
  __device__ void add(float x) {  // after raise(>= x)
    // -inf - -inf would be NaN: an empty sum is shifted by 0. A NaN logit makes s NaN.
    const float d = x - (m == -INFINITY ? 0.0f : m), e = expf(d);
    s += e;
    t += e * fmaxf(d, kExpFloor);
  }
  __device__ void merge(float other_m, Sum other_s, Sum other_t) {
    Online other;
    other.m = other_m;
    other.s = other_s;
    other.t = other_t;
    const float top = other_m > m ? other_m : m;
    raise(top);
    other.raise(top);
    s += other.s;
    t += other.t;
  }
};

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads) stats_kernel(LogitsRows rows, LogitsStats out) {
  const int64_t index = blockIdx.x;
  const Transform<kCapped> transform(rows, index);
  const Row<T> row(rows.z, index, rows.vocab);
  Online<float> mine;
  for (int64_t i = threadIdx.x; i < row.singles(); i += kThreads) {
    const float x = transform.x(to_float(*row.single(i)));
    mine.raise(x);
    mine.add(x);
  }
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < row.packs; i += kThreads) {
    const Pack<T> pack = *row.pack(i);
    float x[Pack<T>::kSize];
    float top = -INFINITY;
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) {
      x[k] = transform.x(to_float(pack.value[k]));
      top = fmaxf(top, x[k]);
    }
    mine.raise(top);
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) mine.add(x[k]);
  }

  // Across threads in double: the sums of a row span many orders of magnitude.
  Online<double> all;
  all.m = mine.m;
  all.s = mine.s;
  all.t = mine.t;
  const auto join = [&](int lanes) {
    for (int lane = lanes / 2; lane > 0; lane /= 2) {
      all.merge(__shfl_xor_sync(kAllLanes, all.m, lane), __shfl_xor_sync(kAllLanes, all.s, lane),
                __shfl_xor_sync(kAllLanes, all.t, lane));
    }
  };
  join(kWarp);
  __shared__ float warp_m[kWarps];
  __shared__ double warp_s[kWarps], warp_t[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) {
    warp_m[warp] = all.m;
    warp_s[warp] = all.s;
    warp_t[warp] = all.t;
  }
  __syncthreads();
  if (warp != 0) return;
  all = Online<double>();
  if (lane < kWarps) {
    all.m = warp_m[lane];
    all.s = warp_s[lane];
    all.t = warp_t[lane];
  }
  join(kWarp);
  if (lane != 0) return;

  if (all.s == 0) {  // every logit is -inf
    out.lse[index] = out.logprob[index] = -INFINITY;
    out.entropy[index] = 0.0f;
    return;
  }
  const double log_s = log(all.s);
  const int64_t target = rows.target[index];
  // Reading targets on the host would wait for the GPU: a wrong one is answered by NaN.
  const bool valid = target >= 0 && target < rows.vocab;
  const double x = valid ? transform.x(to_float(row.start[target])) : nan("");
  out.lse[index] = static_cast<float>(all.m + log_s);
  out.logprob[index] = static_cast<float>(x - all.m - log_s);
  const double entropy = log_s - all.t / all.s;
  out.entropy[index] = static_cast<float>(entropy < 0 ? 0.0 : entropy);
}

// dz = p (base - h log p) dx/dz with base = g - c - h H; the target's own term is added apart.
struct Coefficients {
  float base, h, lse;

  template <bool kCapped>
  __device__ float dz(const Transform<kCapped>& transform, float z) const {
    float slope;
    const float q = transform.x(z, &slope) - lse, p = expf(q);
    return p == 0.0f ? 0.0f : p * (base - h * q) * slope;
  }
};

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads) grad_kernel(LogitsRows rows, LogitsGrad in) {
  const int64_t index = blockIdx.x;
  const Row<T> row(rows.z, index, rows.vocab);
  const float c = in.c[index], h = in.h[index], g = in.g ? in.g[index] : 0.0f;
  const float lse = in.lse[index], entropy = in.entropy[index];
  const int64_t target = rows.target[index];
  const bool used = c != 0.0f || h != 0.0f || g != 0.0f;
  const bool valid = used && target >= 0 && target < rows.vocab;
  const bool empty = !used || lse == -INFINITY;  // no coefficient, or all p are 0
  const Transform<kCapped> transform(rows, index);

  // Read by all before anybody overwrites it.
  const float raw = valid ? to_float(row.start[target]) : 0.0f;
  __syncthreads();

  const Coefficients k{g - c - (h != 0.0f ? h * entropy : 0.0f), h, lse};
  for (int64_t i = threadIdx.x; i < row.singles(); i += kThreads) {
    T* z = row.single(i);
    *z = from_float<T>(empty ? 0.0f : k.dz(transform, to_float(*z)));
  }
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < row.packs; i += kThreads) {
    Pack<T> pack{};
    if (!empty) {
      pack = *row.pack(i);
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; ++j) {
        pack.value[j] = from_float<T>(k.dz(transform, to_float(pack.value[j])));
      }
    }
    *row.pack(i) = pack;
  }
  __syncthreads();
  if (threadIdx.x != 0 || !valid) return;
  float slope;
  const float x = transform.x(raw, &slope);
  double dx = c;
  if (!empty && x > -INFINITY) {
    const double q = static_cast<double>(x) - lse, p = exp(q);  // 1 - p must not cancel
    dx = -c * expm1(q) - (h != 0.0f && p > 0 ? h * p * (q + entropy) : 0.0) + g * p;
  }
  row.start[target] = from_float<T>(static_cast<float>(dx) * slope);
}

template <class T>
int launch_stats(const LogitsRows& rows, const LogitsStats& stats, int64_t n, cudaStream_t s) {
  const unsigned grid = static_cast<unsigned>(n);
  if (rows.softcap > 0) {
    stats_kernel<T, true><<<grid, kThreads, 0, s>>>(rows, stats);
  } else {
    stats_kernel<T, false><<<grid, kThreads, 0, s>>>(rows, stats);
  }
  return cudaGetLastError();
}

template <class T>
int launch_grad(const LogitsRows& rows, const LogitsGrad& grad, int64_t n, cudaStream_t s) {
  const unsigned grid = static_cast<unsigned>(n);
  if (rows.softcap > 0) {
    grad_kernel<T, true><<<grid, kThreads, 0, s>>>(rows, grad);
  } else {
    grad_kernel<T, false><<<grid, kThreads, 0, s>>>(rows, grad);
  }
  return cudaGetLastError();
}

}  // namespace

int logits_stats(const LogitsRows& rows, const LogitsStats& stats, int64_t n, void* stream) {
  if (n == 0) return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (rows.dtype) {
    case DType::kF32:
      return launch_stats<float>(rows, stats, n, s);
    case DType::kBF16:
      return launch_stats<__nv_bfloat16>(rows, stats, n, s);
    default:
      return launch_stats<__half>(rows, stats, n, s);
  }
}

int logits_grad(const LogitsRows& rows, const LogitsGrad& grad, int64_t n, void* stream) {
  if (n == 0) return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (rows.dtype) {
    case DType::kF32:
      return launch_grad<float>(rows, grad, n, s);
    case DType::kBF16:
      return launch_grad<__nv_bfloat16>(rows, grad, n, s);
    default:
      return launch_grad<__half>(rows, grad, n, s);
  }
}

}  // namespace pyrl::cuda
