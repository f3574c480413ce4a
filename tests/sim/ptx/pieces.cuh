// One small kernel for each other group of portable instructions.
#pragma once

#include "device/ptx.cuh"

namespace pydit::PYDIT_BACKEND {

// `matrices` 8 x 8 matrices, one below the other, into registers [lane][matrix].
template <int kMatrices, bool kTranspose>
__global__ void load_matrices(const unsigned short* in, uint32_t* out) {
  __shared__ __align__(16) unsigned short tile[32 * 8];
  for (int i = threadIdx.x; i < kMatrices * 64; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t registers[kMatrices];
  ldmatrix<kTranspose>(registers, &tile[threadIdx.x % (kMatrices * 8) * 8]);
  for (int i = 0; i < kMatrices; ++i) out[threadIdx.x * kMatrices + i] = registers[i];
}

// out[i] = the first `valid` bytes of each piece of in, zeros behind, by copies of kBytes.
template <int kBytes>
__global__ void copy_pieces(const char* in, char* out, int valid) {
  __shared__ __align__(16) char pieces[128 * kBytes];
  char* mine = pieces + threadIdx.x * kBytes;
  cp_async<kBytes>(mine, in + threadIdx.x * kBytes, valid);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  for (int i = 0; i < kBytes; ++i) out[threadIdx.x * kBytes + i] = mine[i];
}

// Warps 0 and 1 hand rounds of numbers to warps 2 and 3 through one buffer and two named barriers.
template <bool kBug>
__global__ void hand_over(int* out, int rounds) {
  __shared__ int buffer[64];
  const bool giver = threadIdx.x < 64;
  for (int round = 0; round < rounds; ++round) {
    if (giver) {
      if (round > 0) barrier_sync(2, 128);  // the last round has been taken
      buffer[threadIdx.x] = round * 1000 + threadIdx.x;
      barrier_arrive(1, 128);
    } else {
      if (!kBug) barrier_sync(1, 128);
      out[round * 64 + threadIdx.x - 64] = buffer[127 - threadIdx.x];
      if (kBug) barrier_sync(1, 128);
      if (round + 1 < rounds) barrier_arrive(2, 128);
    }
  }
}

// Blocks pass x -> 3 x + ticket on, in the order of their tickets.
__global__ void pass_on(unsigned* tickets, unsigned* done, unsigned* x) {
  __shared__ unsigned ticket;
  if (threadIdx.x == 0) {
    ticket = atomicAdd(tickets, 1u);
    wait_at_least(done, ticket);
  }
  __syncthreads();
  x[threadIdx.x] = x[threadIdx.x] * 3 + ticket;
  __syncthreads();
  if (threadIdx.x == 0) {
    if (ticket % 3 == 0)
      store_release(done, ticket + 1);
    else if (ticket % 3 == 1)
      add_release(done, 1);
    else
      reduce_release(done, 1);
  }
}

// Waits for what nobody does.
__global__ void wait_for_ever(unsigned* done) {
  if (threadIdx.x == 0 && blockIdx.x == 0) wait_at_least(done, 1);
}

// Every thread of the grid adds, counting from 1; the CAS loop counts too.
__global__ void scalar_atomics(float* f, double* d, int* i, unsigned* u, unsigned long long* ull) {
  const int rank = blockIdx.x * blockDim.x + threadIdx.x + 1;
  atomicAdd(f, static_cast<float>(rank));
  atomicAdd(d, 0.5 * rank);
  atomicAdd(&i[0], -rank);
  atomicMax(&i[1], rank);
  atomicMin(&i[2], -rank);
  atomicAdd(&u[0], 2u);
  atomicExch(&u[1], static_cast<unsigned>(rank));
  unsigned seen = u[2], before;
  do {
    before = seen;
    seen = atomicCAS(&u[2], before, before + 3);
  } while (seen != before);
  atomicAdd(ull, 1ull << 33);
}

__global__ void pair_atomics(__nv_bfloat162* b, __half2* h) {
  add_vector(b, __floats2bfloat162_rn(1.f, -2.f));
  add_vector(h, __floats2half2_rn(0.5f, 1.f));
}

}  // namespace pydit::PYDIT_BACKEND
