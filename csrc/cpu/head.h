// A linear head over a part of the vocabulary, see HeadChunk in kernels.h: logits with their softmax
// sums, and all gradients in one pass over blocks of tokens. Included by one file per instruction
// set. Rows are lanes: a vector holds one token's logits of kWidth rows.
#pragma once

#include "cpu/softmax.h"
#include "cpu/tile.h"

namespace {

using pyrl::DType;
using pyrl::HeadChunk;
using pyrl::HeadGrad;
using pyrl::HeadSums;
using pyrl::cpu::kHeadBlock;

static_assert(32 % kPanel == 0, "a chunk's lanes are whole panels");
static_assert(kHeadBlock % 2 == 0, "blocks hold whole pairs");
// Lanes whose pairs of dz are adjacent: what a tile reads is then in few pages and cache sets.
constexpr int64_t kGroup = 48;
static_assert(kGroup % kTile == 0 && kGroup % kWidth == 0, "groups are whole tiles and vectors");
// How far above the reference of its sums a logit may be: exp(4) costs no precision.
constexpr float kSlack = 4.0f;

template <DType D, bool kPairs, bool kCapped>
struct Head {
  using E = Element<D>;
  using Op = Operand<D, kPairs>;
  typedef typename E::type type;

  const HeadChunk& chunk;
  int64_t lanes, units;  // of rows; of D
  Floats wide;           // a block of the weight in units, where it cannot be read in place

  explicit Head(const HeadChunk& c)
      : chunk(c), lanes(c.lanes()), units(Op::units(c.dim)), wide(nullptr, &std::free) {
    if (!in_place()) wide = floats(kHeadBlock * units);
  }

  // Rows of the weight are units already.
  bool in_place() const {
    if (kPairs) return chunk.dim % 2 == 0 && chunk.weight_stride % 2 == 0;
    return D == DType::kF32;
  }
  const type* weight(int64_t v) const {
    return static_cast<const type*>(chunk.weight) + v * chunk.weight_stride;
  }
  // Tokens of the block after that of v.
  int64_t following(int64_t v) const {
    const int64_t left = chunk.vocab - v - kHeadBlock;
    return left < kHeadBlock ? left : kHeadBlock;
  }
  static int64_t tiles(int64_t count) { return count / kTile; }
  int64_t near_lanes() const { return (chunk.near_rows + 31) / 32 * 32; }
  // Logits of token v, lanes from r on.
  type* z(int64_t v, int64_t r) const {
    if (r < near_lanes()) return static_cast<type*>(chunk.near) + v * chunk.near_stride + r;
    return static_cast<type*>(chunk.far) + v * chunk.far_stride + r - near_lanes();
  }
  Transform<kCapped, Float> transform(int64_t r) const {
    return {load(chunk.factor + r), load(chunk.outer + r), load(chunk.slope + r)};
  }

  // ---- logits and their sums ----

  void sums(const float* x, const HeadSums& out, int64_t begin, int64_t end) {
    const Floats tile = floats(kHeadBlock * kPanel);
    const bool kept = chunk.near || chunk.far;
    for (int64_t v = begin * kHeadBlock; v < end * kHeadBlock && v < chunk.vocab;
         v += kHeadBlock) {
      const int count = static_cast<int>(
          chunk.vocab - v < kHeadBlock ? chunk.vocab - v : kHeadBlock);
      const float* w = reinterpret_cast<const float*>(weight(v));
      int64_t stride = chunk.weight_stride * static_cast<int64_t>(sizeof(type)) / 4;
      if (!in_place()) {
        stride = units;
        for (int i = 0; i < count; ++i) {
          const type* row = weight(v + i);
          for (int64_t j = 0; j < units; ++j) wide[i * units + j] = Op::unit(row, j, chunk.dim);
        }
        w = wide.get();
      }
      Ahead ahead;
      if (in_place() && following(v) > 0) {
        ahead.add(weight(v + count), following(v), chunk.dim * sizeof(type),
                  chunk.weight_stride * sizeof(type));
        ahead.spread(tiles(count) * (lanes / kPanel));
      }
      for (int64_t r = 0; r < lanes; r += kPanel) {
        const auto before = [&](int64_t i, int rows) {
          for (int q = 0; q < rows && kept; ++q) claim(z(v + i + q, r), kPanel * sizeof(type));
          ahead.some();
        };
        const auto put = [&](int64_t i, Float low, Float high) __attribute__((always_inline)) {
          store(tile.get() + i * kPanel, low);
          store(tile.get() + i * kPanel + kWidth, high);
        };
        multiply_panel<kPairs>(0, count, units, w, stride, 1, x + r * units, before, put);
        panel_sums(v, count, r, tile.get(), out);
      }
    }
  }

