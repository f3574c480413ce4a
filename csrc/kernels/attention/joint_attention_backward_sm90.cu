// Backward of joint attention for Hopper (sm_90a): TMA, wgmma, warp specialisation. The formulas are in
// joint_attention_backward.cu.
//
// Work. A block owns kN = 128 keys of one stream, head and sample, with their values, and walks through the queries of
// both streams in tiles of kM = 64. Each step has five products: S^T = K Q^T and dP^T = V dO^T, from which dS^T
// follows; dV += P^T dO, with P in the registers where the first left it; dQ = dS K, for which dS goes through shared
// memory, as it sums over the keys of both warpgroups; and dK += dS^T Q, which reads dS there too: registers could not
// hold it beside P. TMA adds dQ to an fp32 buffer; a last kernel scales it and converts it to the tensor's dtype and
// layout.
//
// Cost at S = 6889 + 512, H = 24, D = 128: 10 S^2 D H = 1683 GFLOP, 1.70 ms at 989 TFLOP/s. A step takes 2560 cycles of
// tensor cores but moves 384 KB through shared memory, 3072 cycles at 128 bytes: at best 83 % of the peak, 2.04 ms.
// With dS in registers it would be 87 %, with 80 queries a step 92 %; neither fits (240 registers a thread). L2
// supplies 5.3 GB of queries and takes 5.3 GB of dQ.
//
// Roles. One warp loads, one adds dQ to memory; two warpgroups of 64 keys each multiply. A thread holds dK and dV (128
// registers at D = 128), S and dP, later the next S and dQ (64), and P (16). The exponentials run under dP = V dO^T, dS
// is computed under dV += P^T dO, and dQ is written out under the next step's S and dK += dS^T Q. dK runs on into the
// next step, so that the tensor cores always have a product.
//
// Deterministic mode. dQ is added up in the order of the key tiles: the adding warp waits for the tile before its own.
// Blocks take tiles by a ticket, so that one waits only for blocks that have begun.
//
// Padding. The loading warp zeroes rows of the text past its length, which may hold NaN, in shared memory. A query that
// does not exist has lse = inf and so P = 0; scores of keys that do not exist become -inf.
#include "device/check.h"
#include "device/dispatch.h"
#include "device/ptx.cuh"
#include "device/ring.cuh"
#include "kernels/attention/joint_attention.cuh"
#include "kernels/attention/joint_attention.h"
#include "kernels/attention/joint_attention_backward.h"
#include "kernels/attention/joint_attention_sm90.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2;
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kN = 64 * kConsumers;  // keys of a block
constexpr int kM = kQueriesOfBackwardTile;
constexpr int kQStages = 3;  // Q is needed longest: from S = Q K^T, issued a step early, to dK, which ends a step late
constexpr int kStages = 2;   // of dO, and of dS
constexpr int kLoaderRegisters = 24, kConsumerRegisters = 240;
static_assert(kM == 64, "dQ has kM rows, those of one wgmma");

template <int kD>
struct Tile {
  // A row of D elements is split over two boxes, each kSpan bytes wide and swizzled: the columns of dQ that one
  // warpgroup computes.
  static constexpr int kBoxes = 2, kSpan = kD, kBoxColumns = kD / 2;
  // Shared memory: K and V, later dK and dV; stages of Q, dO and dS; dQ; lse and delta of a stage; barriers.
  static constexpr int kKeyBytes = kN * kD * 2, kQueryBytes = kM * kD * 2, kScoreBytes = kM * kN * 2;
  static constexpr int kSumBytes = kM * kD * 4;
  static constexpr int kK = 0, kV = kKeyBytes, kQ = 2 * kKeyBytes, kDOut = kQ + kQStages * kQueryBytes;
  static constexpr int kScores = kDOut + kStages * kQueryBytes, kSums = kScores + kStages * kScoreBytes;
  static constexpr int kLse = kSums + kSumBytes, kDelta = kLse + kQStages * kM * 4;
  static constexpr int kBarriers = kDelta + kStages * kM * 4;
  static constexpr int kSharedBytes = kBarriers + 128;
  static constexpr int kSumRows = kM * kD / kConsumers / kSumColumns;  // of the fp32 buffer, from one warpgroup
  static_assert(kSharedBytes <= 227 * 1024, "what a block may have");
  static_assert(kM * kSpan % 1024 == 0, "a box begins at a multiple of the swizzle's period");
};

