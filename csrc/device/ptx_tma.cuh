// Bulk copies by the Tensor Memory Accelerator (TMA, sm_90). One thread issues; the whole block may wait.
//
// A load signals an mbarrier with the bytes of the box: announce them there first (mbarrier_arrive_expect_tx). A store
// belongs to a group of the issuing thread, like cp.async. Boxes lie in shared memory as sim/tma.h says; the address is
// a multiple of 128 bytes, and of 8 swizzle spans if the kernel computes the swizzle from offsets in the box.
#pragma once

#include <cstdint>

#include "device/platform.cuh"
#include "device/ptx_async.cuh"
#include "device/tensor_map.h"

namespace pydit::PYDIT_BACKEND {

// Fetches the tensor map, a __grid_constant__ parameter, ahead of its first use.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
#ifdef PYDIT_SIM
  simt::require_hopper("prefetch.tensormap");
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// Where the byte at `offset` of a box, whose rows are kSpan bytes wide, lies after a swizzle of kSpan bytes.
template <int kSpan>
__device__ __forceinline__ int tma_swizzle(int offset) {
  return offset ^ (offset >> 7 & (kSpan / 16 - 1)) << 4;
}

// The box whose first element has the coordinates c0 (innermost), c1, ...; outside the tensor it is zero.
__device__ __forceinline__ void tma_load_2d(void* shared, const TensorMap& map, uint64_t* barrier, int c0, int c1) {
#ifdef PYDIT_SIM
  simt::tma_load(shared, map, {{c0, c1, 0, 0}}, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
#endif
}
__device__ __forceinline__ void tma_load_3d(void* shared, const TensorMap& map, uint64_t* barrier, int c0, int c1,
                                            int c2) {
#ifdef PYDIT_SIM
  simt::tma_load(shared, map, {{c0, c1, c2, 0}}, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}
__device__ __forceinline__ void tma_load_4d(void* shared, const TensorMap& map, uint64_t* barrier, int c0, int c1,
                                            int c2, int c3) {
#ifdef PYDIT_SIM
  simt::tma_load(shared, map, {{c0, c1, c2, c3}}, barrier);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

// tma_load_2d to the same place in each block of the cluster whose bit of `blocks` is set, signalling the mbarrier
// there.
__device__ __forceinline__ void tma_load_2d_multicast(void* shared, const TensorMap& map, uint64_t* barrier, int c0,
                                                      int c1, uint16_t blocks) {
#ifdef PYDIT_SIM
  simt::tma_load_multicast(shared, map, {{c0, c1, 0, 0}}, barrier, blocks);
#else
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "h"(blocks)
      : "memory");
#endif
}

// `bytes` (a multiple of 16) neighbouring bytes; both addresses are multiples of 16.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
#ifdef PYDIT_SIM
  simt::bulk_load(shared, global, bytes, barrier);
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

// Stores the box; what lies outside the tensor is left out.
__device__ __forceinline__ void tma_store_2d(const TensorMap& map, const void* shared, int c0, int c1) {
#ifdef PYDIT_SIM
  simt::tma_store(map, {{c0, c1, 0, 0}}, shared, false);
#else
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1)
               : "memory");
#endif
}
__device__ __forceinline__ void tma_store_3d(const TensorMap& map, const void* shared, int c0, int c1, int c2) {
#ifdef PYDIT_SIM
  simt::tma_store(map, {{c0, c1, c2, 0}}, shared, false);
#else
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
#endif
}
__device__ __forceinline__ void tma_store_4d(const TensorMap& map, const void* shared, int c0, int c1, int c2, int c3) {
#ifdef PYDIT_SIM
  simt::tma_store(map, {{c0, c1, c2, c3}}, shared, false);
#else
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
#endif
}

// Adds the box to the tensor, element by element, atomically and in the tensor's dtype.
__device__ __forceinline__ void tma_reduce_add_2d(const TensorMap& map, const void* shared, int c0, int c1) {
#ifdef PYDIT_SIM
  simt::tma_store(map, {{c0, c1, 0, 0}}, shared, true);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(shared_address(shared)), "r"(c0), "r"(c1)
      : "memory");
#endif
}
__device__ __forceinline__ void tma_reduce_add_3d(const TensorMap& map, const void* shared, int c0, int c1, int c2) {
#ifdef PYDIT_SIM
  simt::tma_store(map, {{c0, c1, c2, 0}}, shared, true);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
      "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
#endif
}
__device__ __forceinline__ void tma_reduce_add_4d(const TensorMap& map, const void* shared, int c0, int c1, int c2,
                                                  int c3) {
#ifdef PYDIT_SIM
  simt::tma_store(map, {{c0, c1, c2, c3}}, shared, true);
#else
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#endif
}

__device__ __forceinline__ void bulk_commit_group() {
#ifdef PYDIT_SIM
  simt::bulk_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kPending latest groups of stores of this thread are not complete in global memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_group() {
#ifdef PYDIT_SIM
  simt::bulk_wait(kPending, false);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits until at most the kPending latest groups still read shared memory; enough to reuse it or to exit.
template <int kPending>
__device__ __forceinline__ void bulk_wait_group_read() {
#ifdef PYDIT_SIM
  simt::bulk_wait(kPending, true);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace pydit::PYDIT_BACKEND
