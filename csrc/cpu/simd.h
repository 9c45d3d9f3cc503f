// Vectors of fp32 and their loads, stores, exp and tanh, on the compiler's vector extensions: the
// same source is SSE2, AVX2, AVX-512 or NEON by the flags and PYRL_WIDTH of the including file.
// Everything is in an unnamed namespace: the copies of different flags must never be merged.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef PYRL_WIDTH
#error "define PYRL_WIDTH, floats in a vector, before including this file"
#endif

#define PYRL_INLINE static inline __attribute__((always_inline))

namespace {

constexpr int kWidth = PYRL_WIDTH;
typedef float Float __attribute__((vector_size(4 * PYRL_WIDTH)));
typedef int32_t Int __attribute__((vector_size(4 * PYRL_WIDTH)));
typedef uint32_t UInt __attribute__((vector_size(4 * PYRL_WIDTH)));
typedef uint16_t Short __attribute__((vector_size(2 * PYRL_WIDTH)));

PYRL_INLINE Float splat(float x) { return x - Float{}; }
PYRL_INLINE UInt bits(Float x) { return reinterpret_cast<UInt>(x); }
PYRL_INLINE Float from_bits(UInt x) { return reinterpret_cast<Float>(x); }

// a > b ? a : b, hence b where either is NaN
PYRL_INLINE Float max_or_second(Float a, Float b) {
#if defined(__AVX512F__) && PYRL_WIDTH == 16
  return reinterpret_cast<Float>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__) && PYRL_WIDTH == 8
  return reinterpret_cast<Float>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

PYRL_INLINE float horizontal_max(Float v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

PYRL_INLINE double horizontal_sum(Float v) {
  double s = 0;
  for (int i = 0; i < kWidth; ++i) s += v[i];
  return s;
}

// ---- loads and stores of one vector, converting to and from the logits' dtype ----

template <pyrl::DType>
struct Element;  // ::type has the element's size

template <>
struct Element<pyrl::DType::kF32> {
  typedef float type;
  PYRL_INLINE Float load(const type* p) {
    Float v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  PYRL_INLINE void store(type* p, Float v) { std::memcpy(p, &v, sizeof v); }
};

template <>
struct Element<pyrl::DType::kBF16> {
  typedef uint16_t type;
  PYRL_INLINE Float load(const type* p) {
    Short v;
    std::memcpy(&v, p, sizeof v);
    return from_bits(__builtin_convertvector(v, UInt) << 16);
  }
  PYRL_INLINE void store(type* p, Float v) {  // round to nearest even
    const UInt b = bits(v);
    UInt r = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    r = v == v ? r : (UInt{} + 0x7fc0);  // rounding up could carry a NaN into another number
    const Short s = __builtin_convertvector(r, Short);
    std::memcpy(p, &s, sizeof s);
  }
};

template <>
struct Element<pyrl::DType::kF16> {
  typedef uint16_t type;
#if defined(__AVX512F__) && PYRL_WIDTH == 16
  PYRL_INLINE Float load(const type* p) {
    return reinterpret_cast<Float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
  }
  PYRL_INLINE void store(type* p, Float v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(v), 0));
  }
#elif defined(__F16C__) && PYRL_WIDTH == 8
  PYRL_INLINE Float load(const type* p) {
    return reinterpret_cast<Float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  PYRL_INLINE void store(type* p, Float v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
  }
#else
  PYRL_INLINE Float load(const type* p) {
    Short v;
    std::memcpy(&v, p, sizeof v);
    const UInt h = __builtin_convertvector(v, UInt);
    const UInt magnitude = (h & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
    const UInt normal = magnitude + ((127 - 15) << 23);
    // Subnormals: give them an implicit bit, then subtract it as a float.
    const Float subnormal = from_bits(normal + (1 << 23)) - from_bits(UInt{} + (113 << 23));
    UInt r = exponent == 0x0f800000 ? normal + ((128 - 16) << 23) : normal;  // inf, NaN
    r = exponent == 0 ? bits(subnormal) : r;
    return from_bits(r | ((h & 0x8000) << 16));
  }
  PYRL_INLINE void store(type* p, Float v) {  // round to nearest even
    const UInt sign = bits(v) & 0x80000000u, b = bits(v) ^ sign;
    // Subnormals: adding 0.5 makes the FPU round at the right bit.
    const UInt small = bits(from_bits(b) + splat(0.5f)) - 0x3f000000;
    const UInt normal = (b + 0xc8000fffu + ((b >> 13) & 1)) >> 13;  // exponent - 112, ties to even
    UInt r = b < 0x38800000 ? small : normal;
    r = b >= 0x47800000 ? (b > 0x7f800000 ? UInt{} + 0x7e00 : UInt{} + 0x7c00) : r;
    const Short s = __builtin_convertvector(r | (sign >> 16), Short);
    std::memcpy(p, &s, sizeof s);
  }
#endif
};

// The first `count` < kWidth elements; the rest of the vector is -inf. Never reads past the row.
template <pyrl::DType D>
PYRL_INLINE Float load_first(const typename Element<D>::type* p, int count) {
  typename Element<D>::type padded[kWidth] = {};
  std::memcpy(padded, p, count * sizeof *p);
  Float v = Element<D>::load(padded);
  for (int i = count; i < kWidth; ++i) v[i] = -__builtin_inff();
  return v;
}

template <pyrl::DType D>
PYRL_INLINE void store_first(typename Element<D>::type* p, Float v, int count) {
  typename Element<D>::type padded[kWidth];
  Element<D>::store(padded, v);
  std::memcpy(p, padded, count * sizeof *p);
}

// ---- exp and tanh ----

constexpr float kExpFloor = -87.33654f;  // log of the smallest normal fp32; below it exp is 0 here

// exp(x) for x in [kExpFloor, 88], error <= 1.1e-7 relative; NaN stays NaN.
PYRL_INLINE Float exp_in_range(Float x) {
  // x = n log 2 + r: adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits. The high
  // part of log 2 has 9 bits, so n times it is exact with or without a fused multiply-add.
  const Float magic = splat(12582912.0f);
  const Float shifted = x * 1.44269504088896341f + magic;
  const Float n = shifted - magic;
  Float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  // Minimax on |r| <= log(2) / 2 with p(0) = 1: error 2e-9.
  Float p = splat(1.3843607157468796e-3f);
  p = p * r + 8.374195545911789e-3f;
  p = p * r + 4.166800528764725e-2f;
  p = p * r + 0.16666430234909058f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return from_bits(bits(p) + (bits(shifted) << 23));
}

struct Exp {
  Float argument;  // max(x, kExpFloor): finite where exp(x) is 0, so that 0 times it is 0
  Float value;     // exp(x), exactly 0 for x < kExpFloor
};

PYRL_INLINE Exp exp_or_zero(Float x) {
  const Float clamped = max_or_second(splat(kExpFloor), x);
  const Float e = exp_in_range(clamped);
  return {clamped, x < kExpFloor ? Float{} : e};
}

PYRL_INLINE Float tanh(Float x) {
  const Float a = from_bits(bits(x) & 0x7fffffffu);
  const Float s = a * a;
  Float p = splat(-5.70498872745e-3f);  // odd polynomial of Cephes' tanhf for |x| < 0.625
  p = p * s + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  const Float small = a + a * s * p;
  const Float saturated = a > 10.0f ? splat(10.0f) : a;  // tanh(10) rounds to 1
  const Float large = 1.0f - 2.0f / (exp_in_range(saturated + saturated) + 1.0f);
  const Float t = a < 0.625f ? small : large;
  return from_bits(bits(t) | (bits(x) & 0x80000000u));
}

}  // namespace
