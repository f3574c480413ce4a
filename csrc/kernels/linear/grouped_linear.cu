// Linear layers of both streams in one launch, with what a DiT block does to their output; see pydit.h. The portable
// kernel (sm_80 and up), and the entry point.
//
// A block computes a tile of 128 x 128 outputs with 4 warps of 32 x 128 each, so that a warp holds whole heads; steps
// of 32 along K come by cp.async, three stages ahead. A step reads 16 KB from L2 for 2 x 128 x 128 x 32 FLOP: 64 FLOP
// per byte. 128 threads hold 128 sums each, so that two blocks share a multiprocessor and one multiplies during the
// other's epilogue.
//
// Sums are stored from the registers where the tensor cores leave them, 4 bytes per lane and 16 neighbouring bytes per
// quad; the residual is read the same way.
#include "device/arch.h"
#include "device/dispatch.h"
#include "device/ptx.cuh"
#include "kernels/linear/grouped_linear.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kThreads = 128, kM = 128, kN = 128, kStep = 32, kStages = 4;
constexpr int kRowBytes = kStep * 2, kOperandBytes = kM * kRowBytes, kStageBytes = 2 * kOperandBytes;
constexpr int kSharedBytes = kStages * kStageBytes;
static_assert(kM == kN, "operands of a stage are alike");

// The operands of a layer.
struct Operands {
  const void *x, *weight, *residual;
  void* out;
  int64_t x_b, x_s, weight_n, residual_b, residual_s, out_b, out_s;  // strides
};

struct AllOperands {
  Operands layer[PYDIT_MAX_LINEARS];
};

// Device code ----------------------------------------------------------------------------------------------------

// sums += x w^T over kStep of K, for a warp's 32 x 128.
template <typename T>
__device__ __forceinline__ void multiply_step(float (&sums)[2][kN / 2], const char* x, const char* w, int row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kStep / 8; k += 2) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) ldmatrix(a[m], x + swizzled_offset<kRowBytes>(row + m * 16 + lane % 16, k + lane / 16));
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
      uint32_t b[4];
      ldmatrix(b, w + swizzled_offset<kRowBytes>(n * 16 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 4; ++i)
        mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(sums[i / 2][8 * n + i % 2 * 4]), a[i / 2],
                        reinterpret_cast<const uint32_t (&)[2]>(b[i % 2 * 2]));
    }
  }
}

// Adds the residual to two rows of sums and stores them, rounded once.
template <typename T, bool kAligned>
__device__ __forceinline__ void store_rows(const float (&sums)[kN / 2], const Operands& o, const Layer& l,
                                           int64_t batch, int row, int column) {
  column += threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t at = row + 8 * half;
    if (at >= l.tokens) return;
    const T* residual = static_cast<const T*>(o.residual) + batch * o.residual_b + at * o.residual_s + column;
    T* out = static_cast<T*>(o.out) + batch * o.out_b + at * o.out_s + column;
#pragma unroll
    for (int group = 0; group < kN / 8; ++group) {
      const int left = l.columns - column - 8 * group;
      float2 value = make_float2(sums[4 * group + 2 * half], sums[4 * group + 2 * half + 1]);
      if (l.residual) {
        const float2 before = unpack<T>(load_pair<T, kAligned>(residual + 8 * group, left));
        value.x += before.x, value.y += before.y;
      }
      T* to = out + 8 * group;
      if (kAligned && left > 0) *reinterpret_cast<uint32_t*>(to) = pack<T>(value.x, value.y);
      if (!kAligned && left > 0) to[0] = from_float<T>(value.x);
      if (!kAligned && left > 1) to[1] = from_float<T>(value.y);
    }
  }
}

// Kernel ---------------------------------------------------------------------------------------------------------

