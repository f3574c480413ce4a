// What the kernels of grouped_linear share: the layers as a kernel sees them, the order of tiles, and the epilogue.
//
// Order of tiles. Layers come one after the other, image before text, so that the large ones do not come last. Within a
// layer, bands of kBand rows of tiles are walked column by column: the 132 tiles that run at once are then about 12 x
// 11 and share 12 operands from x and 11 from the weight, where a walk along whole rows would share 4 and 36 at N =
// 9216.
//
// Epilogue. It works on sums as the tensor cores leave them: a warp holds 16 rows; in each group of 8 columns lane l
// has columns l % 4 * 2 and the next, in rows l / 4 and l / 4 + 8 (elements 0, 1 and 2, 3 of the group). So a thread
// has whole interleaved pairs of RoPE, and a warp whole heads. Kernels for layers with heads (kHeads) are separate from
// those with activation, gate and residual: a kernel for both spills on sm_90a.
#pragma once

#include "device/check.h"
#include "device/platform.cuh"
#include "device/ptx_math.cuh"
#include "device/reduce.cuh"
#include "device/tiling.cuh"
#include "device/vector.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

constexpr const char* kGroupedLinear = "grouped_linear";

// A layer without its operands.
struct Layer {
  const void *bias, *gate, *norm_weight;
  const float *cos, *sin;
  int64_t gate_stride_b, gate_stride_r;
  int tokens, depth, columns;
  int split, head_dim;
  bool residual;
};

struct Layers {
  Layer layer[PYDIT_MAX_LINEARS];
  int count, batch;
  float eps;
  bool gelu, heads;  // heads: of some layer
};

inline Layers layers_of(const pydit_grouped_linear_params& p) {
  Layers all = {};
  all.count = p.count, all.batch = static_cast<int>(p.batch), all.eps = p.eps;
  all.gelu = p.activation == PYDIT_GELU_TANH;
  for (int i = 0; i < p.count; ++i) {
    const pydit_linear& l = p.linear[i];
    all.heads = all.heads || l.head_dim != 0;
    all.layer[i] = {l.bias,
                    l.gate.data,
                    l.norm_weight,
                    l.cos,
                    l.sin,
                    l.gate.stride_b,
                    l.gate.stride_r,
                    static_cast<int>(l.tokens),
                    static_cast<int>(l.in_features),
                    static_cast<int>(l.out_features),
                    static_cast<int>(l.split < l.tokens ? l.split : l.tokens),
                    l.head_dim,
                    l.residual.data != nullptr};
  }
  return all;
}

// Tiles ----------------------------------------------------------------------------------------------------------

template <int kM, int kN>
__host__ __device__ inline int64_t count_tiles(const Layers& all) {
  int64_t total = 0;
  for (int i = 0; i < all.count; ++i)
    total += all.batch * ceil_div(all.layer[i].tokens, kM) * ceil_div(all.layer[i].columns, kN);
  return total;
}

struct TileOfLayer {
  int layer, batch;
  int row, column;  // the first
};

template <int kM, int kN, int kBand = 12>
__device__ __forceinline__ TileOfLayer decode_tile(const Layers& all, int index) {
  for (int i = 0;; ++i) {
    const int height = (all.layer[i].tokens + kM - 1) / kM, columns = (all.layer[i].columns + kN - 1) / kN;
    const int rows = all.batch * height;
    if (index >= rows * columns) {
      index -= rows * columns;
      continue;
    }
    const int band = index / (kBand * columns), inside = index % (kBand * columns);
    const int in_band = min(kBand, rows - band * kBand);
    const int row = band * kBand + inside % in_band;
    return {i, row / height, row % height * kM, inside / in_band * kN};
  }
}

// Epilogue -------------------------------------------------------------------------------------------------------

// Two neighbouring elements as one word, `left` elements before the end of their row; those beyond it are 0. kAligned:
// left is even.
template <typename T, bool kAligned>
__device__ __forceinline__ uint32_t load_pair(const T* from, int left) {
  uint32_t pair = 0;
  if constexpr (kAligned) {
    if (left > 0) pair = *reinterpret_cast<const uint32_t*>(from);
  } else {
    if (left > 0) reinterpret_cast<T*>(&pair)[0] = from[0];
    if (left > 1) reinterpret_cast<T*>(&pair)[1] = from[1];
  }
  return pair;
}

