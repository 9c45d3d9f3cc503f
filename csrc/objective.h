// The policy objective of a token and of its sequence, with closed-form gradients: the one
// definition that the CPU and the CUDA kernel share; pyrl/ops/objective.py is the same in torch. A
// new objective is one function below and a line in policy_term (docs/adding-a-loss.md).
//
// Where tokens are coupled, a sequence is worked in three sweeps over its kept tokens: its sums
// (SequenceSums), the gradient through its shared ratio (objective_through), then losses and
// gradients (objective_at). Elsewhere the last sweep is the only one.
//
// In double on both devices: the vectors are short beside a model, and a ratio next to a clip bound
// falls on the same side as in the float64 oracle.
#pragma once

#include <cmath>

#include "kernels.h"
#include "spec.h"

namespace pyrl {

constexpr double kLogTiny = -18.420680743952367;  // log 1e-8: with kLogHuge, vespo's log-weights
constexpr double kLogHuge = 20.0;

PYRL_HOST_DEVICE bool missing(double x) { return x != x; }
PYRL_HOST_DEVICE double clamp(double x, double low, double high) {
  return x < low ? low : (x > high ? high : x);
}
// exp(min(x, 700)), its own derivative: huge but finite, so that 0 times it is 0.
PYRL_HOST_DEVICE double capped(double x) { return x > 700.0 ? 700.0 : x; }
PYRL_HOST_DEVICE double capped_exp(double x) { return std::exp(capped(x)); }
// capped_exp(d) - d - 1 without the cancellation of its plain form near d = 0
PYRL_HOST_DEVICE double k3(double d) { return std::expm1(capped(d)) - capped(d); }

// Inputs of one kept token; NaN: missing at this token, or the whole vector is not given.
struct Token {
  double logprob, entropy, old, ref, rollout, advantage, weight;

  PYRL_HOST_DEVICE Token(const ObjectiveBatch& b, int64_t i)
      : logprob(b.logprob[i]),
        entropy(b.entropy ? b.entropy[i] : 0.0),
        old(b.old ? b.old[i] : NAN),
        ref(b.ref ? b.ref[i] : NAN),
        rollout(b.rollout ? b.rollout[i] : NAN),
        advantage(b.advantage[i]),
        weight(b.weight[i]) {}
  PYRL_HOST_DEVICE Token(double logprob, double entropy, double old, double ref, double rollout,
                         double advantage, double weight)
      : logprob(logprob), entropy(entropy), old(old), ref(ref), rollout(rollout),
        advantage(advantage), weight(weight) {}
  // Without an old log-prob the token is on-policy: delta is 0, with gradient. Subtracted all the
  // same, so that a NaN log-prob stays seen.
  PYRL_HOST_DEVICE double delta() const { return logprob - anchor(); }
  PYRL_HOST_DEVICE double anchor() const { return missing(old) ? logprob : old; }
  PYRL_HOST_DEVICE bool scored() const { return !missing(rollout); }
  PYRL_HOST_DEVICE double log_correction() const { return scored() ? anchor() - rollout : 0.0; }
};

// Detached weight of the policy term.
struct Correction {
  double weight;
  bool scored, masked;  // a rollout log-prob stands behind the weight; mis, icepop put 0
};

// w = exp(log_w), clamped (tis) or 0 outside the bounds (mis, icepop); 1 where nothing is scored.
PYRL_HOST_DEVICE Correction truncated(const ObjectiveParams& p, double log_w, bool scored) {
  if (p.correction == kNoCorrection || !scored) return {1.0, false, false};
  const double w = std::exp(log_w), low = p.correction_low, high = p.correction_high;
  if (p.correction == kTis) return {clamp(w, low, high), true, false};
  const bool outside = !(w >= low && w <= high);
  return {outside ? 0.0 : w, true, outside};
}

// delta, clipped on the side that the advantage's sign selects (gmpo).
struct ClippedDelta {
  double value;
  bool low, high;

  PYRL_HOST_DEVICE ClippedDelta(const ObjectiveParams& p, const Token& t) : value(t.delta()) {
    low = t.advantage < 0.0 && value < -p.clip_low;
    high = t.advantage > 0.0 && value > p.clip_high;
    value = low ? -p.clip_low : (high ? p.clip_high : value);
  }
};

// First sweep of a sequence: sums over its kept tokens.
struct SequenceSums {
  enum { kCount, kLogRatio, kLogWeight, kLogCorrection, kScored, kGap, kSums };
  double value[kSums] = {};

