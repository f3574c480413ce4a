// Backward of joint attention, portable (sm_80 and up).
//
// With P = exp(scale q k^T - lse) and delta = sum(d_out * out) - d_lse per query:
//   d_v = P^T d_out,   d_s = P * (d_out v^T - delta),   d_q = scale d_s k,   d_k = scale d_s^T q.
//
// One kernel, run twice, does both halves. A block owns 64 rows: queries with their d_out, or keys with their values.
// It walks through the tiles of the other side, of both streams, which are copied while it multiplies:
//   own Q, d_out; other K, V:   scores = Q K^T,  inner = d_out V^T,  d_q += d_s K
//   own K, V; other Q, d_out:   scores = K Q^T,  inner = V d_out^T,  d_v += P d_out,  d_k += d_s Q
// No block adds to what another computes, so there are no atomics, results are the same in every run, and no fp32
// buffer of d_q is needed. The price: scores and inner are computed twice, 7 products of 2 D FLOPs per pair instead
// of 5.
//
// Padding. Rows that do not exist are zeros in shared memory, whatever the tensors hold. A key that does not exist adds
// P * (0 - delta) * 0 = 0 to d_q; a query that does not has lse = inf, so P = 0. Gradients past the length are stored
// as 0.
#include "device/check.h"
#include "device/dispatch.h"
#include "device/ptx.cuh"
#include "kernels/attention/joint_attention.cuh"
#include "kernels/attention/joint_attention_mma.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kM = 16 * kWarps, kStages = 2;

// kKeys: the block owns keys. Two accumulators of D = 128 then leave registers for 32 columns of scores.
template <int kD, bool kKeys>
struct Tile {
  static constexpr int kN = kKeys && kD == 128 ? 32 : 64;
  static constexpr int kOwnBytes = kM * Rows<kD>::kBytes, kOtherBytes = kN * Rows<kD>::kBytes;  // of one tensor
  static constexpr int kStageBytes = 2 * kOtherBytes + 2 * kN * 4;                              // two, lse and delta
  static constexpr int kSharedBytes = 2 * kOwnBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024, "more than a block gets on sm_86, sm_89 and sm_120");
};

// What a block owns and what it walks through.
struct OwnRows {
  int batch, head, first;
  int rows;    // own rows that exist from `first` on
  int tokens;  // of the own stream
  bool image;
  int text;         // text tokens of this sample that take part
  int image_tiles;  // of the other side
  int tiles;
};

template <bool kKeys, int kN>
__device__ __forceinline__ OwnRows decode_rows(const pydit_joint_attention_backward_params& p, int index) {
  const int image_tokens = static_cast<int>(p.img_tokens), text_tokens = static_cast<int>(p.txt_tokens);
  const bool text_queries = p.q_txt.data != nullptr;
  const int own_image = (image_tokens + kM - 1) / kM;
  const int own_text = kKeys || text_queries ? (text_tokens + kM - 1) / kM : 0;
  OwnRows own;
  const int tile = index % (own_image + own_text), rest = index / (own_image + own_text);
  own.head = rest % p.heads;
  own.batch = rest / p.heads;
  own.image = tile < own_image;
  own.first = (own.image ? tile : tile - own_image) * kM;
  own.tokens = own.image ? image_tokens : text_tokens;
  own.text = p.txt_lens == nullptr ? text_tokens : min(max(p.txt_lens[own.batch], 0), text_tokens);
  own.rows = (own.image ? image_tokens : own.text) - own.first;
  const int other_text = kKeys && !text_queries ? 0 : (own.text + kN - 1) / kN;
  own.image_tiles = (image_tokens + kN - 1) / kN;
  own.tiles = own.rows > 0 ? own.image_tiles + other_text : 0;
  return own;
}

// Device code ----------------------------------------------------------------------------------------------------