// What a lane needs of a row (null: zeros) for its sums: a pair of each group of 8 columns from `column` on. All pairs
// are requested at once and long before their use; loaded and used in turn, they would wait for L2 again and again.
template <typename T, bool kAligned, int kGroups>
__device__ __forceinline__ void load_pairs(uint32_t (&pairs)[kGroups], const void* row, int column, int columns) {
  column += threadIdx.x % 4 * 2;
  // Written so that the groups' offsets are constants; otherwise each group keeps an address in registers.
  const T* from = static_cast<const T*>(row) + column;
  const int left = row == nullptr ? 0 : columns - column;
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    pairs[group] = load_pair<T, kAligned>(from + 8 * group, left - 8 * group);
}

// GELU by its tanh approximation, as y / (1 + exp(-2 sqrt(2 / pi) (y + 0.044715 y^3))), which keeps the digits of small
// results where 1 + tanh cancels. Two elements share one reciprocal; exponentials are capped at 2^62 so that their
// product is finite.
__device__ __forceinline__ void gelu_pair(float& a, float& b) {
  constexpr float kScale = -2.302208198f, kCubic = 0.044715f;  // -2 sqrt(2 / pi) log2(e)
  const float below_a = 1.f + exp2_approx(fminf(kScale * a * fmaf(kCubic * a, a, 1.f), 62.f));
  const float below_b = 1.f + exp2_approx(fminf(kScale * b * fmaf(kCubic * b, b, 1.f), 62.f));
  const float inverse = reciprocal_approx(below_a * below_b);
  a *= inverse * below_b;
  b *= inverse * below_a;
}

// RMSNorm and RoPE of the heads among a warp's columns. `row` is this lane's first. Both of a lane's rows are done
// group by group, so that the loads of all groups are in flight at once and each weight is loaded once.
template <int kHeadDim, typename T, bool kAligned, int kElements>
__device__ __forceinline__ void norm_rope_heads(float (&sums)[kElements], const Layer& l, float eps, int row) {
  constexpr int kGroups = kHeadDim / 8, kHeads = kElements / (4 * kGroups);
  const bool weighted = l.norm_weight != nullptr, rotated = l.cos != nullptr;
  const T* weights = static_cast<const T*>(l.norm_weight) + threadIdx.x % 4 * 2;
  float scale[2][kHeads];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int head = 0; head < kHeads; ++head) {
      float squares = 0;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const float* x = sums + 4 * (head * kGroups + group) + 2 * half;
        squares = fmaf(x[0], x[0], fmaf(x[1], x[1], squares));
      }
      scale[half][head] = rsqrtf(lane_group_sum<4>(squares) / kHeadDim + eps);
    }
  }
  const float *cosines[2], *sines[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Rows past the last take its angles; they are never stored.
    const int64_t first = static_cast<int64_t>(min(row + 8 * half, l.tokens - 1)) * (kHeadDim / 2) + threadIdx.x % 4;
    cosines[half] = l.cos + first, sines[half] = l.sin + first;
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const float2 weight = weighted ? unpack<T>(load_pair<T, kAligned>(weights + 8 * group, 8)) : make_float2(1.f, 1.f);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float c = 1.f, s = 0.f;
      if (rotated) c = cosines[half][4 * group], s = sines[half][4 * group];
#pragma unroll
      for (int head = 0; head < kHeads; ++head) {
        float* x = sums + 4 * (head * kGroups + group) + 2 * half;
        const float even = x[0] * scale[half][head] * weight.x, odd = x[1] * scale[half][head] * weight.y;
        x[0] = fmaf(even, c, -odd * s);
        x[1] = fmaf(even, s, odd * c);
      }
    }
  }
}