  // The logits of tokens v, v + 1, ... and lanes r ... r + kPanel - 1 in `tile` [count][kPanel].
  PYRL_MEMBER void panel_sums(int64_t v, int count, int64_t r, const float* tile,
                              const HeadSums& out) const {
    for (int k = 0; k < kPanel; k += kWidth) lane_sums(v, count, r + k, tile + k, out);
  }

  PYRL_MEMBER Float biased(Float value, int64_t v) const {
    const auto* bias = static_cast<const type*>(chunk.bias);
    return E::rounded(bias ? value + splat(Op::scalar(bias[v])) : value);
  }

  PYRL_MEMBER void lane_sums(int64_t v, int count, int64_t r, const float* column,
                             const HeadSums& out) const {
    constexpr float kInf = __builtin_inff();
    const auto to_x = transform(r);
    type* const raw = chunk.near || chunk.far ? z(v, r) : nullptr;
    const int64_t raw_stride = r < near_lanes() ? chunk.near_stride : chunk.far_stride;
    const Float before = load(out.m + r);
    Float m = before, shift, top, sum[4], product[4];
    // Any m near the maximum will do: one pass, and another where a logit is far above it.
    for (;;) {
      shift = m > -kInf ? m : Float{};  // -inf - -inf would be NaN
      top = splat(-kInf);
      for (int u = 0; u < 4; ++u) sum[u] = product[u] = Float{};
      const auto add = [&](int i, int u) __attribute__((always_inline)) {
        const Float value = biased(load(column + i * kPanel), v + i);
        if (raw) E::store(raw + i * raw_stride, value);
        const Float x = to_x.apply(value).x;
        top = max_or_second(x, top);
        const Exp e = power<kPairs>(x - shift);
        sum[u] += e.value;
        product[u] += e.value * e.argument;
      };
      int i = 0;
      for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) add(i + u, u);
      }
      for (; i < count; ++i) add(i, 0);
      if (!any(top > m + kSlack)) break;
      m = max_or_second(m, top);
    }
    store(out.m + r, m);
    // A quarter of the block's terms were added in fp32; the rest is double.
    const Float s = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    const Float t = (product[0] + product[1]) + (product[2] + product[3]);
    const Exp down = power<kPairs>(before - shift);
    for (int lane = 0; lane < kWidth; ++lane) {
      double &all = out.s[r + lane], &all_t = out.t[r + lane];
      const double factor = down.value[lane];
      all_t = factor * (all_t + all * down.argument[lane]) + t[lane];
      all = factor * all + s[lane];
    }
    for (int lane = 0; lane < kWidth && r + lane < chunk.rows; ++lane) {
      const int64_t at = chunk.target[r + lane] - v;
      if (at < 0 || at >= count) continue;
      out.at_target[r + lane] = to_x.apply(biased(load(column + at * kPanel), v + at)).x[lane];
    }
  }

  // ---- gradients ----

  void grads(const HeadGrad& grad, const float* x, int64_t begin, int64_t end) {
    const int64_t row_units = Op::units(chunk.rows), panels = Op::panels(chunk.dim);
    // dz of a block with rows adjacent, [token][lane], and with tokens adjacent in pairs,
    // [group of lanes][pair][lane].
    const Floats by_token = floats(kHeadBlock * lanes / (kPairs ? 2 : 1));
    const Floats by_pair = floats(kPairs ? kHeadBlock / 2 * (lanes + kGroup) : 0);
    const Floats w = floats(grad.dx ? kHeadBlock * panels * kPanel : 0);
    for (int64_t v = begin * kHeadBlock; v < end * kHeadBlock && v < chunk.vocab;
         v += kHeadBlock) {
      const int count = static_cast<int>(
          chunk.vocab - v < kHeadBlock ? chunk.vocab - v : kHeadBlock);
      form_dz(grad, v, count, by_token.get(), by_pair.get());
      Ahead ahead;
      const int64_t next = following(v), size = sizeof(type);
      if (grad.dweight) {
        auto* dweight = static_cast<const type*>(grad.dweight) + v * chunk.dim;
        if (!grad.first) ahead.add(dweight, count, chunk.dim * size, chunk.dim * size);
        if (!grad.first && grad.low) {
          ahead.add(grad.low + v * grad.low_stride, count, chunk.dim, grad.low_stride);
        }
      }
      if (chunk.far) {
        ahead.add(z(v + count, near_lanes()), next, (lanes - near_lanes()) * size,
                  chunk.far_stride * size);
      }
      ahead.add(z(v + count, 0), chunk.near ? next : 0, near_lanes() * size,
                chunk.near_stride * size);
      if (grad.dx) {
        Op::pack_rows(weight(v), chunk.weight_stride, count, chunk.dim, w.get());
        const int64_t k = Op::units(count);
        const bool fresh = v == begin * kHeadBlock;
        ahead.spread(tiles(chunk.rows) * panels);
        for (int64_t p = 0; p < panels; ++p) {
          for (int64_t g = 0; g < chunk.rows; g += kGroup) {
            float* dx = grad.dx + (p * chunk.rows + g) * kPanel;
            const auto before = [&](int64_t i, int rows) {
              for (int r = 0; r < rows && !fresh; ++r) fetch<3>(dx + (i + r) * kPanel, kPanel * 4);
              ahead.some();
            };
            const auto put = [&](int64_t i, Float low, Float high) __attribute__((always_inline)) {
              float* at = dx + i * kPanel;
              store(at, fresh ? low : low + load(at));
              store(at + kWidth, fresh ? high : high + load(at + kWidth));
            };
            const int64_t rows = chunk.rows - g < kGroup ? chunk.rows - g : kGroup;
            const float* dz = kPairs ? by_pair.get() + g * (kHeadBlock / 2) : by_token.get() + g;
            multiply_panel<kPairs>(0, rows, k, dz, 1, kPairs ? kGroup : lanes,
                                   w.get() + p * k * kPanel, before, put);
          }
        }
      }
      if (!grad.dweight) continue;
      if (grad.dx) {
        ahead = Ahead();
        ahead.add(weight(v + count), next, chunk.dim * size, chunk.weight_stride * size);
      }
      ahead.spread(tiles(count) * panels);
      for (int64_t p = 0; p < panels; ++p) {
        const auto before = [&](int64_t i, int rows) {
          const auto* at = static_cast<type*>(grad.dweight) + (v + i) * chunk.dim + p * kPanel;
          for (int r = 0; r < rows; ++r) fetch<3>(at + r * chunk.dim, kPanel * size);
          ahead.some();
        };
        const auto put = [&](int64_t i, Float low, Float high) __attribute__((always_inline)) {
          add_dweight(grad, v + i, p * kPanel, low);
          add_dweight(grad, v + i, p * kPanel + kWidth, high);
        };
        multiply_panel<kPairs>(0, count, row_units, by_token.get(), lanes / (kPairs ? 2 : 1), 1,
                               x + p * row_units * kPanel, before, put);
      }
    }
  }

  PYRL_MEMBER Float dz_of(const HeadGrad& grad, const type* raw, int64_t r) const {
    const auto value = transform(r).apply(E::load(raw));
    const Exp p = power<kPairs>(value.x - load(grad.shift + r));
    const Float d = p.value * (load(grad.base + r) - load(grad.slant + r) * p.argument);
    UInt live;
    std::memcpy(&live, grad.live + r, sizeof live);
    return from_bits(bits(d * value.slope) & live);
  }

  void form_dz(const HeadGrad& grad, int64_t v, int count, float* by_token, float* by_pair) const {
    constexpr int kStep = kPairs ? 2 : 1;
    for (int i = 0; i < count; i += kStep) {
      const bool odd = kPairs && i + 1 == count;  // the last token's partner is 0
      for (int64_t r = 0; r < lanes; r += kWidth) {
        const Float d = dz_of(grad, z(v + i, r), r);
        if constexpr (kPairs) {
          const Float next = odd ? Float{} : dz_of(grad, z(v + i + 1, r), r);
          auto* rows = reinterpret_cast<type*>(by_token) + i * lanes + r;
          E::store(rows, d);
          if (!odd) E::store(rows + lanes, next);
          const UInt pair = bits(E::rounded(d)) >> 16 | bits(E::rounded(next));
          store(by_pair + pair_at(i, r), from_bits(pair));
        } else {
          store(by_token + i * lanes + r, d);
        }
      }
    }
    targets(grad, v, count, by_token, by_pair);
    if (grad.dbias) add_dbias(grad, v, count, by_token);
  }

  // Where the pair of tokens i and i + 1, lane r, is.
  static int64_t pair_at(int64_t i, int64_t r) {
    return r / kGroup * kGroup * (kHeadBlock / 2) + i / 2 * kGroup + r % kGroup;
  }

  void add_dbias(const HeadGrad& grad, int64_t v, int count, const float* by_token) const {
    for (int i = 0; i < count; ++i) {
      Float sum = {};
      for (int64_t r = 0; r < lanes; r += kWidth) {
        if constexpr (kPairs) {
          sum += E::load(reinterpret_cast<const type*>(by_token) + i * lanes + r);
        } else {
          sum += load(by_token + i * lanes + r);
        }
      }
      grad.dbias[v + i] += static_cast<float>(horizontal_sum(sum));
    }
  }

  // dz of every row's target, where it is in this block.
  void targets(const HeadGrad& grad, int64_t v, int count, float* by_token,
               float* by_pair) const {
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int64_t at = chunk.target[r] - v;
      if (at < 0 || at >= count) continue;
      const float c = grad.in.c[r], h = grad.in.h[r], g = grad.in.g ? grad.in.g[r] : 0.0f;
      if (c == 0 && h == 0 && g == 0) continue;
      const int64_t first = r / kWidth * kWidth, lane = r - first;
      const auto value = transform(first).apply(E::load(z(v + at, first)));
      const float x = value.x[lane] * kUnit<kPairs>;
      const float d = quiet_nan(
          target_gradient(x, grad.in.lse[r], grad.in.entropy[r], c, h, g) * value.slope[lane]);
      if constexpr (kPairs) {
        store_first<D>(reinterpret_cast<type*>(by_token) + at * lanes + r, splat(d), 1);
        auto* pair = reinterpret_cast<type*>(by_pair + pair_at(at, r));
        store_first<D>(pair + at % 2, splat(d), 1);
      } else {
        by_token[at * lanes + r] = d;
      }
    }
  }

  // dweight[v, column ...] += sum; what is past the last column is dropped.
  PYRL_MEMBER void add_dweight(const HeadGrad& grad, int64_t v, int64_t column, Float sum) const {
    const int64_t left = chunk.dim - column;
    type* high = static_cast<type*>(grad.dweight) + v * chunk.dim + column;
    uint8_t* low = grad.low ? grad.low + v * grad.low_stride + column : nullptr;
    if (left >= kWidth) {
      accumulate(grad, high, low, sum);
    } else if (left > 0) {
      type high_part[kWidth] = {};
      uint8_t low_part[kWidth] = {};
      std::memcpy(high_part, high, left * sizeof *high);
      if (low) std::memcpy(low_part, low, left);
      accumulate(grad, high_part, low ? low_part : nullptr, sum);
      std::memcpy(high, high_part, left * sizeof *high);
      if (low) std::memcpy(low, low_part, left);
    }
  }

  PYRL_MEMBER void accumulate(const HeadGrad& grad, type* high, uint8_t* low, Float sum) const {
    if constexpr (D == DType::kF32) {
      E::store(high, grad.first ? sum : sum + E::load(high));
    } else {
      if (!grad.first) sum += from_bits(load_widened(high) << 16 | load_bytes(low) << 8);
      if (grad.last) return E::store(high, sum);
      const UInt kept = (bits(sum) + 0x7f + ((bits(sum) >> 8) & 1)) >> 8;
      store_low_halves(high, kept >> 8);
      store_low_bytes(low, kept & 0xff);
    }
  }
};

