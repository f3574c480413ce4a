// C = A B by TMA, mbarriers and wgmma, the shape of a Hopper kernel: one warpgroup multiplies, one warp keeps the copy
// engine busy. Tiles of 64 x N x 64. Each operand lies in boxes as wide as its swizzle span (16 bytes without swizzle).
#pragma once

#include "device/ptx.cuh"

namespace pydit::PYDIT_BACKEND {

enum class WgmmaBug { kNone, kParity, kArrivals, kEarlyRelease, kDescriptor, kMissingBytes, kMisaligned };
enum class OperandA { kShared, kSharedTransposed, kRegisters };

constexpr int kWgmmaThreads = 160, kWgmmaStages = 2, kWgmmaM = 64, kWgmmaK = 64;

// A tile of kRows along M or N and 64 along K, in boxes.
template <int kRows, int kSwizzle, bool kTranspose>
struct OperandTile {
  static constexpr int kSpan = kSwizzle == 0 ? 16 : kSwizzle;  // bytes
  static constexpr int kBoxes = (kTranspose ? kRows : kWgmmaK) * 2 / kSpan;
  static constexpr int kBoxBytes = (kTranspose ? kWgmmaK : kRows) * kSpan;
  static constexpr int kBytes = kBoxes * kBoxBytes;
  static_assert(!kTranspose || kRows * 2 % kSpan == 0, "boxes must fill the tile");

  static __device__ __forceinline__ void load(char* to, const TensorMap& map, uint64_t* full, int row, int k) {
    for (int box = 0; box < kBoxes; ++box) {
      const int step = box * kSpan / 2;
      if (kTranspose)
        tma_load_2d(to + box * kBoxBytes, map, full, row + step, k);
      else
        tma_load_2d(to + box * kBoxBytes, map, full, k + step, row);
    }
  }
  // Of the 16 columns from k on.
  static __device__ __forceinline__ uint64_t descriptor(const char* tile, int k) {
    if (kTranspose) {
      const char* start = tile + k * kSpan;
      return kSwizzle == 0 ? matrix_descriptor<kSwizzle>(start, 8 * kSpan, kBoxBytes)
                           : matrix_descriptor<kSwizzle>(start, kBoxBytes, 8 * kSpan);
    }
    return matrix_descriptor<kSwizzle>(tile + k * 2 / kSpan * kBoxBytes + k * 2 % kSpan, kBoxBytes, 8 * kSpan);
  }
};

// Element (row, k) of a K-major tile, as an address for ldmatrix.
template <int kRows, int kSwizzle>
__device__ __forceinline__ const char* element_of(const char* tile, int row, int k) {
  using Tile = OperandTile<kRows, kSwizzle, false>;
  const int offset = k * 2 / Tile::kSpan * Tile::kBoxBytes + row * Tile::kSpan + k * 2 % Tile::kSpan;
  return tile + (kSwizzle == 0 ? offset : offset ^ (offset >> 7 & (Tile::kSpan / 16 - 1)) << 4);
}

template <int kN, int kSwizzle, OperandA kA, bool kTransposeB>
constexpr int wgmma_shared_bytes() {
  const int a = OperandTile<kWgmmaM, kSwizzle, kA == OperandA::kSharedTransposed>::kBytes;
  const int b = OperandTile<kN, kSwizzle, kTransposeB>::kBytes;
  return kWgmmaStages * (a + (b + 1023) / 1024 * 1024) + 1024;
}

template <typename T, int kN, int kSwizzle, OperandA kA, bool kTransposeB, WgmmaBug kBug>
__global__ void __launch_bounds__(kWgmmaThreads, 1)
    gemm_wgmma(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map, float* c, int m, int n,
               int k) {
  constexpr bool kTransposeA = kA == OperandA::kSharedTransposed;
  using TileA = OperandTile<kWgmmaM, kSwizzle, kTransposeA>;
  using TileB = OperandTile<kN, kSwizzle, kTransposeB>;
  PYDIT_DYNAMIC_SHARED(char, shared);
  constexpr int kStageBytes = TileA::kBytes + (TileB::kBytes + 1023) / 1024 * 1024;
  auto* full = reinterpret_cast<uint64_t*>(shared + kWgmmaStages * kStageBytes);
  uint64_t* empty = full + kWgmmaStages;
  const int m0 = blockIdx.y * kWgmmaM, n0 = blockIdx.x * kN, tiles = (k + kWgmmaK - 1) / kWgmmaK;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kWgmmaStages; ++stage) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], kBug == WgmmaBug::kArrivals ? 129 : 128);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp == 4) {
    set_max_registers_down<40>();
    if (elect_one()) {
      prefetch_tensor_map(a_map);
      prefetch_tensor_map(b_map);
      for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kWgmmaStages;
        char* to = shared + stage * kStageBytes + (kBug == WgmmaBug::kMisaligned ? 16 : 0);
        mbarrier_wait(&empty[stage], tile / kWgmmaStages % 2 ^ 1);
        mbarrier_arrive_expect_tx(&full[stage], TileA::kBytes + (kBug == WgmmaBug::kMissingBytes ? 0 : TileB::kBytes));
        TileA::load(to, a_map, &full[stage], m0, tile * kWgmmaK);
        TileB::load(to + TileA::kBytes, b_map, &full[stage], n0, tile * kWgmmaK);
      }
    }
    return;
  }
  float d[kN / 2];
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kWgmmaStages;
    const char* a_tile = shared + stage * kStageBytes;
    const char* b_tile = a_tile + TileA::kBytes;
    mbarrier_wait(&full[stage], tile / kWgmmaStages % 2 ^ (kBug == WgmmaBug::kParity ? 1 : 0));
    uint32_t a_part[kWgmmaK / 16][4];
    if constexpr (kA == OperandA::kRegisters) {
      for (int step = 0; step < kWgmmaK / 16; ++step) {
        ldmatrix(a_part[step], element_of<kWgmmaM, kSwizzle>(a_tile, warp * 16 + lane % 16, step * 16 + lane / 16 * 8));
      }
      fence_proxy_async();  // TMA will overwrite what was read
    }
    wgmma_fence();
    for (int step = 0; step < kWgmmaK / 16; ++step) {
      const uint64_t b = TileB::descriptor(b_tile, step * 16 + (kBug == WgmmaBug::kDescriptor && step == 2 ? 8 : 0));
      const bool accumulate = tile > 0 || step > 0;
      if constexpr (kA == OperandA::kRegisters)
        wgmma<T, kN, kTransposeB>(d, a_part[step], b, accumulate);
      else
        wgmma<T, kN, kTransposeA, kTransposeB>(d, TileA::descriptor(a_tile, step * 16), b, accumulate);
    }
    wgmma_commit_group();
    if (kBug == WgmmaBug::kEarlyRelease) mbarrier_arrive(&empty[stage]);
    if (kA == OperandA::kRegisters)
      wgmma_wait_group<0>();  // the next tile's A goes to the same registers
    else
      wgmma_wait_group<1>();
    if (kBug == WgmmaBug::kEarlyRelease) continue;
    if (kA == OperandA::kRegisters)
      mbarrier_arrive(&empty[stage]);
    else if (tile > 0)
      mbarrier_arrive(&empty[(tile - 1) % kWgmmaStages]);
  }
  wgmma_wait_group<0>();
  for (int i = 0; i < kN / 2; ++i) {
    const int row = m0 + warp * 16 + lane / 4 + i / 2 % 2 * 8, column = n0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < m && column < n) c[static_cast<long long>(row) * n + column] = d[i];
  }
}

}  // namespace pydit::PYDIT_BACKEND