// Everything but gate and residual: sums become act(sums + bias), or their heads are normalised and rotated. 16 rows of
// a warp, of which `row` is this lane's first; `bias` comes from load_pairs.
template <typename T, bool kAligned, bool kHeads, int kElements>
__device__ __forceinline__ void apply_epilogue(float (&sums)[kElements], const uint32_t (&bias)[kElements / 4],
                                               const Layers& all, const Layer& l, int row) {
  if (l.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      const float2 pair = unpack<T>(bias[i / 4]);
      sums[i] += pair.x, sums[i + 1] += pair.y, sums[i + 2] += pair.x, sums[i + 3] += pair.y;
    }
  }
  if constexpr (kHeads) {
    if (l.head_dim == 128) norm_rope_heads<128, T, kAligned>(sums, l, all.eps, row);
    if (l.head_dim == 64) norm_rope_heads<64, T, kAligned>(sums, l, all.eps, row);
    if (l.head_dim == 32) norm_rope_heads<32, T, kAligned>(sums, l, all.eps, row);
  } else if (all.gelu) {
#pragma unroll
    for (int i = 0; i < kElements; i += 2) gelu_pair(sums[i], sums[i + 1]);
  }
}

// The gate of a row; null: none.
template <typename T>
__device__ __forceinline__ const T* gate_of_row(const Layer& l, int batch, int row) {
  if (l.gate == nullptr) return nullptr;
  const int64_t second_row = row < l.split || l.split >= l.tokens ? 0 : l.gate_stride_r;
  return static_cast<const T*>(l.gate) + batch * l.gate_stride_b + second_row;
}

// Multiplies kGroups groups of 8 columns, from `sums` on, by the gates of both rows, which come from load_pairs.
template <typename T, int kGroups>
__device__ __forceinline__ void apply_gate(float* sums, const uint32_t* first, const uint32_t* second) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    float* x = sums + 4 * group;
    const float2 factor = unpack<T>(first[group]), other = unpack<T>(second[group]);
    x[0] *= factor.x, x[1] *= factor.y, x[2] *= other.x, x[3] *= other.y;
  }
}

// Launchers ------------------------------------------------------------------------------------------------------

// The Hopper kernel, for arguments that the entry point has checked and tensors that TMA can address.
int launch_grouped_linear_sm90(const pydit_grouped_linear_params& p);
// Its cluster size: 1, or 2 where blocks share what they load.
int cluster_of_grouped_linear_sm90(const pydit_grouped_linear_params& p);
// Bytes of workspace that it needs to cut tiles; 0: it cuts none.
int64_t workspace_of_grouped_linear_sm90(const pydit_grouped_linear_params& p);

// Names the launch's tensors for the simulator's race detector.
template <typename T>
void name_grouped_linear_tensors(const pydit_grouped_linear_params& p) {
  for (int i = 0; i < p.count; ++i) {
    const pydit_linear& l = p.linear[i];
    if (l.tokens == 0) continue;
    const auto tokens = [&](const char* name, const pydit_tokens& t, int64_t columns, bool writable) {
      name_tensor(name, t.data, writable, sizeof(T), columns, {p.batch, l.tokens}, {t.stride_b, t.stride_s});
    };
    tokens("x", l.x, l.in_features, false), tokens("out", l.out, l.out_features, true);
    name_tensor("weight", l.weight, false, sizeof(T), l.in_features, {l.out_features}, {l.weight_stride});
    const auto vector = [&](const char* name, const void* data, int64_t length, size_t bytes) {
      if (data != nullptr) name_tensor(name, data, false, bytes, length, {1}, {0});
    };
    vector("bias", l.bias, l.out_features, sizeof(T)), vector("norm_weight", l.norm_weight, l.head_dim, sizeof(T));
    vector("cos", l.cos, l.tokens * l.head_dim / 2, sizeof(float));
    vector("sin", l.sin, l.tokens * l.head_dim / 2, sizeof(float));
    if (l.residual.data != nullptr && l.residual.data != l.out.data)
      tokens("residual", l.residual, l.out_features, false);
    if (l.gate.data != nullptr)
      name_tensor("gate", l.gate.data, false, sizeof(T), l.out_features, {p.batch, l.split < l.tokens ? 2 : 1},
                  {l.gate.stride_b, l.gate.stride_r});
  }
}

}  // namespace pydit::PYDIT_BACKEND
