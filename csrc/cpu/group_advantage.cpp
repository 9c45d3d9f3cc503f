// Advantages of samples relative to their group (advantage.h) on the CPU.
#include "advantage.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"

namespace pyrl::cpu {
namespace {

// Groups are summed in blocks of fixed size, in order: nothing depends on the threads.
constexpr int64_t kGroupBlock = 1024;
constexpr int64_t kSampleGrain = 1 << 15;

int64_t sample_at(const GroupAdvantage& b, int64_t i) { return b.order ? b.order[i] : i; }

void one_group(const GroupAdvantage& b, int64_t begin, int64_t end, double* value,
               AdvantageSums& sums) {
  GroupStats group;
  for (int64_t i = begin; i < end; ++i) group.add(b.rewards[sample_at(b, i)]);
  const double mean = group.first_mean();
  double deviation = 0, squares = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double r = b.rewards[sample_at(b, i)], d = r == r ? r - mean : 0.0;
    deviation += d;
    squares += d * d;
  }
  group.refine(b, deviation, squares);
  const bool filtered = group.filtered(b.filters);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t sample = sample_at(b, i);
    write_sample(b, group, filtered, sample, b.rewards[sample], value);
  }
  sums.add(b, group, static_cast<double>(end - begin));
}

void check_groups(const GroupAdvantage& b) {
  PYRL_CHECK(b.offsets[0] == 0 && b.offsets[b.groups] == b.samples, "offsets must run from 0 to ",
             b.samples);
  for (int64_t g = 0; g < b.groups; ++g) {
    PYRL_CHECK(b.offsets[g] <= b.offsets[g + 1], "offsets[", g + 1, "]=", b.offsets[g + 1],
               " is less than the offset before it");
  }
  for (int64_t i = 0; b.order && i < b.samples; ++i) {
    PYRL_CHECK(b.order[i] >= 0 && b.order[i] < b.samples, "order[", i, "]=", b.order[i],
               ": expected a sample index in [0, ", b.samples, ")");
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_advantage_terms(
    const Tensor& rewards, const std::optional<Tensor>& order, const Tensor& offsets,
    int64_t method, bool unbiased, double eps, int64_t filters, bool drop, double offset,
    double scale) {
  AdvantageOutputs out;
  const GroupAdvantage b = advantage_batch(rewards, order, offsets, method, unbiased, eps, filters,
                                           drop, offset, scale, out);
  check_groups(b);
  const bool batch = needs_batch(b.method);
  std::vector<double> value(batch ? static_cast<size_t>(b.samples) : 0);
  const int64_t blocks = (b.groups + kGroupBlock - 1) / kGroupBlock;
  std::vector<AdvantageSums> partial(static_cast<size_t>(blocks));
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(b.groups, (block + 1) * kGroupBlock);
      for (int64_t g = block * kGroupBlock; g < last; ++g) {
        if (b.offsets[g] == b.samples) break;  // this group and all after it are empty
        if (b.offsets[g] == b.offsets[g + 1]) continue;
        one_group(b, b.offsets[g], b.offsets[g + 1], value.data(), partial[block]);
      }
    }
  });
  AdvantageSums sums;
  for (const AdvantageSums& one : partial) sums.merge(one);
  sums.write(b.metrics);
  if (batch) {
    const BatchScale scaled = BatchScale::of(b, sums.batch);
    torch::stable::parallel_for(0, b.samples, kSampleGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) b.advantages[i] = scaled(value[i]);
    });
  }
  return {out.advantages, out.keep, out.metrics};
}

}  // namespace pyrl::cpu

STABLE_TORCH_LIBRARY_IMPL(pyrl_native, CPU, m) {
  m.impl("group_advantage_terms", TORCH_BOX(&pyrl::cpu::group_advantage_terms));
}
