// Sums over a group of kThreads consecutive threads that all hold a term; every thread receives the total.
#pragma once

#include "device/platform.cuh"

namespace pydit::PYDIT_BACKEND {

constexpr unsigned kFullWarp = 0xffffffffu;

// Group of a power of two <= 32 lanes inside one warp; every lane of the warp must call.
template <int kLanes>
__device__ __forceinline__ float lane_group_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Group of one or more whole warps. For more than one warp the group is the block, `scratch` holds kThreads / 32
// floats of shared memory, and a second call needs no barrier of its own: it uses the other half (`phase` 0 or 1).
template <int kThreads>
__device__ __forceinline__ float group_sum(float x, float* scratch, int phase) {
  x = lane_group_sum<32>(x);
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    float* slots = scratch + phase * kWarps;
    if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) x += slots[warp];
  }
  return x;
}

}  // namespace pydit::PYDIT_BACKEND
