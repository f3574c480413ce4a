// Second moments of activations: xx += x^T x (blocks on and above the diagonal), xy += x^T y, and column sums of x, y
// and y^2, of 16-bit tokens in fp64; see pydit.h. The portable kernel (sm_80 and up), and the entry point.
//
// Cost at N = 7401, d = 3072: the triangle is 69.9 GFLOP, 72.8 with whole diagonal tiles: 74 us at 989 TFLOP/s. Memory:
// x once (45 MB; each of 24 x 25 / 2 tiles reads 2 x 1.9 MB of it from L2, 1.1 GB), and 128 KB read and written per
// tile and block, 300 + 132 times: 113 MB, mostly L2.
//
// Numbers. Products of 16-bit values are exact in fp32. The tensor cores sum a chunk of 256 tokens, fp32 registers up
// to 32 chunks, and fp64 in memory the rest. Relative to sums of squares the error is that of 288 fp32 additions,
// however many tokens there are. fp64 registers would take 29 conversions per element, 36 us at 16 per cycle and SM.
// Values are not shifted first, which would round them again: with a mean of r standard deviations the centred moments
// lose a factor of r^2.
//
// A block: 8 warps of 64 x 32 elements each; steps of 32 tokens come by cp.async, four stages ahead. Both operands are
// stored as tokens by columns, so ldmatrix transposes both.
#include "device/arch.h"
#include "device/dispatch.h"
#include "device/ptx.cuh"
#include "device/vector.cuh"
#include "kernels/stats/second_moments.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kThreads = 256, kStep = 32, kStages = 4;
constexpr int kRowBytes = kTile * 2, kOperandBytes = kStep * kRowBytes, kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes;
static_assert(kChunkTokens % kStep == 0 && kSharedBytes <= 99 * 1024, "whole steps; what sm_86 gives a block");

// Device code ----------------------------------------------------------------------------------------------------

// sums += left^T right over kStep tokens, for a warp's 64 x 32.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&sums)[4][4][4], const char* left, const char* right, int row,
                                              int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kStep; k += 16) {
    uint32_t b[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n)
      ldmatrix<true>(b[n], right + swizzled_offset<kRowBytes>(k + lane % 16, column / 8 + n * 2 + lane / 16));
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      uint32_t a[4];
      ldmatrix<true>(a,
                     left + swizzled_offset<kRowBytes>(k + lane / 16 * 8 + lane % 8, row / 8 + m * 2 + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < 4; ++n)
        mma_m16n8k16<T>(sums[m][n], a, reinterpret_cast<const uint32_t (&)[2]>(b[n / 2][n % 2 * 2]));
    }
  }
}

// A thread's part of the column sums of one step, and of those of squares: its column, over half of the tokens.
template <typename T>
__device__ __forceinline__ float2 sum_step(const char* operand) {
  const int column = threadIdx.x % kTile;
  float2 sums = make_float2(0.f, 0.f);
#pragma unroll 4
  for (int i = 0; i < kStep / 2; ++i) {
    const int token = threadIdx.x / kTile * (kStep / 2) + i;
    const float value =
        to_float(*reinterpret_cast<const T*>(operand + swizzled_offset<kRowBytes>(token, column / 8) + column % 8 * 2));
    sums.x += value;
    sums.y = fmaf(value, value, sums.y);
  }
  return sums;
}

