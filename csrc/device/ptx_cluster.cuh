// Clusters (sm_90): blocks that run at the same time and reach into each other's shared memory. The launch says how
// many blocks, neighbours along x, make one (PYDIT_LAUNCH_CLUSTER); in any other launch a block is a cluster of its
// own.
//
// A block must have started before another reaches into its memory, and must not exit before that is over: the kernel
// needs a cluster barrier at both ends.
#pragma once

#include <cstdint>

#include "device/platform.cuh"
#include "device/ptx_async.cuh"

#ifdef PYDIT_SIM
#include "sim/cluster.h"
#endif

namespace pydit::PYDIT_BACKEND {

// Rank of the running block in its cluster.
__device__ __forceinline__ uint32_t cluster_rank() {
#ifdef PYDIT_SIM
  return simt::current->block->rank();
#else
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

__device__ __forceinline__ uint32_t cluster_size() {
#ifdef PYDIT_SIM
  return simt::cluster().size();
#else
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#endif
}

// Arrives, without waiting, at the barrier of all threads of the cluster that have not exited. Earlier writes, to any
// memory, are visible to every one of them after its wait. Each arrival is followed by exactly one cluster_wait.
__device__ __forceinline__ void cluster_arrive() {
#ifdef PYDIT_SIM
  simt::cluster().arrive();
#else
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#ifdef PYDIT_SIM
  simt::cluster().wait();
#else
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The address in block `rank` that corresponds to `shared` in the running block, to load from and to store to.
template <typename T>
__device__ __forceinline__ T* cluster_map(T* shared, uint32_t rank) {
#ifdef PYDIT_SIM
  return static_cast<T*>(simt::cluster().map(shared, rank, "mapa"));
#else
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
#endif
}

// mbarrier_arrive at the mbarrier in the same place in block `rank`, to hand back memory that has been read. It does
// not publish what the thread wrote, which the other block sees only after a cluster barrier: a release of that scope
// would be a GPU-wide fence in every round of a ring.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
#ifdef PYDIT_SIM
  simt::mbarrier_arrive_cluster(barrier, rank);
#else
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

}  // namespace pydit::PYDIT_BACKEND
