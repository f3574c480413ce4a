// What the kernels of hsic_matrix share: the workspace, the order in which tiles of Gram matrices are kept, and how the
// shift of a channel is subtracted.
//
// A Gram matrix is cut into tiles of kTile x kTile; four tiles (2 x 2) make a super tile, and a tile is four blocks of
// kBlock x kBlock. Super tiles on and above the diagonal are computed and kept a group at a time; their tiles below the
// diagonal, or beyond the last row, have memory that nobody touches. In a tile on the diagonal the block below it need
// not be computed.
#pragma once

#include "device/check.h"
#include "device/platform.cuh"
#include "kernels/stats/tiles.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

constexpr const char* kHsicMatrix = "hsic_matrix";
constexpr int kStep = 64;  // channels per step of the gram kernels
constexpr int kBlock = 64, kBlocksOfSuper = 4, kTilesOfSuper = 4;
constexpr int kMaxHopperChannels = 8192;  // more make too many roundings; see hsic_gram_sm90.cu
constexpr int kContractThreads = 256, kSliceRows = 4, kMaxContractors = 264;  // two for each of 132 multiprocessors
constexpr int kMaxGroup = 1 << 20;  // rows of their blocks are counted in 32 bits; 256 GB of one layer
constexpr int64_t kTileElements = kTile * kTile;
constexpr int kSuper = 2 * kTile;
constexpr int64_t kSuperSums = 2 * kBlocksOfSuper * kSuper;  // fp64, of a layer: a 16th of the bytes of its elements

struct Layout {
  int64_t rows;            // of x
  int64_t blocks, padded;  // rows of tiles; rows of x in whole tiles
  int64_t across;          // rows of super tiles
  int64_t supers;          // super tiles on and above the diagonal
  int64_t group, summed;   // super tiles that are kept at a time, and those whose sums are
  int set;                 // layers of one side of a product: 16, 32 or 64
  int layers;
  int64_t pairs;        // of sets
  int64_t contractors;  // blocks per pair
  int64_t channels;     // the most of any layer, in whole steps
  // The workspace, in this order: r - c [layers, padded]; products [contractors, pairs, set, set]; tiles of K [group,
  // kTilesOfSuper, layers, kTile, kTile]; sums of their rows and columns [summed, layers, 2, kBlocksOfSuper, kSuper];
  // shifts [layers, channels]. Where not all tiles are kept, the sums are made first, in the memory of the tiles.
  double *centres, *products;
  float* grams;
  double* sums;
  uint16_t* shifts;
  int64_t bytes;

  bool at_once() const { return group == supers; }  // all tiles are kept
  // Sums of a super tile's rows over the columns of its block `block`, or (`of_columns`) of its columns over the rows
  // of that block. On the diagonal the two are the same and kept as sums of rows. `super` counts from the group's
  // first.
  __host__ __device__ double* sums_of(int64_t super, int layer, bool of_columns, int block) const {
    return sums + (super * layers + layer) * kSuperSums + (of_columns * kBlocksOfSuper + block) * kSuper;
  }
  // Tile (row, column) of a super tile; `super` counts those that are kept.
  __host__ __device__ float* tile_of(int64_t super, int row, int column, int layer) const {
    return grams + ((super * kTilesOfSuper + row % 2 * 2 + column % 2) * layers + layer) * kTileElements;
  }
};

inline Layout layout_of(const pydit_hsic_matrix_params& p) {
  Layout layout;
  layout.rows = p.rows, layout.layers = p.layers;
  layout.blocks = ceil_div(p.rows, kTile), layout.padded = layout.blocks * kTile;
  layout.across = ceil_div(layout.blocks, 2), layout.supers = count_triangle(layout.across);
  const int64_t super_bytes = p.layers * kTilesOfSuper * kTileElements * 4, fit = p.gram_bytes / super_bytes;
  layout.group = layout.supers < fit ? layout.supers : fit > 1 ? fit : 1;
  if (layout.group > kMaxGroup) layout.group = kMaxGroup;
  layout.set = p.layers <= 16 ? 16 : p.layers <= 32 ? 32 : 64;
  layout.pairs = count_triangle(ceil_div(p.layers, layout.set));
  const int64_t slices = layout.group * kBlocksOfSuper * kBlocksOfSuper * (kBlock / kSliceRows);
  layout.contractors = slices < kMaxContractors ? slices : kMaxContractors;
  layout.centres = static_cast<double*>(p.workspace);
  layout.products = layout.centres + p.layers * layout.padded;
  layout.grams =
      reinterpret_cast<float*>(layout.products + layout.contractors * layout.pairs * layout.set * layout.set);
  auto* end = reinterpret_cast<double*>(layout.grams + layout.group * super_bytes / 4);
  const int64_t room = layout.group * super_bytes / (p.layers * kSuperSums * 8);
  layout.sums = layout.at_once() ? end : reinterpret_cast<double*>(layout.grams);
  layout.summed = layout.supers < room ? layout.supers : room;
  if (layout.at_once()) end += layout.supers * p.layers * kSuperSums;
  layout.shifts = reinterpret_cast<uint16_t*>(end);
  int32_t most = 0;
  for (int layer = 0; layer < p.layers; ++layer) most = p.dim[layer] > most ? p.dim[layer] : most;
  layout.channels = ceil_div(most, kStep) * kStep;
  layout.bytes = (end - layout.centres) * 8 + p.layers * layout.channels * 2;
  return layout;
}

// What a gram kernel leaves in the workspace: tiles, sums of their rows and columns, or both.
enum class Store { kAll, kTiles, kSums };

// pair - shift, both of two 16-bit numbers, rounded to 16 bits.
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

// The Hopper gram kernel: super tiles [first, first + count), for arguments that the entry point has checked and
// features that TMA can address.
int launch_hsic_gram_sm90(const pydit_hsic_matrix_params& p, const Layout& layout, int64_t first, int64_t count,
                          Store store);

// Name the launch's tensors for the simulator's race detector.
template <typename T>
void name_features(const pydit_hsic_matrix_params& p) {
  for (int layer = 0; layer < p.layers; ++layer)
    name_tensor("features", p.features[layer], false, sizeof(T), p.dim[layer], {p.rows}, {p.stride[layer]});
}

inline void name_workspace(const pydit_hsic_matrix_params& p, const Layout& layout) {
  name_tensor("workspace", p.workspace, true, 1, layout.bytes, {1}, {0});
  name_tensor("hsic", p.hsic, true, sizeof(double), p.layers, {p.layers}, {p.layers});
}

}  // namespace pydit::PYDIT_BACKEND
