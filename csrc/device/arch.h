// What the current device is.
#pragma once

#include "device/platform.cuh"

namespace pydit::PYDIT_BACKEND {

// Whether the current device runs machine code for sm_90a.
inline bool on_hopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

}  // namespace pydit::PYDIT_BACKEND
