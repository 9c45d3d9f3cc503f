// The policy objective of one token, with its closed-form gradient: the one definition that the CPU
// and the CUDA kernel share. pyrl/ops/objective.py is the same in torch; pyrl/ops/spec.py fixes the
// order of the parameters (PARAMS) and of the sums (METRICS).
//
// In double on both devices: the vectors are short beside a model, and a ratio next to a clip bound
// falls on the same side as in the float64 oracle.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define PYRL_HOST_DEVICE __host__ __device__ __forceinline__
#define PYRL_UNROLL _Pragma("unroll")  // run-time indices would put the sums in local memory
#else
#define PYRL_HOST_DEVICE inline
#define PYRL_UNROLL
#endif

namespace pyrl {

enum Objective { kReinforce = 0, kClip = 1 };
enum Kl { kK1 = 0, kK2 = 1, kK3 = 2 };

constexpr int kParams = 7;

struct ObjectiveParams {
  int objective;
  double clip_low, clip_high;  // distances from 1
  double dual_clip;            // 0: none
  int kl;
  double kl_coef, entropy_coef;

  // From the float64 vector of LossSpec.params().
  static ObjectiveParams from(const double* v) {
    return {static_cast<int>(v[0]), v[1], v[2], v[3], static_cast<int>(v[4]), v[5], v[6]};
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
  kRatioSum,
  kRatioSqSum,
  kRatioMin,
  kRatioMax,
  kClipLow,
  kClipHigh,
  kDualClip,
  kZeroAdvantage,
  kNanOld,
  kNanRef,
  kMetrics  // their number
};

PYRL_HOST_DEVICE double merge_metric(int metric, double a, double b) {
  if (metric == kRatioMin) return b < a ? b : a;
  if (metric == kRatioMax) return b > a ? b : a;
  return a + b;
}

// What merge_metric starts from; the extremes of nothing are +inf and -inf.
PYRL_HOST_DEVICE double empty_metric(int metric) {
  if (metric == kRatioMin) return HUGE_VAL;
  if (metric == kRatioMax) return -HUGE_VAL;
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
  // weight * (policy + kl_coef KL - entropy_coef H), summed
  PYRL_HOST_DEVICE double loss() const {
    return value[kPolicyLoss] + value[kKlLoss] + value[kEntropyLoss];
  }
};

// Inputs of one kept token. An absent old, ref or entropy vector has its has_* false.
struct Token {
  double logprob, entropy, old, ref, advantage, weight;
  bool has_entropy, has_old, has_ref;
};

// c = d loss / d logprob, h = d loss / d entropy, of the token's weighted loss.
struct TokenGradient {
  double c, h;
};

// exp(d) - d - 1 without the cancellation of its plain form near d = 0
PYRL_HOST_DEVICE double k3(double d) { return std::expm1(d) - d; }

// The token's weighted loss is added to `sums` with every metric; its gradient is returned.
// Only kept tokens come here: what an unkept one holds is never computed with.
PYRL_HOST_DEVICE TokenGradient objective_token(const ObjectiveParams& p, const Token& t,
                                               ObjectiveSums& sums) {
  double* m = sums.value;
  const double a = t.advantage;

  // No old log-prob: on-policy, the ratio is 1 with gradient.
  const bool nan_old = t.has_old && t.old != t.old;
  const double delta = (t.has_old && !nan_old) ? t.logprob - t.old : 0.0;
  const double ratio = std::exp(delta);

  // Policy term l and its derivative dl with respect to logprob. Ties follow torch's minimum and
  // clamp: both sides of a tie inside the bounds carry the whole gradient, bounds included.
  double l, dl;
  if (p.objective == kReinforce) {
    l = -a * t.logprob;
    dl = -a;
  } else {
    const double low = 1.0 - p.clip_low, high = 1.0 + p.clip_high;
    const bool below = ratio < low, above = ratio > high;
    const double clipped = below ? low : (above ? high : ratio);
    const double free_term = ratio * a, clipped_term = clipped * a;
    const bool clips = clipped_term < free_term;  // the clipped side is the minimum
    l = -(clips ? clipped_term : free_term);
    dl = clips ? 0.0 : -free_term;
    m[kClipLow] += below && a < 0.0;
    m[kClipHigh] += above && a > 0.0;
    if (p.dual_clip > 0.0 && a < 0.0) {
      const double bound = -p.dual_clip * a;
      m[kDualClip] += -free_term > bound;
      if (l > bound) {
        l = bound;
        dl = 0.0;
      } else if (l == bound) {
        dl = dl / 2.0;
      }
    }
  }
  const double w = t.weight;
  double c = w * dl;
  m[kPolicyLoss] += w * l;

  const bool nan_ref = t.has_ref && t.ref != t.ref;
  if (t.has_ref && !nan_ref) {
    const double d = t.ref - t.logprob;
    const double d_k3 = k3(d);
    m[kKlK1Sum] -= d;
    m[kKlK3Sum] += d_k3;
    // Selected, not multiplied: an overflowing estimate must not reach a loss that does not use it.
    if (p.kl_coef != 0.0) {
      double kl = -d, dkl = 1.0;
      if (p.kl == kK2) {
        kl = d * d / 2.0;
        dkl = -d;
      } else if (p.kl == kK3) {
        kl = d_k3;
        dkl = -std::expm1(d);
      }
      c += w * p.kl_coef * dkl;
      m[kKlLoss] += w * p.kl_coef * kl;
    }
  }

  double h = 0.0;
  if (t.has_entropy) {
    m[kEntropySum] += t.entropy;
    if (p.entropy_coef != 0.0) {
      h = -w * p.entropy_coef;
      m[kEntropyLoss] += h * t.entropy;
    }
  }

  m[kTokens] += 1;
  m[kLogprobSum] += t.logprob;
  m[kOldKlSum] += k3(-delta);
  m[kRatioSum] += ratio;
  m[kRatioSqSum] += ratio * ratio;
  m[kRatioMin] = merge_metric(kRatioMin, m[kRatioMin], ratio);
  m[kRatioMax] = merge_metric(kRatioMax, m[kRatioMax], ratio);
  m[kZeroAdvantage] += a == 0.0;
  m[kNanOld] += nan_old;
  m[kNanRef] += nan_ref;
  return {c, h};
}

}  // namespace pyrl
