// __nv_bfloat16 and __half as bit patterns with exact conversions: round to nearest even, subnormals kept, overflow to
// infinity, every NaN becomes 0x7fff, as the conversion instructions of the GPU do.
//
// There is no implicit conversion and no operator: CUDA's operators round after every step, and code that would
// silently compute in fp32 here must not compile. Kernels convert to float, compute, and convert back.
// Nor is there a constructor: g++ gives a static array of a class that has one a hidden "initialised" flag per thread,
// which the race detector would take for shared memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "sim/types.h"

namespace simt {

inline uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint16_t bfloat16_from_float(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  // The upper half, plus one when the lower half is above 0x8000, or is 0x8000 and the upper half is odd.
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_from_bfloat16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

inline uint16_t half_from_float(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) return sign | 0x7c00;  // 65536 and above, infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 a half counts units of 2^-24, and at 0.5 an fp32 does too: the addition rounds to nearest even.
    const float shifted = bits_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(shifted) - float_bits(0.5f)));
  }
  // Rebias the exponent from 127 to 15 and round off 13 bits of the mantissa; a carry runs into the exponent, and from
  // 65520 up it gives infinity (0x7c00).
  const uint32_t rebiased = magnitude - ((127u - 15u) << 23);
  return static_cast<uint16_t>(sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13));
}

inline float float_from_half(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  if (magnitude < 0x400u) return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
  return bits_float(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

}  // namespace simt

struct __nv_bfloat16 {
  uint16_t bits;
  explicit operator float() const { return simt::float_from_bfloat16(bits); }
};
struct __half {
  uint16_t bits;
  explicit operator float() const { return simt::float_from_half(bits); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct alignas(4) __half2 {
  __half x, y;
};
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;

inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {simt::bfloat16_from_float(x)}; }
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return static_cast<float>(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {static_cast<float>(v.x), static_cast<float>(v.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 x, __nv_bfloat162 y) {
  return __floats2bfloat162_rn(static_cast<float>(x.x) - static_cast<float>(y.x),
                               static_cast<float>(x.y) - static_cast<float>(y.y));
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
  __nv_bfloat16 x;
  x.bits = bits;
  return x;
}

inline __half __float2half_rn(float x) { return {simt::half_from_float(x)}; }
inline __half __float2half(float x) { return __float2half_rn(x); }
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }
inline float2 __half22float2(__half2 v) { return {static_cast<float>(v.x), static_cast<float>(v.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __hsub2(__half2 x, __half2 y) {
  return __floats2half2_rn(static_cast<float>(x.x) - static_cast<float>(y.x),
                           static_cast<float>(x.y) - static_cast<float>(y.y));
}
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
