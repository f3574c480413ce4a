// Math, bit casts, cached loads, fences and atomics of device code.
//
// Functions that the GPU approximates (rsqrtf, __expf, ...) are correctly rounded or close to it here, so a test's
// tolerance must allow for the GPU's error, which CUDA documents per function.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sim/half.h"

// Bit casts ----------------------------------------------------------------------------------------------------
inline unsigned __float_as_uint(float x) { return simt::float_bits(x); }
inline int __float_as_int(float x) { return static_cast<int>(simt::float_bits(x)); }
inline float __uint_as_float(unsigned bits) { return simt::bits_float(bits); }
inline float __int_as_float(int bits) { return simt::bits_float(static_cast<unsigned>(bits)); }

// Arithmetic that is never contracted (the build passes -ffp-contract=off for the rest as well) -------------------
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float rsqrtf(float x) { return static_cast<float>(1. / sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1. / sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.f), 1.f); }

// The C library declares some of these names for itself, so they can only be macros.
#define __expf(x) expf(x)
#define __exp10f(x) powf(10.f, x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __powf(x, y) powf(x, y)

// CUDA's min and max take any two arithmetic types and, of floats, ignore a NaN.
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  else
    return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

// Integer --------------------------------------------------------------------------------------------------------
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}

// Loads and stores with a cache hint are plain ones --------------------------------------------------------------
template <typename T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
inline T __ldcg(const T* pointer) {
  return *pointer;
}
template <typename T>
inline T __ldcs(const T* pointer) {
  return *pointer;
}
template <typename T>
inline void __stcg(T* pointer, T value) {
  *pointer = value;
}
template <typename T>
inline void __stcs(T* pointer, T value) {
  *pointer = value;
}

// Fences and atomics. Blocks run on several OS threads, so these are real --------------------------------------------
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace simt {

template <typename T>
struct Identity {
  using type = T;
};
template <typename T>
using NoDeduce = typename Identity<T>::type;  // atomicAdd(unsigned*, 1) takes T from the pointer

// *pointer = update(*pointer) as one step; returns the value before.
template <typename T, typename Update>
inline T atomic_update(T* pointer, Update update) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics work on 4 or 8 bytes");
  T before;
  __atomic_load(pointer, &before, __ATOMIC_RELAXED);
  T after = update(before);
  while (!__atomic_compare_exchange(pointer, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    after = update(before);
  }
  return before;
}

}  // namespace simt

template <typename T>
inline T atomicAdd(T* p, simt::NoDeduce<T> x) {
  if constexpr (std::is_integral_v<T>)
    return __atomic_fetch_add(p, x, __ATOMIC_RELAXED);
  else
    return simt::atomic_update(p, [x](T old) { return old + x; });
}
template <typename T>
inline T atomicSub(T* p, simt::NoDeduce<T> x) {
  return simt::atomic_update(p, [x](T old) { return old - x; });
}
template <typename T>
inline T atomicMax(T* p, simt::NoDeduce<T> x) {
  return simt::atomic_update(p, [x](T old) { return old < x ? x : old; });
}
template <typename T>
inline T atomicMin(T* p, simt::NoDeduce<T> x) {
  return simt::atomic_update(p, [x](T old) { return x < old ? x : old; });
}
template <typename T>
inline T atomicAnd(T* p, simt::NoDeduce<T> x) {
  return __atomic_fetch_and(p, x, __ATOMIC_RELAXED);
}
template <typename T>
inline T atomicOr(T* p, simt::NoDeduce<T> x) {
  return __atomic_fetch_or(p, x, __ATOMIC_RELAXED);
}
template <typename T>
inline T atomicXor(T* p, simt::NoDeduce<T> x) {
  return __atomic_fetch_xor(p, x, __ATOMIC_RELAXED);
}
template <typename T>
inline T atomicExch(T* p, simt::NoDeduce<T> x) {
  return simt::atomic_update(p, [x](T) { return x; });
}
template <typename T>
inline T atomicCAS(T* p, simt::NoDeduce<T> expected, simt::NoDeduce<T> desired) {
  __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;  // the value found, whether or not it was replaced
}
// Counts up to `limit`, then wraps to 0.
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::atomic_update(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1u; });
}
