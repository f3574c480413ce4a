// What the current device is, and which kernel of an op with two runs there.
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

int reserved_multiprocessors();  // what pydit_<backend>_reserve_multiprocessors was told

// How many multiprocessors of the current device a kernel may fill whose blocks stay until all is done.
inline cudaError_t count_multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int left = *count - reserved_multiprocessors();
  *count = left < 1 ? 1 : left;
  return cudaSuccess;
}

// Whether kernels may have parameters of more than 4 KB, up to 32,764 bytes: since CUDA 12.1, of the toolkit and of the
// driver.
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

// PYDIT_PATH_* for tensors that suit the copy engine, or do not.
inline int hopper_path(bool aligned) {
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  return on_hopper() ? aligned ? PYDIT_PATH_HOPPER : PYDIT_PATH_UNALIGNED : PYDIT_PATH_NOT_HOPPER;
#else
  (void)aligned;
  return PYDIT_PATH_NOT_BUILT;
#endif
}

}  // namespace pydit::PYDIT_BACKEND
