// ldmatrix, stmatrix and mma.sync: 8 x 8 matrices of 16-bit elements spread over a warp.
//
// Register i of lane l holds elements (l / 4, l % 4 * 2) and the next of matrix i; transposed, (l % 4 * 2, l / 4) and
// the one below. Lane 8 i + r names the address of row r of matrix i.
// mma.m16n8k16: A is four such matrices (rows 0-7, rows 8-15, then the same for k 8-15), B two (k 0-7, k 8-15, the lane
// counting columns), C and D have (l / 4, l % 4 * 2), the next, and the same 8 rows below.
#pragma once

#include <cstdint>

#include "sim/half.h"
#include "sim/tma.h"

namespace simt {

// `matrices`: 1, 2 or 4.
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed);
void stmatrix(const uint32_t* registers, void* row, int matrices, bool transposed);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, Element element);

inline float to_float(uint16_t bits, Element element) {
  return element == Element::kBfloat16 ? float_from_bfloat16(bits) : float_from_half(bits);
}

inline void unpack_pair(uint32_t pair, Element element, float& low, float& high) {
  low = to_float(static_cast<uint16_t>(pair), element);
  high = to_float(static_cast<uint16_t>(pair >> 16), element);
}

// Eight neighbouring elements.
inline void to_floats(const uint16_t* bits, Element element, float* out) {
  if (element == Element::kBfloat16) {
    for (int i = 0; i < 8; ++i) out[i] = float_from_bfloat16(bits[i]);
  } else {
    for (int i = 0; i < 8; ++i) out[i] = float_from_half(bits[i]);
  }
}

// out[c] += sum over k of a[k * a_pitch] * b[k * n + c], k = 0..15; n is a multiple of 8. Products of 16-bit factors
// are exact in fp32; the order in which tensor cores add them is not documented.
inline void multiply_row(const float* a, int a_pitch, const float* b, int n, float* out) {
  using Floats = float __attribute__((vector_size(16), aligned(4), may_alias));
  for (int c = 0; c < n; c += 8) {
    Floats low = *reinterpret_cast<Floats*>(out + c), high = *reinterpret_cast<Floats*>(out + c + 4);
    for (int k = 0; k < 16; ++k) {
      const float factor = a[k * a_pitch];
      low += factor * *reinterpret_cast<const Floats*>(b + k * n + c);
      high += factor * *reinterpret_cast<const Floats*>(b + k * n + c + 4);
    }
    *reinterpret_cast<Floats*>(out + c) = low;
    *reinterpret_cast<Floats*>(out + c + 4) = high;
  }
}

}  // namespace simt
