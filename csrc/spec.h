// The loss as numbers: pyrl/ops/spec.py in C++, order of the parameters (PARAMS) and of the sums
// (METRICS) included. Shared by the host and the device.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define PYRL_HOST_DEVICE __host__ __device__ __forceinline__
#define PYRL_UNROLL _Pragma("unroll")  // run-time indices would put the sums in local memory
#else
#define PYRL_HOST_DEVICE inline __attribute__((always_inline))
#define PYRL_UNROLL
#endif

namespace pyrl {

// Each ends with its number of names.
enum Objective { kReinforce, kClip, kCispo, kSapo, kGmpo, kVespo, kDppo, kObjectives };
enum RatioLevel { kTokenRatio, kSequenceRatio, kSequenceTokenRatio, kRatioLevels };
enum Divergence { kTotalVariation, kBinaryKl, kDivergences };
enum Kl { kK1, kK2, kK3, kAbs, kK3St, kKls };
enum CorrectionKind { kNoCorrection, kTis, kMis, kIcepop, kCorrections };
enum CorrectionLevel {
  kTokenCorrection,
  kSequenceCorrection,
  kGeometricCorrection,
  kCorrectionLevels
};

constexpr int kParams = 27;

// Where names are among the parameters, and how many there are: a number beyond them would compute
// another loss, so the host refuses it (check.h).
struct NamedParam {
  int at, names;
  const char* name;
};
constexpr NamedParam kNamedParams[] = {
    {0, kObjectives, "objective"},
    {1, kRatioLevels, "ratio_level"},
    {14, kDivergences, "dppo_divergence"},
    {17, kKls, "kl"},
    {22, kCorrections, "correction"},
    {23, kCorrectionLevels, "correction_level"},
};

// LossSpec.params(), in its order; an absent bound is infinite.
struct ObjectiveParams {
  int objective, ratio_level;
  double clip_low, clip_high;  // distances from 1
  double dual_clip, delta;
  double cispo_low, cispo_high;
  double sapo_tau_pos, sapo_tau_neg;
  double vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg;
  int dppo_divergence;
  double dppo_low, dppo_high;
  int kl;
  double kl_coef;
  bool kl_ratio_weighted;
  double kl_clamp, entropy_coef;
  int correction, correction_level;
  double correction_low, correction_high;
  double off_policy_threshold;

  static ObjectiveParams from(const double* v) {
    const auto name = [v](int i) { return static_cast<int>(v[i]); };
    return {name(0), name(1), v[2],  v[3],  v[4],     v[5],     v[6],  v[7],  v[8],
            v[9],    v[10],   v[11], v[12], v[13],    name(14), v[15], v[16], name(17),
            v[18],   v[19] != 0.0, v[20], v[21], name(22), name(23), v[24], v[25], v[26]};
  }
  // Whether all tokens of a sequence take one ratio, and so share the gradient through it.
  PYRL_HOST_DEVICE bool shares_ratio() const {
    return ratio_level == kSequenceRatio || objective == kGmpo;
  }
  // LossSpec.couples_tokens: the sequences are needed.
  PYRL_HOST_DEVICE bool couples_tokens() const {
    return ratio_level != kTokenRatio || objective == kGmpo || objective == kVespo ||
           off_policy_threshold < HUGE_VAL ||
           (correction != kNoCorrection && correction_level != kTokenCorrection);
  }
};

enum Metric {
  kTokens,
  kPolicyLoss,
  kKlLoss,
  kEntropyLoss,
  kLogprobSum,
  kEntropySum,
  kKlK1Sum,
  kKlK3Sum,
  kOldKlSum,
  kRolloutKlSum,
  kRatioSum,
  kRatioSqSum,
  kRatioMin,
  kRatioMax,
  kClipLow,
  kClipHigh,
  kDualClip,
  kCorrectionSum,
  kCorrectionSqSum,
  kCorrectionMax,
  kCorrectionMasked,
  kOffPolicyMasked,
  kZeroAdvantage,
  kNanOld,
  kNanRef,
  kNanRollout,
  kMetrics  // their number
};

PYRL_HOST_DEVICE double merge_metric(int metric, double a, double b) {
  if (metric == kRatioMin) return b < a ? b : a;
  if (metric == kRatioMax || metric == kCorrectionMax) return b > a ? b : a;
  return a + b;
}

// What merge_metric starts from; the extremes of nothing are +inf and -inf.
PYRL_HOST_DEVICE double empty_metric(int metric) {
  if (metric == kRatioMin) return HUGE_VAL;
  if (metric == kRatioMax || metric == kCorrectionMax) return -HUGE_VAL;
  return 0.0;
}

// Over the kept tokens seen so far; merge() joins blocks, micro-batches and ranks.
struct ObjectiveSums {
  double value[kMetrics];

  PYRL_HOST_DEVICE ObjectiveSums() {
    PYRL_UNROLL
    for (int i = 0; i < kMetrics; ++i) value[i] = empty_metric(i);
  }
  PYRL_HOST_DEVICE void merge(const ObjectiveSums& other) {
    PYRL_UNROLL
    for (int i = 0; i < kMetrics; ++i) value[i] = merge_metric(i, value[i], other.value[i]);
  }
};

// sum of weight * (correction * policy + kl_coef KL - entropy_coef H), of [kMetrics] sums
PYRL_HOST_DEVICE double total_loss(const double* metrics) {
  return metrics[kPolicyLoss] + metrics[kKlLoss] + metrics[kEntropyLoss];
}

}  // namespace pyrl
