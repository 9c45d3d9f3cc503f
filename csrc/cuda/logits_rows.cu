// Rows of logits on the GPU: statistics in one read, gradient in one read and one write, in place or
// not. One block a row; 16-byte accesses; every offset is 64-bit (n * V exceeds 2^31).
#include "logits_row.cuh"

namespace pyrl::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads) stats_kernel(LogitsRows rows, LogitsStats out,
                                                         const bool* keep) {
  const int64_t index = blockIdx.x;
  if (keep && !keep[index]) {
    if (threadIdx.x == 0) out.logprob[index] = out.entropy[index] = out.lse[index] = 0.0f;
    return;
  }
  const Transform<kCapped> transform(rows, index);
  const T* z = static_cast<const T*>(rows.z) + offset(rows.at, index);
  const Row<T> row(z, const_cast<T*>(z), rows.vocab);
  Online<float> mine;
  for (int64_t i = threadIdx.x; i < row.singles(); i += kThreads) {
    const float x = transform.x(to_float(z[row.single(i)]));
    mine.raise(x);
    mine.add(x);
  }
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < row.packs; i += kThreads) {
    const Pack<T> pack = row.pack(i);
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
  const Online<double> all = join_block<kWarps>(mine);
  if (threadIdx.x != 0) return;
  const int64_t target = rows.target[index];
  // Reading targets on the host would wait for the GPU: a wrong one is answered by NaN.
  const bool valid = target >= 0 && target < rows.vocab;
  write_stats(out, index, all, valid ? transform.x(to_float(z[target])) : nan(""));
}

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads) grad_kernel(LogitsRows rows, LogitsGrad in) {
  const int64_t index = blockIdx.x;
  const T* z = static_cast<const T*>(rows.z) + offset(rows.at, index);
  const Row<T> row(z, static_cast<T*>(in.dz) + offset(in.at, index), rows.vocab);
  const Coefficients k(in, index);
  const int64_t target = rows.target[index];
  const bool valid = k.used && target >= 0 && target < rows.vocab;
  const Transform<kCapped> transform(rows, index);

  // Read by all before anybody overwrites it.
  const float raw = valid ? to_float(z[target]) : 0.0f;
  __syncthreads();

  for (int64_t i = threadIdx.x; i < row.singles(); i += kThreads) {
    const int64_t v = row.single(i);
    row.out[v] = from_float<T>(k.empty ? 0.0f : k.dz(transform, to_float(z[v])));
  }
#pragma unroll 2
  for (int64_t i = threadIdx.x; i < row.packs; i += kThreads) {
    Pack<T> pack{};
    if (!k.empty) {
      pack = row.pack(i);
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; ++j) {
        pack.value[j] = from_float<T>(k.dz(transform, to_float(pack.value[j])));
      }
    }
    row.out_pack(i) = pack;
  }
  __syncthreads();
  if (threadIdx.x == 0 && valid) row.out[target] = from_float<T>(k.target_dz(transform, raw));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(void* z, RowIndex at, int64_t vocab, const float* factor) {
  const float by = *factor;
  if (by == 1.0f) return;  // decided here: asking on the host would wait for the GPU
  T* first = static_cast<T*>(z) + offset(at, blockIdx.x);
  const Row<T> row(first, first, vocab);
  // Selected, not multiplied: a row without gradient stays 0 whatever the factor.
  const auto scaled = [by](T v) {
    const float value = to_float(v);
    return from_float<T>(value == 0.0f ? 0.0f : value * by);
  };
  for (int64_t i = threadIdx.x; i < row.singles(); i += kThreads) {
    first[row.single(i)] = scaled(first[row.single(i)]);
  }
  for (int64_t i = threadIdx.x; i < row.packs; i += kThreads) {
    Pack<T> pack = row.pack(i);
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k) pack.value[k] = scaled(pack.value[k]);
    row.out_pack(i) = pack;
  }
}

template <class T>
int launch_stats(const LogitsRows& rows, const LogitsStats& stats, int64_t n, cudaStream_t s,
                 const bool* keep) {
  const unsigned grid = static_cast<unsigned>(n);
  if (rows.softcap > 0) {
    stats_kernel<T, true><<<grid, kThreads, 0, s>>>(rows, stats, keep);
  } else {
    stats_kernel<T, false><<<grid, kThreads, 0, s>>>(rows, stats, keep);
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

int logits_stats(const LogitsRows& rows, const LogitsStats& stats, int64_t n, void* stream,
                 const bool* keep) {
  if (n == 0) return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  switch (rows.dtype) {
    case DType::kF32:
      return launch_stats<float>(rows, stats, n, s, keep);
    case DType::kBF16:
      return launch_stats<__nv_bfloat16>(rows, stats, n, s, keep);
    default:
      return launch_stats<__half>(rows, stats, n, s, keep);
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

int logits_scale(void* z, const RowIndex& at, DType dtype, int64_t vocab, const float* factor,
                 int64_t n, void* stream) {
  if (n == 0) return cudaSuccess;
  const auto s = static_cast<cudaStream_t>(stream);
  const unsigned grid = static_cast<unsigned>(n);
  switch (dtype) {
    case DType::kF32:
      scale_kernel<float><<<grid, kThreads, 0, s>>>(z, at, vocab, factor);
      break;
    case DType::kBF16:
      scale_kernel<__nv_bfloat16><<<grid, kThreads, 0, s>>>(z, at, vocab, factor);
      break;
    default:
      scale_kernel<__half><<<grid, kThreads, 0, s>>>(z, at, vocab, factor);
  }
  return cudaGetLastError();
}

}  // namespace pyrl::cuda
