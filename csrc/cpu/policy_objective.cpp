// objective.h over a batch of tokens on the CPU, threads over blocks of tokens.
#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "objective.h"

namespace pyrl::cpu {
namespace {

// Tokens are summed in blocks of fixed size, in order: the loss does not depend on the threads.
constexpr int64_t kBlock = 4096;

ObjectiveSums block_objective(const ObjectiveParams& params, const ObjectiveBatch& b,
                              int64_t begin, int64_t end) {
  ObjectiveSums sums;
  for (int64_t i = begin; i < end; ++i) {
    if (!b.keep[i]) {
      b.c[i] = b.h[i] = 0;
      continue;
    }
    const Token token{b.logprob[i],
                              b.entropy ? b.entropy[i] : 0.0,
                              b.old ? b.old[i] : 0.0,
                              b.ref ? b.ref[i] : 0.0,
                              b.advantage[i],
                              b.weight[i],
                              b.entropy != nullptr,
                              b.old != nullptr,
                              b.ref != nullptr};
    const TokenGradient gradient = objective_token(params, token, sums);
    b.c[i] = static_cast<float>(gradient.c);
    b.h[i] = static_cast<float>(gradient.h);
  }
  return sums;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> objective_terms(
    const Tensor& logprob, const std::optional<Tensor>& entropy, const std::optional<Tensor>& old,
    const std::optional<Tensor>& ref, const Tensor& advantage, const Tensor& weight,
    const Tensor& keep, const Tensor& params) {
  const ObjectiveParams p = ObjectiveParams::from(objective_params(params, kParams));
  ObjectiveOutputs out;
  const ObjectiveBatch b = objective_batch(logprob, entropy, old, ref, advantage, weight, keep,
                                           kMetrics, out);
  const int64_t blocks = (b.tokens + kBlock - 1) / kBlock;
  std::vector<ObjectiveSums> partial(static_cast<size_t>(blocks));
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      partial[i] = block_objective(p, b, i * kBlock, std::min(b.tokens, (i + 1) * kBlock));
    }
  });
  ObjectiveSums sums;
  for (const ObjectiveSums& one : partial) sums.merge(one);
  *b.loss = static_cast<float>(sums.loss());
  std::copy(sums.value, sums.value + kMetrics, b.metrics);
  return {out.loss, out.c, out.h, out.metrics};
}

}  // namespace pyrl::cpu

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CPU, m) {
  m.impl("objective_terms", TORCH_BOX(&pyrl::cpu::objective_terms));
}
