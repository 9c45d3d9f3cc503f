// Advantages of samples relative to their group (advantage.h) on the CPU.
#include "advantage.h"

#include <limits>
#include <tuple>

#include "check.h"

namespace pyrl::cpu {
namespace {

constexpr int64_t kGrain = 1024;  // groups a thread takes at least: tens of microseconds

void one_group(const GroupAdvantage& b, int64_t begin, int64_t end) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  GroupStats group;
  for (int64_t i = begin; i < end; ++i) group.add(b.rewards[b.order[i]]);
  double squares = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double r = b.rewards[b.order[i]];
    if (r == r) squares += (r - group.mean()) * (r - group.mean());
  }
  const double std = group_std(group, squares, b.unbiased);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = b.order[i];
    const float r = b.rewards[sample];
    const bool scored = r == r;
    b.advantages[sample] =
        scored ? static_cast<float>(advantage_of(r, group, b.method, std, b.eps)) : 0.0f;
    b.low[sample] = scored ? group.low : kNan;
    b.high[sample] = scored ? group.high : kNan;
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_advantage_terms(const Tensor& rewards, const Tensor& order,
                                                         const Tensor& offsets, int64_t method,
                                                         bool unbiased, double eps) {
  AdvantageOutputs out;
  const GroupAdvantage b = advantage_batch(rewards, order, offsets, method, unbiased, eps, out);
  PYRL_CHECK(b.offsets[0] == 0 && b.offsets[b.samples] == b.samples, "offsets must run from 0 to ",
             b.samples);
  for (int64_t i = 0; i < b.samples; ++i) {
    PYRL_CHECK(b.order[i] >= 0 && b.order[i] < b.samples, "order[", i, "]=", b.order[i],
               ": expected a sample index in [0, ", b.samples, ")");
    PYRL_CHECK(b.offsets[i] <= b.offsets[i + 1], "offsets[", i + 1, "]=", b.offsets[i + 1],
               " is less than the offset before it");
  }
  torch::stable::parallel_for(0, b.samples, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      if (b.offsets[g] < b.offsets[g + 1]) one_group(b, b.offsets[g], b.offsets[g + 1]);
    }
  });
  return {out.advantages, out.low, out.high};
}

}  // namespace pyrl::cpu

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CPU, m) {
  m.impl("group_advantage_terms", TORCH_BOX(&pyrl::cpu::group_advantage_terms));
}
