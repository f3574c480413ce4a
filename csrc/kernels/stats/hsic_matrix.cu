// Unbiased HSIC of every pair of L feature matrices [n, d]; see pydit.h. One kernel for all devices (sm_80 and up).
//
//   K = x x^T without its diagonal;  r_i = sum_j K_ij / (n - 2);  c = sum_i r_i / (2 (n - 1))
//   U_ij = K_ij - (r_i - c) - (r_j - c) for i != j;   HSIC_1(a, b) = <U_a, U_b> / (n (n - 3))   (Szekely, Rizzo 2014)
//
// Five kernels. shift: a number per channel, below. gram: tiles of K on and above the diagonal by the tensor cores,
// kept in fp32, and their row sums in fp64. centre: r_i - c. contract: U from K as it is read, and the products of all
// pairs of layers, which is V V^T with V of L rows and n^2 / 2 columns, in fp32 with fp64 every 1024. finish: fp64 sums
// over blocks, in a fixed order.
//
// Cost at n = 512, L = 60, d = 3072: gram 48 GFLOP, 60 with whole diagonal tiles: 61 us at 989 TFLOP/s; 755 MB come
// from L2. Writing and reading K: 2 x 39 MB, which L2 may hold. contract: 0.67 G fused multiply-adds on 64 x 64 layers:
// 22 us at 60 T/s.
//
// Memory. K of all layers takes 64 KB L per tile. Up to gram_bytes all tiles are kept; beyond, they are made a group at
// a time, and once more before that for the row sums alone.
//
// Numbers. Products of 16-bit values are exact in fp32 and 256 of them are summed by the tensor cores before the sum is
// rounded once more. U is formed in fp64: with rows that are all alike it is 0, as all K are the same number.
// Channels that are nearly constant would make K larger than U, and its rounding with it, as the massive channels of
// diffusion transformers do. HSIC does not change if the same number is subtracted from a channel in all rows. So where
// the mean of eight rows is above four times their spread it is subtracted from the registers before they are
// multiplied: exactly, for values between half and twice the number (Sterbenz), else rounded once to 16 bits.
#include "device/check.h"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "kernels/stats/tiles.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr const char* kOp = "hsic_matrix";
constexpr int kThreads = 256;

// gram: steps of kStep channels, kStages in flight; fp32 sums of kChunk channels are rounded into another fp32.
constexpr int kStep = 64, kStages = 3, kChunk = 256;
constexpr int kRowBytes = kStep * 2, kOperandBytes = kTile * kRowBytes, kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes;
static_assert(kChunk % kStep == 0 && kSharedBytes <= 99 * 1024, "whole steps; what sm_86 gives a block");

// contract: one set of layers by another, kColumns columns of one row at a time, kSliceRows rows of a tile.
constexpr int kColumns = 64, kSliceRows = 4;  // of 16 rows, 512 would be 160 slices: a second one for some SMs
constexpr int kSlicesOfTile = kTile / kColumns * (kTile / kSliceRows);
constexpr int kMaxContractors = 264;

constexpr int64_t kTileElements = kTile * kTile;

struct Plan {
  int64_t blocks, padded;  // rows of tiles; rows of x in whole tiles
  int64_t tiles, group;    // on and above the diagonal; of which are kept at a time
  int set;                 // layers of one side of a product: 16, 32 or 64
  int64_t pairs;           // of sets
  int64_t contractors;     // blocks per pair
  int64_t channels;        // the most of any layer, in whole steps
  // The workspace, in this order: row sums of a tile [layers, blocks, padded]; r - c [layers, padded]; products
  // [contractors, pairs, set, set]; tiles of K [group, layers, kTile, kTile]; shifts [layers, channels].
  double *sums, *centres, *products;
  float* grams;
  uint16_t* shifts;
  int64_t bytes;
};