struct Maps {
  TensorMap q_img, k_img, v_img, d_out_img, d_k_img, d_v_img;
  TensorMap q_txt, k_txt, v_txt, d_out_txt, d_k_txt, d_v_txt;
  TensorMap sums;
};

struct Barriers {
  uint64_t keys_full, landed;
  uint64_t q_full[kQStages], q_empty[kQStages], d_out_full[kStages], d_out_empty[kStages];
  uint64_t sums_full[kConsumers], sums_empty[kConsumers];
};

// The keys that a block owns, and the queries that it walks through.
struct Keys {
  int batch, head, first;
  int rows;     // keys that exist from `first` on
  int ordinal;  // of this tile among those of the head and sample
  bool image;
  int text;  // tokens of this sample's text that take part
  int image_steps, steps;
  int sums;  // the first tile of this head and sample in the fp32 buffer
};

__device__ __forceinline__ Keys decode_keys(const BackwardParams& p, int index) {
  const int image_tokens = static_cast<int>(p.img_tokens), text_tokens = static_cast<int>(p.txt_tokens);
  const int image_tiles = (image_tokens + kN - 1) / kN, text_tiles = (text_tokens + kN - 1) / kN;
  Keys keys;
  keys.ordinal = index % (image_tiles + text_tiles);
  const int rest = index / (image_tiles + text_tiles);
  keys.head = rest % p.heads;
  keys.batch = rest / p.heads;
  keys.image = keys.ordinal < image_tiles;
  keys.first = (keys.image ? keys.ordinal : keys.ordinal - image_tiles) * kN;
  keys.text = text_length(p, keys.batch);
  keys.rows = (keys.image ? image_tokens : keys.text) - keys.first;
  keys.image_steps = (image_tokens + kM - 1) / kM;
  keys.steps = keys.rows > 0 ? keys.image_steps + (p.q_txt.data == nullptr ? 0 : (keys.text + kM - 1) / kM) : 0;
  keys.sums = rest * query_tiles(p);
  return keys;
}

// Loading --------------------------------------------------------------------------------------------------------

// Loads kRows rows of a head; those from `valid` on become zeros. All lanes call; `full` completes when all are there.
template <int kD, int kRows>
__device__ __forceinline__ void load_rows(char* to, const TensorMap& map, uint64_t* full, Barriers* barriers,
                                          uint32_t& landed_parity, int first, int valid, int tokens, const Keys& keys,
                                          bool issuer) {
  using Shape = Tile<kD>;
  const bool padded = valid < kRows && valid < tokens - first;
  uint64_t* landed = padded ? &barriers->landed : full;
  if (issuer) {
    mbarrier_arrive_expect_tx(landed, kRows * kD * 2);
    load_boxes<kD, Shape::kSpan>(to, map, landed, kRows, first, keys.head, keys.batch);
  }
  if (!padded) return;
  mbarrier_wait(landed, landed_parity);
  landed_parity ^= 1;
  zero_rows<kD, Shape::kSpan, kRows>(to, valid);
  __syncwarp();
  if (issuer) mbarrier_arrive(full);
}

