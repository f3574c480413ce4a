// The one header through which a kernel sees CUDA. nvcc gives it the toolkit; g++ with -DPYDIT_SIM gives it the
// simulator, which supplies the same names on the CPU. Kernels launch and take dynamic shared memory through macros
// because those are the only CUDA syntax that is not C++.
#pragma once

#ifdef PYDIT_SIM

#include "sim/cuda.h"
#define PYDIT_BACKEND sim

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define PYDIT_BACKEND cuda

#define PYDIT_LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  (kernel<<<(grid), (block), (smem_bytes), (stream)>>>(__VA_ARGS__), cudaGetLastError())
// The same with `cluster` neighbouring blocks along x, a divisor of the grid's, as a cluster (sm_90).
#define PYDIT_LAUNCH_CLUSTER(kernel, cluster, grid, block, smem_bytes, stream, ...) \
  (::pydit::cuda::launch_cluster((kernel), (cluster), (grid), (block), (smem_bytes), (stream), __VA_ARGS__))
#define PYDIT_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(1024) unsigned char name##_raw[]; \
  type* name = reinterpret_cast<type*>(name##_raw)

namespace pydit::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch_cluster(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block, size_t smem_bytes,
                           cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = smem_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  const cudaError_t last = cudaGetLastError();
  return error == cudaSuccess ? last : error;
}

}  // namespace pydit::cuda

#endif

#define PYDIT_CONCAT_(a, b, c) a##b##c
#define PYDIT_CONCAT(a, b, c) PYDIT_CONCAT_(a, b, c)
// pydit_cuda_<name> or pydit_sim_<name>: the C symbol of an entry point in this build.
#define PYDIT_ENTRY(name) PYDIT_CONCAT(pydit_, PYDIT_BACKEND, _##name)
