// What the kernels over rows of logits share: element types, the transform, sums and gradients.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.h"
#include "reduce.cuh"

namespace pyrl::cuda {

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

// The first element of row i.
__device__ __forceinline__ int64_t offset(const RowIndex& at, int64_t i) {
  return (at.index ? at.index[i] : i) * at.stride;
}

// Splits a row into elements before the first 16-byte boundary, whole packs, and the rest: rows of
// an odd vocabulary start anywhere. `in` and `out` may be one row; where they are two that lie
// differently between the boundaries, there are no packs.
template <class T>
struct Row {
  const T* in;
  T* out;
  int64_t head, packs, vocab;

  __device__ Row(const T* in, T* out, int64_t vocab) : in(in), out(out), vocab(vocab) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(in) % 16 / sizeof(T);
    head = misaligned ? Pack<T>::kSize - misaligned : 0;
    head = head < vocab ? head : vocab;
    packs = (vocab - head) / Pack<T>::kSize;
    if ((reinterpret_cast<uintptr_t>(in) - reinterpret_cast<uintptr_t>(out)) % 16) packs = 0;
  }
  __device__ Pack<T> pack(int64_t i) const {
    return reinterpret_cast<const Pack<T>*>(in + head)[i];
  }
  __device__ Pack<T>& out_pack(int64_t i) const { return reinterpret_cast<Pack<T>*>(out + head)[i]; }
  // Where the i-th element outside the packs is, i in [0, singles()).
  __device__ int64_t singles() const { return vocab - packs * Pack<T>::kSize; }
  __device__ int64_t single(int64_t i) const {
    return i < head ? i : i + packs * Pack<T>::kSize;
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
      t = factor == 0 ? 0 : factor * (t + s * down);  // s * -3e38, of finite masks, is -inf
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

// The sums of a block of `kWarps` full warps, right on its first thread. In double: the sums of a
// row span many orders of magnitude.
template <int kWarps>
__device__ __forceinline__ Online<double> join_block(const Online<float>& mine) {
  Online<double> all;
  all.m = mine.m;
  all.s = mine.s;
  all.t = mine.t;
  const auto join = [&]() {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) {
      all.merge(__shfl_xor_sync(kAllLanes, all.m, lane), __shfl_xor_sync(kAllLanes, all.s, lane),
                __shfl_xor_sync(kAllLanes, all.t, lane));
    }
  };
  join();
  __shared__ float warp_m[kWarps];
  __shared__ double warp_s[kWarps], warp_t[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == 0) {
    warp_m[warp] = all.m;
    warp_s[warp] = all.s;
    warp_t[warp] = all.t;
  }
  __syncthreads();
  if (warp != 0) return all;
  all = Online<double>();
  if (lane < kWarps) {
    all.m = warp_m[lane];
    all.s = warp_s[lane];
    all.t = warp_t[lane];
  }
  join();
  return all;
}

// Row `index` of the results, from its sums and the softmax input of its target.
__device__ __forceinline__ void write_stats(const LogitsStats& out, int64_t index,
                                            const Online<double>& all, double target) {
  if (all.s == 0) {  // every logit is -inf
    out.lse[index] = out.logprob[index] = -INFINITY;
    out.entropy[index] = 0.0f;
    return;
  }
  const double log_s = log(all.s);
  out.lse[index] = static_cast<float>(all.m + log_s);
  out.logprob[index] = static_cast<float>(target - all.m - log_s);
  const double entropy = log_s - all.t / all.s;
  out.entropy[index] = static_cast<float>(entropy < 0 ? 0.0 : entropy);
}

// The coefficients of one row. dz = p (base - h log p) dx/dz with base = g - c - h H; the target's
// own term is added apart.
struct Coefficients {
  float base, c, h, g, lse, entropy;
  bool used;   // some coefficient is not 0
  bool empty;  // none is, or all p are 0

  __device__ Coefficients(const LogitsGrad& in, int64_t index)
      : c(in.c[index]), h(in.h[index]), g(in.g ? in.g[index] : 0.0f), lse(in.lse[index]),
        entropy(in.entropy[index]) {
    used = c != 0.0f || h != 0.0f || g != 0.0f;
    empty = !used || lse == -INFINITY;
    base = g - c - (h != 0.0f ? h * entropy : 0.0f);
  }
  template <bool kCapped>
  __device__ float dz(const Transform<kCapped>& transform, float z) const {
    float slope;
    const float q = transform.x(z, &slope) - lse, p = expf(q);
    return p == 0.0f ? 0.0f : p * (base - h * q) * slope;
  }
  template <bool kCapped>
  __device__ float target_dz(const Transform<kCapped>& transform, float z) const {
    float slope;
    const float x = transform.x(z, &slope);
    double dx = c;
    if (!empty && x > -INFINITY) {
      const double q = static_cast<double>(x) - lse, p = exp(q);  // 1 - p must not cancel
      dx = -c * expm1(q) - (h != 0.0f && p > 0 ? h * p * (q + entropy) : 0.0) + g * p;
    }
    return static_cast<float>(dx) * slope;
  }
};

}  // namespace pyrl::cuda