// One warp; all lanes wait, one issues. keys_full counts K and V.
template <int kD>
__device__ __forceinline__ void load(const BackwardParams& p, const Maps& maps, char* shared, Barriers* barriers,
                                     const Keys& keys) {
  using Shape = Tile<kD>;
  const int lane = threadIdx.x % 32;
  const bool issuer = elect_one();
  const int image_tokens = static_cast<int>(p.img_tokens), text_tokens = static_cast<int>(p.txt_tokens);
  uint32_t landed_parity = 0;
  {
    const int tokens = keys.image ? image_tokens : text_tokens;
    load_rows<kD, kN>(shared + Shape::kK, keys.image ? maps.k_img : maps.k_txt, &barriers->keys_full, barriers,
                      landed_parity, keys.first, keys.rows, tokens, keys, issuer);
    load_rows<kD, kN>(shared + Shape::kV, keys.image ? maps.v_img : maps.v_txt, &barriers->keys_full, barriers,
                      landed_parity, keys.first, keys.rows, tokens, keys, issuer);
  }
  Ring<kQStages> queries;
  Ring<kStages> d_outs;
  for (int step = 0; step < keys.steps; ++step) {
    const bool image = step < keys.image_steps;
    const int first = (image ? step : step - keys.image_steps) * kM, tokens = image ? image_tokens : text_tokens;
    const int valid = (image ? image_tokens : keys.text) - first;
    // Read before the wait, so that they have arrived by the time the stage is free.
    const int64_t base = (static_cast<int64_t>(keys.batch) * p.heads + keys.head) * tokens + first;
    float lse[kM / 32], delta[kM / 32];
#pragma unroll
    for (int i = 0; i < kM / 32; ++i) {
      const int row = lane + 32 * i;
      lse[i] = row < valid ? (image ? p.lse_img : p.lse_txt)[base + row] * kLog2E : INFINITY;
      delta[i] = row < valid ? (image ? p.delta_img : p.delta_txt)[base + row] : 0.f;
    }
    auto* lse_rows = reinterpret_cast<float*>(shared + Shape::kLse) + queries.slot * kM;
    auto* delta_rows = reinterpret_cast<float*>(shared + Shape::kDelta) + d_outs.slot * kM;
    mbarrier_wait(&barriers->q_empty[queries.slot], queries.parity ^ 1);
#pragma unroll
    for (int i = 0; i < kM / 32; ++i) lse_rows[lane + 32 * i] = lse[i];
    __syncwarp();
    load_rows<kD, kM>(shared + Shape::kQ + queries.slot * Shape::kQueryBytes, image ? maps.q_img : maps.q_txt,
                      &barriers->q_full[queries.slot], barriers, landed_parity, first, valid, tokens, keys, issuer);
    mbarrier_wait(&barriers->d_out_empty[d_outs.slot], d_outs.parity ^ 1);
#pragma unroll
    for (int i = 0; i < kM / 32; ++i) delta_rows[lane + 32 * i] = delta[i];
    __syncwarp();
    load_rows<kD, kM>(shared + Shape::kDOut + d_outs.slot * Shape::kQueryBytes, image ? maps.d_out_img : maps.d_out_txt,
                      &barriers->d_out_full[d_outs.slot], barriers, landed_parity, first, valid, tokens, keys, issuer);
    queries.next();
    d_outs.next();
  }
}

// Adding up dQ ---------------------------------------------------------------------------------------------------

// One thread. A warpgroup's part of a tile is kSumRows whole rows of the buffer.
template <int kD, bool kDeterministic>
__device__ __forceinline__ void add_sums(const BackwardParams& p, const Maps& maps, const char* shared,
                                         Barriers* barriers, const Keys& keys) {
  using Shape = Tile<kD>;
  const char* sums = shared + Shape::kSums;
  const int image_tiles = (static_cast<int>(p.img_tokens) + kM - 1) / kM;
  for (int step = 0; step < keys.steps; ++step) {
    const int tile = keys.sums + (step < keys.image_steps ? step : image_tiles + step - keys.image_steps);
    if constexpr (kDeterministic) wait_at_least(p.semaphores + tile, static_cast<unsigned>(keys.ordinal));
#pragma unroll
    for (int group = 0; group < kConsumers; ++group) {
      mbarrier_wait(&barriers->sums_full[group], step & 1);
      tma_reduce_add_2d(maps.sums, sums + group * Shape::kSumBytes / kConsumers, 0,
                        (tile * kConsumers + group) * Shape::kSumRows);
      bulk_commit_group();
    }
    bulk_wait_group_read<1>();
    mbarrier_arrive(&barriers->sums_empty[0]);
    bulk_wait_group_read<0>();
    mbarrier_arrive(&barriers->sums_empty[1]);
    if constexpr (kDeterministic) {
      bulk_wait_group<0>();
      reduce_release(p.semaphores + tile, 1);
    }
  }
}