template <typename T, bool kAligned, bool kHeads>
__global__ void __launch_bounds__(kThreads, 2)
    grouped_linear_kernel(const __grid_constant__ Layers all, const __grid_constant__ AllOperands operands) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  const TileOfLayer tile = decode_tile<kM, kN>(all, static_cast<int>(blockIdx.x));
  const Layer& l = all.layer[tile.layer];
  const Operands& o = operands.layer[tile.layer];
  const T* x = static_cast<const T*>(o.x) + tile.batch * o.x_b + tile.row * o.x_s;
  const T* weight = static_cast<const T*>(o.weight) + tile.column * o.weight_n;
  const int steps = (l.depth + kStep - 1) / kStep;
  const auto copy = [&](int step) {
    char* stage = shared + step % kStages * kStageBytes;
    copy_tile<kM, kStep, kThreads, kAligned>(stage, x, o.x_s, l.tokens - tile.row, l.depth, 0, step * kStep);
    copy_tile<kN, kStep, kThreads, kAligned>(stage + kOperandBytes, weight, o.weight_n, l.columns - tile.column,
                                             l.depth, 0, step * kStep);
  };
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < steps) copy(step);
    cp_async_commit_group();
  }
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float sums[2][kN / 2];
#pragma unroll
  for (int i = 0; i < kN; ++i) sums[i / (kN / 2)][i % (kN / 2)] = 0;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait_group<kStages - 2>();
    __syncthreads();  // the step has arrived, and nobody still reads the stage that is filled next
    if (step + kStages - 1 < steps) copy(step + kStages - 1);
    cp_async_commit_group();
    const char* stage = shared + step % kStages * kStageBytes;
    multiply_step<T>(sums, stage, stage + kOperandBytes, warp * 32);
  }
  uint32_t bias[kN / 8];
  load_pairs<T, kAligned>(bias, l.bias, tile.column, l.columns);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const int row = tile.row + warp * 32 + m * 16 + lane / 4;
    apply_epilogue<T, kAligned, kHeads>(sums[m], bias, all, l, row);
    if (!kHeads && l.gate != nullptr) {
      uint32_t gate[2][kN / 8];
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_pairs<T, kAligned>(gate[half], gate_of_row<T>(l, tile.batch, row + 8 * half), tile.column, l.columns);
      apply_gate<T, kN / 8>(sums[m], gate[0], gate[1]);
    }
    store_rows<T, kAligned>(sums[m], o, l, tile.batch, row, tile.column);
  }
}

// Launcher -------------------------------------------------------------------------------------------------------

