// Rows of heads in shared memory and products of them by mma.sync, for the portable kernels of joint attention. A tile
// of rows of kD 16-bit elements is laid out by swizzled_offset<kD * 2>.
#pragma once

#include "device/ptx.cuh"
#include "device/tiling.cuh"
#include "device/vector.cuh"
#include "kernels/attention/joint_attention.cuh"

namespace pydit::PYDIT_BACKEND {

// Copies tokens first .. first + kRows - 1 of a head; rows from `valid` on become zeros, whatever is there. kAligned:
// by cp.async.
template <typename T, int kD, int kRows, int kThreads, bool kAligned>
__device__ __forceinline__ void copy_rows(char* to, const pydit_heads& t, int batch, int head, int first, int valid) {
  const T* base = static_cast<const T*>(t.data) + batch * t.stride_b + head * t.stride_h;
  constexpr int kVectors = kD / 8;
#pragma unroll(kAligned ? 4 : 1)  // addresses in flight take registers that the products need
  for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
    const int row = i / kVectors, vector = i % kVectors;
    const bool exists = row < valid;
    const T* from = base + (exists ? (first + row) * t.stride_s + vector * 8 : 0);
    copy_eight<T, kAligned>(to + swizzled_offset<kD * 2>(row, vector), from, exists ? 8 : 0);
  }
}

// The left operand of 16 columns: rows first .. first + 15, columns 16 d .. 16 d + 15.
template <int kD>
__device__ __forceinline__ void load_left(uint32_t (&left)[4], const char* rows, int first, int d) {
  const int lane = threadIdx.x % 32;
  ldmatrix(left, rows + swizzled_offset<kD * 2>(first + lane % 16, d * 2 + lane / 16));
}

// out += left right^T for columns 16 d .. 16 d + 15 of both: 16 rows by kN. One ldmatrix loads the right operands of
// two products.
template <typename T, int kN, int kD>
__device__ __forceinline__ void multiply_transposed(float (&out)[kN / 2], const uint32_t (&left)[4], const char* right,
                                                    int d) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < kN; row += 16) {
    uint32_t b[4];
    ldmatrix(b, right + swizzled_offset<kD * 2>(row + lane / 16 * 8 + lane % 8, d * 2 + lane / 8 % 2));
    mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(out[row / 2]), left, reinterpret_cast<const uint32_t (&)[2]>(b[0]));
    mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(out[row / 2 + 4]), left,
                    reinterpret_cast<const uint32_t (&)[2]>(b[2]));
  }
}

// out += left right: 16 rows by kD, over the kN rows of `right`, which ldmatrix transposes.
template <typename T, int kN, int kD>
__device__ __forceinline__ void multiply(float (&out)[kD / 2], const uint32_t (&left)[kN / 16][4], const char* right) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int row = 0; row < kN; row += 16) {
#pragma unroll
    for (int d = 0; d < kD; d += 16) {
      uint32_t b[4];
      ldmatrix<true>(b, right + swizzled_offset<kD * 2>(row + lane % 16, d / 8 + lane / 16));
      mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(out[d / 2]), left[row / 16],
                      reinterpret_cast<const uint32_t (&)[2]>(b[0]));
      mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(out[d / 2 + 4]), left[row / 16],
                      reinterpret_cast<const uint32_t (&)[2]>(b[2]));
    }
  }
}

// Stores a warp's 16 rows, those of warp w from token first + 16 w on, as far as there are tokens: through the warp's
// own rows of `shared`, so that whole rows are written at a time.
template <typename T, int kD, bool kAligned>
__device__ __forceinline__ void store_rows(const pydit_heads& t, int batch, int head, int first, int tokens,
                                           char* shared, const float (&out)[kD / 2]) {
  constexpr int kVectors = kD / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int group = 0; group < kD / 8; ++group) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float* pair = out + group * 4 + row * 2;
      char* place = shared + swizzled_offset<kD * 2>(warp * 16 + lane / 4 + row * 8, group) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(place) = pack<T>(pair[0], pair[1]);
    }
  }
  __syncwarp();
  T* base = static_cast<T*>(t.data) + batch * t.stride_b + head * t.stride_h;
#pragma unroll
  for (int i = lane; i < 16 * kVectors; i += 32) {
    const int row = warp * 16 + i / kVectors, vector = i % kVectors;
    if (first + row >= tokens) continue;
    const auto values = *reinterpret_cast<const Pack<T, 8>*>(shared + swizzled_offset<kD * 2>(row, vector));
    T* to = base + (first + row) * t.stride_s + vector * 8;
    if constexpr (kAligned) {
      values.store(to);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j] = values.value[j];
    }
  }
}

}  // namespace pydit::PYDIT_BACKEND
