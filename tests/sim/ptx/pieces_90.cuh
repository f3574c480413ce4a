// One small kernel for each other group of instructions of sm_90.
#pragma once

#include "device/ptx.cuh"

namespace pydit::PYDIT_BACKEND {

__global__ void vector_atomics(float2* pair, float4* quadruple) {
  add_vector(pair, make_float2(1.f, 2.f));
  add_vector(quadruple, make_float4(1.f, -1.f, 0.25f, 3.f));
}

// One warpgroup gives registers, two others take them; what is written are the addresses of neighbours.
__global__ void __launch_bounds__(384, 1) budgets(uint32_t* addresses) {
  PYDIT_DYNAMIC_SHARED(float, shared);
  if (threadIdx.x < 128)
    set_max_registers_down<40>();
  else
    set_max_registers_up<232>();
  addresses[threadIdx.x] = shared_address(shared + threadIdx.x);
}

// Registers [lane][matrix] to matrices one below the other.
template <int kMatrices, bool kTranspose>
__global__ void store_matrices(const uint32_t* in, unsigned short* out) {
  __shared__ __align__(16) unsigned short tile[32 * 8];
  uint32_t registers[kMatrices];
  for (int i = 0; i < kMatrices; ++i) registers[i] = in[threadIdx.x * kMatrices + i];
  stmatrix<kTranspose>(&tile[threadIdx.x % (kMatrices * 8) * 8], registers);
  __syncwarp();
  for (int i = threadIdx.x; i < kMatrices * 64; i += 32) out[i] = tile[i];
}

struct BoxAt {
  int c[4];
};

// Loads the box at `from`, dumps shared memory as it lies, and stores the box at `to`, or adds it there.
template <int kRank, bool kAdd>
__global__ void move_box(const __grid_constant__ TensorMap in, const __grid_constant__ TensorMap out, char* dump,
                         int bytes, BoxAt from, BoxAt to) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* full = reinterpret_cast<uint64_t*>(shared + (bytes + 127) / 128 * 128);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kRank == 2) tma_load_2d(shared, in, full, from.c[0], from.c[1]);
    if constexpr (kRank == 3) tma_load_3d(shared, in, full, from.c[0], from.c[1], from.c[2]);
    if constexpr (kRank == 4) tma_load_4d(shared, in, full, from.c[0], from.c[1], from.c[2], from.c[3]);
    mbarrier_expect_tx(full, bytes);
    mbarrier_arrive(full);
  }
  while (!mbarrier_try_wait(full, 0)) {
  }
  for (int i = threadIdx.x; i < bytes; i += blockDim.x) dump[i] = shared[i];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kAdd) {
      if constexpr (kRank == 2) tma_reduce_add_2d(out, shared, to.c[0], to.c[1]);
      if constexpr (kRank == 3) tma_reduce_add_3d(out, shared, to.c[0], to.c[1], to.c[2]);
      if constexpr (kRank == 4) tma_reduce_add_4d(out, shared, to.c[0], to.c[1], to.c[2], to.c[3]);
    } else {
      if constexpr (kRank == 2) tma_store_2d(out, shared, to.c[0], to.c[1]);
      if constexpr (kRank == 3) tma_store_3d(out, shared, to.c[0], to.c[1], to.c[2]);
      if constexpr (kRank == 4) tma_store_4d(out, shared, to.c[0], to.c[1], to.c[2], to.c[3]);
    }
    bulk_commit_group();
    bulk_wait_group_read<0>();
    mbarrier_invalidate(full);
  }
}

// Two rows through one buffer: the second is written over the first once the engine has read it. kBug: before.
template <bool kBug>
__global__ void store_rows(const __grid_constant__ TensorMap out, const float* in, float* copy) {
  PYDIT_DYNAMIC_SHARED(float, shared);
  auto* full = reinterpret_cast<uint64_t*>(shared + 64);
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(full, 128);
    bulk_load(shared + 32, in + 32, 128, full);
  }
  __syncthreads();
  mbarrier_wait(full, 0);
  copy[threadIdx.x] = shared[32 + threadIdx.x];
  for (int row = 0; row < 2; ++row) {
    shared[threadIdx.x] = in[row * 32 + threadIdx.x];
    fence_proxy_async();
    __syncwarp();
    if (threadIdx.x == 0) {
      tma_store_2d(out, shared, 0, row);
      bulk_commit_group();
      if (!kBug) bulk_wait_group_read<0>();
    }
    __syncwarp();
  }
  if (threadIdx.x == 0) bulk_wait_group<0>();
}

}  // namespace pydit::PYDIT_BACKEND
