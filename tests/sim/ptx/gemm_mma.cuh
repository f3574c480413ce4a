// C = A B by cp.async, ldmatrix and mma.sync, the shape of a portable kernel: tiles of 32 x 32 x 32, three stages.
#pragma once

#include "device/ptx.cuh"

namespace pydit::PYDIT_BACKEND {

enum class MmaBug { kNone, kWaitDepth, kNoSync };

constexpr int kMmaThreads = 128, kMmaStages = 3, kMmaTile = 32,
              kMmaPitch = 40;  // elements; 80 bytes: no bank conflicts
constexpr int kMmaShared = kMmaStages * 2 * kMmaTile * kMmaPitch * 2;

// a [m, k], b [k, n] row-major, multiples of 8 along rows; c [m, n].
template <typename T, MmaBug kBug>
__global__ void gemm_mma(const T* a, const T* b, float* c, int m, int n, int k) {
  PYDIT_DYNAMIC_SHARED(T, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int m0 = blockIdx.y * kMmaTile, n0 = blockIdx.x * kMmaTile;
  const int tiles = (k + kMmaTile - 1) / kMmaTile;
  const auto a_tile = [&](int stage) { return shared + stage * 2 * kMmaTile * kMmaPitch; };
  const auto b_tile = [&](int stage) { return a_tile(stage) + kMmaTile * kMmaPitch; };
  const auto load = [&](int tile) {
    const int row = thread / 4, column = thread % 4 * 8, k0 = tile * kMmaTile;
    const bool a_in = m0 + row < m && k0 + column < k, b_in = k0 + row < k && n0 + column < n;
    const int to = row * kMmaPitch + column;
    cp_async<16>(a_tile(tile % kMmaStages) + to, a_in ? a + (m0 + row) * k + k0 + column : a, a_in ? 16 : 0);
    cp_async<16>(b_tile(tile % kMmaStages) + to, b_in ? b + (k0 + row) * n + n0 + column : b, b_in ? 16 : 0);
  };
  for (int tile = 0; tile < kMmaStages - 1; ++tile) {
    if (tile < tiles) load(tile);
    cp_async_commit_group();
  }
  float d[2][4] = {};
  const int warp_m = warp / 2 * 16, warp_n = warp % 2 * 16;
  for (int tile = 0; tile < tiles; ++tile) {
    cp_async_wait_group<kBug == MmaBug::kWaitDepth ? kMmaStages - 1 : kMmaStages - 2>();
    if (kBug != MmaBug::kNoSync) __syncthreads();
    if (tile + kMmaStages - 1 < tiles) load(tile + kMmaStages - 1);
    cp_async_commit_group();
    for (int kk = 0; kk < kMmaTile; kk += 16) {
      uint32_t a_part[4], b_part[4];
      ldmatrix(a_part, a_tile(tile % kMmaStages) + (warp_m + lane % 16) * kMmaPitch + kk + lane / 16 * 8);
      ldmatrix<true>(b_part, b_tile(tile % kMmaStages) + (kk + lane % 16) * kMmaPitch + warp_n + lane / 16 * 8);
      const uint32_t left[2] = {b_part[0], b_part[1]}, right[2] = {b_part[2], b_part[3]};
      mma_m16n8k16<T>(d[0], a_part, left);
      mma_m16n8k16<T>(d[1], a_part, right);
    }
  }
  cp_async_wait_all();
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int row = m0 + warp_m + lane / 4 + i / 2 * 8, column = n0 + warp_n + half * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) c[row * n + column] = d[half][i];
    }
  }
}

}  // namespace pydit::PYDIT_BACKEND
