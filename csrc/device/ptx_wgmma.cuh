// wgmma.mma_async.m64nNk16 (sm_90a): a warpgroup of four warps, the first a multiple of 4, multiplies a 64 x 16 by a 16
// x N tile and accumulates in fp32 registers. B is in shared memory, A there or in registers. Layouts: sim/wgmma.h.
//
//   wgmma_fence();                          registers and accumulators written so far are ordered before
//   wgmma<T, N>(d, a_descriptor, b_descriptor, accumulate);   one per k16 step
//   wgmma_commit_group();
//   wgmma_wait_group<0>();                  only now are d and the operands in shared memory free again
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/platform.cuh"
#include "device/ptx_async.cuh"

#ifdef PYDIT_SIM
#include "sim/wgmma.h"
#endif

namespace pydit::PYDIT_BACKEND {

// Descriptor of an operand in (dynamic) shared memory, offsets in bytes; kSwizzle: 0, 32, 64 or 128.
// K-major: stride_bytes between groups of 8 rows along M or N; leading_bytes between groups of 8 along K without
// swizzle, unused with one. Transposed: stride_bytes between groups of 8 along K, leading_bytes between the spans along
// M or N; without swizzle the two are exchanged. A step of 16 along K inside a swizzled K-major row adds 32 bytes to
// `start`.
template <int kSwizzle>
__device__ __forceinline__ uint64_t matrix_descriptor(const void* start, uint32_t leading_bytes,
                                                      uint32_t stride_bytes) {
  static_assert(kSwizzle == 0 || kSwizzle == 32 || kSwizzle == 64 || kSwizzle == 128,
                "swizzle of 0, 32, 64 or 128 bytes");
#ifdef PYDIT_SIM
  return simt::matrix_descriptor(start, leading_bytes, stride_bytes, kSwizzle);
#else
  constexpr uint64_t kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : kSwizzle == 32 ? 3 : 0;
  return static_cast<uint64_t>(shared_address(start) >> 4 & 0x3fff) |
         static_cast<uint64_t>(leading_bytes >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4 & 0x3fff) << 32 | kMode << 62;
#endif
}

__device__ __forceinline__ void wgmma_fence() {
#ifdef PYDIT_SIM
  simt::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit_group() {
#ifdef PYDIT_SIM
  simt::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most the kPending latest groups of this warp are not done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
#ifdef PYDIT_SIM
  simt::wgmma_wait(kPending);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

#ifndef PYDIT_SIM
// The instruction names each of its N / 2 accumulators, so every N needs its own text: ptx_wgmma_shapes.inc.
template <int kN>
struct WgmmaShape;
#include "device/ptx_wgmma_shapes.inc"
#endif

// D = A B, plus D if `accumulate`. T: __nv_bfloat16 or __half; kN: 8 to 256 in steps of 8. kTransposeA, kTransposeB:
// the operand is contiguous along M or N rather than K. Every lane of the warpgroup passes the same descriptors.
template <typename T, int kN, bool kTransposeA = false, bool kTransposeB = false>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  constexpr bool kBfloat16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(kBfloat16 || std::is_same<T, __half>::value, "wgmma takes __nv_bfloat16 or __half");
  static_assert(kN >= 8 && kN <= 256 && kN % 8 == 0, "N of 8 to 256 in steps of 8");
#ifdef PYDIT_SIM
  const auto element = kBfloat16 ? simt::Element::kBfloat16 : simt::Element::kHalf;
  simt::wgmma({d, a, b, {}, false, kTransposeA, kTransposeB, accumulate, element, kN});
#else
  WgmmaShape<kN>::template shared<kBfloat16, kTransposeA, kTransposeB>(d, a, b, accumulate);
#endif
}

// The same with A in registers.
template <typename T, int kN, bool kTransposeB = false>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  constexpr bool kBfloat16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(kBfloat16 || std::is_same<T, __half>::value, "wgmma takes __nv_bfloat16 or __half");
  static_assert(kN >= 8 && kN <= 256 && kN % 8 == 0, "N of 8 to 256 in steps of 8");
#ifdef PYDIT_SIM
  const auto element = kBfloat16 ? simt::Element::kBfloat16 : simt::Element::kHalf;
  simt::wgmma({d, 0, b, {a[0], a[1], a[2], a[3]}, true, false, kTransposeB, accumulate, element, kN});
#else
  WgmmaShape<kN>::template registers<kBfloat16, kTransposeB>(d, a, b, accumulate);
#endif
}

}  // namespace pydit::PYDIT_BACKEND
