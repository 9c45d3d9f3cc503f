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
