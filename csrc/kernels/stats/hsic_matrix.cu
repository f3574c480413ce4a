// Unbiased HSIC of every pair of L feature matrices [n, d]; see pydit.h. The entry point and all kernels (sm_80 and up)
// but the Hopper version of the gram kernel, which is in hsic_gram_sm90.cu.
//
//   K = x x^T without its diagonal;  r_i = sum_j K_ij / (n - 2);  c = sum_i r_i / (2 (n - 1))
//   U_ij = K_ij - (r_i - c) - (r_j - c) for i != j;   HSIC_1(a, b) = <U_a, U_b> / (n (n - 3))   (Szekely, Rizzo 2014)
//
// Five kernels. shift: one number per channel, see below. gram: tiles of K on and above the diagonal by the tensor
// cores, kept in fp32, and sums of their rows in fp64. centre: r_i - c. contract: U from K as it is read, and the
// products of all pairs of layers, that is V V^T with V of L rows and n^2 / 2 columns, in fp32 with fp64 every 256.
// finish: fp64 sums over blocks, in a fixed order.
//
// Cost at n = 512, L = 60, d = 3072. gram: 48 GFLOP, 60 with whole diagonal tiles: 61 us at 989 TFLOP/s; 755 MB from
// L2. On Hopper 54 GFLOP and 472 MB. K, written and read: 2 x 35 MB, which L2 may hold. contract: 36 blocks of 64 x 64
// elements times 10 of the 16 blocks of 16 x 16 layers, as the rest are mirror images, 0.38 G fused multiply-adds: 13
// us at 30 T/s. None of this is measured yet.
//
// contract reads 8 vectors of 16 bytes from shared memory for 40 multiply-adds per thread (64 between two sets). A warp
// has 8 x 4 threads of the 16 x 16, and lanes i and i ^ 1, or i and i ^ 2, read the same vector; a load of such pairs
// is assumed to cost 2 wavefronts instead of 4: 16 wavefronts for the 10 clocks that an SM's 128 lanes take for 40
// multiply-adds (16 for 64). So shared memory is the limit: 20 us, where 2 x 16 threads would need 24 wavefronts, 30
// us. If all lanes that read the same vector share it, these are 8 and 12. Which it is has not been measured.
//
// Memory. K of all layers takes 256 KB L per super tile of four tiles, the sums of its rows a 16th of that. Up to
// gram_bytes all super tiles are kept; beyond, they are computed a group at a time, after a first pass for the sums
// alone, 16 times as many in a group, in the same memory.
//
// Numbers. Products of 16-bit values are exact in fp32; the tensor cores sum 256 of them before the sum is rounded once
// more (on Hopper all, see there). U is formed in fp64, and elements that can only be rounding become 0: all of them if
// the rows are all alike, or all but one. Nearly constant channels, such as the massive channels of diffusion
// transformers, would make K, and its rounding, larger than U. HSIC does not change if one number is subtracted from a
// channel in all rows. So where the mean of eight rows exceeds four times their spread, it is subtracted before the
// values are multiplied: exactly for values between half and twice that number (Sterbenz), otherwise rounded once to 16
// bits.
#include "device/arch.h"
#include "device/check.h"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "kernels/stats/hsic_matrix.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kThreads = kContractThreads;

// gram: steps of kStep channels, kStages in flight; fp32 sums of kChunk channels are rounded into another fp32.
constexpr int kStages = 3, kChunk = 256;
constexpr int kRowBytes = kStep * 2, kOperandBytes = kTile * kRowBytes, kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes;
static_assert(kChunk % kStep == 0 && kSharedBytes <= 99 * 1024, "whole steps; what sm_86 gives a block");

// Shifts ---------------------------------------------------------------------------------------------------------