  PYRL_HOST_DEVICE void add(const ObjectiveParams& p, const ObjectiveBatch& b, int64_t i) {
    if (!b.keep[i]) return;
    const Token t(b, i);
    value[kCount] += 1.0;
    value[kLogRatio] += p.objective == kGmpo ? ClippedDelta(p, t).value : t.delta();
    value[kLogCorrection] += t.log_correction();
    value[kScored] += t.scored();
    // An unscored token is no evidence of a gap; without a sampler the gap is to the old policy.
    value[kGap] += t.scored() ? t.rollout - t.logprob : (b.rollout ? 0.0 : -t.delta());
    if (p.objective == kVespo) {
      const Correction one = truncated(p, t.log_correction(), t.scored());
      value[kLogWeight] += clamp(t.delta(), -20.0, 20.0);
      value[kLogWeight] += clamp(std::log(one.weight), kLogTiny, kLogHuge);
    }
  }
  PYRL_HOST_DEVICE void merge(const SequenceSums& other) {
    PYRL_UNROLL
    for (int i = 0; i < kSums; ++i) value[i] += other.value[i];
  }
};

// What every token of a sequence takes from it; unused where tokens are not coupled.
struct Sequence {
  double count = 0.0;  // kept tokens
  double ratio = 1.0;  // exp(mean delta); gmpo: of the clipped deltas
  double log_weight = 0.0;  // vespo's clamped log w
  Correction correction = {1.0, false, false};
  bool off_policy = false;  // beyond off_policy_threshold
  double through = 0.0;  // d loss / d log ratio, the second sweep's sum

