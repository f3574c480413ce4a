// What all kernels of joint attention share: which queries and keys a tile has, and the online softmax.
#pragma once

#include "device/platform.cuh"
#include "device/ptx_math.cuh"
#include "device/tiling.cuh"
#include "device/vector.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kFineScores = 8388608;  // 2^23: neighbouring floats beyond it differ by 1 or more, a factor of 2 in P

// Tiles ----------------------------------------------------------------------------------------------------------

// A tile of queries of one stream, head and sample, and the tiles of keys it needs: first those of the image, then
// those of the text.
struct Work {
  int batch, head, first_query;
  int queries;    // from first_query to the end of the stream: may exceed the tile, or be none
  bool image;     // whose queries
  int text_keys;  // of this sample
  int image_tiles, text_tiles;
  __device__ __forceinline__ int tiles() const { return image_tiles + text_tiles; }
};

// Text tokens of a sample that take part. Params: those of the forward or of the backward.
template <typename Params>
__device__ __forceinline__ int text_length(const Params& p, int batch) {
  const int tokens = static_cast<int>(p.txt_tokens);
  return p.txt_lens == nullptr ? tokens : min(max(p.txt_lens[batch], 0), tokens);
}

// `tile` counts the query tiles of one head and sample: first those of the image, then those of the text.
template <int kM, int kN>
__device__ __forceinline__ Work find_work(const pydit_joint_attention_params& p, int batch, int head, int tile) {
  const int image_tokens = static_cast<int>(p.img_tokens), image_queries = (image_tokens + kM - 1) / kM;
  Work work;
  work.batch = batch;
  work.head = head;
  work.image = tile < image_queries;
  work.first_query = (work.image ? tile : tile - image_queries) * kM;
  work.text_keys = text_length(p, batch);
  work.queries = (work.image ? image_tokens : work.text_keys) - work.first_query;
  work.image_tiles = work.queries > 0 ? (image_tokens + kN - 1) / kN : 0;
  work.text_tiles = work.queries > 0 ? (work.text_keys + kN - 1) / kN : 0;
  return work;
}

// Keys from the first of a tile to the end of their stream; with kN or more the tile is full.
template <int kN>
__device__ __forceinline__ int keys_in(const Work& work, int image_tokens, int tile) {
  return tile < work.image_tiles ? image_tokens - tile * kN : work.text_keys - (tile - work.image_tiles) * kN;
}

// Stores out = 0 and lse = -inf for `rows` queries without a key, or past the sample's length. All threads of a group
// call.
template <typename T, int kD>
__device__ __forceinline__ void store_empty(const pydit_joint_attention_params& p, const Work& work, int rows,
                                            int thread, int threads) {
  const pydit_heads& out = work.image ? p.out_img : p.out_txt;
  float* lse = work.image ? p.lse_img : p.lse_txt;
  const int tokens = static_cast<int>(work.image ? p.img_tokens : p.txt_tokens);
  for (int i = thread; i < rows * kD; i += threads) {
    const int row = work.first_query + i / kD;
    if (row >= tokens) return;
    T* to = static_cast<T*>(out.data) + work.batch * out.stride_b + row * out.stride_s + work.head * out.stride_h;
    to[i % kD] = from_float<T>(0.f);
    if (lse != nullptr && i % kD == 0)
      lse[(static_cast<int64_t>(work.batch) * p.heads + work.head) * tokens + row] = -INFINITY;
  }
}

// Recomputed in the backward: exp2(score * scale - lse), lse in base 2. Clamped at 1, which the rounding of huge scores
// could exceed up to an overflow.
__device__ __forceinline__ float probability(float score, float scale, float lse) {
  return exp2_approx(min_or_nan(fmaf(score, scale, -lse), 0.f));
}

// Online softmax -------------------------------------------------------------------------------------------------
//
// A warp holds 16 rows (queries) of scores as the tensor cores leave them: lane l has of each group of 8 columns
// columns l % 4 * 2 and the next, in rows l / 4 and l / 4 + 8. Element i of a thread is in group i / 4, row i / 2 % 2.