// blockIdx.y: the layer. A thread samples eight rows of one channel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    shift_kernel(const __grid_constant__ pydit_hsic_matrix_params p, const Layout layout) {
  constexpr int kRows = 8;
  const int layer = blockIdx.y, channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (channel >= layout.channels) return;
  float values[kRows], mean = 0, spread = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const auto* row = static_cast<const T*>(p.features[layer]) + i * p.rows / kRows * p.stride[layer];
    values[i] = channel < p.dim[layer] ? to_float(row[channel]) : 0.f;
    mean += values[i] / kRows;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) spread = fmaxf(spread, fabsf(values[i] - mean));
  reinterpret_cast<T*>(layout.shifts)[layer * layout.channels + channel] =
      from_float<T>(fabsf(mean) > 4 * spread ? mean : 0.f);
}

// Gram matrices --------------------------------------------------------------------------------------------------

// sums += left right^T over kStep channels, less `shifts`, for a warp's 64 x 32.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&sums)[4][4][4], const char* left, const char* right,
                                              const uint16_t* shifts, int row, int column) {
  const int lane = threadIdx.x % 32;
  uint32_t shift[kStep / 8];  // of this thread's two channels in every eight
#pragma unroll
  for (int k = 0; k < kStep / 8; ++k) shift[k] = *reinterpret_cast<const uint32_t*>(shifts + k * 8 + lane % 4 * 2);
#pragma unroll
  for (int k = 0; k < kStep / 8; k += 2) {
    uint32_t b[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      ldmatrix(b[n], right + swizzled_offset<kRowBytes>(column + n * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[n][i] = subtract<T>(b[n][i], shift[k + i % 2]);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t a[4];
      ldmatrix(a, left + swizzled_offset<kRowBytes>(row + m * 16 + lane % 16, k + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = subtract<T>(a[i], shift[k + i / 2]);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        mma_m16n8k16<T>(sums[m][n], a, reinterpret_cast<const uint32_t (&)[2]>(b[n / 2][n % 2 * 2]));
    }
  }
}

// Stores the sums of a tile's rows over each half of its columns and, off the diagonal, of its columns over each half
// of its rows; every thread holds its part of a warp's 64 x 32. `scratch`: 6 x kTile numbers.
__device__ __forceinline__ void store_sums(const float (&tile)[4][4][4], const Layout& layout, int super, int layer,
                                           TileAt at, double* scratch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int my_row = warp / 4 * 64, my_column = warp % 4 * 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // rows i / 2 * 16 + lane / 4 + i % 2 * 8
    double sum = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) sum += static_cast<double>(tile[i / 2][n][i % 2 * 2]) + tile[i / 2][n][i % 2 * 2 + 1];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    if (lane % 4 == 0) scratch[warp % 4 * kTile + my_row + i / 2 * 16 + lane / 4 + i % 2 * 8] = sum;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // columns i / 2 * 8 + lane % 4 * 2 + i % 2
    double sum = 0;
#pragma unroll
    for (int m = 0; m < 4; ++m) sum += static_cast<double>(tile[m][i / 2][i % 2]) + tile[m][i / 2][i % 2 + 2];
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    if (lane < 4) scratch[(4 + warp / 4) * kTile + my_column + i / 2 * 8 + lane * 2 + i % 2] = sum;
  }
  __syncthreads();
  const int i = threadIdx.x % kTile, half = threadIdx.x / kTile;
  const int row = at.row % 2, column = at.column % 2;
  layout.sums_of(super, layer, false, 2 * column + half)[row * kTile + i] =
      scratch[2 * half * kTile + i] + scratch[(2 * half + 1) * kTile + i];
  if (at.row == at.column) return;
  const bool diagonal = at.row / 2 == at.column / 2;
  layout.sums_of(super, layer, !diagonal, 2 * row + half)[column * kTile + i] = scratch[(4 + half) * kTile + i];
}

// One tile of one layer: blockIdx.x counts four tiles per super tile, from super tile `first` on; blockIdx.y: the
// layer.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    gram_kernel(const __grid_constant__ pydit_hsic_matrix_params p, const Layout layout, int first, Store store) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  const int layer = blockIdx.y, dim = p.dim[layer];
  const int super = static_cast<int>(blockIdx.x) / kTilesOfSuper, in = blockIdx.x % kTilesOfSuper;
  const TileAt four = triangle_tile(static_cast<int>(layout.across), first + super);
  const TileAt at = {2 * four.row + in / 2, 2 * four.column + in % 2};
  if (at.row > at.column || at.column >= layout.blocks) return;  // no such tile
  const bool square = at.row == at.column;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int my_row = warp / 4 * 64, my_column = warp % 4 * 32;
  const int steps = (dim + kStep - 1) / kStep;
  const auto copy = [&](int step) {
    char* stage = shared + step % kStages * kStageBytes;
    const auto operand = [&](char* to, int tile) {
      copy_tile<kTile, kStep, kThreads, kAligned>(to, static_cast<const T*>(p.features[layer]), p.stride[layer], p.rows,
                                                  dim, int64_t{tile} * kTile, step * kStep);
    };
    operand(stage, at.row);
    if (!square) operand(stage + kOperandBytes, at.column);
  };
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step);
    cp_async_commit_group();
  }
  float sums[4][4][4], partial[4][4][4];