Plan plan_of(const pydit_hsic_matrix_params& p) {
  Plan plan;
  plan.blocks = ceil_div(p.rows, kTile), plan.padded = plan.blocks * kTile;
  plan.tiles = count_triangle(plan.blocks);
  const int64_t fit = p.gram_bytes / (p.layers * kTileElements * 4);
  plan.group = plan.tiles < fit ? plan.tiles : fit > 1 ? fit : 1;
  plan.set = p.layers <= 16 ? 16 : p.layers <= 32 ? 32 : 64;
  plan.pairs = count_triangle(ceil_div(p.layers, plan.set));
  plan.contractors = plan.group * kSlicesOfTile < kMaxContractors ? plan.group * kSlicesOfTile : kMaxContractors;
  plan.sums = static_cast<double*>(p.workspace);
  plan.centres = plan.sums + p.layers * plan.blocks * plan.padded;
  plan.products = plan.centres + p.layers * plan.padded;
  auto* end = plan.products + plan.contractors * plan.pairs * plan.set * plan.set;
  plan.grams = reinterpret_cast<float*>(end);
  plan.shifts = reinterpret_cast<uint16_t*>(plan.grams + plan.group * p.layers * kTileElements);
  int32_t most = 0;
  for (int layer = 0; layer < p.layers; ++layer) most = p.dim[layer] > most ? p.dim[layer] : most;
  plan.channels = ceil_div(most, kStep) * kStep;
  plan.bytes = (end - plan.sums) * 8 + plan.group * p.layers * kTileElements * 4 + p.layers * plan.channels * 2;
  return plan;
}

// Shifts ---------------------------------------------------------------------------------------------------------

// blockIdx.y: the layer. A thread looks at eight rows of one channel.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    shift_kernel(const __grid_constant__ pydit_hsic_matrix_params p, const Plan plan) {
  constexpr int kRows = 8;
  const int layer = blockIdx.y, channel = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (channel >= plan.channels) return;
  float values[kRows], mean = 0, spread = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const auto* row = static_cast<const T*>(p.features[layer]) + i * p.rows / kRows * p.stride[layer];
    values[i] = channel < p.dim[layer] ? to_float(row[channel]) : 0.f;
    mean += values[i] / kRows;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) spread = fmaxf(spread, fabsf(values[i] - mean));
  reinterpret_cast<T*>(plan.shifts)[layer * plan.channels + channel] =
      from_float<T>(fabsf(mean) > 4 * spread ? mean : 0.f);
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

// Gram matrices --------------------------------------------------------------------------------------------------

// Where 16-byte vector `vector` of a row's 8 lies: the eight rows that ldmatrix takes are in different banks.
__device__ __forceinline__ int place(int row, int vector) { return row * kRowBytes + (vector ^ row % 8) * 16; }

// kTile rows of kStep channels; what does not exist becomes zero.
template <typename T, bool kAligned>
__device__ __forceinline__ void copy_step(char* to, const void* from, int64_t stride, int64_t rows, int dim,
                                          int64_t first_row, int first_channel) {
  constexpr int kVectors = kRowBytes / 16;
#pragma unroll
  for (int i = threadIdx.x; i < kTile * kVectors; i += kThreads) {
    const int row = i / kVectors, channel = first_channel + i % kVectors * 8;
    const int left = first_row + row < rows ? dim - channel : 0;
    const T* source = static_cast<const T*>(from) + (left > 0 ? (first_row + row) * stride + channel : 0);
    copy_eight<T, kAligned>(to + place(row, i % kVectors), source, left);
  }
}

