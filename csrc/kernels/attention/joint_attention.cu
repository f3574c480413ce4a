// Joint attention: the portable kernel (sm_80 and up; cp.async, ldmatrix, mma.sync) and the entry point, which prefers
// the Hopper kernel.
//
// out = softmax(scale * q k^T) v over the keys of two streams that stay in tensors of their own; see pydit.h.
//
// A block owns 128 queries of one stream, head and sample, 16 per warp, and walks through all keys in tiles of kN that
// never mix the streams; while it multiplies one tile the next is copied. Queries stay in registers. FLOPs 4 D S per
// query; bytes: Q and O once, K and V once per tile of queries, which neighbouring blocks share through L2. On Hopper
// mma.sync does not reach the rate of wgmma; on sm_80 it is the way to the tensor cores.
//
// Text padding: the copy fills rows past the sample's length with zeros, whatever they hold, and their scores become
// -inf.
//
// Shared memory is at most 96 KB, which every device since sm_80 can give a block. Tiles are swizzled so that neither
// ldmatrix nor the copies meet bank conflicts.
#include "device/check.h"
#include "device/dispatch.h"
#include "device/ptx.cuh"
#include "kernels/attention/joint_attention.cuh"
#include "kernels/attention/joint_attention.h"
#include "kernels/attention/joint_attention_mma.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kM = 16 * kWarps, kStages = 2;

template <int kD>
struct Tile {
  static constexpr int kN = kD == 128 ? 64 : 128;  // 64 at D = 128: two stages of K and V fit 96 KB beside Q
  static constexpr int kQBytes = kM * kD * 2, kKeyBytes = kN * kD * 2;
  static constexpr int kStageBytes = 2 * kKeyBytes;
  static constexpr int kSharedBytes = kQBytes + kStages * kStageBytes;
  static_assert(kSharedBytes <= 96 * 1024, "more than a block gets on sm_86, sm_89 and sm_120");
};

// Device code ----------------------------------------------------------------------------------------------------

template <typename T, int kD, bool kAligned>
__device__ __forceinline__ void copy_keys(char* stage, const pydit_joint_attention_params& p, const Work& work,
                                          int tile) {
  using Shape = Tile<kD>;
  const bool image = tile < work.image_tiles;
  const int first = (image ? tile : tile - work.image_tiles) * Shape::kN;
  const int valid = keys_in<Shape::kN>(work, static_cast<int>(p.img_tokens), tile);
  copy_rows<T, kD, Shape::kN, kThreads, kAligned>(stage, image ? p.k_img : p.k_txt, work.batch, work.head, first,
                                                  valid);
  copy_rows<T, kD, Shape::kN, kThreads, kAligned>(stage + Shape::kKeyBytes, image ? p.v_img : p.v_txt, work.batch,
                                                  work.head, first, valid);
}

// Kernel ---------------------------------------------------------------------------------------------------------

template <typename T, int kD, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1) joint_attention_kernel(const pydit_joint_attention_params p) {
  using Shape = Tile<kD>;
  constexpr int kN = Shape::kN;
  PYDIT_DYNAMIC_SHARED(char, shared);
  // Neighbouring blocks work on tiles of one head and sample, and so share its keys in L2.
  const int all = count_query_tiles<kM>(p);
  const int index = static_cast<int>(blockIdx.x), rest = index / all;
  const Work work = find_work<kM, kN>(p, rest / p.heads, rest % p.heads, index % all);
  const int tiles = work.tiles(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int image_tokens = static_cast<int>(p.img_tokens);
  if (tiles == 0) return store_empty<T, kD>(p, work, kM, static_cast<int>(threadIdx.x), kThreads);
  char* stages = shared + Shape::kQBytes;
  const float scale = p.scale * kLog2E;

  // A text query past the length is not copied, so its row of Q is zero here; finish() makes its output zero.
  copy_rows<T, kD, kM, kThreads, kAligned>(shared, work.image ? p.q_img : p.q_txt, work.batch, work.head,
                                           work.first_query, work.queries);
  cp_async_commit_group();
  copy_keys<T, kD, kAligned>(stages, p, work, 0);
  cp_async_commit_group();
  cp_async_wait_group<1>();
  __syncthreads();
  uint32_t queries[kD / 16][4];
#pragma unroll
  for (int d = 0; d < kD / 16; ++d) load_left<kD>(queries[d], shared, warp * 16, d);

  Softmax<T, kN, kD> state;
#pragma unroll
  for (int i = 0; i < kD / 2; ++i) state.out[i] = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles)
      copy_keys<T, kD, kAligned>(stages + (tile + 1) % kStages * Shape::kStageBytes, p, work, tile + 1);
    cp_async_commit_group();
    cp_async_wait_group<1>();
    __syncthreads();
    const char* stage = stages + tile % kStages * Shape::kStageBytes;
    float scores[kN / 2], factor[2];
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) scores[i] = 0;
#pragma unroll
    for (int d = 0; d < kD / 16; ++d) multiply_transposed<T, kN, kD>(scores, queries[d], stage, d);
    const int existing = keys_in<kN>(work, image_tokens, tile);
    if (existing < kN) mask_keys(scores, existing);
    state.step(scores, scale, factor, tile == 0);
    state.rescale(factor);
    state.pack_probabilities(scores);
    multiply<T, kN, kD>(state.out, state.probabilities, stage + Shape::kKeyBytes);
    __syncthreads();  // the stage is read; the next round writes to it
  }
  state.finish(p, work, warp * 16 + lane / 4);
  store_rows<T, kD, kAligned>(work.image ? p.out_img : p.out_txt, work.batch, work.head, work.first_query,
                              static_cast<int>(work.image ? p.img_tokens : p.txt_tokens), shared, state.out);
}