#pragma unroll
  for (int i = 0; i < 64; ++i) sums[i / 16][i / 4 % 4][i % 4] = partial[i / 16][i / 4 % 4][i % 4] = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the step has arrived, and nobody still reads the stage that is filled next
    if (step + kStages - 1 < steps) copy(step + kStages - 1);
    cp_async_commit_group();
    const char* stage = shared + step % kStages * kStageBytes;
    multiply_step<T>(partial, stage, square ? stage : stage + kOperandBytes,
                     layout.shifts + layer * layout.channels + step * kStep, my_row, my_column);
    if ((step + 1) % (kChunk / kStep) == 0 || step + 1 == steps) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        sums[i / 16][i / 4 % 4][i % 4] += partial[i / 16][i / 4 % 4][i % 4];
        partial[i / 16][i / 4 % 4][i % 4] = 0;
      }
    }
  }
  const int64_t rows_left = p.rows - int64_t{at.row} * kTile, columns_left = p.rows - int64_t{at.column} * kTile;
  float* tile = layout.tile_of(super, at.row, at.column, layer);
#pragma unroll
  for (int i = 0; i < 32; ++i) {  // pairs of neighbours
    const int m = i / 8, n = i / 2 % 4, half = i % 2;
    const int row = my_row + m * 16 + lane / 4 + half * 8, column = my_column + n * 8 + lane % 4 * 2;
    float &x = sums[m][n][half * 2], &y = sums[m][n][half * 2 + 1];
    const bool exists = row < rows_left;
    if (!exists || column >= columns_left || (square && row == column)) x = 0;
    if (!exists || column + 1 >= columns_left || (square && row == column + 1)) y = 0;
    if (store != Store::kSums) *reinterpret_cast<float2*>(tile + row * kTile + column) = make_float2(x, y);
  }
  if (store == Store::kTiles) return;
  __syncthreads();  // the stages become scratch
  store_sums(sums, layout, super, layer, at, reinterpret_cast<double*>(shared));
}

// Centring -------------------------------------------------------------------------------------------------------

// One block per layer, one thread per row: adds up what super tiles [first, first + count) hold of the sums of rows, in
// the order of columns; after the last super tile, makes r - c of them.
__global__ void __launch_bounds__(kThreads) centre_kernel(const Layout layout, int64_t first, int64_t count) {
  __shared__ double scratch[kThreads / 32];
  const int layer = static_cast<int>(blockIdx.x), blocks = static_cast<int>(2 * layout.blocks);
  const int64_t rows = layout.rows;
  double* centres = layout.centres + layer * layout.padded;
  const bool last = first + count == layout.supers;
  double total = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    const int64_t mine = i / kSuper;
    double sum = first > 0 ? centres[i] : 0;
    for (int64_t other = 0; other < layout.across; ++other) {
      const bool of_columns = other < mine;
      const int64_t super = of_columns ? triangle_index(layout.across, other, mine) - first
                                       : triangle_index(layout.across, mine, other) - first;
      if (super < 0 || super >= count) continue;
      for (int block = 0; block < kBlocksOfSuper && other * kBlocksOfSuper + block < blocks; ++block)
        sum += layout.sums_of(super, layer, of_columns, block)[i % kSuper];
    }
    centres[i] = last ? sum / static_cast<double>(rows - 2) : sum;
    total += centres[i];
  }
  if (!last) return;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(kFullWarp, total, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = total;
  __syncthreads();
  total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) centres[i] -= total / static_cast<double>(2 * (rows - 1));
}

