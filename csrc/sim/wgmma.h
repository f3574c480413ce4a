// wgmma: D[64 x N] (+)= A[64 x 16] B[16 x N] by a warpgroup, fp32 accumulation.
//
// Each warp of the warpgroup owns 16 rows of D and A, so a product is four independent ones, and a warp computes its
// own when it waits: an accumulator read before the wait has its old value, and an operand overwritten before the wait
// (a stage released early) gives a wrong one. A in registers is taken when the product is issued, as ptxas keeps it
// safe.
//
// Rows 16 w .. 16 w + 15 of D belong to warp w of the warpgroup; element (r, c) of those 16 rows lies in lane
// r % 8 * 4 + c % 8 / 2, register c / 8 * 4 + r / 8 * 2 + c % 2. A in registers: element (r, k) in lane
// r % 8 * 4 + k % 8 / 2, register k / 8 * 2 + r / 8, half k % 2.
//
// An operand in shared memory is found through a descriptor, all offsets in units of 16 bytes: start address bits 0-13,
// leading offset bits 16-29, stride offset bits 32-45, swizzle bits 62-63 (0 none, 1 128 B, 2 64 B, 3 32 B). With
// S the swizzle span (16 without), element (i along M or N, k) of a K-major operand is at
//   start + i / 8 * stride + i % 8 * S + 2 k            (without swizzle: + k / 8 * leading + k % 8 * 2)
// and of a transposed (M- or N-major) one, with e = i * 2 bytes, at
//   start + e / S * leading + e % S + k / 8 * stride + k % 8 * S    (without swizzle leading and stride change places)
// each followed by the swizzle of the address (tma.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "sim/tma.h"

namespace simt {

struct Product {
  float* accumulator;  // of this thread: n / 2 registers
  uint64_t a, b;       // descriptors
  uint32_t a_registers[4];
  bool a_in_registers, transpose_a, transpose_b, accumulate;
  Element element;
  int n;
  uint64_t token = 0;  // of the race detector; filled by wgmma()
};

// Where shared memory begins for descriptors and 32-bit shared addresses: the dynamic part.
uint32_t shared_address(const void* pointer);
uint64_t matrix_descriptor(const void* start, uint32_t leading_bytes, uint32_t stride_bytes, uint32_t swizzle);

void wgmma(const Product& product);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(size_t keep);

}  // namespace simt