  Sequence() = default;
  PYRL_HOST_DEVICE Sequence(const ObjectiveParams& p, const SequenceSums& sums) {
    const double* s = sums.value;
    count = s[SequenceSums::kCount];
    ratio = capped_exp(s[SequenceSums::kLogRatio] / count);
    log_weight = clamp(s[SequenceSums::kLogWeight], kLogTiny, kLogHuge);
    const double log_correction = s[SequenceSums::kLogCorrection];
    correction = truncated(
        p, p.correction_level == kGeometricCorrection ? log_correction / count : log_correction,
        s[SequenceSums::kScored] > 0.0);
    off_policy = s[SequenceSums::kGap] / count > p.off_policy_threshold;
  }
};

// A policy term l with its gradient: dl / dlogprob = direct + through * d log r / dlogprob, r the
// ratio it used; and where its bounds acted.
struct PolicyTerm {
  double loss, direct, through;
  bool low = false, high = false, dual = false;
};

// -A logprob
PYRL_HOST_DEVICE PolicyTerm reinforce_term(const Token& t) {
  return {-t.advantage * t.logprob, -t.advantage, 0.0};
}

// -min(min(r, delta) A, clamp(r, 1 - lo, 1 + hi) A), at most -dual_clip A where A < 0. Ties follow
// torch: clamp passes the gradient at its bounds, minimum halves it between equal sides.
PYRL_HOST_DEVICE PolicyTerm clip_term(const ObjectiveParams& p, double a, double r) {
  const double low = 1.0 - p.clip_low, high = 1.0 + p.clip_high;
  const double free_side = (r > p.delta ? p.delta : r) * a, clipped_side = clamp(r, low, high) * a;
  const double free_slope = r > p.delta ? 0.0 : r * a;
  const double clipped_slope = r < low || r > high ? 0.0 : r * a;
  PolicyTerm term{-free_side, 0.0, -free_slope, a < 0.0 && r < low, a > 0.0 && r > high};
  if (clipped_side < free_side) {
    term.loss = -clipped_side;
    term.through = -clipped_slope;
  } else if (clipped_side == free_side) {
    term.through = -(free_slope + clipped_slope) / 2.0;
  }
  if (a < 0.0 && p.dual_clip < HUGE_VAL) {
    const double bound = -p.dual_clip * a;
    term.dual = -free_side > bound;
    if (term.loss >= bound) term.through = term.loss > bound ? 0.0 : term.through / 2.0;
    if (term.loss > bound) term.loss = bound;
  }
  return term;
}

// -sg[clamp(r, lo, hi)] A logprob
PYRL_HOST_DEVICE PolicyTerm cispo_term(const ObjectiveParams& p, const Token& t, double r) {
  const double slope = -clamp(r, p.cispo_low, p.cispo_high) * t.advantage;
  return {slope * t.logprob, slope, 0.0, r < p.cispo_low, r > p.cispo_high};
}

// -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A
PYRL_HOST_DEVICE PolicyTerm sapo_term(const ObjectiveParams& p, double a, double r) {
  const double tau = a > 0.0 ? p.sapo_tau_pos : p.sapo_tau_neg, x = tau * (r - 1.0);
  const double gate = 1.0 / (1.0 + std::exp(-x)), rest = 1.0 / (1.0 + std::exp(x));  // sum to 1
  return {-a * (4.0 / tau) * gate, 0.0, -a * 4.0 * gate * rest * r};
}

// -A r, r = exp(mean of the clipped deltas): a clipped token has no part in the gradient through r
PYRL_HOST_DEVICE PolicyTerm gmpo_term(const ObjectiveParams& p, const Token& t, double r) {
  const ClippedDelta delta(p, t);
  return {-t.advantage * r, 0.0, -t.advantage * r, delta.low, delta.high};
}

// -sg[exp(lambda + k log w - lambda w)] A logprob, (k, lambda) by the sign of A
PYRL_HOST_DEVICE PolicyTerm vespo_term(const ObjectiveParams& p, const Token& t, double log_w) {
  const bool positive = t.advantage >= 0.0;
  const double k = positive ? p.vespo_k_pos : p.vespo_k_neg;
  const double rate = positive ? p.vespo_lambda_pos : p.vespo_lambda_neg;
  const double slope = -std::exp(rate + k * log_w - rate * std::exp(log_w)) * t.advantage;
  return {slope * t.logprob, slope, 0.0};
}

// -r A, and 0 where the divergence at the sampled token is beyond its bound on A's side
PYRL_HOST_DEVICE PolicyTerm dppo_term(const ObjectiveParams& p, const Token& t, double r) {
  const double prob = std::exp(t.logprob), old = std::exp(t.anchor());
  double divergence = std::fabs(prob - old);
  if (p.dppo_divergence == kBinaryKl) {
    divergence = old > 0.0 ? old * (t.anchor() - t.logprob) : 0.0;
    divergence += (1.0 - old) * std::log((1.0 - old + 1e-8) / (1.0 - prob + 1e-8));
  }
  const bool high = t.advantage > 0.0 && prob > old && divergence > p.dppo_high;
  const bool low = t.advantage <= 0.0 && prob < old && divergence > p.dppo_low;
  const double loss = low || high ? 0.0 : -r * t.advantage;
  return {loss, 0.0, loss, low, high};
}

PYRL_HOST_DEVICE PolicyTerm policy_term(const ObjectiveParams& p, const Token& t, double r,
                                        const Sequence& s) {
  switch (p.objective) {
    case kReinforce: return reinforce_term(t);
    case kClip: return clip_term(p, t.advantage, r);
    case kCispo: return cispo_term(p, t, r);
    case kSapo: return sapo_term(p, t.advantage, r);
    case kGmpo: return gmpo_term(p, t, r);
    case kVespo: return vespo_term(p, t, s.log_weight);
    case kDppo: return dppo_term(p, t, r);
    default: return {NAN, NAN, NAN};  // never another loss; check.h has refused it
  }
}

// A KL estimate and its derivative with respect to logprob, d = ref - logprob
struct KlTerm {
  double value, slope;
};

PYRL_HOST_DEVICE KlTerm kl_term(const ObjectiveParams& p, double d) {
  KlTerm kl{-d, 1.0};
  if (p.kl == kK2) kl = {d * d / 2.0, -d};
  if (p.kl == kK3) kl = {k3(d), -std::expm1(capped(d))};
  if (p.kl == kAbs) kl = {std::fabs(d), d > 0.0 ? -1.0 : (d < 0.0 ? 1.0 : 0.0)};
  if (p.kl == kK3St) kl = {k3(d), -d};
  const double bound = p.kl_clamp;
  if (bound == HUGE_VAL || (kl.value >= -bound && kl.value <= bound)) return kl;
  return {clamp(kl.value, -bound, bound), 0.0};
}

// Everything of a token's weighted loss but the entropy bonus.
struct TokenLoss {
  double ratio;  // of the ratio level; gmpo: the sequence's geometric mean
  Correction correction;
  PolicyTerm policy;
  bool off_policy;
  double policy_loss, kl_loss;  // weighted
  double direct, through;  // gradients of their sum, as in PolicyTerm