// Multiplying ----------------------------------------------------------------------------------------------------

// out = own rows^T, issued and committed: 64 keys (of K or V) by kM queries (of Q or dO).
template <typename T, int kD>
__device__ __forceinline__ void multiply_queries(float (&out)[kM / 2], const char* keys, const char* queries) {
  multiply_rows<T, kD, Tile<kD>::kSpan, kN, kM>(out, keys, queries);
}

// out (+)= P^T dO, issued and committed: 64 keys by D, over kM queries.
template <typename T, int kD>
__device__ __forceinline__ void add_weighted(float (&out)[kD / 2], const uint32_t (&weights)[kM / 16][4],
                                             const char* d_out, bool accumulate) {
  multiply_registers<T, kD, Tile<kD>::kSpan, kM>(out, weights, d_out, accumulate);
}

// out (+)= dS^T Q, issued and committed: 64 keys by D, over kM queries. `scores`: the keys' box of dS.
template <typename T, int kD>
__device__ __forceinline__ void add_scored(float (&out)[kD / 2], const char* scores, const char* q, bool accumulate) {
  using Shape = Tile<kD>;
#pragma unroll
  for (int k = 0; k < kM / 16; ++k) {
    wgmma<T, kD, true, true>(
        out, matrix_descriptor<128>(scores + k * 16 * 128, kM * 128, 8 * 128),
        matrix_descriptor<Shape::kSpan>(q + k * 16 * Shape::kSpan, kM * Shape::kSpan, 8 * Shape::kSpan),
        accumulate || k > 0);
  }
  wgmma_commit_group();
}

// out = dS K, issued and committed: kM queries by the columns of one box of K, over all keys of the block.
template <typename T, int kD>
__device__ __forceinline__ void multiply_scores(float (&out)[kD / 4], const char* scores, const char* box) {
  using Shape = Tile<kD>;
#pragma unroll
  for (int k = 0; k < kN / 16; ++k) {
    wgmma<T, Shape::kBoxColumns, false, true>(
        out, matrix_descriptor<128>(scores + k / 4 * kM * 128 + k % 4 * 32, 16, 8 * 128),
        matrix_descriptor<Shape::kSpan>(box + k * 16 * Shape::kSpan, kN * Shape::kSpan, 8 * Shape::kSpan), k > 0);
  }
  wgmma_commit_group();
}

// One warpgroup of 64 keys; `group` counts the consumers from 0.
template <typename T, int kD>
struct Consumer {
  using Shape = Tile<kD>;
  char* shared;
  Barriers* barriers;
  int group, warp, lane;
  int rows;  // keys that exist from this warpgroup's first on
  float scale;
  float d_k[kD / 2], d_v[kD / 2], scores[kM / 2];  // scores: S^T of the step at hand
  Ring<kQStages> queries;
  Ring<kStages> d_outs;

  __device__ __forceinline__ const char* my_rows(int offset) const {
    return shared + offset + group * 64 * Shape::kSpan;
  }

  // Issues S^T of the step that `queries` is at.
  __device__ __forceinline__ void begin() {
    mbarrier_wait(&barriers->q_full[queries.slot], queries.parity);
    wgmma_fence();
    multiply_queries<T, kD>(scores, my_rows(Shape::kK), shared + Shape::kQ + queries.slot * Shape::kQueryBytes);
  }

