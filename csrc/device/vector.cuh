// Vector I/O: kWidth neighbouring elements move as one access and are worked on as fp32.
#pragma once

#include <cstring>

#include "device/platform.cuh"
#include "device/ptx_global.cuh"

namespace pydit::PYDIT_BACKEND {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two neighbouring 16-bit elements, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// The exact inverse of pack. Loops that keep pairs in registers hold such words rather than Pack<T, 2>, whose two
// 16-bit elements the compiler may give a register each.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

template <typename T>
constexpr int kElementsIn16Bytes = 16 / sizeof(T);

// kWidth loaded elements that wait to be used, kept as 32-bit words: 16-bit elements would take a register each.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Words {
  static constexpr int kCount = sizeof(T) * kWidth / 4;
  uint32_t word[kCount];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return to_float(__uint_as_float(word[i]));
    } else {
      const float2 pair = unpack<T>(word[i / 2]);
      return i % 2 == 0 ? pair.x : pair.y;
    }
  }

  static __device__ __forceinline__ Words load(const T* pointer) { return *reinterpret_cast<const Words*>(pointer); }

  static __device__ __forceinline__ Words all(float x) {
    Words words;
    for (int i = 0; i < kCount; ++i) {
      if constexpr (sizeof(T) == 4)
        words.word[i] = __float_as_uint(x);
      else
        words.word[i] = pack<T>(x, x);
    }
    return words;
  }
};

// kWidth elements in registers, loaded and stored as one access of up to 16 bytes.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T value[kWidth];

  __device__ __forceinline__ float operator[](int i) const { return to_float(value[i]); }
  __device__ __forceinline__ void set(int i, float x) { value[i] = from_float<T>(x); }

  static __device__ __forceinline__ Pack load(const T* pointer) { return *reinterpret_cast<const Pack*>(pointer); }

  // To global memory.
  __device__ __forceinline__ void store(T* pointer) const {
    if constexpr (sizeof(T) * kWidth == 16) {
      uint4 whole;
      memcpy(&whole, value, sizeof whole);
      store_global_16(pointer, whole);
    } else {
      *reinterpret_cast<Pack*>(pointer) = *this;
    }
  }
};

}  // namespace pydit::PYDIT_BACKEND
