// From PYDIT_LAUNCH to blocks on OS threads.
#pragma once

#include <cstddef>
#include <tuple>

#include "sim/runtime.h"
#include "sim/scheduler.h"
#include "sim/streams.h"
#include "sim/types.h"

namespace simt {

// Runs all blocks of the grid and returns when they are done. The outcome is in cudaGetLastError().
void run_grid(Kernel& kernel, const void* function);

// `cluster` blocks along x are a cluster. `arguments` are converted to the kernel's parameter types once; every thread
// gets its own copy.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*function)(Parameters...), unsigned cluster, dim3 grid, dim3 block,
            size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "the kernel has another number of parameters");
  const std::tuple<Parameters...> converted(arguments...);
  on_stream(stream, [=] {
    struct Call {
      void (*function)(Parameters...);
      const std::tuple<Parameters...>& arguments;
    };
    const Call call{function, converted};
    const auto invoke = [](const void* pointer) {
      const Call& call = *static_cast<const Call*>(pointer);
      std::apply(call.function, call.arguments);
    };
    Kernel kernel{name, invoke, &call, grid, block, shared_bytes, 0, nullptr, cluster};
    run_grid(kernel, reinterpret_cast<const void*>(function));
  });
}

}  // namespace simt
