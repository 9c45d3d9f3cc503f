// Register tiles of C += A B: rows of A are broadcast, B lies in panels of kPanel columns. Included
// by one file per instruction set.
//
// A unit is 32 bits: one float, or with kPairs two bf16 that are adjacent along the sum, whose
// products are added in fp32.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/simd.h"

#if PYRL_PAIRS && !defined(__AVX512BF16__)
#error "PYRL_PAIRS needs the bf16 dot product"
#endif

namespace {

constexpr int kPanel = 2 * kWidth;  // columns of a tile: two vectors
// Rows of a tile: with the two vectors of B and one broadcast, the accumulators fill the registers.
constexpr int kTile = PYRL_WIDTH == 16 ? 12 : 6;

// Floats that begin at a cache line.
using Floats = std::unique_ptr<float[], decltype(&std::free)>;
inline Floats floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (bytes > 0 && p == nullptr) throw std::bad_alloc();
  return {p, &std::free};
}

PYRL_INLINE Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PYRL_INLINE void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }

PYRL_INLINE Float broadcast_unit(const float* p) {
  uint32_t unit;
  std::memcpy(&unit, p, sizeof unit);
  return from_bits(unit - UInt{});
}

template <bool kPairs>
PYRL_INLINE Float multiply_add(Float a, Float b, Float c) {
#if PYRL_PAIRS
  if constexpr (kPairs) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
#else
  static_assert(!kPairs, "no dot product of pairs in this instruction set");
#endif
  return a * b + c;
}

// Prefetches the cache lines of `bytes` from `from` on; kKeep 3: into the L1 cache, 2: into the L2.
template <int kKeep>
PYRL_INLINE void fetch(const void* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + byte, 0, kKeep);
  }
}

// As fetch into the L1 cache, of lines that are about to be written.
PYRL_INLINE void claim(const void* from, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(from) + byte, 1, 3);
  }
}

// Memory that later work reads, fetched into the L2 cache a little at a time between tiles: the
// hardware's own prefetch starts anew with every row and page.
class Ahead {
 public:
  void add(const void* from, int64_t rows, int64_t bytes, int64_t stride) {
    if (rows <= 0 || bytes <= 0) return;
    areas_[count_++] = {static_cast<const char*>(from), rows, bytes, stride};
    lines_ += rows * ((bytes + 63) / 64);
  }
  // What was added is spread over `calls` of `some`.
  void spread(int64_t calls) { each_ = calls > 0 ? (lines_ + calls - 1) / calls : 0; }
  PYRL_MEMBER void some() {
    for (int64_t i = 0; i < each_ && area_ < count_; ++i) {
      const Area& area = areas_[area_];
      fetch<2>(area.from + row_ * area.stride + byte_, 64);
      byte_ += 64;
      if (byte_ < area.bytes) continue;
      byte_ = 0;
      if (++row_ == area.rows) row_ = 0, ++area_;
    }
  }

 private:
  struct Area {
    const char* from;
    int64_t rows, bytes, stride;
  };
  Area areas_[4] = {};
  int count_ = 0, area_ = 0;
  int64_t lines_ = 0, each_ = 0, row_ = 0, byte_ = 0;
};

// put(i, low, high) for every row i of A [count, k]: its sums with the two vectors of B's panel.
// A's unit (i, j) is a[i * row + j * step].
// before(i, rows): called ahead of every tile, to prefetch.
template <bool kPairs, int kRows = kTile, class Before, class Put>
PYRL_INLINE void multiply_panel(int64_t begin, int64_t count, int64_t k, const float* a,
                                int64_t row, int64_t step, const float* b, const Before& before,
                                const Put& put) {
  int64_t i = begin;
  for (; i + kRows <= count; i += kRows) {
    before(i, kRows);
    Float sum[kRows][2] = {};
    const float *at = a + i * row, *panel = b;
    for (int64_t j = 0; j < k; ++j, at += step, panel += kPanel) {
      const Float low = load(panel), high = load(panel + kWidth);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Float unit = broadcast_unit(at + r * row);
        sum[r][0] = multiply_add<kPairs>(unit, low, sum[r][0]);
        sum[r][1] = multiply_add<kPairs>(unit, high, sum[r][1]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) put(i + r, sum[r][0], sum[r][1]);
  }
  if constexpr (kRows > 1) {
    constexpr int kNext = kRows > 8 ? 8 : kRows > 4 ? 4 : kRows / 2;
    multiply_panel<kPairs, kNext>(i, count, k, a, row, step, b, before, put);
  }
}

// How a dtype enters the products: units of one widened element, or of a pair.
template <pyrl::DType D, bool kPairs>
struct Operand {
  using E = Element<D>;
  typedef typename E::type type;
  static_assert(!kPairs || D == pyrl::DType::kBF16, "pairs are of bf16");

  static int64_t units(int64_t length) { return kPairs ? (length + 1) / 2 : length; }
  static int64_t panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

  // Unit j of a row of `length` elements; what is past its end is 0.
  static float unit(const type* row, int64_t j, int64_t length) {
    if constexpr (kPairs) {
      const uint32_t low = row[2 * j], high = 2 * j + 1 < length ? row[2 * j + 1] : 0;
      return bit_float(low | high << 16);
    } else {
      return scalar(row[j]);
    }
  }

  static float scalar(type element) {
    if constexpr (D == pyrl::DType::kBF16) return bit_float(static_cast<uint32_t>(element) << 16);
    else return element;
  }

  // Rows as columns: out[row / kPanel][unit][row % kPanel] of rows [begin, end), with zeros where
  // the last panel has no row.
  static void pack_columns(const type* rows, int64_t stride, int64_t begin, int64_t end,
                           int64_t length, float* out) {
    for (int64_t r = begin; r < (end + kPanel - 1) / kPanel * kPanel; ++r) {
      float* column = out + (r / kPanel) * units(length) * kPanel + r % kPanel;
      for (int64_t j = 0; j < units(length); ++j) {
        column[j * kPanel] = r < end ? unit(rows + r * stride, j, length) : 0.0f;
      }
    }
  }

  // Rows as the sum's axis: out[column / kPanel][unit of rows][column % kPanel].
  static void pack_rows(const type* rows, int64_t stride, int64_t count, int64_t columns,
                        float* out) {
    for (int64_t c = 0; c < columns; c += kPanel) {
      for (int64_t j = 0; j < units(count); ++j, out += kPanel) {
        if constexpr (kPairs) {
          type even[kPanel] = {}, odd[kPanel] = {};
          const type* low = part(rows + 2 * j * stride + c, columns - c, even);
          const type* high = odd;
          if (2 * j + 1 < count) high = part(rows + (2 * j + 1) * stride + c, columns - c, odd);
          for (int k = 0; k < kPanel; k += kWidth) {
            store(out + k, from_bits(load_widened(low + k) | load_widened(high + k) << 16));
          }
        } else {
          type tail[kPanel] = {};
          const type* from = part(rows + j * stride + c, columns - c, tail);
          for (int k = 0; k < kPanel; k += kWidth) store(out + k, E::load(from + k));
        }
      }
    }
  }

 private:
  static float bit_float(uint32_t b) {
    float f;
    std::memcpy(&f, &b, sizeof f);
    return f;
  }
  // kPanel elements of which `left` exist, the rest zeros of `padded`.
  PYRL_INLINE const type* part(const type* from, int64_t left, type* padded) {
    if (left >= kPanel) return from;
    std::memcpy(padded, from, left * sizeof *from);
    return padded;
  }
};

}  // namespace