// Contraction ----------------------------------------------------------------------------------------------------

// Columns of blocks of a super tile, and its blocks on and above the diagonal; the matrix has `blocks` rows of blocks.
__host__ __device__ inline int width_of(TileAt super, int blocks) {
  const int left = blocks - super.column * kBlocksOfSuper;
  return left < kBlocksOfSuper ? left : kBlocksOfSuper;
}
__host__ __device__ inline int blocks_of(TileAt super, int blocks) {
  const int width = width_of(super, blocks);
  return super.row == super.column ? width * (width + 1) / 2 : kBlocksOfSuper * width;
}

// The super tile after one, in the order of triangle_tile.
__host__ __device__ inline TileAt next_super(TileAt super, int across) {
  return super.column + 1 < across ? TileAt{super.row, super.column + 1} : TileAt{super.row + 1, super.row + 1};
}

// U of a set of layers in one row, at the columns of a block; the padding puts layers in different banks.
template <int kLayers>
using Side = float[kLayers][kBlock + 4];

// `grams`: K of layer 0 in that row, from the block's first column on. A thread has kTogether loads in flight.
template <int kLayers, int kTogether>
__device__ __forceinline__ void load_side(Side<kLayers>& side, const Layout& layout, const float* grams, int first,
                                          int row, int first_column) {
  const int place = threadIdx.x % kBlock;
  const int column = first_column + place;
  const bool exists = column < layout.rows && column != row;
#pragma unroll kTogether
  for (int i = threadIdx.x / kBlock; i < kLayers; i += kThreads / kBlock) {
    const int layer = first + i;
    double u = 0;
    if (exists && layer < layout.layers) {
      const double gram = grams[layer * kTileElements + place];
      const double* centres = layout.centres + layer * layout.padded;
      const double of_row = centres[row], of_column = centres[column];
      u = gram - of_row - of_column;
      // Only rounding: of rows that are all alike, or all but one. Products with other layers might be as small.
      if (fabs(u) <= 1e-12 * (fabs(of_row) + fabs(of_column))) u = 0;
    }
    side[i][place] = static_cast<float>(u);
  }
}

