// How matrices are cut into tiles, and how what a tile is made of gets to shared memory.
#pragma once

#include <cstdint>

#include "device/platform.cuh"
#include "device/ptx_async.cuh"
#include "device/vector.cuh"

namespace pydit::PYDIT_BACKEND {

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Eight elements to shared memory; of `left` that there are, the rest becomes zero. Asynchronous if kAligned.
template <typename T, bool kAligned>
__device__ __forceinline__ void copy_eight(char* target, const T* source, int64_t left) {
  const int exist = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
  if constexpr (kAligned) {
    cp_async<16>(target, source, exist * 2);
  } else {
    Pack<T, 8> values;
#pragma unroll
    for (int j = 0; j < 8; ++j) values.value[j] = j < exist ? source[j] : from_float<T>(0.f);
    *reinterpret_cast<Pack<T, 8>*>(target) = values;
  }
}

}  // namespace pydit::PYDIT_BACKEND
