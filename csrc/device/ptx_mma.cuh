// Tensor cores as warps use them: 8 x 8 matrices of 16-bit elements in and out of shared memory, and mma.m16n8k16. Who
// holds what is in sim/matrix.h, in words and code.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device/platform.cuh"
#include "device/ptx_async.cuh"

#ifdef PYDIT_SIM
#include "sim/matrix.h"
#endif

namespace pydit::PYDIT_BACKEND {

// Loads kMatrices (1, 2 or 4) matrices, each transposed on the way if kTranspose. Lane 8 i + r passes the address of
// row r of matrix i, a multiple of 16 bytes; all 32 lanes call.
template <bool kTranspose = false, int kMatrices>
__device__ __forceinline__ void ldmatrix(uint32_t (&registers)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef PYDIT_SIM
  simt::ldmatrix(registers, row, kMatrices, kTranspose);
#else
  const uint32_t address = shared_address(row);
  uint32_t* r = registers;
  if constexpr (kMatrices == 1 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (kMatrices == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (kMatrices == 2 && !kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (kMatrices == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (!kTranspose)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
#endif
}

// The reverse of ldmatrix (sm_90).
template <bool kTranspose = false, int kMatrices>
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&registers)[kMatrices]) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "stmatrix stores 1, 2 or 4 matrices");
#ifdef PYDIT_SIM
  simt::stmatrix(registers, row, kMatrices, kTranspose);
#else
  const uint32_t address = shared_address(row);
  const uint32_t* r = registers;
  if constexpr (kMatrices == 1 && !kTranspose)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0]) : "memory");
  else if constexpr (kMatrices == 1)
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(r[0]) : "memory");
  else if constexpr (kMatrices == 2 && !kTranspose)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
                 : "memory");
  else if constexpr (kMatrices == 2)
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(r[0]), "r"(r[1])
                 : "memory");
  else if constexpr (!kTranspose)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
#endif
}

// D += A B for a 16 x 8 tile with k = 16. T: __nv_bfloat16 or __half.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr bool kBfloat16 = std::is_same<T, __nv_bfloat16>::value;
  static_assert(kBfloat16 || std::is_same<T, __half>::value, "mma_m16n8k16 takes __nv_bfloat16 or __half");
#ifdef PYDIT_SIM
  simt::mma_m16n8k16(d, a, b, kBfloat16 ? simt::Element::kBfloat16 : simt::Element::kHalf);
#else
  if constexpr (kBfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

}  // namespace pydit::PYDIT_BACKEND
