// Small kernels in the shapes of real ones, mostly Hopper's, each with the bugs that such kernels have.
#pragma once

#include "device/ptx.cuh"

namespace pydit::PYDIT_BACKEND {

enum class StageBug {
  kNone,
  kNotSynchronised,   // mbarriers used by threads that cannot know that they are initialised
  kNoInitFence,       // and which TMA may not see
  kInitialisedTwice,  // to begin a round anew
  kInvalidatedEarly,  // while others may still look at it
  kParity,            // of the phase before
  kTooFewBytes,       // announced
  kTooManyBytes,
  kBoxTooLarge,   // a box, and its announcement, of two stages
  kBeyondMemory,  // the last stage reaches beyond what the launch asked for
  kFenceTooEarly  // by the issuing thread alone, before the barrier that orders it behind the others' reads
};

constexpr int kStageThreads = 64, kStageRows = 8, kStageBytes = kStageRows * 128;
constexpr int kStageShared = 2 * kStageBytes + 128;

// Sums tiles of 8 rows of 32 floats through two stages, the next filled while one is read.
template <StageBug kBug>
__global__ void staged(const __grid_constant__ TensorMap map, float* out, int tiles) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* full = reinterpret_cast<uint64_t*>(shared + 2 * kStageBytes);
  const bool issues = threadIdx.x == 0;
  if (issues) {
    for (int stage = 0; stage < 2; ++stage) mbarrier_init(&full[stage], 1);
    if (kBug != StageBug::kNoInitFence) fence_barrier_init();
  }
  if (kBug != StageBug::kNotSynchronised) __syncthreads();
  const auto load = [&](int tile) {
    constexpr int kAnnounced = kBug == StageBug::kTooFewBytes    ? kStageBytes / 2
                               : kBug == StageBug::kTooManyBytes ? kStageBytes + 128
                               : kBug == StageBug::kBoxTooLarge  ? 2 * kStageBytes
                                                                 : kStageBytes;
    constexpr int kPitch = kStageBytes + (kBug == StageBug::kBeyondMemory ? 256 : 0);
    const int stage = tile % 2;
    if (kBug == StageBug::kInitialisedTwice && tile == 2) mbarrier_init(&full[stage], 1);
    mbarrier_arrive_expect_tx(&full[stage], kAnnounced);
    tma_load_2d(shared + stage * kPitch, map, &full[stage], 0, tile * kStageRows);
  };
  if (issues) load(0);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % 2;
    if (issues && tile + 1 < tiles) load(tile + 1);
    mbarrier_wait(&full[stage], tile / 2 % 2 ^ (kBug == StageBug::kParity ? 1 : 0));
    if (kBug == StageBug::kInvalidatedEarly && issues && tile + 1 == tiles) mbarrier_invalidate(&full[stage]);
    const auto* values = reinterpret_cast<const float*>(shared + stage * kStageBytes);
    for (int i = threadIdx.x; i < kStageBytes / 4; i += kStageThreads) sum += values[i];
    if (kBug != StageBug::kFenceTooEarly || issues) fence_proxy_async();
    __syncthreads();
  }
  if (issues && kBug != StageBug::kInvalidatedEarly) mbarrier_invalidate(&full[0]);
  out[blockIdx.x * kStageThreads + threadIdx.x] = sum;
}

enum class CopyBug { kNone, kNoCommit, kNoBarrier };

// Each thread copies 16 bytes and reads what another one copied.
template <CopyBug kBug>
__global__ void copied(const float* in, float* out) {
  PYDIT_DYNAMIC_SHARED(float, values);
  cp_async<16>(values + 4 * threadIdx.x, in + 4 * threadIdx.x);
  if (kBug != CopyBug::kNoCommit) cp_async_commit_group();
  cp_async_wait_group<0>();
  if (kBug != CopyBug::kNoBarrier) __syncthreads();
  out[threadIdx.x] = values[4 * (63 - threadIdx.x)];
}

enum class ProductsBug {
  kNone,
  kNoProxyFence,  // between the copies and the products
  kNoWgmmaFence,  // between an access of the accumulator and the second group
  kNoCommit,      // of the second group
  kWaitDepth,     // for the first group, though the second adds to the same accumulator
  kOverwritten    // an operand in shared memory is written before the wait
};

// Two groups of a product of ones, 64 x 16 by 16 x 8, whose operands cp.async brings: twice 16, plus 1, and one more in
// between.
template <ProductsBug kBug>
__global__ void products(const __nv_bfloat16* ones, float* out) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  for (int i = threadIdx.x; i < 72 * 2; i += 128) cp_async<16>(shared + 16 * i, ones + 8 * i);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  if (kBug != ProductsBug::kNoProxyFence) fence_proxy_async();
  __syncthreads();
  const uint64_t a = matrix_descriptor<0>(shared, 128, 256), b = matrix_descriptor<0>(shared + 64 * 32, 128, 256);
  float d[4] = {1, 1, 1, 1};
  for (int group = 0; group < 2; ++group) {
    if (group == 1 && (kBug == ProductsBug::kNone || kBug == ProductsBug::kNoWgmmaFence)) {
      wgmma_wait_group<0>();
      d[3] += 1;
    }
    if (kBug != ProductsBug::kNoWgmmaFence || group == 0) wgmma_fence();
    wgmma<__nv_bfloat16, 8>(d, a, b, true);
    if (kBug != ProductsBug::kNoCommit || group == 0) wgmma_commit_group();
  }
  if (kBug == ProductsBug::kOverwritten) *reinterpret_cast<int*>(shared + 16 * threadIdx.x) = 0;
  wgmma_wait_group<kBug == ProductsBug::kWaitDepth ? 1 : 0>();
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
  if (kBug == ProductsBug::kWaitDepth) wgmma_wait_group<0>();
}

enum class BudgetBug {
  kNone,
  kBeyondThePool,  // more registers, together, than the block was launched with
  kUp,             // taking what it has to give
  kHalf            // half of a warpgroup
};

// A loader and two consuming warpgroups of a block that has 168 registers a thread.
template <BudgetBug kBug>
__global__ void __launch_bounds__(384, 1) budgets_of_three(int* out) {
  const int group = threadIdx.x / 128;
  if (group == 0) {
    if (kBug == BudgetBug::kUp)
      set_max_registers_up<24>();
    else if (kBug != BudgetBug::kHalf || threadIdx.x < 64)
      set_max_registers_down<kBug == BudgetBug::kBeyondThePool ? 40 : 24>();
  } else {
    set_max_registers_up<240>();
  }
  out[blockIdx.x * 384 + threadIdx.x] = group;
}

// Half of the warps give the other half a value; kBug: and count themselves alone.
template <bool kBug>
__global__ void handed_over(int* out) {
  __shared__ int value;
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) value = 7;
    barrier_arrive(1, kBug ? 32 : 64);
  } else {
    barrier_sync(1, 64);
    out[threadIdx.x - 32] = value;
  }
}

// kBug: the last thread writes behind the dynamic shared memory.
template <bool kBug>
__global__ void overrun(int* out) {
  PYDIT_DYNAMIC_SHARED(int, values);
  values[threadIdx.x + (kBug && threadIdx.x == 31)] = 1;
  out[threadIdx.x] = values[threadIdx.x];
}

}  // namespace pydit::PYDIT_BACKEND
