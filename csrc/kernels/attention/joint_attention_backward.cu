// Backward of joint attention: the entry point, the delta kernel with which both implementations begin, and the
// portable kernel (sm_80 and up).
//
// With P = exp(scale q k^T - lse) and delta = sum(d_out * out) - d_lse per query:
//   d_v = P^T d_out,   d_s = P * (d_out v^T - delta),   d_q = scale d_s k,   d_k = scale d_s^T q.
//
// First delta, one pass over out and d_out: 2 B S H D elements read. The portable kernel then runs twice, once for each
// half. A block owns 64 rows: queries with their d_out, or keys with their values. It walks through the tiles of the
// other side, of both streams, and copies the next one while it multiplies:
//   own Q, d_out; other K, V:   scores = Q K^T,  inner = d_out V^T,  d_q += d_s K
//   own K, V; other Q, d_out:   scores = K Q^T,  inner = V d_out^T,  d_v += P d_out,  d_k += d_s Q
// No block adds to what another computes, so there are no atomics, results are the same in every run, and no fp32
// buffer of d_q is needed. The price: scores and inner are computed twice, 7 products of 2 D FLOPs per pair instead
// of 5.
//
// Padding. Rows that do not exist are zeros in shared memory, whatever the tensors hold. Scores of keys that do not
// exist are -inf, and queries that do not exist have lse = inf, so P = 0. Gradients past the length are stored as 0.
#include "device/check.h"
#include "device/dispatch.h"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "kernels/attention/joint_attention.cuh"
#include "kernels/attention/joint_attention.h"
#include "kernels/attention/joint_attention_backward.h"
#include "kernels/attention/joint_attention_mma.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kM = 16 * kWarps, kStages = 2;

// kKeys: the block owns keys. At D = 128 its two accumulators then leave registers for 32 columns of scores.
template <int kD, bool kKeys>
struct Tile {
  static constexpr int kN = kKeys && kD == 128 ? 32 : 64;
  static constexpr int kOwnBytes = kM * kD * 2, kOtherBytes = kN * kD * 2;  // of one tensor
  static constexpr int kStageBytes = 2 * kOtherBytes + 2 * kN * 4;          // two, lse and delta
  static constexpr int kSharedBytes = 2 * kOwnBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= 99 * 1024, "more than a block gets on sm_86, sm_89 and sm_120");
};

// The rows that a block owns, and the tiles that it walks through.
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
__device__ __forceinline__ OwnRows decode_rows(const BackwardParams& p, int index) {
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
  own.text = text_length(p, own.batch);
  own.rows = (own.image ? image_tokens : own.text) - own.first;
  const int other_text = kKeys && !text_queries ? 0 : (own.text + kN - 1) / kN;
  own.image_tiles = (image_tokens + kN - 1) / kN;
  own.tiles = own.rows > 0 ? own.image_tiles + other_text : 0;
  return own;
}

// Rows from the first of a tile of the other side to the end of their stream.
__device__ __forceinline__ int rows_of(const BackwardParams& p, const OwnRows& own, int size, int tile) {
  return tile < own.image_tiles ? static_cast<int>(p.img_tokens) - tile * size
                                : own.text - (tile - own.image_tiles) * size;
}

// Delta ----------------------------------------------------------------------------------------------------------

constexpr int kDeltaThreads = 256;

// kD / 8 lanes per row; rows in the order of memory, those of the image first. Padded rows get whatever their inputs
// give: nobody reads them.
template <typename T, int kD, bool kAligned>
__global__ void __launch_bounds__(kDeltaThreads) joint_attention_delta_kernel(const BackwardParams p) {
  constexpr int kLanes = kD / 8;
  const int64_t image_rows = p.batch * p.img_tokens * p.heads;
  const int64_t text_rows = p.q_txt.data == nullptr ? 0 : p.batch * p.txt_tokens * p.heads;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kDeltaThreads + threadIdx.x) / kLanes;
  const bool exists = index < image_rows + text_rows, image = index < image_rows;
  const int64_t row = image ? index : index - image_rows, tokens = image ? p.img_tokens : p.txt_tokens;
  const int lane = threadIdx.x % kLanes;
  float sum = 0;
  int64_t to = 0;
  if (exists) {
    const int64_t head = row % p.heads, token = row / p.heads % tokens, batch = row / p.heads / tokens;
    const auto load = [&](const pydit_heads& t) {
      const T* from = static_cast<const T*>(t.data) + batch * t.stride_b + token * t.stride_s + head * t.stride_h;
      Pack<T, 8> values;
      if constexpr (kAligned) {
        values = Pack<T, 8>::load(from + lane * 8);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) values.value[i] = from[lane * 8 + i];
      }
      return values;
    };
    const auto out = load(image ? p.out_img : p.out_txt), d_out = load(image ? p.d_out_img : p.d_out_txt);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(out[i], d_out[i], sum);
    to = (batch * p.heads + head) * tokens + token;
  }
  sum = lane_group_sum<kLanes>(sum);
  if (!exists || lane != 0) return;
  const float* d_lse = image ? p.d_lse_img : p.d_lse_txt;
  (image ? p.delta_img : p.delta_txt)[to] = d_lse == nullptr ? sum : sum - d_lse[to];
}

