// Status and error text of the C API. Launchers return a status; the first failed check wins, and its sentence is kept
// per host thread for pydit_<backend>_last_error().
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "device/platform.cuh"

#ifdef PYDIT_SIM
#include "sim/control.h"
#include "sim/race.h"
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
  (void)cudaGetLastError();  // clears the error, which the runtime would report again at the next launch
#ifdef PYDIT_SIM
  const char* reason = pydit_sim_last_report();  // kernel, block, thread and what happened
#else
  const char* reason = cudaGetErrorString(error);
#endif
  snprintf(error_buffer(), kErrorBytes, "%s: launch failed: %s", op, reason);
  return kLaunchFailed;
}

// Names a tensor that the next launch reads (or writes): in a race build of the simulator, accesses outside the named
// tensors are errors. `extents` and `strides`, in elements, are those of all but the contiguous last dimension.
template <int kDimensions>
inline void name_tensor(const char* name, const void* data, bool writable, size_t element_bytes, int64_t last,
                        const int64_t (&extents)[kDimensions], const int64_t (&strides)[kDimensions]) {
#ifdef PYDIT_SIM
  for (int i = 0; i < kDimensions; ++i) last += (extents[i] - 1) * strides[i];
  simt::race::allow(data, static_cast<size_t>(last) * element_bytes, writable, name);
#else
  (void)name, (void)data, (void)writable, (void)element_bytes, (void)last, (void)extents, (void)strides;
#endif
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace pydit::PYDIT_BACKEND
