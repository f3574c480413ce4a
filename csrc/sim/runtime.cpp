#include "sim/runtime.h"

#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>
#include <utility>

#include "sim/async.h"
#include "sim/control.h"
#include "sim/scheduler.h"

namespace {

constexpr int kMultiprocessors = 4;  // few, so that persistent kernels go round more than once
constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr int kDevices = 2;

thread_local int current_device = 0;

int arch_of(int device) { return device == 0 ? simt::arch() : 80; }

// Per block with the attribute: what an A100 and an H100 give.
size_t max_shared_bytes(int device) { return arch_of(device) < 90 ? 163 * 1024 : simt::kMaxSharedBytes; }

thread_local cudaError_t last_error = cudaSuccess;
thread_local char report[simt::kReportBytes] = "";

// Dynamic shared memory granted beyond the default, per kernel and device: a grant on one is none on the other.
struct Grants {
  std::mutex mutex;
  std::map<std::pair<const void*, int>, int> bytes;
};

Grants& grants() {
  static Grants& instance = *new Grants;  // never destroyed: a kernel may run while the process ends
  return instance;
}

}  // namespace

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return report[0] != '\0' ? report : "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return report[0] != '\0' ? report : "unspecified launch failure";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = simt::kMaxThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kDefaultSharedBytes;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = simt::kLanes;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = arch_of(device) / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = arch_of(device) % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(max_shared_bytes(device));
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

namespace simt {

cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      static_cast<size_t>(value) > max_shared_bytes(current_device)) {
    last_error = cudaErrorInvalidValue;
    return cudaErrorInvalidValue;
  }
  const std::lock_guard<std::mutex> lock(grants().mutex);
  grants().bytes[{function, current_device}] = value;
  return cudaSuccess;
}

size_t shared_limit(const void* function) {
  const std::lock_guard<std::mutex> lock(grants().mutex);
  const auto found = grants().bytes.find({function, current_device});
  const size_t granted = found == grants().bytes.end() ? 0 : static_cast<size_t>(found->second);
  return granted > kDefaultSharedBytes ? granted : kDefaultSharedBytes;
}

void set_error(cudaError_t error, const char* format, ...) {
  last_error = error;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(report, sizeof report, format, arguments);
  va_end(arguments);
}

const char* last_report() { return report; }

}  // namespace simt

extern "C" int pydit_sim_set_device(int device) {
  if (device < 0 || device >= kDevices) return 1;
  current_device = device;
  return 0;
}
