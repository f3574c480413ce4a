// ada_layer_norm, gated_residual, gated_residual_ada_layer_norm: what a DiT block does between its matrix products.
//
//   r   = x + gate * y                              (kGate; otherwise r = x)
//   out = (r - mean(r)) * rstd(r) * (1 + scale) + shift   (kNorm; otherwise r itself is the output)
//
// All three make one pass over rows of C channels and are bound by memory: a row is read once into registers as fp32,
// reduced there, and written once. The variance is computed from centred values, whose own sum (0 but for rounding)
// corrects the mean, so that an offset of 1e4 standard deviations costs no accuracy. A warp owns a row that fits its
// registers, so that no barrier is needed; longer rows are shared by a block. gate, scale and shift are one row per
// sample and stay in L1.
//
// An exact gated_residual rounds gate * y to T before it adds x: bit for bit what two separate operations compute.
//
// Floor per element: ada_layer_norm 2, gated_residual 3, both fused 4 accesses of sizeof(T).

#include "device/check.h"
#include "device/dispatch.h"
#include "device/reduce.cuh"
#include "device/tiling.cuh"
#include "device/vector.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int64_t kMaxChannels = 8192;
constexpr int kWarpsPerBlock = 4;  // rows per block while a warp owns a row

// Blocks per multiprocessor that the registers must allow: rows in flight are what keeps memory busy.
template <int kThreads, bool kNorm>
constexpr int kBlocks = kThreads > 32 ? 1
                        : kNorm       ? 3
                                      : 4;

struct ModulateParams {
  pydit_tokens x, y;
  pydit_modulation gate, scale, shift;
  pydit_tokens residual, out;
  int64_t batch, tokens, channels, split;
  float eps;
  bool exact;
};

template <typename T>
__device__ __forceinline__ T* token_row(const pydit_tokens& t, int64_t b, int64_t s) {
  return static_cast<T*>(t.data) + b * t.stride_b + s * t.stride_s;
}

template <typename T>
__device__ __forceinline__ const T* modulation_row(const pydit_modulation& m, int64_t b, int64_t r) {
  return static_cast<const T*>(m.data) + b * m.stride_b + r * m.stride_r;
}

// kThreads threads own a row; thread t holds the kWidth channels from (i * kThreads + t) * kWidth for i < kVectors.
template <typename T, int kWidth, int kThreads, int kVectors, bool kGate, bool kNorm>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kWarpsPerBlock : kThreads, kBlocks<kThreads, kNorm>)
    modulate_kernel(const ModulateParams p) {
  using Vec = Pack<T, kWidth>;
  using Loaded = std::conditional_t<kWidth == 1, Vec, Words<T, kWidth>>;
  constexpr int kWarps = kThreads / 32;
  __shared__ float2 scratch[2][kWarps];
  const int thread = threadIdx.x % kThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kThreads) + threadIdx.x / kThreads;
  if (row >= p.batch * p.tokens) return;  // whole warps only: a block that shares a row has no spare rows
  const int64_t b = static_cast<uint32_t>(row) / static_cast<uint32_t>(p.tokens);
  const int64_t s = row - b * p.tokens;
  const int64_t r = s < p.split ? 0 : 1;
  const int channels = static_cast<int>(p.channels);

  float value[kVectors][kWidth];
  {
    const T* x = token_row<T>(p.x, b, s);
    Loaded xs[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = (i * kThreads + thread) * kWidth;
      if (c < channels) xs[i] = Loaded::load(x + c);
    }
    if constexpr (kGate) {
      const T* y = token_row<T>(p.y, b, s);
      const T* gate = modulation_row<T>(p.gate, b, r);
      Loaded ys[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int c = (i * kThreads + thread) * kWidth;
        if (c < channels) ys[i] = Loaded::load(y + c);
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int c = (i * kThreads + thread) * kWidth;
        if (c < channels) {
          const auto g = Loaded::load(gate + c);
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            if (!kNorm && p.exact)
              value[i][j] = __fadd_rn(xs[i][j], to_float(from_float<T>(__fmul_rn(g[j], ys[i][j]))));
            else
              value[i][j] = fmaf(g[j], ys[i][j], xs[i][j]);
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int c = (i * kThreads + thread) * kWidth;
        if (c < channels) {
#pragma unroll
          for (int j = 0; j < kWidth; ++j) value[i][j] = xs[i][j];
        }
      }
    }
  }

  if constexpr (kGate) {  // the sum itself is an output
    T* residual = token_row<T>(p.residual, b, s);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int c = (i * kThreads + thread) * kWidth;
      if (c < channels) {
        Vec packed;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) packed.set(j, value[i][j]);
        packed.store(residual + c);
      }
    }
  }

  if constexpr (kNorm) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if ((i * kThreads + thread) * kWidth < channels) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum += value[i][j];
      }
    }
    const float inverse = 1.f / static_cast<float>(channels);
    const float pilot = group_sum<kThreads>(make_float2(sum, 0.f), scratch[0]).x * inverse;
    float2 moments = make_float2(0.f, 0.f);  // of the deviations from the pilot mean: sum, sum of squares
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if ((i * kThreads + thread) * kWidth < channels) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          value[i][j] -= pilot;
          moments.x += value[i][j];
          moments.y = fmaf(value[i][j], value[i][j], moments.y);
        }
      }
    }
    moments = group_sum<kThreads>(moments, scratch[1]);
    const float mean = moments.x * inverse;
    const float rstd = rsqrtf(fmaxf(fmaf(-mean, mean, moments.y * inverse), 0.f) + p.eps);

    const T* scale = modulation_row<T>(p.scale, b, r);
    const T* shift = modulation_row<T>(p.shift, b, r);
    T* out = token_row<T>(p.out, b, s);
    // The compiler cannot move loads above a store that may alias them, so each batch of loads comes before its stores.
    constexpr int kBatch = 4;
    static_assert(kVectors % kBatch == 0, "whole batches");