  // With S^T in `scores`; dK of the step before may still run.
  template <bool kLast>
  __device__ __forceinline__ void step(int index) {
    const int slot = queries.slot, d_out_slot = d_outs.slot;
    const char* q = shared + Shape::kQ + slot * Shape::kQueryBytes;
    const char* d_out = shared + Shape::kDOut + d_out_slot * Shape::kQueryBytes;
    const auto* lses = reinterpret_cast<const float*>(shared + Shape::kLse) + slot * kM + lane % 4 * 2;
    const auto* deltas = reinterpret_cast<const float*>(shared + Shape::kDelta) + d_out_slot * kM + lane % 4 * 2;
    float inner[kM / 2];
    mbarrier_wait(&barriers->d_out_full[d_out_slot], d_outs.parity);
    wgmma_fence();
    multiply_queries<T, kD>(inner, my_rows(Shape::kV), d_out);
    if (rows < 64) {
#pragma unroll
      for (int i = 0; i < kM / 2; ++i) {
        if (warp * 16 + lane / 4 + i / 2 % 2 * 8 >= rows) scores[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < kM / 8; ++i) {
      const float2 lse = *reinterpret_cast<const float2*>(lses + i * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& score = scores[4 * i + j];
        score = probability(score, scale, j % 2 == 0 ? lse.x : lse.y);
      }
    }
    uint32_t weights[kM / 16][4];
#pragma unroll
    for (int k = 0; k < kM / 16; ++k) pack_left<T>(weights[k], scores + 8 * k);
    wgmma_fence();
    add_weighted<T, kD>(d_v, weights, d_out, index > 0);
    wgmma_wait_group<1>();  // dK of the step before, and dP^T
    if (index > 0 && lane == 0) mbarrier_arrive(&barriers->q_empty[(slot + kQStages - 1) % kQStages]);
#pragma unroll
    for (int i = 0; i < kM / 8; ++i) {
      const float2 delta = *reinterpret_cast<const float2*>(deltas + i * 8);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        inner[4 * i + j] = scores[4 * i + j] * (inner[4 * i + j] - (j % 2 == 0 ? delta.x : delta.y));
    }
    // dS: queries by keys, a box of 64 keys per warpgroup; the registers hold it transposed. Two buffers suffice:
    // whoever reaches the barrier below has waited for its dQ of the step before, so nobody still reads the next step's
    // buffer.
    char* all_scores = shared + Shape::kScores + (index & 1) * Shape::kScoreBytes;
    char* my_scores = all_scores + group * kM * 128;
#pragma unroll
    for (int k = 0; k < kM / 16; ++k) {
      uint32_t d_scores[4];
      pack_left<T>(d_scores, inner + 8 * k);
      const int query = k * 16 + lane / 16 * 8 + lane % 8, key = warp * 16 + lane / 8 % 2 * 8;
      const int offset = query * 128 + key * 2;
      stmatrix<true>(my_scores + tma_swizzle<128>(offset), d_scores);
    }
    fence_proxy_async();
    barrier_sync(1, kConsumers * kWarpgroup);
    float d_q[kD / 4];
    wgmma_fence();
    multiply_scores<T, kD>(d_q, all_scores, shared + Shape::kK + group * kN * Shape::kSpan);
    queries.next();
    d_outs.next();
    if constexpr (!kLast) begin();
    add_scored<T, kD>(d_k, my_scores, q, index > 0);
    wgmma_wait_group<kLast ? 2 : 3>();  // dV
    if (lane == 0) mbarrier_arrive(&barriers->d_out_empty[d_out_slot]);
    wgmma_wait_group<kLast ? 1 : 2>();  // dQ
    mbarrier_wait(&barriers->sums_empty[group], (index & 1) ^ 1);
    char* sums = shared + Shape::kSums + group * Shape::kSumBytes / kConsumers + (warp * 32 + lane) * 16;
#pragma unroll
    for (int i = 0; i < kD / 16; ++i) {
      *reinterpret_cast<float4*>(sums + i * kWarpgroup * 16) =
          make_float4(d_q[4 * i], d_q[4 * i + 1], d_q[4 * i + 2], d_q[4 * i + 3]);
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&barriers->sums_full[group]);
    wgmma_wait_group<kLast ? 0 : 1>();  // the next S^T; dK may run on, but in the last step
  }
};

// Stores zero gradients for keys without a query, or past the length. `thread` counts all consumers' threads.
template <typename T, int kD>
__device__ __forceinline__ void store_zeros(const BackwardParams& p, const Keys& keys, int thread) {
  const int tokens = static_cast<int>(keys.image ? p.img_tokens : p.txt_tokens);
  for (int i = thread; i < kN * kD; i += kConsumers * kWarpgroup) {
    const int row = keys.first + i / kD;
    if (row >= tokens) return;
    for (const pydit_heads* t : {keys.image ? &p.d_k_img : &p.d_k_txt, keys.image ? &p.d_v_img : &p.d_v_txt})
      static_cast<T*>(t->data)[keys.batch * t->stride_b + row * t->stride_s + keys.head * t->stride_h + i % kD] =
          from_float<T>(0.f);
  }
}

template <typename T, int kD>
__device__ __forceinline__ void consume(const BackwardParams& p, const Maps& maps, char* shared, Barriers* barriers,
                                        const Keys& keys, int group) {
  using Shape = Tile<kD>;
  const int thread = threadIdx.x % kWarpgroup;
  if (keys.steps == 0) return store_zeros<T, kD>(p, keys, group * kWarpgroup + thread);
  Consumer<T, kD> own;
  own.shared = shared, own.barriers = barriers, own.group = group, own.warp = thread / 32, own.lane = thread % 32;
  own.rows = keys.rows - group * 64;
  own.scale = p.scale * kLog2E;
  mbarrier_wait(&barriers->keys_full, 0);
  own.begin();
  wgmma_wait_group<0>();  // S^T, as at the end of a step
  for (int step = 0; step + 1 < keys.steps; ++step) own.template step<false>(step);
  own.template step<true>(keys.steps - 1);
  barrier_sync(1, kConsumers * kWarpgroup);  // nobody reads K for dQ any more
  char *d_k = shared + Shape::kK + group * 64 * Shape::kSpan, *d_v = shared + Shape::kV + group * 64 * Shape::kSpan;
  store_to_boxes<T, kD, Shape::kSpan, kN>(d_k, own.d_k, p.scale, own.warp, own.lane);
  store_to_boxes<T, kD, Shape::kSpan, kN>(d_v, own.d_v, 1.f, own.warp, own.lane);
  fence_proxy_async();
  barrier_sync(2 + group, kWarpgroup);
  if (thread == 0) {
#pragma unroll
    for (int box = 0; box < Shape::kBoxes; ++box) {
      const int column = box * Shape::kBoxColumns, row = keys.first + group * 64, offset = box * kN * Shape::kSpan;
      tma_store_4d(keys.image ? maps.d_k_img : maps.d_k_txt, d_k + offset, column, row, keys.head, keys.batch);
      tma_store_4d(keys.image ? maps.d_v_img : maps.d_v_txt, d_v + offset, column, row, keys.head, keys.batch);
    }
    bulk_commit_group();
    bulk_wait_group_read<0>();
  }
}

// Kernels --------------------------------------------------------------------------------------------------------

template <typename T, int kD, bool kDeterministic>
__global__ void __launch_bounds__(kThreads, 1)
    joint_attention_backward_sm90_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ Maps maps) {
  using Shape = Tile<kD>;
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* barriers = reinterpret_cast<Barriers*>(shared + Shape::kBarriers);
  auto* ticket = reinterpret_cast<unsigned*>(shared + Shape::kLse);  // until the first stage is loaded
  if (threadIdx.x == 0) {
    mbarrier_init(&barriers->keys_full, 2);  // K, V
    mbarrier_init(&barriers->landed, 1);
    for (int stage = 0; stage < kQStages; ++stage) {
      mbarrier_init(&barriers->q_full[stage], 1);
      mbarrier_init(&barriers->q_empty[stage], 4 * kConsumers);  // a lane of each warp
    }
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&barriers->d_out_full[stage], 1);
      mbarrier_init(&barriers->d_out_empty[stage], 4 * kConsumers);
    }
    for (int group = 0; group < kConsumers; ++group) {
      mbarrier_init(&barriers->sums_full[group], 4);
      mbarrier_init(&barriers->sums_empty[group], 1);
    }
    fence_barrier_init();
    if constexpr (kDeterministic) *ticket = atomicAdd(p.ticket, 1u);
  }
  __syncthreads();
  int index = static_cast<int>(blockIdx.x);
  if constexpr (kDeterministic) {
    index = static_cast<int>(*ticket);
    __syncthreads();
  }
  const Keys keys = decode_keys(p, index);
  if (threadIdx.x < kWarpgroup) {
    set_max_registers_down<kLoaderRegisters>();
    if (keys.steps == 0) return;
    if (threadIdx.x < 32) load<kD>(p, maps, shared, barriers, keys);
    if (threadIdx.x == 32) add_sums<kD, kDeterministic>(p, maps, shared, barriers, keys);
  } else {
    set_max_registers_up<kConsumerRegisters>();
    consume<T, kD>(p, maps, shared, barriers, keys, static_cast<int>(threadIdx.x) / kWarpgroup - 1);
  }
}

