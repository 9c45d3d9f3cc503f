// The arithmetic of logits_policy.h on one row: sums of its exponentials, its token's objective, and
// what its elements become. Exponents are in base 2, y = x log2 e, as the hardware's are.
#pragma once

#include <cmath>

#include "kernels.h"
#include "objective.h"

#ifdef __CUDACC__
#define PYRL_TEAM __device__ __forceinline__
#else
#define PYRL_TEAM inline
#endif

namespace pyrl::one_read {

constexpr double kLn2 = 0.693147180559945309417;
constexpr double kLog2E = 1.44269504088896340736;
// 2^d is 0 from here down; a finite stand-in for d keeps 0 * d at 0.
constexpr float kFloor = -150.0f;
// Logits that models mask by (-1e10, -3e38) are no maximum: fma(z, factor, -y) would be off by more
// than an exponent holds. A row of nothing else is one of -inf.
constexpr float kLeast = -2147483648.0f;

PYRL_TEAM float pow2(float d) {  // 0 below 2^-126
#ifdef __CUDA_ARCH__
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(d));
  return e;
#else
  return d < -126.0f ? 0.0f : std::exp2(d);
#endif
}

// Raw logits to y, and dx/dz.
template <bool kCapped>
struct Scale {
  float factor, outer, slope_at_0;

  PYRL_TEAM Scale(const LogitsRows& rows, float inv_temperature)
      : slope_at_0(inv_temperature * rows.logit_scale) {
    factor = kCapped ? rows.logit_scale / rows.softcap : static_cast<float>(slope_at_0 * kLog2E);
    outer = static_cast<float>(static_cast<double>(rows.softcap) * inv_temperature * kLog2E);
  }
  PYRL_TEAM float y(float z) const {
    if constexpr (kCapped) return tanhf(z * factor) * outer;
    return z * factor;
  }
  // d = y - shift, and dx/dz relative to slope_at_0.
  PYRL_TEAM float d(float z, float shift, float* slope) const {
    if constexpr (kCapped) {
      const float squashed = tanhf(z * factor);
      *slope = 1.0f - squashed * squashed;
      return squashed * outer - shift;
    }
    *slope = 1.0f;
    return fmaf(z, factor, -shift);
  }
};

// A lane's sums so far, as in Partial.
struct Sums {
  float m = -INFINITY, s = 0.0f, t = 0.0f;

  PYRL_TEAM void raise(float top) {
    if (!(top > fmaxf(m, kLeast))) return;
    if (m > -INFINITY) {
      const float down = fmaxf(m - top, kFloor), factor = pow2(down);
      t = factor * (t + s * down);
      s *= factor;
    }
    m = top;
  }
  PYRL_TEAM void add(float d) {  // d = y - m
    const float e = pow2(d);     // of a NaN logit NaN
    s += e;
    t += e * fmaxf(d, kFloor);
  }
  PYRL_TEAM float shift() const { return m == -INFINITY ? 0.0f : m; }  // -inf - -inf is NaN
  // Relative to 2^top, top >= m.
  PYRL_TEAM Sums at(float top) const {
    const float down = fmaxf(m - top, kFloor), factor = pow2(down);
    Sums moved;
    moved.m = top;
    moved.t = factor * (t + s * down);
    moved.s = factor * s;
    return moved;
  }
};

// What all warps need for the gradient of a row: dz = e (base - slant d), d = y - shift, e = 2^d.
struct Plan {
  float shift, base, slant;
  float target_dz;
  int target;  // -1: not written
  bool zero;
};

// A token's fields, read while its logits are still coming.
struct Fields {
  float old = NAN, ref = NAN, rollout = NAN, advantage = 0.0f, weight = 0.0f, target_logit = NAN;
  int target = -1;  // outside the vocabulary, which only the host could refuse: answered by NaN

  // `row` holds the logits as floats or what Team::to_float takes.
  template <class Team, class T>
  PYRL_TEAM void read(const LogitsPolicy& b, int i, const T* row) {
    if (b.old) old = b.old[i];
    if (b.ref) ref = b.ref[i];
    if (b.rollout) rollout = b.rollout[i];
    advantage = b.advantage[i];
    weight = b.weight[i];
    const int64_t id = b.rows.target[i];
    if (id < 0 || id >= b.rows.vocab) return;
    target = static_cast<int>(id);
    target_logit = Team::to_float(row[id]);
  }
};

struct Stats {
  float logprob, entropy, lse;
};

// A row's statistics, then its objective's gradient, then what its elements become.
template <bool kCapped>
PYRL_TEAM Plan plan_row(const ObjectiveParams& p, const Scale<kCapped>& scale, const Fields& in,
                        float m, double s, double t, Stats* out) {
  const bool empty = s == 0.0;  // every logit is -inf
  const double log_s = empty ? 0.0 : log(s), shift = empty ? 0.0 : m;
  double y = static_cast<double>(in.target_logit) * scale.factor, slope = scale.slope_at_0;
  if constexpr (kCapped) {
    float relative;
    y = scale.d(in.target_logit, 0.0f, &relative);
    slope *= relative;
  }
  const double q = empty ? -INFINITY : (y - shift) * kLn2 - log_s;
  double entropy = empty ? 0.0 : log_s - t / s * kLn2;
  entropy = entropy < 0.0 ? 0.0 : entropy;
  out->logprob = static_cast<float>(q);
  out->entropy = static_cast<float>(entropy);
  out->lse = empty ? -INFINITY : static_cast<float>(shift * kLn2 + log_s);

  const Token token(out->logprob, out->entropy, in.old, in.ref, in.rollout, in.advantage,
                    in.weight);
  const Sequence alone;
  // Rounded as where c and h pass through memory: both ways agree.
  const float c = static_cast<float>(logprob_gradient(p, alone, TokenLoss(p, token, alone)));
  const float h = static_cast<float>(entropy_gradient(p, token));
  const bool used = c != 0.0f || h != 0.0f;
  Plan plan;
  plan.shift = static_cast<float>(shift);
  plan.zero = !used || empty;
  plan.target = used ? in.target : -1;
  // p (-c - h (log p + H)) with log p = d ln 2 - log s and p = 2^d / s
  const double over = empty ? 0.0 : scale.slope_at_0 / s;
  const double bonus = h != 0.0f ? h * (log_s - entropy) : 0.0;
  plan.base = static_cast<float>(over * (bonus - c));
  plan.slant = static_cast<float>(over * h * kLn2);
  // c (1 - p) must not cancel.
  double dx = c;
  if (q > -INFINITY) {
    const double prob = h != 0.0f ? pow2(static_cast<float>(y - shift)) / s : 0.0;
    dx = -c * expm1(q) - (prob > 0.0 ? h * prob * (q + entropy) : 0.0);
  } else if (q != q) {
    dx = NAN;
  }
  plan.target_dz = static_cast<float>(dx * slope);
  return plan;
}

template <bool kCapped>
PYRL_TEAM float gradient(const Plan& plan, const Scale<kCapped>& scale, float z) {
  float slope;
  const float d = scale.d(z, plan.shift, &slope);
  const float dz = pow2(d) * (plan.base - plan.slant * fmaxf(d, kFloor));
  return kCapped ? dz * slope : dz;
}

}  // namespace pyrl::one_read