// sums += left right^T over kStep channels, less `shifts`, for a warp's 64 x 32.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&sums)[4][4][4], const char* left, const char* right,
                                              const uint16_t* shifts, int row, int column) {
  const int lane = threadIdx.x % 32;
  uint32_t shift[kStep / 8];  // of the channels that this thread has in every eight
#pragma unroll
  for (int k = 0; k < kStep / 8; ++k) shift[k] = *reinterpret_cast<const uint32_t*>(shifts + k * 8 + lane % 4 * 2);
#pragma unroll
  for (int k = 0; k < kStep / 8; k += 2) {
    uint32_t b[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      ldmatrix(b[n], right + place(column + n * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 4; ++i) b[n][i] = subtract<T>(b[n][i], shift[k + i % 2]);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t a[4];
      ldmatrix(a, left + place(row + m * 16 + lane % 16, k + lane / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = subtract<T>(a[i], shift[k + i / 2]);
#pragma unroll
      for (int n = 0; n < 4; ++n)
        mma_m16n8k16<T>(sums[m][n], a, reinterpret_cast<const uint32_t (&)[2]>(b[n / 2][n % 2 * 2]));
    }
  }
}

// Sums of a tile over its columns, per row, and over its rows, per column; every thread has a part of a warp's 64 x 32.
// `scratch`: 6 x kTile numbers.
__device__ __forceinline__ void store_sums(const float (&tile)[4][4][4], double* of_rows, double* of_columns,
                                           double* scratch) {
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
  const int i = threadIdx.x % kTile;
  if (threadIdx.x < kTile)
    of_rows[i] = scratch[i] + scratch[kTile + i] + scratch[2 * kTile + i] + scratch[3 * kTile + i];
  else if (of_columns != nullptr)
    of_columns[i] = scratch[4 * kTile + i] + scratch[5 * kTile + i];
}

// One tile of one layer: blockIdx.x counts tiles from `first_tile`, blockIdx.y layers.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    gram_kernel(const __grid_constant__ pydit_hsic_matrix_params p, const Plan plan, int first_tile, bool keep) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  const int layer = blockIdx.y, dim = p.dim[layer];
  const TileAt at = triangle_tile(static_cast<int>(plan.blocks), first_tile + static_cast<int>(blockIdx.x));
  const bool square = at.row == at.column;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int my_row = warp / 4 * 64, my_column = warp % 4 * 32;
  const int steps = (dim + kStep - 1) / kStep;
  const auto copy = [&](int step) {
    char* stage = shared + step % kStages * kStageBytes;
    const auto operand = [&](char* to, int tile) {
      copy_step<T, kAligned>(to, p.features[layer], p.stride[layer], p.rows, dim, int64_t{tile} * kTile, step * kStep);
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
    __syncthreads();  // the step is here, and everyone is done with the stage that is filled next
    if (step + kStages - 1 < steps) copy(step + kStages - 1);
    cp_async_commit_group();
    const char* stage = shared + step % kStages * kStageBytes;
    multiply_step<T>(partial, stage, square ? stage : stage + kOperandBytes,
                     plan.shifts + layer * plan.channels + step * kStep, my_row, my_column);
    if ((step + 1) % (kChunk / kStep) == 0 || step + 1 == steps) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        sums[i / 16][i / 4 % 4][i % 4] += partial[i / 16][i / 4 % 4][i % 4];
        partial[i / 16][i / 4 % 4][i % 4] = 0;
      }
    }
  }
  const int64_t rows_left = p.rows - int64_t{at.row} * kTile, columns_left = p.rows - int64_t{at.column} * kTile;
  float* tile = plan.grams + (static_cast<int64_t>(blockIdx.x) * p.layers + layer) * kTileElements;
#pragma unroll
  for (int i = 0; i < 32; ++i) {  // pairs of neighbours
    const int m = i / 8, n = i / 2 % 4, half = i % 2;
    const int row = my_row + m * 16 + lane / 4 + half * 8, column = my_column + n * 8 + lane % 4 * 2;
    float &x = sums[m][n][half * 2], &y = sums[m][n][half * 2 + 1];
    const bool exists = row < rows_left;
    if (!exists || column >= columns_left || (square && row == column)) x = 0;
    if (!exists || column + 1 >= columns_left || (square && row == column + 1)) y = 0;
    if (keep) *reinterpret_cast<float2*>(tile + row * kTile + column) = make_float2(x, y);
  }
  __syncthreads();  // the stages become scratch
  double* slots = plan.sums + layer * plan.blocks * plan.padded;
  store_sums(sums, slots + at.column * plan.padded + at.row * kTile,
             square ? nullptr : slots + at.row * plan.padded + at.column * kTile, reinterpret_cast<double*>(shared));
}

// Centring -------------------------------------------------------------------------------------------------------

// One block per layer.
__global__ void __launch_bounds__(kThreads) centre_kernel(const Plan plan, int64_t rows) {
  __shared__ double scratch[kThreads / 32];
  const double* slots = plan.sums + blockIdx.x * plan.blocks * plan.padded;
  double* centres = plan.centres + blockIdx.x * plan.padded;
  double total = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) {
    double sum = 0;
    for (int64_t block = 0; block < plan.blocks; ++block) sum += slots[block * plan.padded + i];
    centres[i] = sum / static_cast<double>(rows - 2);
    total += centres[i];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(kFullWarp, total, offset);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = total;
  __syncthreads();
  total = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  for (int64_t i = threadIdx.x; i < rows; i += kThreads) centres[i] -= total / static_cast<double>(2 * (rows - 1));
}

// Contraction ----------------------------------------------------------------------------------------------------

// U of a set of layers at some positions; the gap keeps rows in other banks.
template <int kLayers>
using Side = float[kLayers][kColumns + 4];

// U of kLayers layers from `first` on, at kColumns positions of one row.
template <int kLayers>
__device__ __forceinline__ void load_side(Side<kLayers>& side, const Plan& plan, const float* tiles, int layers,
                                          int first, int64_t row, int64_t first_column, int64_t rows) {
  const int slot = threadIdx.x % kColumns;
  const int64_t column = first_column + slot;
  const bool exists = column < rows && column != row;
#pragma unroll 4
  for (int i = threadIdx.x / kColumns; i < kLayers; i += kThreads / kColumns) {
    const int layer = first + i;
    double u = 0;
    if (exists && layer < layers) {
      const double gram = tiles[layer * kTileElements + row % kTile * kTile + column % kTile];
      const double* centres = plan.centres + layer * plan.padded;
      u = gram - centres[row] - centres[column];
      if (fabs(u) <= 1e-12 * fabs(gram)) u = 0;  // rounding: rows that are all alike
    }
    side[i][slot] = static_cast<float>(u);
  }
}

// Products of U of two sets of layers: blockIdx.y is the pair of sets, blockIdx.x takes slices of `tiles` tiles in
// turn. A thread has layers threadIdx.x / 16 + 16 a of one set and threadIdx.x % 16 + 16 b of the other.
template <int kLayers>
__global__ void __launch_bounds__(kThreads, 2)
    contract_kernel(const Plan plan, int64_t rows, int layers, int first_tile, int tiles) {
  constexpr int kEach = kLayers / 16;  // layers of a thread on either side
  __shared__ __align__(16) Side<kLayers> sides[2];
  const TileAt pair = triangle_tile((layers + kLayers - 1) / kLayers, static_cast<int>(blockIdx.y));
  const bool same = pair.row == pair.column;
  const int mine = threadIdx.x / 16, theirs = threadIdx.x % 16;
  double totals[kEach][kEach];
#pragma unroll
  for (int i = 0; i < kEach * kEach; ++i) totals[i / kEach][i % kEach] = 0;
  for (int slice = blockIdx.x; slice < tiles * kSlicesOfTile; slice += gridDim.x) {
    const int tile = slice / kSlicesOfTile, part = slice % kSlicesOfTile;
    const TileAt at = triangle_tile(static_cast<int>(plan.blocks), first_tile + tile);
    const float* grams = plan.grams + static_cast<int64_t>(tile) * layers * kTileElements;
    const int64_t first_row = int64_t{at.row} * kTile + part / 2 * kSliceRows;
    const int64_t first_column = int64_t{at.column} * kTile + part % 2 * kColumns;
    float sums[kEach][kEach];
#pragma unroll
    for (int i = 0; i < kEach * kEach; ++i) sums[i / kEach][i % kEach] = 0;
    for (int64_t row = first_row; row < first_row + kSliceRows && row < rows; ++row) {
      __syncthreads();
      load_side<kLayers>(sides[0], plan, grams, layers, pair.row * kLayers, row, first_column, rows);
      if (!same) load_side<kLayers>(sides[1], plan, grams, layers, pair.column * kLayers, row, first_column, rows);
      __syncthreads();
      const Side<kLayers>&left = sides[0], &right = sides[same ? 0 : 1];
#pragma unroll 4
      for (int i = 0; i < kColumns; i += 4) {
        float4 a[kEach], b[kEach];
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          a[j] = *reinterpret_cast<const float4*>(&left[mine + 16 * j][i]);
          b[j] = *reinterpret_cast<const float4*>(&right[theirs + 16 * j][i]);
        }
#pragma unroll
        for (int j = 0; j < kEach * kEach; ++j) {
          float& sum = sums[j / kEach][j % kEach];
          const float4 &x = a[j / kEach], &y = b[j % kEach];
          sum = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, sum))));
        }
      }
    }
    const double weight = at.row == at.column ? 1 : 2;  // a tile off the diagonal stands for its mirror image as well
