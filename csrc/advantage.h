// A sample's advantage within its group, shared by the CPU and the CUDA kernel.
// Statistics are double and leave out NaN rewards (samples that could not be scored).
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "objective.h"

namespace pyrl {

struct GroupStats {
  double sum = 0;
  int64_t count = 0;
  float low = HUGE_VALF, high = -HUGE_VALF;

  PYRL_HOST_DEVICE void add(float r) {
    if (r != r) return;
    sum += r;
    ++count;
    low = r < low ? r : low;
    high = r > high ? r : high;
  }
  PYRL_HOST_DEVICE void merge(const GroupStats& other) {
    sum += other.sum;
    count += other.count;
    low = other.low < low ? other.low : low;
    high = other.high > high ? other.high : high;
  }
  PYRL_HOST_DEVICE bool alone() const { return count == 1; }
  // Equal rewards have no spread: rounding of the mean must not be divided by eps.
  PYRL_HOST_DEVICE bool equal() const { return low == high && !alone(); }
  // A group of one has mean 0 and standard deviation 1.
  PYRL_HOST_DEVICE double mean() const { return alone() ? 0.0 : sum / static_cast<double>(count); }
};

// `squares` = sum of (r - mean)^2 over the group's scored rewards
PYRL_HOST_DEVICE double group_std(const GroupStats& group, double squares, bool unbiased) {
  if (group.alone()) return 1.0;
  return std::sqrt(squares / static_cast<double>(group.count - (unbiased ? 1 : 0)));
}

// grpo (r - mean) / (std + eps), mean r - mean, rloo r - mean of the others, positive 1[r = max],
// raw r; r is not NaN.
PYRL_HOST_DEVICE double advantage_of(double r, const GroupStats& group, int method, double std,
                                     double eps) {
  switch (method) {
    case kGrpo:
      return group.equal() ? 0.0 : (r - group.mean()) / (std + eps);
    case kMean:
      return group.equal() ? 0.0 : r - group.mean();
    case kRloo:
      return group.alone() || group.equal()
                 ? 0.0
                 : r - (group.sum - r) / static_cast<double>(group.count - 1);
    case kPositive:
      return r == group.high ? 1.0 : 0.0;
    default:
      return r;
  }
}

}  // namespace pyrl
