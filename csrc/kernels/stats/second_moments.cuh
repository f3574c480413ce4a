// What the kernels of second moments share: how the work is cut into tiles and chunks and dealt to blocks, and how a
// tile's sums get to memory.
//
// A tile is kTile x kTile elements of x^T x, on or above the diagonal, or of x^T y. A unit is a tile over one chunk of
// tokens. Units are numbered tile by tile; each block takes an equal run of them (stream-K: Osama et al. 2023) and
// works from its last tile to its first. A tile that two blocks share is then the first that the lower block does and
// the last of the higher one, which waits for it: sums are added in the order of the tokens, the same in every run, and
// a block waits only for blocks with a lower ticket.
#pragma once

#include "device/check.h"
#include "device/platform.cuh"
#include "device/ptx_atomic.cuh"
#include "kernels/stats/tiles.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

constexpr const char* kSecondMoments = "second_moments";
constexpr int kChunkTokens = 256;  // summed by the tensor cores, then added in fp32
constexpr int kChunksOfSum = 32;   // so many at most before they are added in fp64, in memory

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

// Before a tile's sums of chunks from `chunk` on are added: everything before must have been. The block calls.
__device__ __forceinline__ void wait_for_earlier(unsigned* done, int chunk) {
  if (chunk == 0) return;
  if (threadIdx.x == 0) wait_at_least(done, static_cast<unsigned>(chunk));
  __syncthreads();
}

// After the sums of chunks up to `chunk` have been added. The block calls; nobody waits for the last.
__device__ __forceinline__ void tell_later(unsigned* done, int chunk, int chunks) {
  if (chunk == chunks) return;
  __syncthreads();
  if (threadIdx.x == 0) store_release(done, static_cast<unsigned>(chunk));
}

// Adds kCount sums of a thread to `target` [rows, width] and clears them. sum(i) is one of them, place(i) where it
// belongs. Loads of a batch are on their way together: one by one each would wait for the store before it, which as far
// as the compiler knows may have written to it.
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

// Defined for arguments that the entry point has checked, with tensors that suit the copy engine.
int launch_second_moments_sm90(const pydit_second_moments_params& p);
// How many blocks of it are a cluster, and share what they load: 1 or 2.
int cluster_of_second_moments_sm90(const pydit_second_moments_params& p);

// Counters of both kernels' tiles, which may come in pairs of rows, and the ticket.
inline int64_t workspace_bytes(const pydit_second_moments_params& p) {
  const int64_t rows = ceil_div(p.dim_x, 2 * kTile) * 2;
  return (rows * (rows + ceil_div(p.dim_y, kTile)) + 1) * static_cast<int64_t>(sizeof(unsigned));
}

// For the race detector of the simulator.
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
