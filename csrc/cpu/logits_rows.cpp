// logits_stats and logits_grad_ on the CPU: checks, choice of the instruction set, threads.
// The arithmetic is in rows.h, compiled once per instruction set.
//
// Threads are torch's own (torch_parallel_for of the stable ABI): one pool, the caller's
// torch.set_num_threads, and no second set of threads fighting the GEMMs before and after.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <tuple>

#include "check.h"

namespace pyrl::cpu {
namespace {

// Fewer elements than this are not worth waking a thread for (about 10 us of work).
constexpr int64_t kGrain = 32768;

RowKernels choose() {
#ifdef PYRL_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
#endif
  // PYRL_CPU_ISA caps the choice, for tests and for comparisons on one machine.
  const char* wanted = std::getenv("PYRL_CPU_ISA");
  const auto allows = [&](const char* name) { return !wanted || !std::strcmp(wanted, name); };
#ifdef PYRL_X86
  if (avx512 && allows("avx512")) return avx512_rows();
  if (avx2 && allows("avx2")) return avx2_rows();
#endif
  PYRL_CHECK(allows("portable"), "PYRL_CPU_ISA=", wanted,
             ": expected portable, avx2 or avx512, and a CPU that has it");
  return portable_rows();
}

// `count` rows of the matrix may be named by the index.
void check_rows(const LogitsRows& rows, int64_t n, int64_t count) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = rows.at.index ? rows.at.index[i] : i;
    PYRL_CHECK(row >= 0 && row < count, "rows[", i, "]=", row, ": expected a row in [0, ", count,
               ")");
    PYRL_CHECK(rows.target[i] >= 0 && rows.target[i] < rows.vocab, "target[", i,
               "]=", rows.target[i], ": expected a token id in [0, ", rows.vocab, ")");
  }
}

}  // namespace

const RowKernels& chosen_rows() {
  static const RowKernels chosen = choose();
  return chosen;
}

std::tuple<Tensor, Tensor, Tensor> logits_stats(const Tensor& z, const Tensor& target,
                                                const Tensor& inv_temperature, double logit_scale,
                                                double softcap, const std::optional<Tensor>& spans,
                                                const std::optional<Tensor>& ids,
                                                const std::optional<Tensor>& row_ids) {
  const LogitsRows rows = logits_rows(z, target, inv_temperature, logit_scale, softcap, row_ids);
  const int64_t n = target.numel();
  const SupportRows support = support_rows(spans, ids, n, z);
  check_rows(rows, n, z.size(0));
  Tensor logprob = output(z, {n}, ScalarType::Float), entropy = output(z, {n}, ScalarType::Float),
         lse = output(z, {n}, ScalarType::Float);
  const LogitsStats stats{static_cast<float*>(logprob.data_ptr()),
                          static_cast<float*>(entropy.data_ptr()),
                          static_cast<float*>(lse.data_ptr())};
  if (support.spans) {
    support_stats(rows, support, stats, n);
  } else if (n > 0) {
    const RowKernels& k = chosen_rows();
    const int64_t grain = std::max<int64_t>(1, kGrain / rows.vocab);
    torch::stable::parallel_for(
        0, n, grain, [&](int64_t begin, int64_t end) { k.stats(rows, stats, begin, end); });
  }
  return {logprob, entropy, lse};
}

void logits_grad_(const Tensor& z, const Tensor& target, const Tensor& inv_temperature,
                  double logit_scale, double softcap, const Tensor& lse, const Tensor& entropy,
                  const Tensor& c, const Tensor& h, const std::optional<Tensor>& g,
                  const std::optional<Tensor>& spans, const std::optional<Tensor>& ids,
                  const std::optional<Tensor>& row_ids, const std::optional<Tensor>& source) {
  const Tensor& raw = source ? *source : z;
  const LogitsRows rows = logits_rows(raw, target, inv_temperature, logit_scale, softcap, row_ids);
  const LogitsGrad grad = logits_grad(z, lse, entropy, c, h, g, row_ids, source);
  const int64_t n = target.numel();
  const SupportRows support = support_rows(spans, ids, n, z);
  check_rows(rows, n, raw.size(0));
  if (support.spans) return support_grad(rows, support, grad, n);
  if (n == 0) return;
  const RowKernels& k = chosen_rows();
  const int64_t grain = std::max<int64_t>(1, kGrain / rows.vocab);
  torch::stable::parallel_for(
      0, n, grain, [&](int64_t begin, int64_t end) { k.grad(rows, grad, begin, end); });
}

}  // namespace pyrl::cpu

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CPU, m) {
  m.impl("logits_stats", TORCH_BOX(&pyrl::cpu::logits_stats));
  m.impl("logits_grad_", TORCH_BOX(&pyrl::cpu::logits_grad_));
}
