// A sample's advantage within its group and batch, shared by the CPU and the CUDA kernel.
// Statistics are double and leave out NaN rewards (samples that could not be scored).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "objective.h"

namespace pyrl {

// Whether the advantage needs the whole batch's mean or standard deviation.
PYRL_HOST_DEVICE bool needs_batch(int method) {
  return method == kBatchStd || method == kWhiten || method == kWhitenBaseline;
}

// Count, mean, sum of squared deviations and extremes of a set of values. Merging adds deviations,
// never squares of the values themselves, so a large mean costs no digits (Chan et al. 1979).
struct Moments {
  double count = 0, mean = 0, squares = 0;
  double low = HUGE_VAL, high = -HUGE_VAL;

  PYRL_HOST_DEVICE void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, apart = other.mean - mean;
    mean += apart * (other.count / total);
    squares += other.squares + apart * apart * (count * other.count / total);
    count = total;
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
  }
};

PYRL_HOST_DEVICE double standard_deviation(double squares, double count, bool unbiased) {
  return std::sqrt(squares / (count - (unbiased ? 1 : 0)));
}

// One group's rewards as given, in two passes: `add` every reward and merge the threads' parts,
// then `refine` with the sums of (r - first_mean()) and of its square.
struct GroupStats {
  double sum = 0, square_sum = 0;
  double count = 0;
  double low = HUGE_VAL, high = -HUGE_VAL;
  double mean = 0, squares = 0;
  double factor = 1;  // what grpo, scaled and rloo multiply by, once a group

  PYRL_HOST_DEVICE void add(double r) {
    if (r != r) return;
    sum += r;
    square_sum += r * r;
    ++count;
    low = r < low ? r : low;
    high = r > high ? r : high;
  }
  PYRL_HOST_DEVICE double first_mean() const { return count > 0 ? sum / count : 0.0; }
  PYRL_HOST_DEVICE void refine(const GroupAdvantage& b, double deviation_sum,
                               double deviation_squares) {
    // Equal rewards have no spread: rounding of the mean must not be divided by eps.
    const bool equal = count == 0 || low == high;
    mean = count == 0 ? 0.0 : (equal ? low : first_mean() + deviation_sum / count);
    squares = equal ? 0.0 : deviation_squares - deviation_sum * deviation_sum / count;
    const bool by_std = b.method == kGrpo || b.method == kScaled;
    if (by_std && alone()) {
      factor = 1 / (1 + b.eps);
    } else if (by_std) {
      const double scale = std::fabs(b.scale);
      factor = equal ? 0.0 : 1 / (scale * standard_deviation(squares, count, b.unbiased) + b.eps);
    } else if (b.method == kRloo) {
      factor = alone() ? 0.0 : count / (count - 1);
    }
  }

  PYRL_HOST_DEVICE bool alone() const { return count == 1; }
  PYRL_HOST_DEVICE bool filtered(int filters) const {
    return count > 0 && (((filters & kDropAllCorrect) && low > 0) ||
                         ((filters & kDropAllWrong) && high <= 0) ||
                         ((filters & kDropZeroStd) && low == high));
  }
};

PYRL_HOST_DEVICE double mapped(const GroupAdvantage& b, double r) { return b.offset + b.scale * r; }

// Mapped reward less the group's mean, which is 0 for a group of one.
PYRL_HOST_DEVICE double centred(const GroupAdvantage& b, const GroupStats& group, double r) {
  return group.alone() ? mapped(b, r) : b.scale * (r - group.mean);
}

// The advantage of reward r (not NaN), or for `needs_batch` what the batch then scales:
//   grpo (x - mean) / (std + eps) · mean x - mean · rloo x - mean of the others ·
//   positive 1[x = max] · raw x · correct 1[x > 0] · batch_std, whiten_baseline x - mean ·
//   whiten x · scaled x / (std + eps)
PYRL_HOST_DEVICE double group_value(const GroupAdvantage& b, const GroupStats& group, double r) {
  switch (b.method) {
    case kPositive:
      return r == (b.scale > 0 ? group.high : group.low) ? 1.0 : 0.0;
    case kRaw:
    case kWhiten:
      return mapped(b, r);
    case kScaled:
      return mapped(b, r) * group.factor;
    case kCorrect:
      return mapped(b, r) > 0 ? 1.0 : 0.0;
    default:
      return centred(b, group, r) * group.factor;
  }
}