#pragma unroll
    for (int first = 0; first < kVectors; first += kBatch) {
      Loaded scales[kBatch], shifts[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int c = ((first + i) * kThreads + thread) * kWidth;
        if (c < channels) scales[i] = Loaded::load(scale + c), shifts[i] = Loaded::load(shift + c);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int c = ((first + i) * kThreads + thread) * kWidth;
        if (c < channels) {
          Vec packed;
#pragma unroll
          for (int j = 0; j < kWidth; ++j)
            packed.set(j, fmaf((value[first + i][j] - mean) * rstd, 1.f + scales[i][j], shifts[i][j]));
          packed.store(out + c);
        }
      }
    }
  }
}

template <typename T>
void name_tensors(const ModulateParams& p) {
  const int64_t rows[2] = {p.batch, p.tokens}, vectors[2] = {p.batch, p.split < p.tokens ? 2 : 1};
  const auto tokens = [&](const char* name, const pydit_tokens& t, bool writable) {
    name_tensor(name, t.data, writable, sizeof(T), p.channels, rows, {t.stride_b, t.stride_s});
  };
  const auto modulation = [&](const char* name, const pydit_modulation& m) {
    name_tensor(name, m.data, false, sizeof(T), p.channels, vectors, {m.stride_b, m.stride_r});
  };
  tokens("x", p.x, false), tokens("y", p.y, false), tokens("residual", p.residual, true), tokens("out", p.out, true);
  modulation("gate", p.gate), modulation("scale", p.scale), modulation("shift", p.shift);
}

template <typename T, int kWidth, int kThreads, int kVectors, bool kGate, bool kNorm>
int launch_rows(const char* op, const ModulateParams& p, cudaStream_t stream) {
  constexpr int kRows = kThreads == 32 ? kWarpsPerBlock : 1;
  const auto blocks = static_cast<unsigned>(ceil_div(p.batch * p.tokens, kRows));
  name_tensors<T>(p);
  return launch_status(op, PYDIT_LAUNCH((modulate_kernel<T, kWidth, kThreads, kVectors, kGate, kNorm>), dim3(blocks),
                                        dim3(kThreads * kRows), 0, stream, p));
}

template <typename T>
bool vectorizable(const pydit_tokens& t) {
  constexpr int kWidth = kElementsIn16Bytes<T>;
  return aligned16(t.data) && t.stride_b % kWidth == 0 && t.stride_s % kWidth == 0;
}

