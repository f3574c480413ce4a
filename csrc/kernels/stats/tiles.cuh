// Tiles of symmetric matrices, of which the kernels of statistics compute only those on and above the diagonal.
#pragma once

#include <cstdint>

#include "device/platform.cuh"
#include "device/tiling.cuh"

namespace pydit::PYDIT_BACKEND {

constexpr int kTile = 128;  // rows and columns of a tile

__host__ __device__ inline int64_t count_triangle(int64_t rows) { return rows * (rows + 1) / 2; }

struct TileAt {
  int row, column;  // in tiles; row <= column
};

// The index-th tile of `rows` rows of tiles: the first row from left to right, then the second.
__host__ __device__ inline TileAt triangle_tile(int rows, int index) {
  int row = 0;
  for (; index >= rows - row; ++row) index -= rows - row;
  return {row, row + index};
}

// The index of a tile in that order.
__host__ __device__ inline int64_t triangle_index(int64_t rows, int64_t row, int64_t column) {
  return row * rows - count_triangle(row) + column;
}

}  // namespace pydit::PYDIT_BACKEND