// Kernel ---------------------------------------------------------------------------------------------------------

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) second_moments_kernel(const pydit_second_moments_params p) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* done = static_cast<unsigned*>(p.workspace);  // per tile; the last is the ticket
  const int64_t tiles = count_tiles(p);
  auto* drawn = reinterpret_cast<unsigned*>(shared);
  if (threadIdx.x == 0) *drawn = atomicAdd(done + tiles, 1u);
  __syncthreads();
  const unsigned ticket = *drawn;
  __syncthreads();
  const Run run = run_of(p, tiles, ticket, gridDim.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int my_row = warp / 4 * 64, my_column = warp % 4 * 32;

  for (int64_t last = run.last; last > run.first;) {
    const int index = static_cast<int>((last - 1) / run.chunks);
    const int64_t base = static_cast<int64_t>(index) * run.chunks;
    const int from = static_cast<int>(base > run.first ? 0 : run.first - base), to = static_cast<int>(last - base);
    last = base + from;
    const TileOfSums tile = decode_tile(p, index);
    const bool square = !tile.cross && tile.row == tile.column;   // both operands are the same columns
    const bool counts = square || (tile.cross && tile.row == 0);  // this tile also makes its columns' sums
    const void* right = tile.cross ? p.y : p.x;
    const int64_t right_stride = tile.cross ? p.stride_y : p.stride_x, right_columns = tile.cross ? p.dim_y : p.dim_x;
    const int steps = (to - from) * (kChunkTokens / kStep);
    const auto copy = [&](int step) {
      char* stage = shared + step % kStages * kStageBytes;
      const int64_t token = static_cast<int64_t>(from) * kChunkTokens + step * kStep;
      copy_tile<kStep, kTile, kThreads, kAligned>(stage, static_cast<const T*>(p.x), p.stride_x, p.tokens, p.dim_x,
                                                  token, tile.row * kTile);
      if (!square)
        copy_tile<kStep, kTile, kThreads, kAligned>(stage + kOperandBytes, static_cast<const T*>(right), right_stride,
                                                    p.tokens, right_columns, token, tile.column * kTile);
    };
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copy(step);
      cp_async_commit_group();
    }
    const int64_t rows = p.dim_x, width = right_columns;
    bool turn = from == 0;
    const auto flush = [&](float (&sums)[4][4][4]) {
      if (!turn) wait_for_earlier(done + index, from);
      turn = true;
      double* target = tile.cross ? p.xy : p.xx;
      const int64_t row = tile.row * kTile + my_row + lane / 4;
      const int64_t column = tile.column * kTile + my_column + lane % 4 * 2;
      add_to_memory<64, 16>(
          target, rows, width, [&](int i) -> float& { return sums[i / 16][i / 4 % 4][i % 4]; },
          [&](int i) { return make_longlong2(row + i / 16 * 16 + i / 2 % 2 * 8, column + i / 4 % 4 * 8 + i % 2); });
    };
    double columns[2] = {0, 0};
    float sums[4][4][4], partial[4][4][4], partial_columns[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0;
    for (int step = 0; step < steps; ++step) {
      if (step % (kChunkTokens / kStep) == 0) {
#pragma unroll
        for (int i = 0; i < 64; ++i) partial[i / 16][i / 4 % 4][i % 4] = 0;
        partial_columns[0] = partial_columns[1] = 0;
      }
      cp_async_wait_group<kStages - 2>();
      __syncthreads();  // the step has arrived, and nobody still reads the stage that is filled next
      if (step + kStages - 1 < steps) copy(step + kStages - 1);
      cp_async_commit_group();
      const char* stage = shared + step % kStages * kStageBytes;
      const char* other = square ? stage : stage + kOperandBytes;
      multiply_step<T>(partial, stage, other, my_row, my_column);
      if (counts) {
        const float2 more = sum_step<T>(other);
        partial_columns[0] += more.x, partial_columns[1] += more.y;
      }
      if ((step + 1) % (kChunkTokens / kStep) == 0) {
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[i / 16][i / 4 % 4][i % 4] += partial[i / 16][i / 4 % 4][i % 4];
        columns[0] += partial_columns[0], columns[1] += partial_columns[1];
        if ((step + 1) % (kChunkTokens / kStep * kChunksOfSum) == 0 || step + 1 == steps) flush(sums);
      }
    }
    __syncthreads();  // stages are free: for the next tile's copies, and for the column sums of the upper half
    if (counts) {
      auto* upper = reinterpret_cast<double*>(shared);
      const int column = threadIdx.x % kTile;
      if (threadIdx.x >= kTile) upper[2 * column] = columns[0], upper[2 * column + 1] = columns[1];
      __syncthreads();
      const int64_t place = tile.column * kTile + column;
      if (threadIdx.x < kTile && place < width) {
        (square ? p.sum_x : p.sum_y)[place] += columns[0] + upper[2 * column];
        if (!square) p.sum_yy[place] += columns[1] + upper[2 * column + 1];
      }
      __syncthreads();
    }
    announce_added(done + index, to, run.chunks);
  }
}

// Launcher -------------------------------------------------------------------------------------------------------