// What a group adds to the moments of the batch: its mapped rewards, or for whiten_baseline its
// `centred` values, whose sum is exactly 0 unless the group is of one.
PYRL_HOST_DEVICE Moments batch_share(const GroupAdvantage& b, const GroupStats& group) {
  Moments share;
  if (group.count == 0) return share;
  const bool of_centred = b.method == kWhitenBaseline;
  const double first = of_centred ? centred(b, group, group.low) : mapped(b, group.low);
  const double last = of_centred ? centred(b, group, group.high) : mapped(b, group.high);
  share.count = group.count;
  share.mean = of_centred && !group.alone() ? 0.0 : mapped(b, group.mean);
  share.squares = b.scale * b.scale * group.squares;
  share.low = first < last ? first : last;
  share.high = first < last ? last : first;
  return share;
}

// (x - shift) / (std + eps); a batch of one has mean 0 and std 1, one of equal values is all 0.
struct BatchScale {
  double shift, factor;

  PYRL_HOST_DEVICE static BatchScale of(const GroupAdvantage& b, const Moments& batch) {
    if (batch.count <= 1) return {0.0, 1 / (1 + b.eps)};
    const double spread = standard_deviation(batch.squares, batch.count, b.unbiased) + b.eps;
    return {b.method == kBatchStd ? 0.0 : batch.mean, batch.low == batch.high ? 0.0 : 1 / spread};
  }
  // A NaN value marks a sample that has no advantage.
  PYRL_HOST_DEVICE float operator()(double value) const {
    return value != value ? 0.0f : static_cast<float>((value - shift) * factor);
  }
};

// Sums and counts of a batch, the first kAdvantageMetrics in the order of METRICS of
// pyrl/ops/group_advantage.py, and its moments.
struct AdvantageSums {
  double samples = 0, groups = 0, flat_groups = 0, filtered = 0, nan_rewards = 0;
  double reward_sum = 0, reward_sq_sum = 0, kept = 0;
  Moments batch;

  // Adds a group of `size` samples, unscored ones included.
  PYRL_HOST_DEVICE void add(const GroupAdvantage& b, const GroupStats& group, double size) {
    const bool out = group.filtered(b.filters);
    samples += size;
    groups += size > 0;
    flat_groups += group.count > 0 && group.low == group.high;
    filtered += out ? group.count : 0;
    nan_rewards += size - group.count;
    reward_sum += group.sum;
    reward_sq_sum += group.square_sum;
    kept += out && b.drop ? 0 : group.count;
    if (needs_batch(b.method) && !(out && b.drop)) batch.merge(batch_share(b, group));
  }
  PYRL_HOST_DEVICE void merge(const AdvantageSums& other) {
    samples += other.samples;
    groups += other.groups;
    flat_groups += other.flat_groups;
    filtered += other.filtered;
    nan_rewards += other.nan_rewards;
    reward_sum += other.reward_sum;
    reward_sq_sum += other.reward_sq_sum;
    kept += other.kept;
    batch.merge(other.batch);
  }
  PYRL_HOST_DEVICE void write(double* metrics) const {
    const double values[kAdvantageMetrics] = {samples,     groups,     flat_groups,   filtered,
                                              nan_rewards, reward_sum, reward_sq_sum, kept};
    PYRL_UNROLL for (int i = 0; i < kAdvantageMetrics; ++i) metrics[i] = values[i];
  }
};

// Writes one sample's outputs; `value` [n] holds what the batch then scales, where it does.
PYRL_HOST_DEVICE void write_sample(const GroupAdvantage& b, const GroupStats& group, bool filtered,
                                   int64_t sample, double r, double* value) {
  const bool scored = r == r, live = scored && !filtered;
  b.keep[sample] = scored && !(filtered && b.drop);
  if (needs_batch(b.method)) {
    value[sample] = live ? group_value(b, group, r) : NAN;
  } else {
    b.advantages[sample] = live ? static_cast<float>(group_value(b, group, r)) : 0.0f;
  }
}

}  // namespace pyrl