// d_q = scale * sums: a tile of kM queries per block. A warpgroup's part of the buffer holds, for every 8 of its
// columns, four numbers of each of its threads as wgmma leaves them. Four neighbouring threads had 8 columns of two
// rows, which one thread here reads and stores; neighbouring lanes take neighbouring columns.
constexpr int kConvertThreads = 256;

template <typename T, int kD>
__global__ void __launch_bounds__(kConvertThreads) joint_attention_d_q_kernel(const BackwardParams p) {
  const int image_tokens = static_cast<int>(p.img_tokens), text_tokens = static_cast<int>(p.txt_tokens);
  const int image_tiles = (image_tokens + kM - 1) / kM, tiles = query_tiles(p);
  const int tile = static_cast<int>(blockIdx.x) % tiles, rest = static_cast<int>(blockIdx.x) / tiles;
  const int head = rest % p.heads, batch = rest / p.heads;
  const bool image = tile < image_tiles;
  const int first = (image ? tile : tile - image_tiles) * kM, tokens = image ? image_tokens : text_tokens;
  const pydit_heads& t = image ? p.d_q_img : p.d_q_txt;
  const auto* sums = reinterpret_cast<const float4*>(p.sums) + static_cast<int64_t>(blockIdx.x) * (kM * kD / 4);
  constexpr int kGroups = kD / 8;  // of 8 columns
  for (int i = threadIdx.x; i < kM / 2 * kGroups; i += kConvertThreads) {
    const int group = i % kGroups, pair = i / kGroups;  // rows pair / 8 * 16 + pair % 8, and 8 on
    const float4* from = sums + group * kWarpgroup + pair / 8 * 32 + pair % 8 * 4;
    Pack<T, 8> top, bottom;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 four = from[j];
      top.set(2 * j, four.x * p.scale), top.set(2 * j + 1, four.y * p.scale);
      bottom.set(2 * j, four.z * p.scale), bottom.set(2 * j + 1, four.w * p.scale);
    }
    const int row = first + pair / 8 * 16 + pair % 8;
    T* to = static_cast<T*>(t.data) + batch * t.stride_b + row * t.stride_s + head * t.stride_h + group * 8;
    if (row < tokens) top.store(to);
    if (row + 8 < tokens) bottom.store(to + 8 * t.stride_s);
  }
}

