// How matrices are cut into tiles, and how tiles lie in shared memory and get there.
#pragma once

#include <cstdint>

#include "device/platform.cuh"
#include "device/ptx_async.cuh"
#include "device/vector.cuh"

namespace pydit::PYDIT_BACKEND {

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Byte offset of 16-byte vector `vector` of row `row` in a tile with rows of kRowBytes. Vectors are permuted (XOR
// swizzle) so that the eight rows that ldmatrix reads in one pass lie in different banks.
template <int kRowBytes>
__device__ __forceinline__ int swizzled_offset(int row, int vector) {
  constexpr int kVectors = kRowBytes / 16;
  const int turn = kVectors >= 8 ? row % 8 : row / 2 % kVectors;
  return row * kRowBytes + (vector ^ turn) * 16;
}

// Copies eight elements to shared memory, of which the first `left` exist; the others become zero. By cp.async if
// kAligned, which needs 16-byte alignment.
template <typename T, bool kAligned>
__device__ __forceinline__ void copy_eight(char* target, const T* source, int64_t left) {
  const int exist = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
  if constexpr (kAligned) {
    cp_async<16>(target, source, exist * 2);
  } else {
    Pack<T, 8> values;
#pragma unroll
    for (int j = 0; j < 8; ++j) values.value[j] = j < exist ? source[j] : from_float<T>(0.f);
    *reinterpret_cast<Pack<T, 8>*>(target) = values;
  }
}

// Copies the kRows x kColumns elements from (first_row, first_column) on of a matrix [rows, columns] to a tile laid out
// by swizzled_offset; those beyond the matrix become zero. All kThreads threads of the block call. Indices are of the
// types of `rows` and `columns`, int where that is enough.
template <int kRows, int kColumns, int kThreads, bool kAligned, typename T, typename Rows, typename Columns>
__device__ __forceinline__ void copy_tile(char* tile, const T* matrix, int64_t stride, Rows rows, Columns columns,
                                          Rows first_row, int first_column) {
  constexpr int kVectors = kColumns / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kRows * kVectors; i += kThreads) {
    const int row = i / kVectors, column = first_column + i % kVectors * 8;
    const Columns left = first_row + row < rows ? columns - column : 0;
    const T* source = matrix + (left > 0 ? (first_row + row) * stride + column : 0);
    copy_eight<T, kAligned>(tile + swizzled_offset<kColumns * 2>(row, i % kVectors), source, left);
  }
}

}  // namespace pydit::PYDIT_BACKEND
