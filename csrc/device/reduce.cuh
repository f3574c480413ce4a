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

// Sums of two terms over a group of one or more whole warps. For more than one warp the group is the block and
// `scratch` is kThreads / 32 slots of shared memory that no other call of the kernel uses.
template <int kThreads>
__device__ __forceinline__ float2 group_sum(float2 x, float2* scratch) {
  x.x = lane_group_sum<32>(x.x);
  x.y = lane_group_sum<32>(x.y);
  if constexpr (kThreads > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = make_float2(0.f, 0.f);
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      x.x += scratch[warp].x;
      x.y += scratch[warp].y;
    }
  }
  return x;
}

}  // namespace pydit::PYDIT_BACKEND