// Launcher -------------------------------------------------------------------------------------------------------

template <typename T, int kD>
const char* encode_all(Maps& maps, const BackwardParams& p) {
  const char* reason = nullptr;
  const auto add = [&](TensorMap* map, const pydit_heads& t, int64_t tokens, int rows) {
    if (reason == nullptr) reason = encode_heads<T>(map, t, tokens, p, rows, Tile<kD>::kSpan);
  };
  add(&maps.q_img, p.q_img, p.img_tokens, kM), add(&maps.q_txt, p.q_txt, p.txt_tokens, kM);
  add(&maps.d_out_img, p.d_out_img, p.img_tokens, kM), add(&maps.d_out_txt, p.d_out_txt, p.txt_tokens, kM);
  add(&maps.k_img, p.k_img, p.img_tokens, kN), add(&maps.k_txt, p.k_txt, p.txt_tokens, kN);
  add(&maps.v_img, p.v_img, p.img_tokens, kN), add(&maps.v_txt, p.v_txt, p.txt_tokens, kN);
  add(&maps.d_k_img, p.d_k_img, p.img_tokens, 64), add(&maps.d_k_txt, p.d_k_txt, p.txt_tokens, 64);
  add(&maps.d_v_img, p.d_v_img, p.img_tokens, 64), add(&maps.d_v_txt, p.d_v_txt, p.txt_tokens, 64);
  if (reason != nullptr || query_tiles(p) == 0) return reason;
  const uint64_t size[2] = {kSumColumns, static_cast<uint64_t>(count_sums(p)) / kSumColumns};
  const uint64_t stride[1] = {kSumColumns * sizeof(float)};
  const uint32_t box[2] = {kSumColumns, Tile<kD>::kSumRows};
  return encode_tensor_map(&maps.sums, p.sums, 2, size, stride, box, Swizzle::kNone);
}