// Products of U of two sets of layers, or of one set with itself (kSame), then only in blocks of 16 layers on and above
// the diagonal. The block does rows `unit` to `end` of the blocks of a group of super tiles, of which `super` is the
// first. A thread has layers mine + 16 a of one set and theirs + 16 b of the other.
template <int kLayers, bool kSame>
__device__ __forceinline__ void contract(Side<kLayers> (&sides)[2], const Layout& layout, TileAt pair, TileAt super,
                                         int unit, int end) {
  constexpr int kEach = kLayers / 16;                                // layers of a thread on either side
  constexpr int kTogether = kSame ? 8 : 4, kUnroll = kSame ? 4 : 1;  // as registers allow
  const auto needed = [](int j) { return !kSame || j / kEach <= j % kEach; };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int mine = warp / 4 * 8 + (lane & 1) + (lane >> 2 & 6), theirs = warp % 4 * 4 + (lane >> 1 & 3);
  const int all_rows = static_cast<int>(layout.rows), across = static_cast<int>(layout.across);
  const int blocks = (all_rows + kBlock - 1) / kBlock;
  double totals[kEach * kEach];
#pragma unroll
  for (int j = 0; j < kEach * kEach; ++j) totals[j] = 0;
  int before = 0, kept = 0;  // rows of blocks before `super`, and super tiles
  while (unit < end) {
    const int size = blocks_of(super, blocks) * kBlock;
    if (unit >= before + size) {
      before += size, ++kept, super = next_super(super, across);
      continue;
    }
    const int index = (unit - before) / kBlock, from = (unit - before) % kBlock;
    const bool diagonal = super.row == super.column;
    const int width = width_of(super, blocks);
    const TileAt in = diagonal ? triangle_tile(width, index) : TileAt{index / width, index % width};
    const int most = kBlock - from < kSliceRows ? kBlock - from : kSliceRows;
    const int rows = end - unit < most ? end - unit : most;
    const float* grams = layout.tile_of(kept, in.row / 2, in.column / 2, 0) + (in.row % 2 * kBlock + from) * kTile +
                         in.column % 2 * kBlock;
    const int first_row = (super.row * kBlocksOfSuper + in.row) * kBlock + from;
    const int first_column = (super.column * kBlocksOfSuper + in.column) * kBlock;
    float sums[kEach * kEach];
#pragma unroll
    for (int j = 0; j < kEach * kEach; ++j) sums[j] = 0;
    for (int i = 0; i < rows && first_row + i < all_rows; ++i) {
      __syncthreads();
      const float* row = grams + i * kTile;
      load_side<kLayers, kTogether>(sides[0], layout, row, pair.row * kLayers, first_row + i, first_column);
      if (!kSame)
        load_side<kLayers, kTogether>(sides[1], layout, row, pair.column * kLayers, first_row + i, first_column);
      __syncthreads();
      const Side<kLayers>&left = sides[0], &right = sides[kSame ? 0 : 1];
#pragma unroll kUnroll
      for (int column = 0; column < kBlock; column += 4) {
        float4 a[kEach], b[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          a[j] = *reinterpret_cast<const float4*>(&left[mine + 16 * j][column]);
          b[j] = *reinterpret_cast<const float4*>(&right[theirs + 16 * j][column]);
        }
#pragma unroll
        for (int j = 0; j < kEach * kEach; ++j) {
          if (!needed(j)) continue;
          const float4 &x = a[j / kEach], &y = b[j % kEach];
          sums[j] = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sums[j]))));
        }
      }
    }
    const double weight = diagonal && in.row == in.column ? 1 : 2;  // above the diagonal: its mirror image as well
#pragma unroll
    for (int j = 0; j < kEach * kEach; ++j) totals[j] += weight * sums[j];
    unit += rows;
  }
  double* products = layout.products + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kLayers * kLayers;
#pragma unroll
  for (int j = 0; j < kEach * kEach; ++j) {
    if (needed(j)) products[(mine + j / kEach * 16) * kLayers + theirs + j % kEach * 16] = totals[j];
  }
}

// blockIdx.y: the pair of sets. blockIdx.x has an equal run of the `units` rows of the blocks of a group of super
// tiles, from super tile `first` on.
template <int kLayers>
__global__ void __launch_bounds__(kThreads, 2) contract_kernel(const Layout layout, int first, int units) {
  __shared__ __align__(16) Side<kLayers> sides[2];
  const TileAt pair = triangle_tile((layout.layers + kLayers - 1) / kLayers, static_cast<int>(blockIdx.y));
  const TileAt super = triangle_tile(static_cast<int>(layout.across), first);
  const auto start_of = [&](unsigned block) { return static_cast<int>(int64_t{units} * block / gridDim.x); };
  const int from = start_of(blockIdx.x), end = start_of(blockIdx.x + 1);
  if (pair.row == pair.column)
    contract<kLayers, true>(sides, layout, pair, super, from, end);
  else
    contract<kLayers, false>(sides, layout, pair, super, from, end);
}

// hsic = (or +=) the sum over the blocks of contract_kernel / (n (n - 3)): blockIdx.y as there, blockIdx.x one layer of
// its first set. For a set with itself, what lies below the diagonal mirrors what was computed.
template <int kLayers>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Layout layout, double* hsic, bool add) {
  constexpr int kParts = kThreads / kLayers;
  __shared__ double scratch[kParts][kLayers];
  const int row = static_cast<int>(blockIdx.x), column = threadIdx.x % kLayers, part = threadIdx.x / kLayers;
  const TileAt pair = triangle_tile((layout.layers + kLayers - 1) / kLayers, static_cast<int>(blockIdx.y));
  const bool mirrored = pair.row == pair.column && row / 16 > column / 16;
  const double* products =
      layout.products + blockIdx.y * kLayers * kLayers + (mirrored ? column * kLayers + row : row * kLayers + column);
  double sum = 0;
#pragma unroll 8
  for (int64_t i = part; i < layout.contractors; i += kParts) sum += products[i * layout.pairs * kLayers * kLayers];
  scratch[part][column] = sum;
  __syncthreads();
  const int a = pair.row * kLayers + row, b = pair.column * kLayers + column;
  if (part > 0 || a >= layout.layers || b >= layout.layers) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) sum += scratch[i][column];
  sum /= static_cast<double>(layout.rows) * static_cast<double>(layout.rows - 3);
  double* target = hsic + a * layout.layers + b;
  *target = add ? *target + sum : sum;
  if (pair.row != pair.column)
    hsic[b * layout.layers + a] = *target;  // inside one set the mirror image is another thread's
}

