// The few calls of the CUDA runtime that launchers make. Two devices, of which a host thread has one at a time; they
// share the host's memory. Launches finish before they return, unless the host runs ahead (streams.h).
#pragma once

#include <cstddef>
#include <cstring>

#include "sim/streams.h"

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
using cudaError = cudaError_t;

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

// The last error of this host thread; the first call clears it, the second does not.
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
// For cudaErrorLaunchFailure and a refused configuration: the report of this host thread's last failed launch.
const char* cudaGetErrorString(cudaError_t error);

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace simt {

cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value);
// Dynamic shared memory that `function` may ask for, in bytes.
size_t shared_limit(const void* function);
// Sets the last error of this host thread, and its report.
[[gnu::format(printf, 2, 3)]] void set_error(cudaError_t error, const char* format, ...);
const char* last_report();

}  // namespace simt

template <typename Function>
cudaError_t cudaFuncSetAttribute(Function* function, cudaFuncAttribute attribute, int value) {
  return simt::set_function_attribute(reinterpret_cast<const void*>(function), attribute, value);
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  simt::on_stream(stream, [=] { memset(pointer, value, bytes); });
  return cudaSuccess;
}
