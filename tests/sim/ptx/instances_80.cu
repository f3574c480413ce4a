// What sm_80 must compile of the simulator's test kernels.
#include "gemm_mma.cuh"
#include "pieces.cuh"

namespace pydit::cuda {
template __global__ void gemm_mma<__nv_bfloat16, MmaBug::kNone>(const __nv_bfloat16*, const __nv_bfloat16*, float*, int,
                                                                int, int);
template __global__ void gemm_mma<__half, MmaBug::kNone>(const __half*, const __half*, float*, int, int, int);
template __global__ void load_matrices<1, false>(const unsigned short*, uint32_t*);
template __global__ void load_matrices<1, true>(const unsigned short*, uint32_t*);
template __global__ void load_matrices<2, false>(const unsigned short*, uint32_t*);
template __global__ void load_matrices<2, true>(const unsigned short*, uint32_t*);
template __global__ void load_matrices<4, false>(const unsigned short*, uint32_t*);
template __global__ void load_matrices<4, true>(const unsigned short*, uint32_t*);
template __global__ void copy_pieces<4>(const char*, char*, int);
template __global__ void copy_pieces<8>(const char*, char*, int);
template __global__ void copy_pieces<16>(const char*, char*, int);
template __global__ void hand_over<false>(int*, int);
}  // namespace pydit::cuda
