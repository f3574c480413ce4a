#include "device/ptx.cuh"
namespace pydit::cuda {
// The accumulators are read before the wait: ptxas serialises the products.
__global__ void __launch_bounds__(128) touched_early(float* out, uint64_t a, uint64_t b) {
  float d[32] = {};
  wgmma_fence();
  wgmma<__nv_bfloat16, 64>(d, a, b, true);
  wgmma_commit_group();
  for (int i = 0; i < 32; ++i) d[i] += 1.f;
  wgmma<__nv_bfloat16, 64>(d, a, b, true);
  wgmma_commit_group();
  wgmma_wait_group<0>();
  for (int i = 0; i < 32; ++i) out[threadIdx.x * 32 + i] = d[i];
}
template <typename T, int kValues>
__global__ void __launch_bounds__(1024, 2) too_many_values(const T* in, T* out) {
  __shared__ float once[8];
  float v[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) v[i] = in[i * 1024 + threadIdx.x];
  if (threadIdx.x < 8) once[threadIdx.x] = v[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) out[i * 1024 + threadIdx.x] = v[i] * v[kValues - 1 - i] + once[i % 8];
}
template __global__ void too_many_values<float, 64>(const float*, float*);
}