// Launcher -------------------------------------------------------------------------------------------------------

// Whether 16-byte accesses are legal.
bool aligned(const pydit_hsic_matrix_params& p) {
  for (int layer = 0; layer < p.layers; ++layer) {
    if (!aligned16(p.features[layer]) || p.stride[layer] % 8 != 0) return false;
  }
  return true;
}

// Which gram kernel runs. TMA is not documented to take a stride of 0, that of an expanded tensor.
int path_of(const pydit_hsic_matrix_params& p) {
  bool tma_addressable = aligned(p), narrow = true;
  for (int layer = 0; layer < p.layers; ++layer) {
    tma_addressable &= p.stride[layer] != 0;
    narrow &= p.dim[layer] <= kMaxHopperChannels;
  }
  const int path = hopper_path(tma_addressable);
  if (path != PYDIT_PATH_HOPPER) return path;
  return p.rows <= kTile || !narrow ? PYDIT_PATH_SHAPE : large_parameters() ? path : PYDIT_PATH_OLD_CUDA;
}

template <typename T>
int launch_shift(const pydit_hsic_matrix_params& p, const Layout& layout) {
  name_features<T>(p), name_workspace(p, layout);
  return launch_status(kHsicMatrix, PYDIT_LAUNCH(shift_kernel<T>,
                                                 dim3(static_cast<unsigned>(ceil_div(layout.channels, kThreads)),
                                                      static_cast<unsigned>(p.layers)),
                                                 dim3(kThreads), 0, static_cast<cudaStream_t>(p.stream), p, layout));
}

