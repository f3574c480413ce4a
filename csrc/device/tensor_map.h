// Tensor maps: what TMA (the Tensor Memory Accelerator, Hopper's copy engine) must know of a tensor to copy boxes of it
// (ptx_tma.cuh). Made on the host, passed to the kernel by value as `const __grid_constant__ TensorMap`.
#pragma once

#include <cstdint>
#include <cstdio>
#include <type_traits>

#include "device/platform.cuh"

#ifdef PYDIT_SIM
#include "sim/tma.h"
#elif __has_include(<cuda.h>)
#include <cuda.h>
#else
#error "tensor_map.h needs cuda.h, which comes with the toolkit that nvcc is part of"
#endif

namespace pydit::PYDIT_BACKEND {

#ifdef PYDIT_SIM
using TensorMap = simt::TensorMap;
#else
using TensorMap = CUtensorMap;

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// cuTensorMapEncodeTiled, looked up at run time because the module must load without a driver. Null if the driver lacks
// it.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* pointer = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &pointer, cudaEnableDefault, &result);
#endif
    return result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(pointer) : nullptr;
  }();
  return function;
}

// A driver call needs a current context. A host thread that has launched nothing yet, such as a fresh one of autograd
// or of a server, has none; this makes the current device's primary context current.
inline bool make_context_current() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess;
}
#endif

constexpr int kMaxTensorMapRank = 4;

// The span of bytes within which a box's 16-byte chunks are permuted in shared memory; a row of the box is as wide.
enum class Swizzle : int { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

// Describes the tensor of `rank` (2 to 4) dimensions at `base`, dimension 0 innermost and contiguous: `size` elements
// each, `stride` bytes from one index to the next for dimensions 1 and up (stride[0] belongs to dimension 1; that of a
// dimension of one element may be anything), copied in boxes of `box` elements. T: float, __half or __nv_bfloat16.
// Returns null, or why TMA cannot address it: text that lives until the next call on this thread.
template <typename T>
const char* encode_tensor_map(TensorMap* map, const T* base, int rank, const uint64_t* size, const uint64_t* stride,
                              const uint32_t* box, Swizzle swizzle) {
  constexpr bool kFloat = std::is_same<T, float>::value, kHalf = std::is_same<T, __half>::value;
  static_assert(kFloat || kHalf || std::is_same<T, __nv_bfloat16>::value, "T: float, __half or __nv_bfloat16");
  static thread_local char reason[160];
  const auto refuse = [&](const char* what, const char* expected, unsigned long long got) {
    snprintf(reason, sizeof reason, "tensor map: %s: expected %s, got %llu", what, expected, got);
    return static_cast<const char*>(reason);
  };
  const auto span = static_cast<uint64_t>(swizzle);
  const uint64_t row = box[0] * sizeof(T), address = reinterpret_cast<uintptr_t>(base);
  if (rank < 2 || rank > kMaxTensorMapRank) return refuse("rank", "2 to 4", static_cast<unsigned long long>(rank));
  if (address % 16 != 0) return refuse("base", "a multiple of 16 bytes", address);
  // Each stride must span the dimensions before it (CUDA's documentation), even one that is never used.
  constexpr uint64_t kMost = (1ull << 40) - 16;
  uint64_t step[kMaxTensorMapRank] = {sizeof(T)};
  for (int d = 0; d < rank; ++d) {
    if (size[d] < 1 || size[d] > 1ull << 32) return refuse("size", "1 to 2^32", size[d]);
    if (box[d] < 1 || box[d] > 256) return refuse("box", "1 to 256", box[d]);
    if (d == 0) continue;
    if (size[d] > 1) {
      step[d] = stride[d - 1];
    } else {
      const uint64_t whole = step[d - 1] < kMost / size[d - 1] ? (step[d - 1] * size[d - 1] + 15) / 16 * 16 : kMost;
      step[d] = whole < kMost ? whole : kMost;
    }
    // An expanded dimension has a stride of 0; the documentation only says that strides increase.
    if (step[d] == 0 || step[d] % 16 != 0 || step[d] > kMost)
      return refuse("stride", "a multiple of 16 bytes, more than 0 and below 2^40", step[d]);
  }
  if (row % 16 != 0) return refuse("row of the box", "a multiple of 16 bytes", row);
  if (span != 0 && row != span) return refuse("row of the box", "the swizzle span", row);
#ifdef PYDIT_SIM
  *map = TensorMap();
  map->base = const_cast<T*>(base);
  map->rank = static_cast<uint32_t>(rank);
  for (int d = 0; d < rank; ++d) {
    map->size[d] = size[d];
    map->box[d] = box[d];
    map->stride[d] = step[d];
  }
  map->swizzle = static_cast<uint32_t>(span);
  map->element = kFloat ? simt::Element::kFloat32 : kHalf ? simt::Element::kHalf : simt::Element::kBfloat16;
#else
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return "tensor map: the driver has no cuTensorMapEncodeTiled; it needs CUDA 12.0 or newer";
  const cuuint32_t element_strides[kMaxTensorMapRank] = {1, 1, 1, 1};
  cuuint64_t sizes[kMaxTensorMapRank], strides[kMaxTensorMapRank] = {};
  for (int d = 0; d < rank; ++d) sizes[d] = size[d];
  for (int d = 0; d + 1 < rank; ++d) strides[d] = step[d + 1];
  const auto type = kFloat  ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : kHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                            : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto mode = swizzle == Swizzle::k128  ? CU_TENSOR_MAP_SWIZZLE_128B
                    : swizzle == Swizzle::k64 ? CU_TENSOR_MAP_SWIZZLE_64B
                    : swizzle == Swizzle::k32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                              : CU_TENSOR_MAP_SWIZZLE_NONE;
  const auto call = [&] {
    return encode(map, type, static_cast<cuuint32_t>(rank), const_cast<T*>(base), sizes, strides, box, element_strides,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = call();
  if (result == CUDA_ERROR_INVALID_CONTEXT && make_context_current()) result = call();
  if (result != CUDA_SUCCESS) return refuse("cuTensorMapEncodeTiled", "result 0", result);
#endif
  return nullptr;
}

}  // namespace pydit::PYDIT_BACKEND
