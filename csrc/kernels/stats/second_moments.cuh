// What the kernels of second moments share: how the work is cut into tiles and chunks and dealt to blocks, and how a
// tile's sums are added to memory.
//
// A tile is kTile x kTile elements of x^T x, on or above the diagonal, or of x^T y. A unit is a tile over one chunk of
// tokens. Units are numbered tile by tile; each block takes an equal run of them (stream-K: Osama et al. 2023) and
// works from its last tile to its first. A tile that two blocks share then comes first in the block with the lower
// ticket and last in the other, which waits for it: sums are added in the order of the tokens, the same in every run,
// and a block waits only for blocks with lower tickets.
#pragma once

#include "device/check.h"
#include "device/platform.cuh"
#include "device/ptx_atomic.cuh"
#include "kernels/stats/tiles.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

constexpr const char* kSecondMoments = "second_moments";
constexpr int kChunkTokens = 256;  // summed by the tensor cores, then added in fp32
constexpr int kChunksOfSum = 32;   // at most so many chunks are added in fp32 before they are added in fp64, in memory

__host__ __device__ inline int64_t count_tiles(const pydit_second_moments_params& p) {
  const int64_t rows = ceil_div(p.dim_x, kTile);
  return count_triangle(rows) + rows * ceil_div(p.dim_y, kTile);
}

struct TileOfSums {
  int row, column;  // of tiles
  bool cross;       // x^T y
};

__device__ __forceinline__ TileOfSums decode_tile(const pydit_second_moments_params& p, int index) {
  const int rows = static_cast<int>(ceil_div(p.dim_x, kTile)), triangle = static_cast<int>(count_triangle(rows));
  if (index >= triangle) {
    const int columns = static_cast<int>(ceil_div(p.dim_y, kTile));
    return {(index - triangle) / columns, (index - triangle) % columns, true};
  }
  const TileAt at = triangle_tile(rows, index);
  return {at.row, at.column, false};
}

// A block's run of units: [first, last).
struct Run {
  int64_t first, last;
  int chunks;
};

__device__ __forceinline__ Run run_of(const pydit_second_moments_params& p, int64_t tiles, unsigned ticket,
                                      unsigned blocks) {
  const int chunks = static_cast<int>(ceil_div(p.tokens, kChunkTokens));
  const int64_t units = tiles * chunks;
  return {units * ticket / blocks, units * (ticket + 1) / blocks, chunks};
}

// Waits until a tile's chunks before `chunk` have been added. All threads of the block call.
__device__ __forceinline__ void wait_for_earlier(unsigned* done, int chunk) {
  if (chunk == 0) return;
  if (threadIdx.x == 0) wait_at_least(done, static_cast<unsigned>(chunk));
  __syncthreads();
}

// Announces that a tile's chunks before `chunk` have been added. All threads of the block call; nobody waits for the
// last chunk.
__device__ __forceinline__ void announce_added(unsigned* done, int chunk, int chunks) {
  if (chunk == chunks) return;
  __syncthreads();
  if (threadIdx.x == 0) store_release(done, static_cast<unsigned>(chunk));
}

// Adds kCount sums of a thread, sum(i) at place(i), to `target` [rows, width] and clears them. The loads of a batch are
// in flight together: one by one, each would wait for the store before it, which may alias it as far as the compiler
// knows.
template <int kCount, int kBatch, typename Sum, typename Place>
__device__ __forceinline__ void add_to_memory(double* target, int64_t rows, int64_t width, Sum sum, Place place) {
  static_assert(kCount % kBatch == 0, "whole batches");
#pragma unroll
  for (int first = 0; first < kCount; first += kBatch) {
    double before[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const longlong2 at = place(first + i);  // row, column
      before[i] = at.x < rows && at.y < width ? target[at.x * width + at.y] : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const longlong2 at = place(first + i);
      if (at.x < rows && at.y < width) target[at.x * width + at.y] = before[i] + sum(first + i);
      sum(first + i) = 0;
    }
  }
}

// The Hopper kernel, for arguments that the entry point has checked and tensors that TMA can address.
int launch_second_moments_sm90(const pydit_second_moments_params& p);
// Its cluster size: 1, or 2 where blocks share what they load.
int cluster_of_second_moments_sm90(const pydit_second_moments_params& p);

// For the counters of either kernel's tiles, whose rows may come in pairs, and the ticket.
inline int64_t workspace_bytes(const pydit_second_moments_params& p) {
  const int64_t rows = ceil_div(p.dim_x, 2 * kTile) * 2;
  return (rows * (rows + ceil_div(p.dim_y, kTile)) + 1) * static_cast<int64_t>(sizeof(unsigned));
}

// Names the launch's tensors for the simulator's race detector.
template <typename T>
void name_second_moments_tensors(const pydit_second_moments_params& p) {
  name_tensor("x", p.x, false, sizeof(T), p.dim_x, {p.tokens}, {p.stride_x});
  name_tensor("xx", p.xx, true, sizeof(double), p.dim_x, {p.dim_x}, {p.dim_x});
  name_tensor("sum_x", p.sum_x, true, sizeof(double), p.dim_x, {1}, {0});
  name_tensor("workspace", p.workspace, true, 1, workspace_bytes(p), {1}, {0});
  if (p.dim_y == 0) return;
  name_tensor("y", p.y, false, sizeof(T), p.dim_y, {p.tokens}, {p.stride_y});
  name_tensor("xy", p.xy, true, sizeof(double), p.dim_y, {p.dim_x}, {p.dim_y});
  name_tensor("sum_y", p.sum_y, true, sizeof(double), p.dim_y, {1}, {0});
  name_tensor("sum_yy", p.sum_yy, true, sizeof(double), p.dim_y, {1}, {0});
}

}  // namespace pydit::PYDIT_BACKEND