template <typename T, int kD, bool kDeterministic>
int launch_products(const BackwardParams& p, const Maps& maps, int64_t blocks) {
  constexpr auto kernel = joint_attention_backward_sm90_kernel<T, kD, kDeterministic>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile<kD>::kSharedBytes);
  if (error != cudaSuccess) return launch_status(kBackward, error);
  name_backward_tensors<T>(p);
  return launch_status(kBackward, PYDIT_LAUNCH((joint_attention_backward_sm90_kernel<T, kD, kDeterministic>),
                                               dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                                               Tile<kD>::kSharedBytes, static_cast<cudaStream_t>(p.stream), p, maps));
}

template <typename T, int kD>
int launch(const BackwardParams& p) {
  const int64_t blocks = p.batch * p.heads * (ceil_div(p.img_tokens, kN) + ceil_div(p.txt_tokens, kN));
  const int64_t converted = p.batch * p.heads * query_tiles(p);
  if (blocks > INT32_MAX || converted > INT32_MAX / 64)
    return bad_argument("%s: expected at most 2^31 - 1 tiles, got more", kBackward);
  if (blocks == 0) return kOk;  // no key, so no query either
  Maps maps;
  if (const char* reason = encode_all<T, kD>(maps, p)) return bad_argument("%s: %s", kBackward, reason);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  const cudaError_t error = cudaMemsetAsync(p.sums, 0, static_cast<size_t>(bytes_to_clear(p)), stream);
  if (error != cudaSuccess) return launch_status(kBackward, error);
  const int status =
      p.deterministic ? launch_products<T, kD, true>(p, maps, blocks) : launch_products<T, kD, false>(p, maps, blocks);
  if (status != kOk || converted == 0) return status;
  name_backward_tensors<T>(p);
  return launch_status(kBackward,
                       PYDIT_LAUNCH((joint_attention_d_q_kernel<T, kD>), dim3(static_cast<unsigned>(converted)),
                                    dim3(kConvertThreads), 0, stream, p));
}

template <typename T>
int launch_head_dim(const BackwardParams& p) {
  if (p.head_dim == 32) return launch<T, 32>(p);
  if (p.head_dim == 64) return launch<T, 64>(p);
  return launch<T, 128>(p);
}

}  // namespace

int launch_joint_attention_backward_sm90(const BackwardParams& p) {
  return p.dtype == PYDIT_FLOAT16 ? launch_head_dim<__half>(p) : launch_head_dim<__nv_bfloat16>(p);
}

}  // namespace pydit::PYDIT_BACKEND