// Device code ----------------------------------------------------------------------------------------------------

// One tile of the other side: both tensors, and for queries their lse (in base 2) and delta.
template <typename T, int kD, bool kKeys, bool kAligned>
__device__ __forceinline__ void copy_other(char* stage, const BackwardParams& p, const OwnRows& own, int tile) {
  using Shape = Tile<kD, kKeys>;
  constexpr int kN = Shape::kN;
  const bool image = tile < own.image_tiles;
  const int first = (image ? tile : tile - own.image_tiles) * kN, valid = rows_of(p, own, kN, tile);
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

// Kernel ---------------------------------------------------------------------------------------------------------

template <typename T, int kD, bool kKeys, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) joint_attention_backward_kernel(const BackwardParams p) {
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
    if constexpr (!kKeys) {
      const int existing = rows_of(p, own, kN, tile);
      if (existing < kN) mask_keys(scores, existing);  // their zeros score 0, which may exceed all real scores
    }
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) {
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const float bottom = kKeys ? rows[column] : lse[i / 2 % 2];
      const float subtracted = kKeys ? rows[kN + column] : delta[i / 2 % 2];
      scores[i] = probability(scores[i], scale, bottom);
      inner[i] = scores[i] * (inner[i] - subtracted);
    }
    uint32_t left[kN / 16][4];
    if constexpr (kKeys) {
#pragma unroll
      for (int k = 0; k < kN / 16; ++k) pack_left<T>(left[k], scores + 8 * k);
      multiply<T, kN, kD>(sums[1], left, two);
    }