// Super tiles [first, first + count), as all the launches below.
template <typename T, bool kAligned>
int launch_portable_gram(const pydit_hsic_matrix_params& p, const Layout& layout, int64_t first, int64_t count,
                         Store store) {
  const cudaError_t error =
      cudaFuncSetAttribute(gram_kernel<T, kAligned>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return launch_status(kHsicMatrix, error);
  const dim3 grid(static_cast<unsigned>(count * kTilesOfSuper), static_cast<unsigned>(p.layers));
  name_features<T>(p), name_workspace(p, layout);
  return launch_status(kHsicMatrix,
                       PYDIT_LAUNCH((gram_kernel<T, kAligned>), grid, dim3(kThreads), kSharedBytes,
                                    static_cast<cudaStream_t>(p.stream), p, layout, static_cast<int>(first), store));
}

template <typename T>
int launch_gram(const pydit_hsic_matrix_params& p, const Layout& layout, int64_t first, int64_t count, Store store) {
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  if (path_of(p) == PYDIT_PATH_HOPPER) return launch_hsic_gram_sm90(p, layout, first, count, store);
#endif
  return aligned(p) ? launch_portable_gram<T, true>(p, layout, first, count, store)
                    : launch_portable_gram<T, false>(p, layout, first, count, store);
}

int launch_centre(const pydit_hsic_matrix_params& p, const Layout& layout, int64_t first, int64_t count) {
  name_workspace(p, layout);
  return launch_status(kHsicMatrix, PYDIT_LAUNCH(centre_kernel, dim3(static_cast<unsigned>(p.layers)), dim3(kThreads),
                                                 0, static_cast<cudaStream_t>(p.stream), layout, first, count));
}

template <int kLayers>
int launch_contract(const pydit_hsic_matrix_params& p, const Layout& layout, int64_t first, int64_t count) {
  const auto stream = static_cast<cudaStream_t>(p.stream);
  const auto pairs = static_cast<unsigned>(layout.pairs);
  const int across = static_cast<int>(layout.across), blocks = static_cast<int>(ceil_div(p.rows, kBlock));
  int units = 0;
  TileAt super = triangle_tile(across, static_cast<int>(first));
  for (int64_t i = 0; i < count; ++i, super = next_super(super, across)) units += blocks_of(super, blocks) * kBlock;
  name_workspace(p, layout);
  const int status = launch_status(
      kHsicMatrix, PYDIT_LAUNCH(contract_kernel<kLayers>, dim3(static_cast<unsigned>(layout.contractors), pairs),
                                dim3(kThreads), 0, stream, layout, static_cast<int>(first), units));
  if (status != kOk) return status;
  name_workspace(p, layout);
  return launch_status(kHsicMatrix, PYDIT_LAUNCH(finish_kernel<kLayers>, dim3(kLayers, pairs), dim3(kThreads), 0,
                                                 stream, layout, p.hsic, first > 0));
}

int launch_contract_set(const pydit_hsic_matrix_params& p, const Layout& layout, int64_t first, int64_t count) {
  return layout.set == 16   ? launch_contract<16>(p, layout, first, count)
         : layout.set == 32 ? launch_contract<32>(p, layout, first, count)
                            : launch_contract<64>(p, layout, first, count);
}

template <typename T>
int launch(const pydit_hsic_matrix_params& p) {
  const Layout layout = layout_of(p);
  const auto in_groups = [&](int64_t most, auto launch_one) {
    int status = kOk;
    for (int64_t first = 0; first < layout.supers && status == kOk; first += most)
      status = launch_one(first, layout.supers - first < most ? layout.supers - first : most);
    return status;
  };
  int status = launch_shift<T>(p, layout);
  if (status != kOk) return status;
  status = in_groups(layout.summed, [&](int64_t first, int64_t count) {
    const int of_gram = launch_gram<T>(p, layout, first, count, layout.at_once() ? Store::kAll : Store::kSums);
    return of_gram == kOk ? launch_centre(p, layout, first, count) : of_gram;
  });
  if (status != kOk) return status;
  return in_groups(layout.group, [&](int64_t first, int64_t count) {
    const int of_gram = layout.at_once() ? kOk : launch_gram<T>(p, layout, first, count, Store::kTiles);
    return of_gram == kOk ? launch_contract_set(p, layout, first, count) : of_gram;
  });
}

}  // namespace
}  // namespace pydit::PYDIT_BACKEND

using namespace pydit::PYDIT_BACKEND;

extern "C" int64_t PYDIT_ENTRY(hsic_matrix_workspace)(const pydit_hsic_matrix_params* p) {
  return p->layers > 0 && p->rows > 0 ? layout_of(*p).bytes : 0;
}

extern "C" int PYDIT_ENTRY(hsic_matrix_path)(const pydit_hsic_matrix_params* p) { return path_of(*p); }

extern "C" int PYDIT_ENTRY(hsic_matrix)(const pydit_hsic_matrix_params* p) {
  if (p->dtype != PYDIT_FLOAT16 && p->dtype != PYDIT_BFLOAT16)
    return bad_argument("%s: dtype: expected float16 (1) or bfloat16 (2), got %d", kHsicMatrix, p->dtype);
  if (p->layers < 1 || p->layers > PYDIT_MAX_LAYERS)
    return bad_argument("%s: layers: expected 1 to %d, got %d", kHsicMatrix, PYDIT_MAX_LAYERS, p->layers);
  if (p->rows < 4 || p->rows > 1 << 20)
    return bad_argument("%s: rows: expected 4 to 2^20, got %lld", kHsicMatrix, static_cast<long long>(p->rows));
  if (p->workspace == nullptr) return bad_argument("%s: workspace: expected memory, got a null pointer", kHsicMatrix);
  return p->dtype == PYDIT_FLOAT16 ? launch<__half>(*p) : launch<__nv_bfloat16>(*p);
}