// One tile of the other side: both tensors, and for queries their lse (in base 2) and delta.
template <typename T, int kD, bool kKeys, bool kAligned>
__device__ __forceinline__ void copy_other(char* stage, const pydit_joint_attention_backward_params& p,
                                           const OwnRows& own, int tile) {
  using Shape = Tile<kD, kKeys>;
  constexpr int kN = Shape::kN;
  const bool image = tile < own.image_tiles;
  const int first = (image ? tile : tile - own.image_tiles) * kN;
  const int valid = (image ? static_cast<int>(p.img_tokens) : own.text) - first;
  const pydit_heads& one = kKeys ? (image ? p.q_img : p.q_txt) : (image ? p.k_img : p.k_txt);
  const pydit_heads& two = kKeys ? (image ? p.d_out_img : p.d_out_txt) : (image ? p.v_img : p.v_txt);
  copy_rows<T, kD, kN, kThreads, kAligned>(stage, one, own.batch, own.head, first, valid);
  copy_rows<T, kD, kN, kThreads, kAligned>(stage + Shape::kOtherBytes, two, own.batch, own.head, first, valid);
  if constexpr (kKeys) {
    auto* rows = reinterpret_cast<float*>(stage + 2 * Shape::kOtherBytes);
    const int64_t tokens = image ? p.img_tokens : p.txt_tokens;
    const int64_t base = (static_cast<int64_t>(own.batch) * p.heads + own.head) * tokens + first;
    const int row = threadIdx.x % kN;
    const bool exists = row < valid;
    if (threadIdx.x >= 2 * kN) return;
    if (threadIdx.x < kN)
      rows[row] = exists ? (image ? p.lse_img : p.lse_txt)[base + row] * kLog2E : INFINITY;
    else
      rows[kN + row] = exists ? (image ? p.delta_img : p.delta_txt)[base + row] : 0.f;
  }
}

template <typename T, int kN>
__device__ __forceinline__ void pack_left(uint32_t (&left)[kN / 16][4], const float (&values)[kN / 2]) {
#pragma unroll
  for (int k = 0; k < kN / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) left[k][i] = pack<T>(values[8 * k + 2 * i], values[8 * k + 2 * i + 1]);
  }
}

// Kernel ---------------------------------------------------------------------------------------------------------

template <typename T, int kD, bool kKeys, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    joint_attention_backward_kernel(const pydit_joint_attention_backward_params p) {
  using Shape = Tile<kD, kKeys>;
  constexpr int kN = Shape::kN;
  PYDIT_DYNAMIC_SHARED(char, shared);
  const OwnRows own = decode_rows<kKeys, kN>(p, static_cast<int>(blockIdx.x));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char *own_one = shared, *own_two = shared + Shape::kOwnBytes, *stages = shared + 2 * Shape::kOwnBytes;
  const float scale = p.scale * kLog2E;

  // sums[0]: d_q or d_k; sums[1]: d_v.
  float sums[kKeys ? 2 : 1][kD / 2];
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) {
    sums[0][i] = 0;
    if constexpr (kKeys) sums[1][i] = 0;
  }
  if (own.tiles > 0) {
    const pydit_heads& one = kKeys ? (own.image ? p.k_img : p.k_txt) : (own.image ? p.q_img : p.q_txt);
    const pydit_heads& two = kKeys ? (own.image ? p.v_img : p.v_txt) : (own.image ? p.d_out_img : p.d_out_txt);
    copy_rows<T, kD, kM, kThreads, kAligned>(own_one, one, own.batch, own.head, own.first, own.rows);
    copy_rows<T, kD, kM, kThreads, kAligned>(own_two, two, own.batch, own.head, own.first, own.rows);
    copy_other<T, kD, kKeys, kAligned>(stages, p, own, 0);
    cp_async_commit_group();
  }
  float lse[2] = {INFINITY, INFINITY}, delta[2] = {0, 0};  // of this thread's rows, when those are queries
  if constexpr (!kKeys) {
    const int64_t base = (static_cast<int64_t>(own.batch) * p.heads + own.head) * own.tokens + own.first;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int here = warp * 16 + lane / 4 + row * 8;
      if (here < own.rows) {
        lse[row] = (own.image ? p.lse_img : p.lse_txt)[base + here] * kLog2E;
        delta[row] = (own.image ? p.delta_img : p.delta_txt)[base + here];
      }
    }
  }
  for (int tile = 0; tile < own.tiles; ++tile) {
    if (tile + 1 < own.tiles)
      copy_other<T, kD, kKeys, kAligned>(stages + (tile + 1) % kStages * Shape::kStageBytes, p, own, tile + 1);
    cp_async_commit_group();
    cp_async_wait_group<1>();
    __syncthreads();
    const char* one = stages + tile % kStages * Shape::kStageBytes;
    const char* two = one + Shape::kOtherBytes;
    const auto* rows = reinterpret_cast<const float*>(one + 2 * Shape::kOtherBytes);
    float scores[kN / 2], inner[kN / 2];
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) scores[i] = inner[i] = 0;
#pragma unroll
    for (int d = 0; d < kD / 16; ++d) {
      uint32_t left[4];
      load_left<kD>(left, own_one, warp * 16, d);
      multiply_transposed<T, kN, kD>(scores, left, one, d);
      load_left<kD>(left, own_two, warp * 16, d);
      multiply_transposed<T, kN, kD>(inner, left, two, d);
    }
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const float bottom = kKeys ? rows[column] : lse[i / 2 % 2];
      const float subtracted = kKeys ? rows[kN + column] : delta[i / 2 % 2];
      scores[i] = exp2_approx(fmaf(scores[i], scale, -bottom));
      inner[i] = scores[i] * (inner[i] - subtracted);
    }
    uint32_t left[kN / 16][4];
    if constexpr (kKeys) {
      pack_left<T, kN>(left, scores);
      multiply<T, kN, kD>(sums[1], left, two);
    }
    pack_left<T, kN>(left, inner);
    multiply<T, kN, kD>(sums[0], left, one);
    __syncthreads();  // the stage is read; the next round writes to it
  }
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) {
    const bool exists = warp * 16 + lane / 4 + i / 2 % 2 * 8 < own.rows;  // padding has scores of 0, not none
    sums[0][i] = exists ? sums[0][i] * p.scale : 0.f;
    if constexpr (kKeys) sums[1][i] = exists ? sums[1][i] : 0.f;
  }
  const pydit_heads& first = kKeys ? (own.image ? p.d_k_img : p.d_k_txt) : (own.image ? p.d_q_img : p.d_q_txt);
  store_rows<T, kD, kAligned>(first, own.batch, own.head, own.first, own.tokens, own_one, sums[0]);
  if constexpr (kKeys) {
    const pydit_heads& second = own.image ? p.d_v_img : p.d_v_txt;
    __syncwarp();
    store_rows<T, kD, kAligned>(second, own.batch, own.head, own.first, own.tokens, own_two, sums[1]);
  }
}