// Calls the member function of the Head that `chunk` needs.
template <DType D, bool kPairs>
void head_sums(const HeadChunk& chunk, const float* x, const HeadSums& out, int64_t begin,
               int64_t end) {
  chunk.softcap > 0 ? Head<D, kPairs, true>(chunk).sums(x, out, begin, end)
                    : Head<D, kPairs, false>(chunk).sums(x, out, begin, end);
}

template <DType D, bool kPairs>
void head_grads(const HeadChunk& chunk, const HeadGrad& grad, const float* x, int64_t begin,
                int64_t end) {
  chunk.softcap > 0 ? Head<D, kPairs, true>(chunk).grads(grad, x, begin, end)
                    : Head<D, kPairs, false>(chunk).grads(grad, x, begin, end);
}

template <DType D, bool kPairs>
int64_t head_packed_size(const HeadChunk& chunk, bool as_columns) {
  using Op = Operand<D, kPairs>;
  return as_columns ? chunk.lanes() * Op::units(chunk.dim)
                    : Op::panels(chunk.dim) * kPanel * Op::units(chunk.rows);
}

template <DType D, bool kPairs>
void head_pack_x(const HeadChunk& chunk, bool as_columns, float* packed) {
  using Op = Operand<D, kPairs>;
  const auto* x = static_cast<const typename Op::type*>(chunk.x);
  if (as_columns) return Op::pack_columns(x, chunk.x_stride, 0, chunk.rows, chunk.dim, packed);
  Op::pack_rows(x, chunk.x_stride, chunk.rows, chunk.dim, packed);
}

template <DType D, bool kPairs>
pyrl::cpu::HeadKernels head_kernels() {
  return {kPanel, kUnit<kPairs>, head_packed_size<D, kPairs>, head_pack_x<D, kPairs>,
          head_sums<D, kPairs>, head_grads<D, kPairs>};
}

}  // namespace