  PYRL_HOST_DEVICE TokenLoss(const ObjectiveParams& p, const Token& t, const Sequence& s)
      : ratio(p.ratio_level == kTokenRatio && p.objective != kGmpo ? capped_exp(t.delta())
                                                                   : s.ratio),
        correction(p.correction_level == kTokenCorrection
                       ? truncated(p, t.log_correction(), t.scored())
                       : s.correction),
        policy(policy_term(p, t, ratio, s)),
        off_policy(t.advantage < 0.0 && s.off_policy) {
    const double factor = p.objective == kVespo ? 1.0 : correction.weight;
    // Selected, not multiplied: the term may be infinite, as a log-prob of -inf makes it.
    const bool off = off_policy || t.advantage == 0.0 || !(factor > 0.0);
    policy_loss = off ? 0.0 : t.weight * (factor * policy.loss);
    direct = off ? 0.0 : t.weight * (factor * policy.direct);
    through = off ? 0.0 : t.weight * (factor * policy.through);

    kl_loss = 0.0;
    // An overflowing estimate must not reach a loss that does not use it.
    if (missing(t.ref) || p.kl_coef == 0.0) return;
    KlTerm kl = kl_term(p, t.ref - t.logprob);
    const double w = t.weight * p.kl_coef;
    if (p.kl_ratio_weighted) {
      kl = {kl.value * ratio, kl.slope * ratio};
      through += w * kl.value;
    }
    kl_loss = w * kl.value;
    direct += w * kl.slope;
  }
};

// Second sweep: token i's part of d loss / d log ratio of its sequence (shares_ratio).
PYRL_HOST_DEVICE double objective_through(const ObjectiveParams& p, const ObjectiveBatch& b,
                                          int64_t i, const Sequence& s) {
  return b.keep[i] ? TokenLoss(p, Token(b, i), s).through : 0.0;
}

// d(weighted policy and KL terms) / dlogprob of a token.
PYRL_HOST_DEVICE double logprob_gradient(const ObjectiveParams& p, const Sequence& s,
                                         const TokenLoss& loss) {
  if (!p.shares_ratio()) return loss.direct + loss.through;
  const bool clipped = p.objective == kGmpo && (loss.policy.low || loss.policy.high);
  return loss.direct + (clipped ? 0.0 : s.through / s.count);
}

PYRL_HOST_DEVICE double entropy_gradient(const ObjectiveParams& p, const Token& t) {
  return p.entropy_coef == 0.0 ? 0.0 : -t.weight * p.entropy_coef;
}

// Last sweep: token i's loss and metrics are added to `sums`, b.c[i] and b.h[i] are written. What
// an unkept token holds is never computed with.
PYRL_HOST_DEVICE void objective_at(const ObjectiveParams& p, const ObjectiveBatch& b, int64_t i,
                                   const Sequence& s, ObjectiveSums& sums) {
  if (!b.keep[i]) {
    b.c[i] = b.h[i] = 0.0f;
    return;
  }
  const Token t(b, i);
  const TokenLoss loss(p, t, s);
  const double h = entropy_gradient(p, t);
  b.c[i] = static_cast<float>(logprob_gradient(p, s, loss));
  b.h[i] = static_cast<float>(b.entropy ? h : 0.0);

  double* m = sums.value;
  m[kTokens] += 1.0;
  m[kPolicyLoss] += loss.policy_loss;
  m[kKlLoss] += loss.kl_loss;
  if (h != 0.0) m[kEntropyLoss] += h * t.entropy;
  m[kLogprobSum] += t.logprob;
  m[kEntropySum] += t.entropy;
  if (!missing(t.ref)) {
    m[kKlK1Sum] += t.logprob - t.ref;
    m[kKlK3Sum] += k3(t.ref - t.logprob);
  }
  m[kOldKlSum] += k3(-t.delta());
  if (t.scored()) m[kRolloutKlSum] += k3(t.log_correction());
  m[kRatioSum] += loss.ratio;
  m[kRatioSqSum] += loss.ratio * loss.ratio;
  m[kRatioMin] = merge_metric(kRatioMin, m[kRatioMin], loss.ratio);
  m[kRatioMax] = merge_metric(kRatioMax, m[kRatioMax], loss.ratio);
  m[kClipLow] += loss.policy.low;
  m[kClipHigh] += loss.policy.high;
  m[kDualClip] += loss.policy.dual;
  if (loss.correction.scored) {
    const double w = loss.correction.weight;
    m[kCorrectionSum] += w;
    m[kCorrectionSqSum] += w * w;
    m[kCorrectionMax] = merge_metric(kCorrectionMax, m[kCorrectionMax], w);
  }
  m[kCorrectionMasked] += loss.correction.masked;
  m[kOffPolicyMasked] += loss.off_policy;
  m[kZeroAdvantage] += t.advantage == 0.0;
  m[kNanOld] += b.old && missing(t.old);
  m[kNanRef] += b.ref && missing(t.ref);
  m[kNanRollout] += b.rollout && missing(t.rollout);
}

}  // namespace pyrl
