// From raw logits to softmax inputs, and the gradient at the target: what the kernels over rows and
// those over whole heads share.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace {

// x = softcap(z * logit_scale) * inv_temperature; T is float where all lanes are of one row, Float
// where every lane is a row.
template <bool kCapped, class T>
struct Transform {
  T factor;  // x = z * factor, or outer * tanh(z * factor)
  T outer;   // cap * inv_temperature
  T slope;   // dx/dz at 0

  struct Result {
    Float x, slope;
  };
  PYRL_MEMBER Result apply(Float z) const {
    if constexpr (kCapped) {
      const Float squashed = tanh(z * factor);
      return {squashed * outer, slope * (1.0f - squashed * squashed)};
    } else {
      return {z * factor, slope - Float{}};
    }
  }
};

// exp(kUnit x): in the unit log(2) that is a power of 2, whose argument takes one subtraction to
// reduce, not two multiplications more. Of f32 logits it would round x once more.
template <bool kBinary>
constexpr float kUnit = kBinary ? 0.693147180559945309f : 1.0f;

template <bool kBinary>
PYRL_INLINE Exp power(Float x) {
#if PYRL_AVX512
  if constexpr (kBinary) {
    const Float clamped = max_or_second(splat(-152.0f), x);  // 2^-152 rounds to 0
    const Float n = _mm512_roundscale_ps(clamped, 0), r = clamped - n;
    // |r| <= 1/2: minimax with p(0) = 1, error 1e-7, a 20000th of a bf16 gradient's.
    Float p = splat(1.326472731307149e-3f);
    p = p * r + 9.671512991189957e-3f;
    p = p * r + 5.550733581185341e-2f;
    p = p * r + 0.24022242426872253f;
    p = p * r + 0.6931470036506653f;
    p = p * r + 1.0f;
    return {clamped, _mm512_scalef_ps(p, n)};
  }
#else
  static_assert(!kBinary, "only where exponents are scaled by an instruction");
#endif
  return exp_or_zero(x);
}

template <bool kCapped>
Transform<kCapped, float> row_transform(const pyrl::LogitsRows& rows, int64_t row) {
  const float inv_temperature = quiet_nan(rows.inv_temperature[row]);
  const float slope = inv_temperature * rows.logit_scale;
  return {kCapped ? rows.logit_scale / rows.softcap : slope, rows.softcap * inv_temperature, slope};
}

// dx/dlogits of the target, where 1 - p must not cancel.
inline float target_gradient(float x, float lse, float entropy, float c, float h, float g) {
  if (!(x > -__builtin_inff()) || !(lse > -__builtin_inff())) return c;
  const double q = static_cast<double>(x) - lse, p = std::exp(q);
  const double bonus = h != 0 && p > 0 ? h * p * (q + entropy) : 0.0;
  return static_cast<float>(-c * std::expm1(q) - bonus + g * p);
}

}  // namespace