template <typename T>
bool vectorizable(const pydit_modulation& m) {
  constexpr int kWidth = kElementsIn16Bytes<T>;
  return aligned16(m.data) && m.stride_b % kWidth == 0 && m.stride_r % kWidth == 0;
}

// Tensors that an op does not use are NULL with zero strides and so never rule out the 16-byte path.
template <typename T, bool kGate, bool kNorm>
int launch(const char* op, const ModulateParams& p, cudaStream_t stream) {
  constexpr int kWidth = kElementsIn16Bytes<T>;
  const bool vector = p.channels % kWidth == 0 && vectorizable<T>(p.x) && vectorizable<T>(p.y) &&
                      vectorizable<T>(p.gate) && vectorizable<T>(p.scale) && vectorizable<T>(p.shift) &&
                      vectorizable<T>(p.residual) && vectorizable<T>(p.out);
  if (!vector) return launch_rows<T, 1, 512, 16, kGate, kNorm>(op, p, stream);
  const int64_t vectors = p.channels / kWidth;
  if (vectors <= 32 * 4) return launch_rows<T, kWidth, 32, 4, kGate, kNorm>(op, p, stream);
  if (vectors <= 32 * 12) return launch_rows<T, kWidth, 32, 12, kGate, kNorm>(op, p, stream);
  if (vectors <= 128 * 8) return launch_rows<T, kWidth, 128, 8, kGate, kNorm>(op, p, stream);
  return launch_rows<T, kWidth, 256, 8, kGate, kNorm>(op, p, stream);
}

template <bool kGate, bool kNorm>
int run(const char* op, const ModulateParams& p, int32_t dtype, void* stream) {
  if (p.batch < 0 || p.tokens < 0 || (p.tokens > 0 && p.batch > INT32_MAX / p.tokens))
    return bad_argument("%s: batch x tokens: expected 0 to 2^31 - 1, got %lld x %lld", op,
                        static_cast<long long>(p.batch), static_cast<long long>(p.tokens));
  if (p.channels < 1 || p.channels > kMaxChannels)
    return bad_argument("%s: channels: expected 1 to %lld, got %lld", op, static_cast<long long>(kMaxChannels),
                        static_cast<long long>(p.channels));
  if (p.batch * p.tokens == 0) return kOk;
  return dispatch_dtype(op, dtype, [&](auto tag) {
    return launch<typename decltype(tag)::type, kGate, kNorm>(op, p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace
}  // namespace pydit::PYDIT_BACKEND

using namespace pydit::PYDIT_BACKEND;

extern "C" int PYDIT_ENTRY(ada_layer_norm)(const pydit_ada_layer_norm_params* a) {
  ModulateParams p = {};
  p.x = a->x, p.scale = a->scale, p.shift = a->shift, p.out = a->out;
  p.batch = a->batch, p.tokens = a->tokens, p.channels = a->channels, p.split = a->split, p.eps = a->eps;
  return run<false, true>("ada_layer_norm", p, a->dtype, a->stream);
}

extern "C" int PYDIT_ENTRY(gated_residual)(const pydit_gated_residual_params* a) {
  ModulateParams p = {};
  p.x = a->x, p.y = a->y, p.gate = a->gate, p.residual = a->out;
  p.batch = a->batch, p.tokens = a->tokens, p.channels = a->channels, p.split = a->split, p.exact = a->exact != 0;
  return run<true, false>("gated_residual", p, a->dtype, a->stream);
}

extern "C" int PYDIT_ENTRY(gated_residual_ada_layer_norm)(const pydit_gated_residual_ada_layer_norm_params* a) {
  ModulateParams p = {};
  p.x = a->x, p.y = a->y, p.gate = a->gate, p.scale = a->scale, p.shift = a->shift;
  p.residual = a->residual, p.out = a->out;
  p.batch = a->batch, p.tokens = a->tokens, p.channels = a->channels, p.split = a->split, p.eps = a->eps;
  return run<true, true>("gated_residual_ada_layer_norm", p, a->dtype, a->stream);
}
