// The current device, and which kernel runs there: Hopper's or the portable one.
#pragma once

#include "device/platform.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

// Whether the current device runs machine code for sm_90a.
inline bool on_hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

int reserved_multiprocessors();  // as set by pydit_<backend>_reserve_multiprocessors

// Multiprocessors of the current device that a persistent kernel may fill: all but the reserved ones, at least one.
inline cudaError_t count_multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int left = *count - reserved_multiprocessors();
  *count = left < 1 ? 1 : left;
  return cudaSuccess;
}

// Whether a kernel's parameters may exceed 4 KB, up to 32,764 bytes: needs toolkit and driver from CUDA 12.1 on.
#if defined(PYDIT_SIM) || CUDART_VERSION >= 12010
constexpr bool kLargeParameters = true;
#else
constexpr bool kLargeParameters = false;
#endif
inline bool large_parameters() {
#ifdef PYDIT_SIM
  return true;
#else
  int version = 0;
  return kLargeParameters && cudaDriverGetVersion(&version) == cudaSuccess && version >= 12010;
#endif
}

// PYDIT_PATH_* of an op with a Hopper kernel, for tensors that TMA can or cannot address.
inline int hopper_path(bool tma_addressable) {
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  return on_hopper() ? tma_addressable ? PYDIT_PATH_HOPPER : PYDIT_PATH_UNALIGNED : PYDIT_PATH_NOT_HOPPER;
#else
  (void)tma_addressable;
  return PYDIT_PATH_NOT_BUILT;
#endif
}

}  // namespace pydit::PYDIT_BACKEND