#pragma unroll
    for (int i = 0; i < kEach * kEach; ++i) totals[i / kEach][i % kEach] += weight * sums[i / kEach][i % kEach];
  }
  double* products = plan.products + (static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kLayers * kLayers;
#pragma unroll
  for (int i = 0; i < kEach * kEach; ++i)
    products[(mine + i / kEach * 16) * kLayers + theirs + i % kEach * 16] = totals[i / kEach][i % kEach];
}

// hsic = (or +=) the sum over blocks of `contract` / (n (n - 3)): blockIdx.y as there, blockIdx.x one layer of its
// first set.
template <int kLayers>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const Plan plan, double* hsic, int64_t rows, int layers, bool add) {
  constexpr int kParts = kThreads / kLayers;
  __shared__ double scratch[kParts][kLayers];
  const int column = threadIdx.x % kLayers, part = threadIdx.x / kLayers;
  const double* products = plan.products + blockIdx.y * kLayers * kLayers + blockIdx.x * kLayers + column;
  double sum = 0;
#pragma unroll 8
  for (int64_t i = part; i < plan.contractors; i += kParts) sum += products[i * plan.pairs * kLayers * kLayers];
  scratch[part][column] = sum;
  __syncthreads();
  const TileAt pair = triangle_tile((layers + kLayers - 1) / kLayers, static_cast<int>(blockIdx.y));
  const int a = pair.row * kLayers + static_cast<int>(blockIdx.x), b = pair.column * kLayers + column;
  if (part > 0 || a >= layers || b >= layers) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) sum += scratch[i][column];
  sum /= static_cast<double>(rows) * static_cast<double>(rows - 3);
  double* target = hsic + a * layers + b;
  *target = add ? *target + sum : sum;
  if (pair.row != pair.column) hsic[b * layers + a] = *target;  // inside one set the mirror image is another thread's
}