template <typename T, bool kAligned>
int launch(const pydit_second_moments_params& p) {
  const int64_t units = count_tiles(p) * ceil_div(p.tokens, kChunkTokens);
  int processors = 0;
  cudaError_t error = count_multiprocessors(&processors);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(second_moments_kernel<T, kAligned>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kSharedBytes);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  if (error == cudaSuccess)
    error = cudaMemsetAsync(p.workspace, 0, static_cast<size_t>(count_tiles(p) + 1) * sizeof(unsigned), stream);
  if (error != cudaSuccess) return launch_status(kSecondMoments, error);
  const auto blocks = static_cast<unsigned>(units < processors ? units : processors);
  name_second_moments_tensors<T>(p);
  return launch_status(kSecondMoments, PYDIT_LAUNCH((second_moments_kernel<T, kAligned>), dim3(blocks), dim3(kThreads),
                                                    kSharedBytes, stream, p));
}

// Whether 16-byte accesses are legal.
bool aligned(const pydit_second_moments_params& p) {
  const auto legal = [&](const void* data, int64_t stride) {
    return aligned16(data) && (p.tokens <= 1 || stride % 8 == 0);
  };
  return legal(p.x, p.stride_x) && (p.dim_y == 0 || legal(p.y, p.stride_y));
}

// Whether TMA, whose coordinates have 32 bits, can address both tensors. A stride of 0, that of an expanded tensor, is
// not documented to work.
bool tma_addressable(const pydit_second_moments_params& p) {
  const bool expanded = p.tokens > 1 && (p.stride_x == 0 || (p.dim_y > 0 && p.stride_y == 0));
  return !expanded && p.tokens <= INT32_MAX - kChunkTokens && aligned(p);
}

template <typename T>
int launch_alignment(const pydit_second_moments_params& p) {
  return aligned(p) ? launch<T, true>(p) : launch<T, false>(p);
}

}  // namespace
}  // namespace pydit::PYDIT_BACKEND

using namespace pydit::PYDIT_BACKEND;

extern "C" int64_t PYDIT_ENTRY(second_moments_workspace)(const pydit_second_moments_params* p) {
  return workspace_bytes(*p);
}

extern "C" int PYDIT_ENTRY(second_moments_path)(const pydit_second_moments_params* p) {
  const int path = hopper_path(tma_addressable(*p));
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  if (path == PYDIT_PATH_HOPPER && cluster_of_second_moments_sm90(*p) == 2) return PYDIT_PATH_HOPPER_PAIRS;
#endif
  return path;
}

extern "C" int PYDIT_ENTRY(second_moments)(const pydit_second_moments_params* p) {
  if (p->dtype != PYDIT_FLOAT16 && p->dtype != PYDIT_BFLOAT16)
    return bad_argument("%s: dtype: expected float16 (1) or bfloat16 (2), got %d", kSecondMoments, p->dtype);
  if (p->tokens < 0)
    return bad_argument("%s: tokens: expected 0 or more, got %lld", kSecondMoments, static_cast<long long>(p->tokens));
  if (p->cluster < 0 || p->cluster > 2)
    return bad_argument("%s: cluster: expected 0, 1 or 2, got %d", kSecondMoments, p->cluster);
  for (const int64_t dim : {p->dim_x, p->dim_y}) {
    if (dim < 0 || dim > 1 << 20)
      return bad_argument("%s: dim: expected 0 to 2^20, got %lld", kSecondMoments, static_cast<long long>(dim));
  }
  if (p->tokens == 0 || p->dim_x == 0) return kOk;
  if (count_tiles(*p) > INT32_MAX || ceil_div(p->tokens, kChunkTokens) > INT32_MAX)
    return bad_argument("%s: expected at most 2^31 - 1 tiles and chunks, got more", kSecondMoments);
  if (p->workspace == nullptr)
    return bad_argument("%s: workspace: expected memory, got a null pointer", kSecondMoments);
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  if (hopper_path(tma_addressable(*p)) == PYDIT_PATH_HOPPER) return launch_second_moments_sm90(*p);
#endif
  return p->dtype == PYDIT_FLOAT16 ? launch_alignment<__half>(*p) : launch_alignment<__nv_bfloat16>(*p);
}
