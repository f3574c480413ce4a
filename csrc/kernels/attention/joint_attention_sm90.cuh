// Rows of heads in shared memory and products of them by wgmma, for the Hopper kernels of joint attention.
//
// A tile of rows of kD 16-bit elements consists of kD * 2 / kSpan boxes, one behind the other. Each holds kSpan bytes
// of every row, swizzled over kSpan: what TMA copies and wgmma reads.
#pragma once

#include "device/ptx.cuh"
#include "device/vector.cuh"
#include "kernels/attention/joint_attention.cuh"

namespace pydit::PYDIT_BACKEND {

// Loads rows first .. first + rows - 1 of a head. One thread calls.
template <int kD, int kSpan>
__device__ __forceinline__ void load_boxes(char* tile, const TensorMap& map, uint64_t* barrier, int rows, int first,
                                           int head, int batch) {
#pragma unroll
  for (int box = 0; box < kD * 2 / kSpan; ++box)
    tma_load_4d(tile + box * rows * kSpan, map, barrier, box * (kSpan / 2), first, head, batch);
}

// Zeroes rows `valid` .. kRows - 1, whose padding may hold NaN, for the async proxy. A warp calls.
template <int kD, int kSpan, int kRows>
__device__ __forceinline__ void zero_rows(char* tile, int valid) {
  constexpr int kVectors = kSpan / 16;  // of a row of a box; the swizzle stays inside a row
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int i = valid * kVectors + static_cast<int>(threadIdx.x) % 32; i < kRows * kVectors; i += 32) {
#pragma unroll
    for (int box = 0; box < kD * 2 / kSpan; ++box)
      *reinterpret_cast<uint4*>(tile + box * kRows * kSpan + i * 16) = zero;
  }
  fence_proxy_async();
}

// Stores a warp's 16 rows of a warpgroup's accumulators [64, kD], times `scale`, to the warpgroup's rows of a tile of
// kRows rows.
template <typename T, int kD, int kSpan, int kRows>
__device__ __forceinline__ void store_to_boxes(char* my_rows, const float (&values)[kD / 2], float scale, int warp,
                                               int lane) {
#pragma unroll
  for (int column = 0; column < kD; column += 16) {
    const float* o = values + column / 2;
    const uint32_t matrices[4] = {pack<T>(o[0] * scale, o[1] * scale), pack<T>(o[2] * scale, o[3] * scale),
                                  pack<T>(o[4] * scale, o[5] * scale), pack<T>(o[6] * scale, o[7] * scale)};
    const int row = warp * 16 + lane % 16, d = column + lane / 16 * 8;
    char* box = my_rows + d * 2 / kSpan * kRows * kSpan;
    stmatrix(box + tma_swizzle<kSpan>(row * kSpan + d * 2 % kSpan), matrices);
  }
}

// out = left right^T, issued and committed: 64 rows of a tile of kLeftRows rows by the kN rows of another, over kD.
template <typename T, int kD, int kSpan, int kLeftRows, int kN>
__device__ __forceinline__ void multiply_rows(float (&out)[kN / 2], const char* left, const char* right) {
#pragma unroll
  for (int d = 0; d < kD; d += 16) {
    const int box = d / (kSpan / 2), inside = d % (kSpan / 2) * 2;
    wgmma<T, kN>(out, matrix_descriptor<kSpan>(left + box * kLeftRows * kSpan + inside, 16, 8 * kSpan),
                 matrix_descriptor<kSpan>(right + box * kN * kSpan + inside, 16, 8 * kSpan), d > 0);
  }
  wgmma_commit_group();
}

// out (+)= left right, issued and committed: `left` [64, kRows] in registers, `right` a tile of kRows rows by kD, which
// wgmma transposes.
template <typename T, int kD, int kSpan, int kRows>
__device__ __forceinline__ void multiply_registers(float (&out)[kD / 2], const uint32_t (&left)[kRows / 16][4],
                                                   const char* right, bool accumulate) {
#pragma unroll
  for (int k = 0; k < kRows / 16; ++k) {
    wgmma<T, kD, true>(out, left[k], matrix_descriptor<kSpan>(right + k * 16 * kSpan, kRows * kSpan, 8 * kSpan),
                       accumulate || k > 0);
  }
  wgmma_commit_group();
}

}  // namespace pydit::PYDIT_BACKEND
