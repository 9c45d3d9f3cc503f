// logits_policy_grad_ on the CPU: a row's statistics, its objective, its gradient while the row is
// still in the cache that the statistics read it into. Threads over rows, as in logits_rows.cpp.
#include "objective.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "check.h"
#define PYRL_WIDTH 4
#include "cpu/simd.h"

namespace pyrl::cpu {
namespace {

constexpr int64_t kGrain = 32768;  // elements worth waking a thread for

int64_t row_of(const RowIndex& at, int64_t i) { return at.index ? at.index[i] : i; }

// Rows named by the index lie within `count` rows, targets of kept ones within the vocabulary.
void check_kept(const LogitsPolicy& b, int64_t n, int64_t count) {
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = row_of(b.rows.at, i);
    PYRL_CHECK(row >= 0 && row < count, "rows[", i, "]=", row, ": expected a row in [0, ", count,
               ")");
    PYRL_CHECK(!b.keep[i] || (b.rows.target[i] >= 0 && b.rows.target[i] < b.rows.vocab), "target[",
               i, "]=", b.rows.target[i], ": expected a token id in [0, ", b.rows.vocab, ")");
  }
}

// c and h of row i, whose logprob and entropy are known.
void token_gradient(const LogitsPolicy& b, const ObjectiveParams& p, int64_t i, float* c,
                    float* h) {
  const Token t(b.stats.logprob[i], b.stats.entropy[i], b.old ? b.old[i] : NAN,
                b.ref ? b.ref[i] : NAN, b.rollout ? b.rollout[i] : NAN, b.advantage[i],
                b.weight[i]);
  const Sequence alone;
  *c = static_cast<float>(logprob_gradient(p, alone, TokenLoss(p, t, alone)));
  *h = static_cast<float>(entropy_gradient(p, t));
}

template <class Body>
void over_rows(int64_t n, int64_t vocab, const Body& body) {
  if (n == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / vocab);
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace

// `ctas` is the GPU's.
std::tuple<Tensor, Tensor, Tensor> logits_policy_grad_(
    const Tensor& z, const Tensor& target, const Tensor& inv_temperature, double logit_scale,
    double softcap, const std::optional<Tensor>& old, const std::optional<Tensor>& ref,
    const std::optional<Tensor>& rollout, const Tensor& advantage, const Tensor& weight,
    const Tensor& keep, const Tensor& params, const std::optional<Tensor>& row_ids,
    const std::optional<Tensor>& source, int64_t) {
  const ObjectiveParams p = ObjectiveParams::from(objective_params(params));
  PolicyOutputs out;
  const LogitsPolicy b = logits_policy(z, target, inv_temperature, logit_scale, softcap, old, ref,
                                       rollout, advantage, weight, keep, p, row_ids, source, out);
  const int64_t n = target.numel(), width = z.element_size();
  check_kept(b, n, source ? source->size(0) : z.size(0));
  const RowKernels& k = chosen_rows();
  std::vector<float> c(static_cast<size_t>(n)), h(c.size());
  const LogitsGrad grad{b.dz, b.at, b.stats.lse, b.stats.entropy, c.data(), h.data(), nullptr};
  over_rows(n, b.rows.vocab, [&](int64_t i) {
    if (!b.keep[i]) {
      b.stats.logprob[i] = b.stats.entropy[i] = b.stats.lse[i] = 0.0f;
      std::memset(static_cast<char*>(b.dz) + row_of(b.at, i) * b.at.stride * width, 0,
                  b.rows.vocab * width);
      return;
    }
    k.stats(b.rows, b.stats, i, i + 1);
    token_gradient(b, p, i, &c[i], &h[i]);
    k.grad(b.rows, grad, i, i + 1);
  });
  return {out.logprob, out.entropy, out.lse};
}

// z *= factor, in fp32; a zero stays one whatever the factor.
template <DType D>
void scale_row(void* row, int64_t vocab, float by) {
  using E = Element<D>;
  auto* z = static_cast<typename E::type*>(row);
  const auto scaled = [by](Float v) { return v == 0.0f ? v : v * by; };
  int64_t i = 0;
  for (; i + kWidth <= vocab; i += kWidth) E::store(z + i, scaled(E::load(z + i)));
  const int rest = static_cast<int>(vocab - i);
  if (rest > 0) store_first<D>(z + i, scaled(load_first<D>(z + i, rest)), rest);
}

void logits_scale_(const Tensor& z, const Tensor& factor, const std::optional<Tensor>& row_ids) {
  const ScaledRows rows = scaled_rows(z, factor, row_ids);
  const float by = *rows.factor;
  if (by == 1.0f) return;
  const int64_t vocab = z.size(1), width = z.element_size();
  over_rows(rows.n, vocab, [&](int64_t i) {
    void* row = static_cast<char*>(z.data_ptr()) + row_of(rows.at, i) * rows.at.stride * width;
    switch (rows.dtype) {
      case DType::kF32: return scale_row<DType::kF32>(row, vocab, by);
      case DType::kBF16: return scale_row<DType::kBF16>(row, vocab, by);
      case DType::kF16: return scale_row<DType::kF16>(row, vocab, by);
    }
  });
}

}  // namespace pyrl::cpu

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CPU, m) {
  m.impl("logits_policy_grad_", TORCH_BOX(&pyrl::cpu::logits_policy_grad_));
  m.impl("logits_scale_", TORCH_BOX(&pyrl::cpu::logits_scale_));
}