// Launchers ------------------------------------------------------------------------------------------------------

template <typename T>
void name_tensors(const pydit_joint_attention_backward_params& p) {
  const auto heads = [&](const char* name, const pydit_heads& t, int64_t tokens, bool writable) {
    if (t.data != nullptr && tokens > 0)
      name_tensor(name, t.data, writable, sizeof(T), p.head_dim, {p.batch, tokens, p.heads},
                  {t.stride_b, t.stride_s, t.stride_h});
  };
  const auto rows = [&](const char* name, const float* t, int64_t tokens) {
    if (t != nullptr && tokens > 0) name_tensor(name, t, false, sizeof(float), tokens, {p.batch * p.heads}, {tokens});
  };
  heads("q_img", p.q_img, p.img_tokens, false), heads("q_txt", p.q_txt, p.txt_tokens, false);
  heads("k_img", p.k_img, p.img_tokens, false), heads("k_txt", p.k_txt, p.txt_tokens, false);
  heads("v_img", p.v_img, p.img_tokens, false), heads("v_txt", p.v_txt, p.txt_tokens, false);
  heads("d_out_img", p.d_out_img, p.img_tokens, false), heads("d_out_txt", p.d_out_txt, p.txt_tokens, false);
  heads("d_q_img", p.d_q_img, p.img_tokens, true), heads("d_q_txt", p.d_q_txt, p.txt_tokens, true);
  heads("d_k_img", p.d_k_img, p.img_tokens, true), heads("d_k_txt", p.d_k_txt, p.txt_tokens, true);
  heads("d_v_img", p.d_v_img, p.img_tokens, true), heads("d_v_txt", p.d_v_txt, p.txt_tokens, true);
  rows("lse_img", p.lse_img, p.img_tokens), rows("lse_txt", p.lse_txt, p.txt_tokens);
  rows("delta_img", p.delta_img, p.img_tokens), rows("delta_txt", p.delta_txt, p.txt_tokens);
  if (p.txt_lens != nullptr) name_tensor("txt_lens", p.txt_lens, false, sizeof(int32_t), p.batch, {1}, {0});
}