// Launcher -------------------------------------------------------------------------------------------------------

template <typename T>
void name_features(const pydit_hsic_matrix_params& p) {
  for (int layer = 0; layer < p.layers; ++layer)
    name_tensor("features", p.features[layer], false, sizeof(T), p.dim[layer], {p.rows}, {p.stride[layer]});
}

void name_workspace(const pydit_hsic_matrix_params& p, const Plan& plan) {
  name_tensor("workspace", p.workspace, true, 1, plan.bytes, {1}, {0});
  name_tensor("hsic", p.hsic, true, sizeof(double), p.layers, {p.layers}, {p.layers});
}

template <typename T>
int launch_shift(const pydit_hsic_matrix_params& p, const Plan& plan) {
  name_features<T>(p), name_workspace(p, plan);
  return launch_status(
      kOp, PYDIT_LAUNCH(shift_kernel<T>,
                        dim3(static_cast<unsigned>(ceil_div(plan.channels, kThreads)), static_cast<unsigned>(p.layers)),
                        dim3(kThreads), 0, static_cast<cudaStream_t>(p.stream), p, plan));
}

template <typename T, bool kAligned>
int launch_gram(const pydit_hsic_matrix_params& p, const Plan& plan, int64_t first, int64_t tiles, bool keep) {
  name_features<T>(p), name_workspace(p, plan);
  return launch_status(
      kOp, PYDIT_LAUNCH((gram_kernel<T, kAligned>), dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(p.layers)),
                        dim3(kThreads), kSharedBytes, static_cast<cudaStream_t>(p.stream), p, plan,
                        static_cast<int>(first), keep));
}

