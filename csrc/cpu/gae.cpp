// Generalised advantage estimation on the CPU: one backward pass a sequence.
#include <algorithm>
#include <tuple>

#include "check.h"

namespace pyrl::cpu {
namespace {

constexpr int64_t kTokenGrain = 1 << 14;  // tokens a thread takes at least

void one_sequence(const Gae& b, int64_t begin, int64_t end, double bootstrap) {
  double next_value = bootstrap, next_advantage = 0;
  for (int64_t t = end - 1; t >= begin; --t) {
    if (!b.keep[t]) {  // passed over: its successor stays the next kept token
      b.advantages[t] = b.returns[t] = 0;
      continue;
    }
    const double value = b.values[t];
    const double delta = b.rewards[t] + b.gamma * next_value - value;
    next_advantage = delta + b.gamma * b.lam * next_advantage;
    next_value = value;
    b.advantages[t] = static_cast<float>(next_advantage);
    b.returns[t] = static_cast<float>(next_advantage + value);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> gae_terms(const Tensor& rewards, const Tensor& values,
                                     const Tensor& keep, const Tensor& bounds,
                                     const Tensor& bootstrap, double gamma, double lam) {
  GaeOutputs out;
  const Gae b = gae_batch(rewards, values, keep, bounds, bootstrap, gamma, lam, out);
  PYRL_CHECK(b.bounds[0] == 0 && b.bounds[b.sequences] == b.tokens, "bounds must run from 0 to ",
             b.tokens);
  for (int64_t s = 0; s < b.sequences; ++s) {
    PYRL_CHECK(b.bounds[s] <= b.bounds[s + 1], "bounds[", s + 1, "]=", b.bounds[s + 1],
               " is less than the bound before it");
  }
  const int64_t length = b.tokens / std::max<int64_t>(b.sequences, 1) + 1;
  torch::stable::parallel_for(
      0, b.sequences, kTokenGrain / length + 1, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s) {
          one_sequence(b, b.bounds[s], b.bounds[s + 1], b.bootstrap[s]);
        }
      });
  return {out.advantages, out.returns};
}

}  // namespace pyrl::cpu

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CPU, m) {
  m.impl("gae_terms", TORCH_BOX(&pyrl::cpu::gae_terms));
}
