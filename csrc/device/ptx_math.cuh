// Approximate functions of the special function units, and instructions that CUDA C++ has no name for.
#pragma once

#include <cmath>

#include "device/platform.cuh"

namespace pydit::PYDIT_BACKEND {

// 2^x within 2 ulp; results below 2^-126 are 0, 2^-inf is 0.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef PYDIT_SIM
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x within 1 ulp, for |x| from 2^-126 to 2^126.
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef PYDIT_SIM
  return 1.f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The smaller one, or NaN if either is NaN, where fminf returns the other.
__device__ __forceinline__ float min_or_nan(float x, float y) {
#ifdef PYDIT_SIM
  return x < y || x != x ? x : y;
#else
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#endif
}

}  // namespace pydit::PYDIT_BACKEND