int launch_centre(const pydit_hsic_matrix_params& p, const Plan& plan) {
  name_workspace(p, plan);
  return launch_status(kOp, PYDIT_LAUNCH(centre_kernel, dim3(static_cast<unsigned>(p.layers)), dim3(kThreads), 0,
                                         static_cast<cudaStream_t>(p.stream), plan, p.rows));
}

template <int kLayers>
int launch_contract(const pydit_hsic_matrix_params& p, const Plan& plan, int64_t first, int64_t tiles) {
  const auto stream = static_cast<cudaStream_t>(p.stream);
  const auto pairs = static_cast<unsigned>(plan.pairs);
  name_workspace(p, plan);
  const int status = launch_status(
      kOp, PYDIT_LAUNCH(contract_kernel<kLayers>, dim3(static_cast<unsigned>(plan.contractors), pairs), dim3(kThreads),
                        0, stream, plan, p.rows, p.layers, static_cast<int>(first), static_cast<int>(tiles)));
  if (status != kOk) return status;
  name_workspace(p, plan);
  return launch_status(kOp, PYDIT_LAUNCH(finish_kernel<kLayers>, dim3(kLayers, pairs), dim3(kThreads), 0, stream, plan,
                                         p.hsic, p.rows, p.layers, first > 0));
}

int launch_contract_set(const pydit_hsic_matrix_params& p, const Plan& plan, int64_t first, int64_t tiles) {
  return plan.set == 16   ? launch_contract<16>(p, plan, first, tiles)
         : plan.set == 32 ? launch_contract<32>(p, plan, first, tiles)
                          : launch_contract<64>(p, plan, first, tiles);
}

template <typename T, bool kAligned>
int launch(const pydit_hsic_matrix_params& p) {
  const Plan plan = plan_of(p);
  const cudaError_t error =
      cudaFuncSetAttribute(gram_kernel<T, kAligned>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return launch_status(kOp, error);
  const bool at_once = plan.group == plan.tiles;
  int status = launch_shift<T>(p, plan);
  if (status == kOk) status = launch_gram<T, kAligned>(p, plan, 0, plan.tiles, at_once);
  if (status == kOk) status = launch_centre(p, plan);
  for (int64_t first = 0; first < plan.tiles && status == kOk; first += plan.group) {
    const int64_t tiles = plan.tiles - first < plan.group ? plan.tiles - first : plan.group;
    if (!at_once) status = launch_gram<T, kAligned>(p, plan, first, tiles, true);
    if (status == kOk) status = launch_contract_set(p, plan, first, tiles);
  }
  return status;
}

template <typename T>
int launch_alignment(const pydit_hsic_matrix_params& p) {
  bool legal = true;
  for (int layer = 0; layer < p.layers; ++layer) legal &= aligned16(p.features[layer]) && p.stride[layer] % 8 == 0;
  return legal ? launch<T, true>(p) : launch<T, false>(p);
}

}  // namespace
}  // namespace pydit::PYDIT_BACKEND

using namespace pydit::PYDIT_BACKEND;

extern "C" int64_t PYDIT_ENTRY(hsic_matrix_workspace)(const pydit_hsic_matrix_params* p) {
  return p->layers > 0 && p->rows > 0 ? plan_of(*p).bytes : 0;
}

extern "C" int PYDIT_ENTRY(hsic_matrix)(const pydit_hsic_matrix_params* p) {
  if (p->dtype != PYDIT_FLOAT16 && p->dtype != PYDIT_BFLOAT16)
    return bad_argument("%s: dtype: expected float16 (1) or bfloat16 (2), got %d", kOp, p->dtype);
  if (p->layers < 1 || p->layers > PYDIT_MAX_LAYERS)
    return bad_argument("%s: layers: expected 1 to %d, got %d", kOp, PYDIT_MAX_LAYERS, p->layers);
  if (p->rows < 4 || p->rows > 1 << 20)
    return bad_argument("%s: rows: expected 4 to 2^20, got %lld", kOp, static_cast<long long>(p->rows));
  if (p->workspace == nullptr) return bad_argument("%s: workspace: expected memory, got a null pointer", kOp);
  return p->dtype == PYDIT_FLOAT16 ? launch_alignment<__half>(*p) : launch_alignment<__nv_bfloat16>(*p);
}