// Launchers ------------------------------------------------------------------------------------------------------

template <typename T, int kD, bool kAligned>
int launch(const pydit_joint_attention_params& p) {
  const int64_t blocks = p.batch * p.heads * count_query_tiles<kM>(p);
  if (blocks > INT32_MAX) return bad_argument("joint_attention: expected at most 2^31 - 1 tiles, got more");
  constexpr int kBytes = Tile<kD>::kSharedBytes;
  const cudaError_t error = cudaFuncSetAttribute(joint_attention_kernel<T, kD, kAligned>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return launch_status("joint_attention", error);
  name_joint_attention_tensors<T>(p);
  return launch_status("joint_attention",
                       PYDIT_LAUNCH((joint_attention_kernel<T, kD, kAligned>), dim3(static_cast<unsigned>(blocks)),
                                    dim3(kThreads), kBytes, static_cast<cudaStream_t>(p.stream), p));
}

// Whether 16-byte accesses are legal everywhere.
bool aligned(const pydit_joint_attention_params& p) {
  const auto legal = [&](const pydit_heads& t, int64_t tokens) { return is_aligned(t, p.batch, tokens, p.heads); };
  bool all = true;
  for (const pydit_heads* t : {&p.q_img, &p.k_img, &p.v_img, &p.out_img}) all = all && legal(*t, p.img_tokens);
  for (const pydit_heads* t : {&p.q_txt, &p.k_txt, &p.v_txt, &p.out_txt}) all = all && legal(*t, p.txt_tokens);
  return all;
}

// Whether TMA can address all tensors. A stride of 0, that of an expanded tensor, is not documented to work.
bool tma_addressable(const pydit_joint_attention_params& p) {
  const auto expanded = [&](const pydit_heads& t, int64_t tokens) { return is_expanded(t, p.batch, tokens, p.heads); };
  for (const pydit_heads* t : {&p.q_img, &p.k_img, &p.v_img, &p.out_img})
    if (expanded(*t, p.img_tokens)) return false;
  for (const pydit_heads* t : {&p.q_txt, &p.k_txt, &p.v_txt, &p.out_txt})
    if (expanded(*t, p.txt_tokens)) return false;
  return aligned(p);
}

template <typename T, int kD>
int launch_alignment(const pydit_joint_attention_params& p) {
  return aligned(p) ? launch<T, kD, true>(p) : launch<T, kD, false>(p);
}

template <typename T>
int launch_head_dim(const pydit_joint_attention_params& p) {
  if (p.head_dim == 32) return launch_alignment<T, 32>(p);
  if (p.head_dim == 64) return launch_alignment<T, 64>(p);
  return launch_alignment<T, 128>(p);
}

}  // namespace
}  // namespace pydit::PYDIT_BACKEND

using namespace pydit::PYDIT_BACKEND;

extern "C" int PYDIT_ENTRY(joint_attention_path)(const pydit_joint_attention_params* p) {
  return hopper_path(tma_addressable(*p));
}

extern "C" int PYDIT_ENTRY(joint_attention)(const pydit_joint_attention_params* p) {
  const int status = check_arguments("joint_attention", *p);
  if (status != kOk) return status;
  const bool queries = p->img_tokens > 0 || (p->txt_tokens > 0 && p->q_txt.data != nullptr);
  if (p->batch == 0 || p->heads == 0 || !queries) return kOk;
#if defined(PYDIT_SIM) || defined(PYDIT_WITH_HOPPER)
  if (PYDIT_ENTRY(joint_attention_path)(p) == PYDIT_PATH_HOPPER) return launch_joint_attention_sm90(*p);
#endif
  return p->dtype == PYDIT_FLOAT16 ? launch_head_dim<__half>(*p) : launch_head_dim<__nv_bfloat16>(*p);
}