#pragma unroll
    for (int k = 0; k < kN / 16; ++k) pack_left<T>(left[k], inner + 8 * k);
    multiply<T, kN, kD>(sums[0], left, one);
    __syncthreads();  // the stage is read; the next round writes to it
  }
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) {
    const bool exists = warp * 16 + lane / 4 + i / 2 % 2 * 8 < own.rows;  // padded rows scored 0, and so have sums
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

template <typename T, int kD, bool kAligned>
int launch_delta(const BackwardParams& p) {
  const int64_t rows = p.batch * p.heads * (p.img_tokens + (p.q_txt.data == nullptr ? 0 : p.txt_tokens));
  const int64_t blocks = ceil_div(rows * (kD / 8), kDeltaThreads);
  if (blocks > INT32_MAX) return bad_argument("%s: expected at most 2^31 - 1 blocks, got more", kBackward);
  if (blocks == 0) return kOk;
  name_backward_tensors<T>(p);
  return launch_status(
      kBackward, PYDIT_LAUNCH((joint_attention_delta_kernel<T, kD, kAligned>), dim3(static_cast<unsigned>(blocks)),
                              dim3(kDeltaThreads), 0, static_cast<cudaStream_t>(p.stream), p));
}

template <typename T, int kD, bool kKeys, bool kAligned>
int launch(const BackwardParams& p) {
  const int64_t key_tiles = ceil_div(p.img_tokens, kM) + ceil_div(p.txt_tokens, kM);
  const int64_t blocks = p.batch * p.heads * (kKeys ? key_tiles : count_query_tiles<kM>(p));
  if (blocks > INT32_MAX) return bad_argument("%s: expected at most 2^31 - 1 tiles, got more", kBackward);
  if (blocks == 0) return kOk;
  constexpr int kBytes = Tile<kD, kKeys>::kSharedBytes;
  const cudaError_t error = cudaFuncSetAttribute(joint_attention_backward_kernel<T, kD, kKeys, kAligned>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return launch_status(kBackward, error);
  name_backward_tensors<T>(p);
  return launch_status(kBackward, PYDIT_LAUNCH((joint_attention_backward_kernel<T, kD, kKeys, kAligned>),
                                               dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kBytes,
                                               static_cast<cudaStream_t>(p.stream), p));
}

// Whether 16-byte accesses are legal everywhere.
bool aligned(const pydit_joint_attention_backward_params& p) {
  const auto legal = [&](const pydit_heads& t, int64_t tokens) { return is_aligned(t, p.batch, tokens, p.heads); };
  bool all = true;
  for (const auto* t : {&p.q_img, &p.k_img, &p.v_img, &p.out_img, &p.d_out_img, &p.d_q_img, &p.d_k_img, &p.d_v_img})
    all = all && legal(*t, p.img_tokens);
  for (const auto* t : {&p.q_txt, &p.k_txt, &p.v_txt, &p.out_txt, &p.d_out_txt, &p.d_q_txt, &p.d_k_txt, &p.d_v_txt})
    all = all && legal(*t, p.txt_tokens);
  return all;
}

// Whether TMA can address all tensors. A stride of 0, that of an expanded tensor, is not documented to work.
bool tma_addressable(const pydit_joint_attention_backward_params& p) {
  const auto expanded = [&](const pydit_heads& t, int64_t tokens) { return is_expanded(t, p.batch, tokens, p.heads); };
  for (const auto* t : {&p.q_img, &p.k_img, &p.v_img, &p.d_out_img, &p.d_k_img, &p.d_v_img})
    if (expanded(*t, p.img_tokens)) return false;
  for (const auto* t : {&p.q_txt, &p.k_txt, &p.v_txt, &p.d_out_txt, &p.d_k_txt, &p.d_v_txt})
    if (expanded(*t, p.txt_tokens)) return false;
  return aligned(p);
}

template <typename T, int kD, bool kAligned>
int launch_aligned(const BackwardParams& p, bool hopper) {
  int status = launch_delta<T, kD, kAligned>(p);
  if (status != kOk) return status;
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  if (hopper) return launch_joint_attention_backward_sm90(p);
#endif
  (void)hopper;
  status = launch<T, kD, false, kAligned>(p);
  return status != kOk ? status : launch<T, kD, true, kAligned>(p);
}

template <typename T, int kD>
int launch_alignment(const BackwardParams& p, bool hopper) {
  return aligned(p) ? launch_aligned<T, kD, true>(p, hopper) : launch_aligned<T, kD, false>(p, false);
}

template <typename T>
int launch_head_dim(const BackwardParams& p, bool hopper) {
  if (p.head_dim == 32) return launch_alignment<T, 32>(p, hopper);
  if (p.head_dim == 64) return launch_alignment<T, 64>(p, hopper);
  return launch_alignment<T, 128>(p, hopper);
}

// Sets the pointers into the workspace, if there is one; returns its size in bytes.
int64_t lay_out_workspace(BackwardParams* p, bool hopper) {
  const int64_t cleared = hopper ? bytes_to_clear(*p) : 0, rows = p->batch * p->heads;
  const int64_t image = rows * p->img_tokens, text = p->q_txt.data == nullptr ? 0 : rows * p->txt_tokens;
  if (auto* base = static_cast<char*>(p->workspace)) {
    if (hopper) {
      p->sums = reinterpret_cast<float*>(base);
      p->semaphores = reinterpret_cast<unsigned*>(base + count_sums(*p) * 4);
      p->ticket = p->semaphores + rows * query_tiles(*p);
    }
    p->delta_img = reinterpret_cast<float*>(base + cleared);
    p->delta_txt = p->delta_img + image;
  }
  return cleared + (image + text) * 4;
}

}  // namespace
}  // namespace pydit::PYDIT_BACKEND

using namespace pydit::PYDIT_BACKEND;

extern "C" int PYDIT_ENTRY(joint_attention_backward_path)(const pydit_joint_attention_backward_params* p) {
  return hopper_path(tma_addressable(*p));
}

extern "C" int64_t PYDIT_ENTRY(joint_attention_backward_workspace)(const pydit_joint_attention_backward_params* p) {
  BackwardParams all = {};
  static_cast<pydit_joint_attention_backward_params&>(all) = *p;
  all.workspace = nullptr;
  return lay_out_workspace(&all, PYDIT_ENTRY(joint_attention_backward_path)(p) == PYDIT_PATH_HOPPER);
}

extern "C" int PYDIT_ENTRY(joint_attention_backward)(const pydit_joint_attention_backward_params* p) {
  const int status = check_arguments(kBackward, *p);
  if (status != kOk) return status;
  if (p->batch == 0 || p->heads == 0) return kOk;
  const bool hopper = PYDIT_ENTRY(joint_attention_backward_path)(p) == PYDIT_PATH_HOPPER;
  BackwardParams all = {};
  static_cast<pydit_joint_attention_backward_params&>(all) = *p;
  if (lay_out_workspace(&all, hopper) > 0 && (p->workspace == nullptr || !aligned16(p->workspace)))
    return bad_argument("%s: workspace: expected memory at a multiple of 16 bytes, got %p", kBackward, p->workspace);
  return p->dtype == PYDIT_FLOAT16 ? launch_head_dim<__half>(all, hopper) : launch_head_dim<__nv_bfloat16>(all, hopper);
}
