// Tiles of symmetric matrices, as the kernels of statistics deal with them: only those on and above the diagonal; and
// how what they are made of gets to shared memory.
#pragma once

#include <cstdint>

#include "device/platform.cuh"
#include "device/ptx_async.cuh"
#include "device/vector.cuh"

namespace pydit::PYDIT_BACKEND {

constexpr int kTile = 128;  // rows and columns

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__host__ __device__ inline int64_t count_triangle(int64_t rows) { return rows * (rows + 1) / 2; }

struct TileAt {
  int row, column;  // in tiles; row <= column
};

// The index-th tile of `rows` rows of tiles: the first row from left to right, then the second.
__device__ __forceinline__ TileAt triangle_tile(int rows, int index) {
  int row = 0;
  for (; index >= rows - row; ++row) index -= rows - row;
  return {row, row + index};
}

// Eight elements to shared memory; of `left` that there are, the rest becomes zero. Asynchronous if kAligned.
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

}  // namespace pydit::PYDIT_BACKEND
