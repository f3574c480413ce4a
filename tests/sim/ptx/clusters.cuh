// What blocks of a cluster do together: a ring of tiles that each fills half of for both, and reads of each other's
// shared memory.
#pragma once

#include "device/ptx.cuh"

namespace pydit::PYDIT_BACKEND {

enum class RingBug {
  kNone,
  kNoStart,       // mbarriers of the other block used without a barrier of the cluster after their initialisation
  kNoEnd,         // a block exits while the other may still arrive at its mbarriers
  kUnread,        // a block exits while the other still copies into it
  kOwnRelease,    // a slot counts as free when this block has read it, whatever the other does
  kEarlyRelease,  // a slot is given to the other block before it was read
  kNoFence,       // a slot is given back without a fence between plain reads and the copy that fills it again
  kMask,          // a copy for a block that is not in the cluster
  kBytes,         // the bytes that come from the other block are not announced
  kUninitialised  // an arrival where the other block has no mbarrier
};

constexpr int kRingThreads = 96, kRingStages = 2, kHalfRows = 8, kHalfBytes = kHalfRows * 128,
              kTileBytes = 2 * kHalfBytes;
constexpr int kRingBytes = kRingStages * kTileBytes + 2 * kRingStages * 8;

// Sums, element by element, `tiles` tiles of 16 rows of 32 floats: a cluster's own rows. All 64 consumers of each of
// its two blocks see all elements; thread t of a block adds the elements t, t + 64, ... to sums[block * 64 + t].
template <RingBug kBug>
__global__ void shared_ring(const __grid_constant__ TensorMap map, float* sums, int tiles) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* full = reinterpret_cast<uint64_t*>(shared + kRingStages * kTileBytes);
  uint64_t* empty = full + kRingStages;
  const uint32_t rank = cluster_rank();
  const int lane = threadIdx.x % 32, consumer = static_cast<int>(threadIdx.x) - 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kRingStages; ++stage) {
      mbarrier_init(&full[stage], 1);
      if (kBug != RingBug::kUninitialised || rank == 0)
        mbarrier_init(&empty[stage], kBug == RingBug::kOwnRelease ? 2 : 4);
    }
    fence_barrier_init();
  }
  if (kBug == RingBug::kNoStart)
    __syncthreads();
  else
    cluster_sync();
  const auto release = [&](int stage) {
    if (kBug != RingBug::kNoFence) fence_proxy_async();
    __syncwarp();
    if (lane != 0) return;
    if (kBug == RingBug::kOwnRelease) return mbarrier_arrive(&empty[stage]);
    for (uint32_t block = 0; block < 2; ++block) mbarrier_arrive_cluster(&empty[stage], block);
  };
  if (threadIdx.x == 0) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kRingStages;
      mbarrier_wait(&empty[stage], tile / kRingStages % 2 ^ 1);
      mbarrier_arrive_expect_tx(&full[stage], kBug == RingBug::kBytes ? kHalfBytes : kTileBytes);
      const int row = (static_cast<int>(blockIdx.x) / 2 * tiles + tile) * 2 + static_cast<int>(rank);
      tma_load_2d_multicast(shared + stage * kTileBytes + rank * kHalfBytes, map, &full[stage], 0, row * kHalfRows,
                            kBug == RingBug::kMask ? 5 : 3);
    }
  } else if (consumer >= 0) {
    float sum = 0;
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kRingStages;
      if (kBug == RingBug::kUnread && rank == 1 && tile == tiles - 1) break;
      mbarrier_wait(&full[stage], tile / kRingStages % 2);
      if (kBug == RingBug::kEarlyRelease) release(stage);
      const auto* values = reinterpret_cast<const float*>(shared + stage * kTileBytes);
      for (int i = consumer; i < kTileBytes / 4; i += 64) sum += values[i];
      if (kBug != RingBug::kEarlyRelease) release(stage);
    }
    sums[blockIdx.x * 64 + consumer] = sum;
  }
  if (kBug != RingBug::kNoEnd && kBug != RingBug::kUnread) cluster_sync();
}

enum class ExchangeBug { kNone, kNoStart, kNoBarrier, kBetween, kNoEnd, kLateWrite, kStatic };

// What thread t of a block has, thread t of the next block of its cluster writes.
template <ExchangeBug kBug>
__global__ void exchange(int* out) {
  PYDIT_DYNAMIC_SHARED(int, values);
  __shared__ int fixed;
  const uint32_t next = (cluster_rank() + 1) % cluster_size();
  const int place = static_cast<int>(threadIdx.x);
  values[place] = -1;
  if (kBug == ExchangeBug::kStatic && threadIdx.x == 0) fixed = 1;
  if (kBug != ExchangeBug::kNoStart) cluster_sync();
  values[place] = static_cast<int>(blockIdx.x) * 100 + place;
  if (kBug == ExchangeBug::kBetween) cluster_arrive();
  if (kBug == ExchangeBug::kNone || kBug == ExchangeBug::kNoEnd || kBug == ExchangeBug::kLateWrite) cluster_sync();
  const int offset = kBug == ExchangeBug::kStatic ? fixed : 0;
  out[blockIdx.x * blockDim.x + threadIdx.x] = *cluster_map(values + place, next) + offset;
  if (kBug == ExchangeBug::kBetween) cluster_wait();
  if (kBug != ExchangeBug::kNoEnd) cluster_sync();
  if (kBug == ExchangeBug::kLateWrite) *cluster_map(values + place, next) = 0;
}

}  // namespace pydit::PYDIT_BACKEND