template <typename T, int kD, bool kKeys, bool kAligned>
int launch(const pydit_joint_attention_backward_params& p) {
  const auto tiles = [](int64_t tokens) { return (tokens + kM - 1) / kM; };
  const int64_t blocks =
      p.batch * p.heads * (tiles(p.img_tokens) + (kKeys || p.q_txt.data != nullptr ? tiles(p.txt_tokens) : 0));
  if (blocks > INT32_MAX) return bad_argument("joint_attention_backward: expected at most 2^31 - 1 tiles, got more");
  if (blocks == 0) return kOk;
  constexpr int kBytes = Tile<kD, kKeys>::kSharedBytes;
  const cudaError_t error = cudaFuncSetAttribute(joint_attention_backward_kernel<T, kD, kKeys, kAligned>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return launch_status("joint_attention_backward", error);
  name_tensors<T>(p);
  return launch_status(
      "joint_attention_backward",
      PYDIT_LAUNCH((joint_attention_backward_kernel<T, kD, kKeys, kAligned>), dim3(static_cast<unsigned>(blocks)),
                   dim3(kThreads), kBytes, static_cast<cudaStream_t>(p.stream), p));
}

bool aligned(const pydit_joint_attention_backward_params& p) {
  const auto legal = [&](const pydit_heads& t, int64_t tokens) {
    return aligned16(t.data) && (p.batch <= 1 || t.stride_b % 8 == 0) && (tokens <= 1 || t.stride_s % 8 == 0) &&
           (p.heads <= 1 || t.stride_h % 8 == 0);
  };
  bool all = true;
  for (const pydit_heads* t : {&p.q_img, &p.k_img, &p.v_img, &p.d_out_img, &p.d_q_img, &p.d_k_img, &p.d_v_img})
    all = all && legal(*t, p.img_tokens);
  for (const pydit_heads* t : {&p.q_txt, &p.k_txt, &p.v_txt, &p.d_out_txt, &p.d_q_txt, &p.d_k_txt, &p.d_v_txt})
    all = all && legal(*t, p.txt_tokens);
  return all;
}

template <typename T, int kD>
int launch_both(const pydit_joint_attention_backward_params& p) {
  const bool fast = aligned(p);
  const int status = fast ? launch<T, kD, false, true>(p) : launch<T, kD, false, false>(p);
  if (status != kOk) return status;
  return fast ? launch<T, kD, true, true>(p) : launch<T, kD, true, false>(p);
}

template <typename T>
int launch_head_dim(const pydit_joint_attention_backward_params& p) {
  if (p.head_dim == 32) return launch_both<T, 32>(p);
  if (p.head_dim == 64) return launch_both<T, 64>(p);
  return launch_both<T, 128>(p);
}

}  // namespace
}  // namespace pydit::PYDIT_BACKEND

using namespace pydit::PYDIT_BACKEND;

extern "C" int PYDIT_ENTRY(joint_attention_backward)(const pydit_joint_attention_backward_params* p) {
  const char* op = "joint_attention_backward";
  if (p->dtype != PYDIT_FLOAT16 && p->dtype != PYDIT_BFLOAT16)
    return bad_argument("%s: dtype: expected float16 (1) or bfloat16 (2), got %d", op, p->dtype);
  if (p->head_dim != 32 && p->head_dim != 64 && p->head_dim != 128)
    return bad_argument("%s: head_dim: expected 32, 64 or 128, got %d", op, p->head_dim);
  for (const int64_t tokens : {p->img_tokens, p->txt_tokens}) {
    if (tokens < 0 || tokens > INT32_MAX / 2)
      return bad_argument("%s: tokens: expected 0 to 2^30, got %lld", op, static_cast<long long>(tokens));
  }
  if (p->batch < 0 || p->batch > INT32_MAX || p->heads < 0)
    return bad_argument("%s: batch, heads: expected 0 or more, got %lld, %d", op, static_cast<long long>(p->batch),
                        p->heads);
  if (p->batch == 0 || p->heads == 0) return kOk;
  return p->dtype == PYDIT_FLOAT16 ? launch_head_dim<__half>(*p) : launch_head_dim<__nv_bfloat16>(*p);
}
