// Status and error text of the C API. Launchers return Status; the first failed check wins and its sentence is kept
// per host thread for pydit_<backend>_last_error().
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "device/platform.cuh"

#ifdef PYDIT_SIM
#include "sim/control.h"
#endif

namespace pydit::PYDIT_BACKEND {

constexpr int kOk = 0;
constexpr int kBadArgument = 1;
constexpr int kLaunchFailed = 2;

char* error_buffer();  // kErrorBytes, thread-local
constexpr int kErrorBytes = 2048;

[[gnu::format(printf, 1, 2)]] inline int bad_argument(const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(error_buffer(), kErrorBytes, format, args);
  va_end(args);
  return kBadArgument;
}

inline int launch_status(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return kOk;
#ifdef PYDIT_SIM
  const char* reason = pydit_sim_last_report();  // kernel, block, thread and what happened
#else
  const char* reason = cudaGetErrorString(error);
#endif
  snprintf(error_buffer(), kErrorBytes, "%s: launch failed: %s", op, reason);
  return kLaunchFailed;
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace pydit::PYDIT_BACKEND