// Sets the scores of keys from `keys` on to -inf: those beyond the end in the last tile of a stream.
template <int kElements>
__device__ __forceinline__ void mask_keys(float (&scores)[kElements], int keys) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    if (i / 4 * 8 + i % 2 + column >= keys) scores[i] = -INFINITY;
  }
}

// 16 columns of accumulators as the left operand of a product, rounded to T.
template <typename T>
__device__ __forceinline__ void pack_left(uint32_t (&left)[4], const float* values) {
#pragma unroll
  for (int i = 0; i < 4; ++i) left[i] = pack<T>(values[2 * i], values[2 * i + 1]);
}

template <typename T, int kN, int kD>
struct Softmax {
  float out[kD / 2];
  float maximum[2], sum[2];            // of the scaled scores, in base 2; the sum is over this thread's columns only
  uint32_t probabilities[kN / 16][4];  // as the left operand of a product

  // Turns scores into exp2(scale * score - maximum) and updates `sum`. factor: what earlier sums and outputs must be
  // multiplied by. lse adds the same maximum that is subtracted here, so its rounding cancels.
  __device__ __forceinline__ void step(float (&scores)[kN / 2], float scale, float (&factor)[2], bool first) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float largest = scores[2 * row];
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        if (i / 2 % 2 == row) largest = fmaxf(largest, scores[i]);
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const float scaled = largest * scale, before = maximum[row];
      const float now = first ? scaled : fmaxf(before, scaled);
      factor[row] = first ? 0.f : exp2_approx(before - now);
      maximum[row] = now;
      float subtracted = now;
      if (fabsf(now) > kFineScores) {
        // The product is so large that its rounding error alone would be an exponent: exp2 could overflow, or leave no
        // key a share. So the largest score is subtracted before scaling, which is exact for scores near it.
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) {
          if (i / 2 % 2 == row) scores[i] -= largest;
        }
        subtracted = now - scaled;
      }
      float total = 0;
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) {
        if (i / 2 % 2 != row) continue;
        scores[i] = exp2_approx(fmaf(scores[i], scale, -subtracted));
        total += scores[i];
      }
      sum[row] = first ? total : fmaf(sum[row], factor[row], total);
    }
  }

  // Rounds what step() left in scores to T, for the product with V.
  __device__ __forceinline__ void pack_probabilities(const float (&scores)[kN / 2]) {
#pragma unroll
    for (int k = 0; k < kN / 16; ++k) pack_left<T>(probabilities[k], scores + 8 * k);
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kD / 2; ++i) out[i] *= factor[i / 2 % 2];
  }

  // The sum over all columns, per row.
  __device__ __forceinline__ float total(int row) const {
    const float pair = sum[row] + __shfl_xor_sync(0xffffffffu, sum[row], 1);
    return pair + __shfl_xor_sync(0xffffffffu, pair, 2);
  }

  // Divides the outputs by the sums and stores lse. `in_tile`: this thread's first row within the tile. Rows from
  // work.queries on were computed from padding, which may hold NaN, and become 0.
  __device__ __forceinline__ void finish(const pydit_joint_attention_params& p, const Work& work, int in_tile) {
    float* lse = work.image ? p.lse_img : p.lse_txt;
    const int tokens = static_cast<int>(work.image ? p.img_tokens : p.txt_tokens);
    if (lse != nullptr) lse += (static_cast<int64_t>(work.batch) * p.heads + work.head) * tokens + work.first_query;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float all = total(row), inverse = 1 / all;
      const int here = in_tile + 8 * row;
      const bool exists = here < work.queries;
#pragma unroll
      for (int i = 0; i < kD / 2; ++i) {
        if (i / 2 % 2 == row) out[i] = exists ? out[i] * inverse : 0.f;
      }
      if (lse != nullptr && threadIdx.x % 4 == 0 && work.first_query + here < tokens)
        lse[here] = exists ? fmaf(maximum[row], kLn2, logf(all)) : -INFINITY;
    }
  }
};

}  // namespace pydit::PYDIT_BACKEND
