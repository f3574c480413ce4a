// What the kernels of hsic_matrix share: the workspace, the order in which tiles of Gram matrices are kept, and how the
// shift of a channel is subtracted.
//
// A Gram matrix is cut into tiles of kTile x kTile, four of them are a super tile, and a tile is four blocks of kBlock
// x kBlock. What is kept and made a group at a time are super tiles, on and above the diagonal; a tile below it, or
// beyond the last, has a place in memory that nobody touches. Of a tile on the diagonal, the block below it need not
// exist.
#pragma once

#include "device/check.h"
#include "device/platform.cuh"
#include "kernels/stats/tiles.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

constexpr const char* kHsicMatrix = "hsic_matrix";
constexpr int kStep = 64;  // channels that the gram kernels take at a time
constexpr int kBlock = 64, kBlocksOfSuper = 4, kTilesOfSuper = 4;
constexpr int kMaxHopperChannels = 8192;  // more make too many roundings; see hsic_gram_sm90.cu
constexpr int kContractThreads = 256, kSliceRows = 4, kMaxContractors = 264;  // two for each of 132 multiprocessors
constexpr int kMaxGroup = 1 << 20;  // rows of their blocks are counted in 32 bits; 256 GB of one layer
constexpr int64_t kTileElements = kTile * kTile;

struct Plan {
  int64_t rows;            // of x
  int64_t blocks, padded;  // rows of tiles; rows of x in whole tiles
  int64_t across;          // rows of super tiles
  int64_t supers, group;   // super tiles on and above the diagonal; of which are kept at a time
  int set;                 // layers of one side of a product: 16, 32 or 64
  int layers;
  int64_t pairs;        // of sets
  int64_t contractors;  // blocks per pair
  int64_t channels;     // the most of any layer, in whole steps
  // The workspace, in this order: sums of rows over the kBlock columns of a block [layers, 2 blocks, padded]; r - c
  // [layers, padded]; products [contractors, pairs, set, set]; tiles of K [group, kTilesOfSuper, layers, kTile, kTile];
  // shifts [layers, channels].
  double *sums, *centres, *products;
  float* grams;
  uint16_t* shifts;
  int64_t bytes;

  // Sums over the columns of block `column`, of all rows.
  __host__ __device__ double* sums_of(int layer, int64_t column) const {
    return sums + (layer * 2 * blocks + column) * padded;
  }
  // Tile (row, column) of a super tile; `super` counts those that are kept.
  __host__ __device__ float* tile_of(int64_t super, int row, int column, int layer) const {
    return grams + ((super * kTilesOfSuper + row % 2 * 2 + column % 2) * layers + layer) * kTileElements;
  }
};

inline Plan plan_of(const pydit_hsic_matrix_params& p) {
  Plan plan;
  plan.rows = p.rows, plan.layers = p.layers;
  plan.blocks = ceil_div(p.rows, kTile), plan.padded = plan.blocks * kTile;
  plan.across = ceil_div(plan.blocks, 2), plan.supers = count_triangle(plan.across);
  const int64_t super_bytes = p.layers * kTilesOfSuper * kTileElements * 4, fit = p.gram_bytes / super_bytes;
  plan.group = plan.supers < fit ? plan.supers : fit > 1 ? fit : 1;
  if (plan.group > kMaxGroup) plan.group = kMaxGroup;
  plan.set = p.layers <= 16 ? 16 : p.layers <= 32 ? 32 : 64;
  plan.pairs = count_triangle(ceil_div(p.layers, plan.set));
  const int64_t slices = plan.group * kBlocksOfSuper * kBlocksOfSuper * (kBlock / kSliceRows);
  plan.contractors = slices < kMaxContractors ? slices : kMaxContractors;
  plan.sums = static_cast<double*>(p.workspace);
  plan.centres = plan.sums + p.layers * 2 * plan.blocks * plan.padded;
  plan.products = plan.centres + p.layers * plan.padded;
  auto* end = plan.products + plan.contractors * plan.pairs * plan.set * plan.set;
  plan.grams = reinterpret_cast<float*>(end);
  plan.shifts = reinterpret_cast<uint16_t*>(plan.grams + plan.group * super_bytes / 4);
  int32_t most = 0;
  for (int layer = 0; layer < p.layers; ++layer) most = p.dim[layer] > most ? p.dim[layer] : most;
  plan.channels = ceil_div(most, kStep) * kStep;
  plan.bytes = (end - plan.sums) * 8 + plan.group * super_bytes + p.layers * plan.channels * 2;
  return plan;
}

// Two numbers minus two others, in 16 bits.
template <typename T>
__device__ __forceinline__ uint32_t subtract(uint32_t pair, uint32_t shift);
template <>
__device__ __forceinline__ uint32_t subtract<__nv_bfloat16>(uint32_t pair, uint32_t shift) {
  const auto x = __hsub2(reinterpret_cast<__nv_bfloat162&>(pair), reinterpret_cast<__nv_bfloat162&>(shift));
  return reinterpret_cast<const uint32_t&>(x);
}
template <>
__device__ __forceinline__ uint32_t subtract<__half>(uint32_t pair, uint32_t shift) {
  const auto x = __hsub2(reinterpret_cast<__half2&>(pair), reinterpret_cast<__half2&>(shift));
  return reinterpret_cast<const uint32_t&>(x);
}

// The Hopper gram kernel: super tiles [first, first + count), kept or only summed. Defined for arguments that the entry
// point has checked, with features that suit the copy engine.
int launch_hsic_gram_sm90(const pydit_hsic_matrix_params& p, const Plan& plan, int64_t first, int64_t count, bool keep);

// For the race detector of the simulator.
template <typename T>
void name_features(const pydit_hsic_matrix_params& p) {
  for (int layer = 0; layer < p.layers; ++layer)
    name_tensor("features", p.features[layer], false, sizeof(T), p.dim[layer], {p.rows}, {p.stride[layer]});
}

inline void name_workspace(const pydit_hsic_matrix_params& p, const Plan& plan) {
  name_tensor("workspace", p.workspace, true, 1, plan.bytes, {1}, {0});
  name_tensor("hsic", p.hsic, true, sizeof(double), p.layers, {p.layers}, {p.layers});
}

}  // namespace pydit::PYDIT_BACKEND
