// What sm_90a must compile of the simulator's test kernels.
#include "clusters.cuh"
#include "gemm_wgmma.cuh"
#include "instances_80.cu"
#include "pieces_90.cuh"

namespace pydit::cuda {
#define WGMMA(T, N, SWIZZLE, A, TRANSPOSE_B)                                                     \
  template __global__ void gemm_wgmma<T, N, SWIZZLE, OperandA::A, TRANSPOSE_B, WgmmaBug::kNone>( \
      const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, float*, int, int, int);
#define EVERY_SOURCE(N)                          \
  WGMMA(__nv_bfloat16, N, 128, kShared, false)   \
  WGMMA(__half, N, 32, kSharedTransposed, false) \
  WGMMA(__nv_bfloat16, N, 64, kRegisters, false) \
  WGMMA(__half, N, 0, kRegisters, true)
EVERY_SOURCE(8)
EVERY_SOURCE(24)
EVERY_SOURCE(64)
EVERY_SOURCE(80)
EVERY_SOURCE(128)
WGMMA(__nv_bfloat16, 256, 128, kShared, true)

#define STORE(MATRICES, TRANSPOSE) \
  template __global__ void store_matrices<MATRICES, TRANSPOSE>(const uint32_t*, unsigned short*);
STORE(1, false)
STORE(1, true)
STORE(2, false)
STORE(2, true)
STORE(4, false)
STORE(4, true)

#define MOVE(RANK, ADD)                                                                                              \
  template __global__ void move_box<RANK, ADD>(const __grid_constant__ TensorMap, const __grid_constant__ TensorMap, \
                                               char*, int, BoxAt, BoxAt);
MOVE(2, false)
MOVE(2, true)
MOVE(3, false)
MOVE(3, true)
MOVE(4, false)
MOVE(4, true)
template __global__ void shared_ring<RingBug::kNone>(const __grid_constant__ TensorMap, float*, int);
template __global__ void exchange<ExchangeBug::kNone>(int*);
template __global__ void store_rows<false>(const __grid_constant__ TensorMap, const float*, float*);
template const char* encode_tensor_map<float>(TensorMap*, const float*, int, const uint64_t*, const uint64_t*,
                                              const uint32_t*, Swizzle);
}  // namespace pydit::cuda
