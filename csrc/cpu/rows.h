// Rows of logits, see kernels.h: included by one file per instruction set, which names the table.
#pragma once

#include <cmath>

#include "cpu/softmax.h"

namespace {

using pyrl::DType;
using pyrl::LogitsGrad;
using pyrl::LogitsRows;
using pyrl::LogitsStats;

constexpr int kUnroll = 4;  // independent sums hide the latency of the multiply-adds
constexpr int kBlock = 1024;  // floats of a row kept in L1 between the maximum and the sums
static_assert(kBlock % (kUnroll * kWidth) == 0, "blocks hold whole unrolled steps");

// The first element of row i.
inline int64_t offset(const pyrl::RowIndex& at, int64_t i) {
  return (at.index ? at.index[i] : i) * at.stride;
}

// One pass over the row: blocks go through L1, the sums are rescaled when the maximum rises.
template <DType D, bool kCapped>
void row_stats(const LogitsRows& rows, const LogitsStats& out, int64_t row) {
  using E = Element<D>;
  const auto transform = row_transform<kCapped>(rows, row);
  const auto* z = static_cast<const typename E::type*>(rows.z) + offset(rows.at, row);
  constexpr float kInf = __builtin_inff();
  alignas(64) float x[kBlock];
  float m = -kInf;
  double s = 0, t = 0;  // sum of e = exp(x - m), and of e (x - m)

  for (int64_t start = 0; start < rows.vocab; start += kBlock) {
    const int count = static_cast<int>(rows.vocab - start < kBlock ? rows.vocab - start : kBlock);
    Float top = splat(-kInf);
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      const Float v = transform.apply(E::load(z + start + i)).x;
      top = max_or_second(v, top);
      std::memcpy(x + i, &v, sizeof v);
    }
    if (i < count) {
      Float v = transform.apply(load_first<D>(z + start + i, count - i)).x;
      for (int k = count - i; k < kWidth; ++k) v[k] = -kInf;  // a negative scale made them +inf
      top = max_or_second(v, top);
      std::memcpy(x + i, &v, sizeof v);
      i += kWidth;
    }
    const int used = (i + kUnroll * kWidth - 1) / (kUnroll * kWidth) * (kUnroll * kWidth);
    for (; i < used; ++i) x[i] = -kInf;

    const float block_max = horizontal_max(top);
    if (block_max > m) {
      if (m > -kInf) {
        const double down = static_cast<double>(m) - block_max, factor = std::exp(down);
        t = factor * (t + s * down);
        s = factor * s;
      }
      m = block_max;
    }
    const Float shift = splat(m == -kInf ? 0.0f : m);  // -inf - -inf would be NaN
    Float sums[kUnroll] = {}, products[kUnroll] = {};
    for (int b = 0; b < used; b += kUnroll * kWidth) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        Float v;
        std::memcpy(&v, x + b + u * kWidth, sizeof v);
        const Exp e = exp_or_zero(v - shift);
        sums[u] += e.value;
        products[u] += e.value * e.argument;
      }
    }
    // At most kBlock / kUnroll / kWidth terms were added in fp32; the rest is double.
    s += horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    t += horizontal_sum((products[0] + products[1]) + (products[2] + products[3]));
  }

  if (s == 0) {  // every logit is -inf
    out.lse[row] = out.logprob[row] = -kInf;
    out.entropy[row] = 0;
    return;
  }
  const double log_s = std::log(s);
  const float target = transform.apply(load_first<D>(z + rows.target[row], 1)).x[0];
  out.lse[row] = static_cast<float>(m + log_s);
  out.logprob[row] = static_cast<float>(static_cast<double>(target) - m - log_s);
  const double entropy = log_s - t / s;
  out.entropy[row] = static_cast<float>(entropy < 0 ? 0 : entropy);  // rounding of a certain row
}

// One pass; dz may lie over z.
template <DType D, bool kCapped>
void row_grad(const LogitsRows& rows, const LogitsGrad& in, int64_t row) {
  using E = Element<D>;
  const auto* z = static_cast<const typename E::type*>(rows.z) + offset(rows.at, row);
  auto* dz = static_cast<typename E::type*>(in.dz) + offset(in.at, row);
  const float c = in.c[row], h = in.h[row], g = in.g ? in.g[row] : 0.0f;
  if (c == 0 && h == 0 && g == 0) {
    std::memset(dz, 0, rows.vocab * sizeof *dz);
    return;
  }
  const auto transform = row_transform<kCapped>(rows, row);
  const float lse = in.lse[row], entropy = in.entropy[row];
  const int64_t target = rows.target[row];
  const auto at_target = transform.apply(load_first<D>(z + target, 1));
  const float target_dx = target_gradient(at_target.x[0], lse, entropy, c, h, g);
  const Float target_dz = splat(quiet_nan(target_dx * at_target.slope[0]));

  if (lse == -__builtin_inff()) {  // every logit is -inf: all p are 0
    std::memset(dz, 0, rows.vocab * sizeof *dz);
  } else {
    // dx = p (base - h log p)
    const float base = quiet_nan(g - c - (h != 0 ? h * entropy : 0.0f)), slant = quiet_nan(h);
    const float shift = quiet_nan(lse);
    const auto dz_of = [&](Float raw) __attribute__((always_inline)) {
      const auto v = transform.apply(raw);
      const Exp p = exp_or_zero(v.x - shift);
      return p.value * (base - slant * p.argument) * v.slope;
    };
    int64_t i = 0;
    for (; i + kUnroll * kWidth <= rows.vocab; i += kUnroll * kWidth) {
      Float v[kUnroll];
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) v[u] = dz_of(E::load(z + i + u * kWidth));
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) E::store(dz + i + u * kWidth, v[u]);
    }
    for (; i + kWidth <= rows.vocab; i += kWidth) {
      E::store(dz + i, dz_of(E::load(z + i)));
    }
    const int rest = static_cast<int>(rows.vocab - i);
    if (rest > 0) store_first<D>(dz + i, dz_of(load_first<D>(z + i, rest)), rest);
  }
  store_first<D>(dz + target, target_dz, 1);
}

template <DType D>
void stats_of(const LogitsRows& rows, const LogitsStats& out, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    rows.softcap > 0 ? row_stats<D, true>(rows, out, row) : row_stats<D, false>(rows, out, row);
  }
}

template <DType D>
void grad_of(const LogitsRows& rows, const LogitsGrad& in, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    rows.softcap > 0 ? row_grad<D, true>(rows, in, row) : row_grad<D, false>(rows, in, row);
  }
}

void rows_stats(const LogitsRows& rows, const LogitsStats& out, int64_t begin, int64_t end) {
  switch (rows.dtype) {
    case DType::kF32:
      return stats_of<DType::kF32>(rows, out, begin, end);
    case DType::kBF16:
      return stats_of<DType::kBF16>(rows, out, begin, end);
    case DType::kF16:
      return stats_of<DType::kF16>(rows, out, begin, end);
  }
}

void rows_grad(const LogitsRows& rows, const LogitsGrad& in, int64_t begin, int64_t end) {
  switch (rows.dtype) {
    case DType::kF32:
      return grad_of<DType::kF32>(rows, in, begin, end);
    case DType::kBF16:
      return grad_of<DType::kBF16>(rows, in, begin, end);
    case DType::kF16:
      return grad_of<DType::kF16>(rows, in, begin, end);
  }
}

}  // namespace