template <typename T, bool kAligned, bool kHeads>
int launch(const pydit_grouped_linear_params& p) {
  const Layers all = layers_of(p);
  AllOperands operands = {};
  for (int i = 0; i < p.count; ++i) {
    const pydit_linear& l = p.linear[i];
    operands.layer[i] = {l.x.data,      l.weight,        l.residual.data,     l.out.data,          l.x.stride_b,
                         l.x.stride_s,  l.weight_stride, l.residual.stride_b, l.residual.stride_s, l.out.stride_b,
                         l.out.stride_s};
  }
  const cudaError_t error = cudaFuncSetAttribute(grouped_linear_kernel<T, kAligned, kHeads>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return launch_status(kGroupedLinear, error);
  name_grouped_linear_tensors<T>(p);
  const auto blocks = static_cast<unsigned>(count_tiles<kM, kN>(all));
  return launch_status(kGroupedLinear,
                       PYDIT_LAUNCH((grouped_linear_kernel<T, kAligned, kHeads>), dim3(blocks), dim3(kThreads),
                                    kSharedBytes, static_cast<cudaStream_t>(p.stream), all, operands));
}

// Whether 16-byte accesses are legal.
bool aligned(const pydit_grouped_linear_params& p) {
  for (int i = 0; i < p.count; ++i) {
    const pydit_linear& l = p.linear[i];
    const auto tokens = [&](const pydit_tokens& t) {
      return aligned16(t.data) && (p.batch <= 1 || t.stride_b % 8 == 0) && (l.tokens <= 1 || t.stride_s % 8 == 0);
    };
    if (l.tokens == 0) continue;
    if (!tokens(l.x) || !tokens(l.out) || !tokens(l.residual) || !aligned16(l.weight) || !aligned16(l.bias) ||
        !aligned16(l.gate.data) || !aligned16(l.norm_weight) || (p.batch > 1 && l.gate.stride_b % 8 != 0) ||
        (l.split < l.tokens && l.gate.stride_r % 8 != 0) || (l.out_features > 1 && l.weight_stride % 8 != 0) ||
        l.out_features % 8 != 0)
      return false;
  }
  return true;
}

// Whether TMA can address all tensors. A stride of 0, that of an expanded tensor, is not documented to work.
bool tma_addressable(const pydit_grouped_linear_params& p) {
  for (int i = 0; i < p.count; ++i) {
    const pydit_linear& l = p.linear[i];
    const auto expanded = [&](const pydit_tokens& t) {
      return t.data != nullptr && ((p.batch > 1 && t.stride_b == 0) || (l.tokens > 1 && t.stride_s == 0));
    };
    if (l.tokens == 0) continue;
    if (expanded(l.x) || expanded(l.residual) || expanded(l.out) || (l.out_features > 1 && l.weight_stride == 0))
      return false;
  }
  return aligned(p);
}

template <typename T>
int launch_alignment(const pydit_grouped_linear_params& p) {
  if (layers_of(p).heads) return aligned(p) ? launch<T, true, true>(p) : launch<T, false, true>(p);
  return aligned(p) ? launch<T, true, false>(p) : launch<T, false, false>(p);
}

int check(const pydit_grouped_linear_params& p) {
  if (p.dtype != PYDIT_FLOAT16 && p.dtype != PYDIT_BFLOAT16)
    return bad_argument("%s: dtype: expected float16 (1) or bfloat16 (2), got %d", kGroupedLinear, p.dtype);
  if (p.count < 0 || p.count > PYDIT_MAX_LINEARS)
    return bad_argument("%s: count: expected 0 to %d, got %d", kGroupedLinear, PYDIT_MAX_LINEARS, p.count);
  if (p.batch < 0 || p.batch > INT32_MAX)
    return bad_argument("%s: batch: expected 0 to 2^31 - 1, got %lld", kGroupedLinear, static_cast<long long>(p.batch));
  if (p.activation != PYDIT_NO_ACTIVATION && p.activation != PYDIT_GELU_TANH)
    return bad_argument("%s: activation: expected none (0) or GELU (1), got %d", kGroupedLinear, p.activation);
  if (p.cluster < 0 || p.cluster > 2)
    return bad_argument("%s: cluster: expected 0, 1 or 2, got %d", kGroupedLinear, p.cluster);
  if (p.parts < 0 || p.parts > PYDIT_MAX_PARTS)
    return bad_argument("%s: parts: expected 0 to %d, got %d", kGroupedLinear, PYDIT_MAX_PARTS, p.parts);
  if (p.parts != 1 && !aligned16(p.workspace))
    return bad_argument("%s: workspace: expected a multiple of 16, got %p", kGroupedLinear, p.workspace);
  bool heads = false, plain = p.activation == PYDIT_NO_ACTIVATION;
  for (int i = 0; i < p.count; ++i) {
    const pydit_linear& l = p.linear[i];
    if (l.tokens < 0 || l.tokens > INT32_MAX - 255)  // a tile that begins at the last token counts 255 beyond it
      return bad_argument("%s: tokens of layer %d: expected 0 to 2^31 - 256, got %lld", kGroupedLinear, i,
                          static_cast<long long>(l.tokens));
    for (const int64_t features : {l.in_features, l.out_features}) {
      if (features < 1 || features > 1 << 24)
        return bad_argument("%s: features of layer %d: expected 1 to 2^24, got %lld", kGroupedLinear, i,
                            static_cast<long long>(features));
    }
    if ((l.cos == nullptr) != (l.sin == nullptr))
      return bad_argument("%s: cos, sin of layer %d: expected both or neither, got one", kGroupedLinear, i);
    heads = heads || l.head_dim != 0;
    plain = plain && l.residual.data == nullptr && l.gate.data == nullptr;
    if (l.head_dim != 0 &&
        ((l.head_dim != 32 && l.head_dim != 64 && l.head_dim != 128) || l.out_features % l.head_dim != 0))
      return bad_argument("%s: head_dim of layer %d: expected 0, 32, 64 or 128, a divisor of %lld, got %d",
                          kGroupedLinear, i, static_cast<long long>(l.out_features), l.head_dim);
  }
  if (heads && !plain)
    return bad_argument("%s: expected no residual, gate or activation beside a layer with head_dim", kGroupedLinear);
  return kOk;
}

}  // namespace
}  // namespace pydit::PYDIT_BACKEND

using namespace pydit::PYDIT_BACKEND;

extern "C" int PYDIT_ENTRY(grouped_linear_path)(const pydit_grouped_linear_params* p) {
  const int path = hopper_path(tma_addressable(*p));
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  if (path == PYDIT_PATH_HOPPER && cluster_of_grouped_linear_sm90(*p) == 2) return PYDIT_PATH_HOPPER_PAIRS;
#endif
  return path;
}

extern "C" int64_t PYDIT_ENTRY(grouped_linear_workspace)(const pydit_grouped_linear_params* p) {
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  if (check(*p) == kOk && hopper_path(tma_addressable(*p)) == PYDIT_PATH_HOPPER)
    return workspace_of_grouped_linear_sm90(*p);
#endif
  return 0;
}

extern "C" int PYDIT_ENTRY(grouped_linear)(const pydit_grouped_linear_params* p) {
  if (const int status = check(*p)) return status;
  const int64_t tiles = count_tiles<kM, kN>(layers_of(*p));
  if (tiles == 0) return kOk;
  if (tiles > INT32_MAX) return bad_argument("%s: expected at most 2^31 - 1 tiles, got more", kGroupedLinear);
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  if (hopper_path(tma_addressable(*p)) == PYDIT_PATH_HOPPER) return launch_grouped_linear_sm90(*p);
#endif
  return p->dtype == PYDIT_FLOAT16 ? launch_alignment<__half>(*p) : launch_alignment<__nv_bfloat16>(*p);
}
