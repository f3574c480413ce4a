// Wide stores to global memory.
#pragma once

#include "device/platform.cuh"

namespace pydit::PYDIT_BACKEND {

// 16 bytes at an address that is a multiple of 16. nvcc splits the assignment of a uint4 whose members it has just
// computed into four stores, each of which would touch a part of every sector.
__device__ __forceinline__ void store_global_16(void* pointer, uint4 value) {
#ifdef PYDIT_SIM
  *static_cast<uint4*>(pointer) = value;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(pointer), "r"(value.x), "r"(value.y), "r"(value.z),
               "r"(value.w)
               : "memory");
#endif
}

}  // namespace pydit::PYDIT_BACKEND
