// Semaphores between blocks, and atomic additions of several values at once. Scalar atomicAdd, atomicMax, atomicMin,
// atomicCAS and atomicExch are CUDA's own names on both sides.
//
// A kernel may wait only for blocks that have taken a lower ticket from an atomic counter: those run or are done, so
// the wait ends however few blocks fit on the device at once.
#pragma once

#include <cstdint>

#include "device/platform.cuh"

#ifdef PYDIT_SIM
#include "sim/atomics.h"
#endif

namespace pydit::PYDIT_BACKEND {

// Reads a semaphore. What the releasing thread wrote before is then visible to this thread, and after a __syncthreads
// to the block.
__device__ __forceinline__ unsigned load_acquire(const unsigned* semaphore) {
#ifdef PYDIT_SIM
  return simt::load_acquire(semaphore);
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(semaphore) : "memory");
  return value;
#endif
}

// Sets a semaphore, after everything that this thread has written and that it has synchronised with.
__device__ __forceinline__ void store_release(unsigned* semaphore, unsigned value) {
#ifdef PYDIT_SIM
  simt::store_release(semaphore, value);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(semaphore), "r"(value) : "memory");
#endif
}

// Adds with the ordering of store_release; returns the value before.
__device__ __forceinline__ unsigned add_release(unsigned* semaphore, unsigned value) {
#ifdef PYDIT_SIM
  return simt::add_release(semaphore, value);
#else
  unsigned before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(semaphore), "r"(value) : "memory");
  return before;
#endif
}

// The same without a result.
__device__ __forceinline__ void reduce_release(unsigned* semaphore, unsigned value) {
#ifdef PYDIT_SIM
  simt::add_release(semaphore, value);
#else
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(semaphore), "r"(value) : "memory");
#endif
}

// Waits until the semaphore is at least `value`.
__device__ __forceinline__ void wait_at_least(const unsigned* semaphore, unsigned value) {
  while (load_acquire(semaphore) < value) {
  }
}

// Vector additions to global memory, each element atomic by itself. float: sm_90. The address is a multiple of the
// size.
__device__ __forceinline__ void add_vector(float2* to, float2 x) {
#ifdef PYDIT_SIM
  atomicAdd(to, x);
#else
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x.x), "f"(x.y) : "memory");
#endif
}
__device__ __forceinline__ void add_vector(float4* to, float4 x) {
#ifdef PYDIT_SIM
  atomicAdd(to, x);
#else
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
#endif
}
__device__ __forceinline__ void add_vector(__nv_bfloat162* to, __nv_bfloat162 x) { atomicAdd(to, x); }
__device__ __forceinline__ void add_vector(__half2* to, __half2 x) { atomicAdd(to, x); }

}  // namespace pydit::PYDIT_BACKEND
