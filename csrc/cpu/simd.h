// Vectors of fp32 and their loads, stores, exp and tanh, on the compiler's vector extensions: the
// same source is SSE2, AVX2, AVX-512 or NEON by the flags and PYRL_WIDTH of the including file.
// Everything is in an unnamed namespace: the copies of different flags must never be merged.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef PYRL_WIDTH
#error "define PYRL_WIDTH, floats in a vector, before including this file"
#endif

#if defined(__AVX512F__) && PYRL_WIDTH == 16
#define PYRL_AVX512 1
#elif defined(__AVX2__) && defined(__F16C__) && PYRL_WIDTH == 8
#define PYRL_AVX2 1
#endif

#define PYRL_INLINE static inline __attribute__((always_inline))
#define PYRL_MEMBER inline __attribute__((always_inline))

namespace {

constexpr int kWidth = PYRL_WIDTH;
typedef float Float __attribute__((vector_size(4 * PYRL_WIDTH)));
typedef int32_t Int __attribute__((vector_size(4 * PYRL_WIDTH)));
typedef uint32_t UInt __attribute__((vector_size(4 * PYRL_WIDTH)));
typedef uint16_t Short __attribute__((vector_size(2 * PYRL_WIDTH)));
typedef uint8_t Byte __attribute__((vector_size(PYRL_WIDTH)));

PYRL_INLINE Float splat(float x) { return x - Float{}; }
PYRL_INLINE UInt bits(Float x) { return reinterpret_cast<UInt>(x); }
PYRL_INLINE Float from_bits(UInt x) { return reinterpret_cast<Float>(x); }

// a > b ? a : b, hence b where either is NaN
PYRL_INLINE Float max_or_second(Float a, Float b) {
#if PYRL_AVX512
  return _mm512_max_ps(a, b);
#elif PYRL_AVX2
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// Whether a comparison is true in any lane.
PYRL_INLINE bool any(Int mask) {
#if PYRL_AVX512
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif PYRL_AVX2
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kWidth; ++i) all |= mask[i];
  return all != 0;
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

// x, or the NaN without a payload: the others (the GPU's has all bits set) are unsafe to round.
PYRL_INLINE float quiet_nan(float x) { return x == x ? x : __builtin_nanf(""); }

// 16-bit elements, zero-extended. Intrinsics where the compiler's own conversion of 16 bits takes
// the vector apart.
PYRL_INLINE UInt load_widened(const uint16_t* p) {
#if PYRL_AVX512
  return reinterpret_cast<UInt>(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif PYRL_AVX2
  return reinterpret_cast<UInt>(
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Short v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, UInt);
#endif
}

// The low 16 bits of every lane, whose high bits are 0.
PYRL_INLINE void store_low_halves(uint16_t* p, UInt v) {
#if PYRL_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#elif PYRL_AVX2
  const __m256i lanes = reinterpret_cast<__m256i>(v), packed = _mm256_packus_epi32(lanes, lanes);
  const __m256i ordered = _mm256_permute4x64_epi64(packed, 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(ordered));
#else
  const Short s = __builtin_convertvector(v, Short);
  std::memcpy(p, &s, sizeof s);
#endif
}

// Bytes, zero-extended.
PYRL_INLINE UInt load_bytes(const uint8_t* p) {
#if PYRL_AVX512
  return reinterpret_cast<UInt>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif PYRL_AVX2
  return reinterpret_cast<UInt>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  Byte v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, UInt);
#endif
}

// The low 8 bits of every lane, whose other bits are 0.
PYRL_INLINE void store_low_bytes(uint8_t* p, UInt v) {
#if PYRL_AVX512
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
#else
  const Byte b = __builtin_convertvector(v, Byte);
  std::memcpy(p, &b, sizeof b);
#endif
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
  PYRL_INLINE Float rounded(Float v) { return v; }
};

template <>
struct Element<pyrl::DType::kBF16> {
  typedef uint16_t type;
#if PYRL_PAIRS
  PYRL_INLINE Float rounded(Float v) {
    return from_bits(reinterpret_cast<UInt>(_mm512_cvtepu16_epi32(
                         reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)))) << 16);
  }
#else
  PYRL_INLINE Float rounded(Float v) {
    const UInt b = bits(v);
    return from_bits((b + 0x7fff + ((b >> 16) & 1)) & 0xffff0000u);
  }
#endif
  PYRL_INLINE Float load(const type* p) { return from_bits(load_widened(p) << 16); }
  // Rounds to nearest even. A NaN must have no payload in its low 16 bits (see quiet_nan): there a
  // carry would turn it into another number.
  PYRL_INLINE void store(type* p, Float v) {
#if PYRL_PAIRS
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
    const UInt b = bits(v);
    store_low_halves(p, (b + 0x7fff + ((b >> 16) & 1)) >> 16);
#endif
  }
};

template <>
struct Element<pyrl::DType::kF16> {
  typedef uint16_t type;
#if PYRL_AVX512
  PYRL_INLINE Float load(const type* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  PYRL_INLINE void store(type* p, Float v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
  }
#elif PYRL_AVX2
  PYRL_INLINE Float load(const type* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  PYRL_INLINE void store(type* p, Float v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
  }
#else
  PYRL_INLINE Float load(const type* p) {
    const UInt h = load_widened(p);
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
    store_low_halves(p, r | (sign >> 16));
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

// e^r for |r| <= log(2) / 2: minimax with p(0) = 1, error 2e-9.
PYRL_INLINE Float exp_reduced(Float r) {
  Float p = splat(1.3843607157468796e-3f);
  p = p * r + 8.374195545911789e-3f;
  p = p * r + 4.166800528764725e-2f;
  p = p * r + 0.16666430234909058f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}

// x - n log(2). The high part has 9 bits, so n times it is exact even without a fused multiply-add.
PYRL_INLINE Float reduce(Float x, Float n) {
  const Float r = x - n * 0.693359375f;
  return r - n * -2.12194440e-4f;
}

struct Exp {
  Float argument;  // max(x, floor): finite where exp(x) is 0, so that 0 times it is 0
  Float value;     // exp(x), error <= 1.1e-7 relative; 0 below the floor; NaN stays NaN
};

#if PYRL_AVX512

// The scaling by 2^n underflows by itself: exp(-104) rounds to 0.
PYRL_INLINE Exp exp_or_zero(Float x) {
  const Float clamped = max_or_second(splat(-104.0f), x);
  const Float n = _mm512_roundscale_ps(clamped * 1.44269504088896341f, 0);
  const Float p = exp_reduced(reduce(clamped, n));
  return {clamped, _mm512_scalef_ps(p, n)};
}

#else

PYRL_INLINE Exp exp_or_zero(Float x) {
  const Float floor = splat(-87.33654f);  // log of the smallest normal fp32
  const Float clamped = max_or_second(floor, x);
  // Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits.
  const Float magic = splat(12582912.0f);
  const Float shifted = clamped * 1.44269504088896341f + magic;
  const Float p = exp_reduced(reduce(clamped, shifted - magic));
  const Float e = from_bits(bits(p) + (bits(shifted) << 23));
  return {clamped, x < floor ? Float{} : e};
}

#endif

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
  const Float large = 1.0f - 2.0f / (exp_or_zero(saturated + saturated).value + 1.0f);
  const Float t = a < 0.625f ? small : large;
  return from_bits(bits(t) | (bits(x) & 0x80000000u));
}

}  // namespace
