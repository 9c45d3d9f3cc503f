// Rows of logits on the GPU: statistics in one read, gradient in one read and one write, in place or
// not. One block a row; 16-byte accesses; every offset is 64-bit (n * V exceeds 2^31).
#include "logits_row.cuh"

namespace pyrl::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;

template <class T, bool kCapped>
__global__ void __launch_bounds__(kThreads) stats_kernel(LogitsRows rows, LogitsStats out) {
  const int64_t index = blockIdx.x;
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
