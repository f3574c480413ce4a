// cp.async, barriers between some of a block's threads, mbarriers, and a warpgroup's register budget.
#pragma once

#include <cstdint>

#include "device/platform.cuh"

#ifdef PYDIT_SIM
#include "sim/async.h"
#include "sim/mbarrier.h"
#endif

namespace pydit::PYDIT_BACKEND {

// The 32-bit address that PTX takes for shared memory. In the simulator only dynamic shared memory has one.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
#ifdef PYDIT_SIM
  return simt::shared_address(pointer);
#else
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
#endif
}

// cp.async -------------------------------------------------------------------------------------------------------

// Copies `valid` of kBytes (4, 8 or 16) bytes from global to shared memory and fills the rest with zeros. 16-byte
// copies bypass L1. Visible to this thread after cp_async_wait_group for the group that it was committed in.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef PYDIT_SIM
  simt::cp_async(shared, global, kBytes, static_cast<uint32_t>(valid));
#else
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
#endif
}

__device__ __forceinline__ void cp_async_commit_group() {
#ifdef PYDIT_SIM
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the kPending latest groups of this thread are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
#ifdef PYDIT_SIM
  simt::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Waits for all copies of this thread, committed or not.
__device__ __forceinline__ void cp_async_wait_all() {
#ifdef PYDIT_SIM
  simt::cp_async_commit();
  simt::cp_async_wait(0);
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Named barriers -------------------------------------------------------------------------------------------------

// Waits at barrier `id` (1 to 15; 0 is __syncthreads) until `threads`, a multiple of 32, have come to it.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
#ifdef PYDIT_SIM
  simt::named_barrier(id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Arrives at barrier `id` without waiting there.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#ifdef PYDIT_SIM
  simt::named_barrier(id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// mbarriers (sm_90) ----------------------------------------------------------------------------------------------

// One thread initialises, calls fence_barrier_init, and the block synchronises before the first use.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
#ifdef PYDIT_SIM
  simt::mbarrier_init(barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Afterwards the memory may be used for something else.
__device__ __forceinline__ void mbarrier_invalidate(uint64_t* barrier) {
#ifdef PYDIT_SIM
  simt::mbarrier_invalidate(barrier);
#else
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Makes initialised mbarriers visible to TMA.
__device__ __forceinline__ void fence_barrier_init() {
#ifdef PYDIT_SIM
  simt::mbarrier_init_fence();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#ifdef PYDIT_SIM
  simt::mbarrier_arrive(barrier, 0, "mbarrier.arrive");
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// The current phase also waits for `bytes` bytes of copies.
__device__ __forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
#ifdef PYDIT_SIM
  simt::mbarrier_expect(barrier, bytes);
#else
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
#ifdef PYDIT_SIM
  simt::mbarrier_arrive(barrier, bytes, "mbarrier.arrive.expect_tx");
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Whether the phase of that parity is complete; may wait a moment for it.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
#ifdef PYDIT_SIM
  return simt::mbarrier_try_wait(barrier, parity);
#else
  uint32_t done;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p;}"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
#endif
}

// Waits until the phase of that parity is complete. The first phase has parity 0; a wait for parity 1 on a fresh
// barrier passes at once.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#ifdef PYDIT_SIM
  simt::mbarrier_wait(barrier, parity);
#else
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#endif
}

// Orders this thread's plain accesses to shared memory before those of TMA and wgmma (the async proxy) after the next
// barrier: every thread that wrote what these will read, or read what these will write, calls it; then all synchronise;
// then one issues.
__device__ __forceinline__ void fence_proxy_async() {
#ifdef PYDIT_SIM
  simt::proxy_fence();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Warps ----------------------------------------------------------------------------------------------------------

// True in one lane of the warp, the same one in every call. All 32 lanes call. It tells ptxas that what it guards runs
// in one thread; behind any other condition a TMA copy becomes a loop over the lanes that might be there.
__device__ __forceinline__ bool elect_one() {
#ifdef PYDIT_SIM
  return simt::elect_one();
#else
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
#endif
}

// Sets the register budget of the calling warpgroup to kRegisters per thread. Needs __launch_bounds__ on the kernel.
// All budgets together must fit what the block was launched with, or the GPU waits for registers that never come.
template <int kRegisters>
__device__ __forceinline__ void set_max_registers_up() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256 registers in steps of 8");
#ifdef PYDIT_SIM
  simt::set_max_registers(kRegisters, true);
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void set_max_registers_down() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "24 to 256 registers in steps of 8");
#ifdef PYDIT_SIM
  simt::set_max_registers(kRegisters, false);
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace pydit::PYDIT_BACKEND
