// Rows whose softmax runs over a sampling support, on the GPU: only the support's logits are read,
// and the gradient's row is zeroed and the support's entries put in. One block a row.
#include <type_traits>

#include "logits_row.cuh"

namespace pyrl::cuda {
namespace {

constexpr int kThreads = 128;  // a support is tens to thousands of tokens
constexpr int kWarps = kThreads / kWarp;

// A wrong id is answered by NaN, as a wrong target is; the public op has checked both.
template <class T>
__device__ __forceinline__ float logit(const T* z, int64_t id, int64_t vocab) {
  return id >= 0 && id < vocab ? to_float(z[id]) : nanf("");
}

template <class T, class Id, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    support_stats_kernel(LogitsRows rows, SupportRows support, LogitsStats out) {
  const int64_t index = blockIdx.x;
  const Transform<kCapped> transform(rows, index);
  const T* z = static_cast<const T*>(rows.z) + offset(rows.at, index);
  const Id* ids = static_cast<const Id*>(support.ids);
  const int64_t begin = support.spans[2 * index], end = support.spans[2 * index + 1];
  const int64_t target = rows.target[index];
  Online<float> mine;
  bool member = false;
  for (int64_t k = begin + threadIdx.x; k < end; k += kThreads) {
    const float x = transform.x(logit(z, ids[k], rows.vocab));
    mine.raise(x);
    mine.add(x);
    member |= ids[k] == target;
  }
  member = __syncthreads_or(member);
  const Online<double> all = join_block<kWarps>(mine);
  if (threadIdx.x != 0) return;
  write_stats(out, index, all,
              member ? transform.x(logit(z, target, rows.vocab)) : nan(""));
}

// The support's gradients wait in `scratch` while its row, perhaps the one they come from, is zeroed.
template <class T, class Id, bool kCapped>
__global__ void __launch_bounds__(kThreads)
    support_grad_kernel(LogitsRows rows, SupportRows support, LogitsGrad in, float* scratch) {
  const int64_t index = blockIdx.x;
  const T* z = static_cast<const T*>(rows.z) + offset(rows.at, index);
  T* dz = static_cast<T*>(in.dz) + offset(in.at, index);
  const Id* ids = static_cast<const Id*>(support.ids);
  const Coefficients k(in, index);
  const int64_t begin = k.used ? support.spans[2 * index] : 0;
  const int64_t end = k.used ? support.spans[2 * index + 1] : 0;
  if (k.used) {
    const int64_t target = rows.target[index];
    const Transform<kCapped> transform(rows, index);
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const float raw = logit(z, ids[i], rows.vocab);
      scratch[i] = ids[i] == target ? k.target_dz(transform, raw)
                   : k.empty        ? 0.0f
                                    : k.dz(transform, raw);
    }
  }
  __syncthreads();
  const Row<T> row(dz, dz, rows.vocab);
  for (int64_t i = threadIdx.x; i < row.singles(); i += kThreads) {
    dz[row.single(i)] = from_float<T>(0.0f);
  }
  for (int64_t i = threadIdx.x; i < row.packs; i += kThreads) row.out_pack(i) = Pack<T>{};
  __syncthreads();
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int64_t id = ids[i];
    if (id >= 0 && id < rows.vocab) dz[id] = from_float<T>(scratch[i]);
  }
}

// Calls body(T, Id, capped) with the types that `rows` and `support` have.
template <class Body>
int dispatch(const LogitsRows& rows, const SupportRows& support, const Body& body) {
  const auto with_cap = [&](auto element, auto id) {
    rows.softcap > 0 ? body(element, id, std::true_type{}) : body(element, id, std::false_type{});
  };
  const auto with_id = [&](auto element) {
    support.wide ? with_cap(element, int64_t{}) : with_cap(element, int32_t{});
  };
  switch (rows.dtype) {
    case DType::kF32:
      with_id(float{});
      break;
    case DType::kBF16:
      with_id(__nv_bfloat16{});
      break;
    default:
      with_id(__half{});
  }
  return cudaGetLastError();
}

}  // namespace

int support_stats(const LogitsRows& rows, const SupportRows& support, const LogitsStats& stats,
                  int64_t n, void* stream) {
  if (n == 0) return cudaSuccess;
  const unsigned grid = static_cast<unsigned>(n);
  const auto s = static_cast<cudaStream_t>(stream);
  return dispatch(rows, support, [&](auto element, auto id, auto capped) {
    support_stats_kernel<decltype(element), decltype(id), decltype(capped)::value>
        <<<grid, kThreads, 0, s>>>(rows, support, stats);
  });
}

int support_grad(const LogitsRows& rows, const SupportRows& support, const LogitsGrad& grad,
                 float* scratch, int64_t n, void* stream) {
  if (n == 0) return cudaSuccess;
  const unsigned grid = static_cast<unsigned>(n);
  const auto s = static_cast<cudaStream_t>(stream);
  return dispatch(rows, support, [&](auto element, auto id, auto capped) {
    support_grad_kernel<decltype(element), decltype(id), decltype(capped)::value>
        <<<grid, kThreads, 0, s>>>(rows, support, grad, scratch);
  });
}

}  // namespace pyrl::cuda
