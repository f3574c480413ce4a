// Joint attention for Hopper (sm_90a): TMA, wgmma, warp specialisation.
//
// out = softmax(scale * q k^T) v over the keys of two streams that stay in tensors of their own; see pydit.h.
//
// Work. A tile is kM queries of one stream, head and sample, against all keys of both streams in steps of kN. Blocks
// are persistent, one per SM, and take tiles in turn; tiles of one head and sample are neighbours, so that K and V come
// from L2. At S = 6889 + 512, H = 24, D = 128 (bf16): 673 GFLOP, 680 us at 989 TFLOP/s; 58 x 24 tiles on 132 SMs are
// 10.5 waves. Memory moves 182 MB (38 us); L2 supplies all K and V once per tile, 5.3 GB, 7.8 TB/s at the floor, which
// is near its limit and why kM is not smaller.
//
// Roles. One warp produces: it waits for a stage of K or V to be free and has TMA fill it. kConsumers warpgroups of 64
// queries each multiply. Their registers are taken from the producer's (setmaxnreg).
//
// Overlap. Within a warpgroup, S_j = Q K_j^T is issued together with O += P_{j-1} V_{j-1}, and the softmax of S_j runs
// under the second product. Between warpgroups, a ring of named barriers lets one issue its products while the other is
// in its softmax (ping-pong): at D = 128 exponentials take half as long as both products. Between tiles, the first K
// and V are loaded while the outputs are finished and stored; Q, whose memory the outputs take, only afterwards.
//
// Text padding. Tiles of queries past the sample's length are dealt out last; tiles of keys past it are not loaded. In
// the one tile that the length cuts, scores of padded keys become -inf, and padded rows of V, which may hold NaN, are
// zeroed in shared memory before use.
#include "device/check.h"
#include "device/dispatch.h"
#include "device/ptx.cuh"
#include "device/ring.cuh"
#include "kernels/attention/joint_attention.cuh"
#include "kernels/attention/joint_attention.h"
#include "kernels/attention/joint_attention_sm90.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kWarpgroup = 128;
constexpr int kStages = 2;  // of K, and of V

// Tile sizes. Accumulators of a thread: kN / 2 scores, kD / 2 outputs, and kN / 4 registers of probabilities.
template <int kD>
struct Tile {
  static constexpr int kConsumers = kD == 128 ? 2 : 3;
  static constexpr int kN = kD == 128 ? 176 : 128;
  static constexpr int kM = 64 * kConsumers;
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  // A row of D elements is split over kBoxes boxes, each kSpan bytes wide and swizzled.
  static constexpr int kSpan = kD == 32 ? 64 : 128;
  static constexpr int kBoxes = kD * 2 / kSpan;
  static constexpr int kBoxColumns = kSpan / 2;
  // Shared memory: Q, later the outputs; stages of K and V; barriers.
  static constexpr int kQBytes = kM * kD * 2, kKeyBytes = kN * kD * 2;
  static constexpr int kK = kQBytes, kV = kK + kStages * kKeyBytes, kBarriers = kV + kStages * kKeyBytes;
  static constexpr int kSharedBytes = kBarriers + 128;
  static_assert(kSharedBytes <= 227 * 1024, "what a block may have");
  static_assert(kQBytes % 1024 == 0 && kN * kSpan % 1024 == 0, "a box begins at a multiple of the swizzle's period");
};

struct Maps {
  TensorMap q_img, k_img, v_img, q_txt, k_txt, v_txt, out_img, out_txt;
};

struct Barriers {
  uint64_t q_full, q_empty, v_landed;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// Schedule -------------------------------------------------------------------------------------------------------

// The tiles of a block: every gridDim.x-th of all, in the order of the tensors, but tiles without a query after all
// others. In their natural place they would fall to some blocks more than to others, which would run a tile longer.
template <int kM, int kN>
struct Schedule {
  // `tile` counts from the first of `sample` on. All tiles and all blocks are below 2^31: the sum does not overflow.
  unsigned sample = 0, tile = blockIdx.x;

  __device__ __forceinline__ bool next(const pydit_joint_attention_params& p, Work& work) {
    const auto batch = static_cast<unsigned>(p.batch);
    const auto tiles = [](int tokens) { return (tokens + kM - 1) / kM; };
    const int image = tiles(static_cast<int>(p.img_tokens)), text = tiles(static_cast<int>(p.txt_tokens));
    for (; sample < 2 * batch; ++sample) {  // once for what has queries, once for what has none
      const bool empty = sample >= batch;
      const int at = static_cast<int>(empty ? sample - batch : sample);
      const int existing = image + (p.q_txt.data == nullptr ? 0 : tiles(text_length(p, at)));
      const int here = empty ? (p.q_txt.data == nullptr ? 0 : image + text - existing) : existing;
      const unsigned all = static_cast<unsigned>(p.heads) * static_cast<unsigned>(here);
      if (tile < all) {
        const int index = static_cast<int>(tile);
        work = find_work<kM, kN>(p, at, index / here, (empty ? existing : 0) + index % here);
        tile += gridDim.x;
        return true;
      }
      tile -= all;
    }
    return false;
  }
};

// Producer -------------------------------------------------------------------------------------------------------

// One warp. All lanes wait for a slot to be empty; only then does one of them issue: its copy lets the consumers empty
// the slot once more, and a lane that had not looked yet would wait for a phase that is over.
template <typename T, int kD>
__device__ __forceinline__ void produce(const pydit_joint_attention_params& p, const Maps& maps, char* shared,
                                        Barriers* barriers) {
  using Shape = Tile<kD>;
  constexpr int kN = Shape::kN;
  const bool issuer = elect_one();
  Ring<kStages> keys, values;
  uint32_t q_parity = 1, landed_parity = 0;
  Schedule<Shape::kM, kN> schedule;
  Work work;
  const auto load_queries = [&] {
    mbarrier_wait(&barriers->q_empty, q_parity);
    q_parity ^= 1;
    __syncwarp();
    if (issuer) {
      mbarrier_arrive_expect_tx(&barriers->q_full, Shape::kQBytes);
      load_boxes<kD, Shape::kSpan>(shared, work.image ? maps.q_img : maps.q_txt, &barriers->q_full, Shape::kM,
                                   work.first_query, work.head, work.batch);
    }
  };
  for (bool first_tile = true; schedule.next(p, work);) {
    const int tiles = work.tiles();
    if (tiles == 0) continue;
    if (first_tile) load_queries();
    // K is one step ahead of V, as its consumers are.
    for (int step = 0; step <= tiles; ++step) {
      if (step < tiles) {
        const bool image = step < work.image_tiles;
        const int first = (image ? step : step - work.image_tiles) * kN;
        mbarrier_wait(&barriers->k_empty[keys.slot], keys.parity ^ 1);
        __syncwarp();
        if (issuer) {
          mbarrier_arrive_expect_tx(&barriers->k_full[keys.slot], Shape::kKeyBytes);
          load_boxes<kD, Shape::kSpan>(shared + Shape::kK + keys.slot * Shape::kKeyBytes,
                                       image ? maps.k_img : maps.k_txt, &barriers->k_full[keys.slot], kN, first,
                                       work.head, work.batch);
        }
        keys.next();
      }
      if (step > 0) {
        const bool image = step - 1 < work.image_tiles;
        const int first = (image ? step - 1 : step - 1 - work.image_tiles) * kN;
        char* to = shared + Shape::kV + values.slot * Shape::kKeyBytes;
        uint64_t* full = &barriers->v_full[values.slot];
        mbarrier_wait(&barriers->v_empty[values.slot], values.parity ^ 1);
        __syncwarp();
        const bool padded = !image && work.text_keys - first < kN && work.text_keys < p.txt_tokens;
        uint64_t* landed = padded ? &barriers->v_landed : full;
        if (issuer) {
          mbarrier_arrive_expect_tx(landed, Shape::kKeyBytes);
          load_boxes<kD, Shape::kSpan>(to, image ? maps.v_img : maps.v_txt, landed, kN, first, work.head, work.batch);
        }
        if (padded) {
          mbarrier_wait(landed, landed_parity);
          landed_parity ^= 1;
          zero_rows<kD, Shape::kSpan, kN>(to, work.text_keys - first);
          __syncwarp();
          if (issuer) mbarrier_arrive(full);
        }
        values.next();
      }
      // Q's memory holds the outputs of the previous tile, for which the first two K and the first V need not wait.
      if (step == 1 && !first_tile) load_queries();
    }
    first_tile = false;
  }
}

// Consumers ------------------------------------------------------------------------------------------------------

// S = Q K^T, issued and committed.
template <typename T, int kD>
__device__ __forceinline__ void multiply_keys(float (&scores)[Tile<kD>::kN / 2], const char* q, const char* k) {
  multiply_rows<T, kD, Tile<kD>::kSpan, Tile<kD>::kM, Tile<kD>::kN>(scores, q, k);
}

// O (+)= P V, issued and committed.
template <typename T, int kD>
__device__ __forceinline__ void multiply_values(Softmax<T, Tile<kD>::kN, kD>& state, const char* v, bool accumulate) {
  multiply_registers<T, kD, Tile<kD>::kSpan, Tile<kD>::kN>(state.out, state.probabilities, v, accumulate);
}

// One warpgroup of 64 queries; `group` counts the consumers from 0.
template <typename T, int kD>
__device__ __forceinline__ void consume(const pydit_joint_attention_params& p, const Maps& maps, char* shared,
                                        Barriers* barriers, int group) {
  using Shape = Tile<kD>;
  constexpr int kN = Shape::kN;
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32;
  const int image_tokens = static_cast<int>(p.img_tokens);
  const float scale = p.scale * kLog2E;
  const int my_turn = 1 + group, next_turn = 1 + (group + 1) % Shape::kConsumers, whole_group = 8 + group;
  char* my_rows = shared + group * 64 * Shape::kSpan;  // of the first box of Q; the outputs take their place
  Ring<kStages> keys, values;
  uint32_t q_parity = 0;
  if (group == Shape::kConsumers - 1) barrier_arrive(1, 2 * kWarpgroup);  // the first warpgroup begins
  Softmax<T, Tile<kD>::kN, kD> state;
  Schedule<Shape::kM, kN> schedule;
  Work work;
  while (schedule.next(p, work)) {
    const int tiles = work.tiles();
    if (tiles == 0) {
      store_empty<T, kD>(p, work, Shape::kM, group * kWarpgroup + thread, Shape::kConsumers * kWarpgroup);
      continue;
    }
    float scores[kN / 2], factor[2];
    mbarrier_wait(&barriers->q_full, q_parity);
    q_parity ^= 1;
    mbarrier_wait(&barriers->k_full[keys.slot], keys.parity);
    wgmma_fence();
    multiply_keys<T, kD>(scores, my_rows, shared + Shape::kK + keys.slot * Shape::kKeyBytes);
    wgmma_wait_group<0>();
    if (lane == 0) mbarrier_arrive(&barriers->k_empty[keys.slot]);
    keys.next();
    const int first_keys = keys_in<kN>(work, image_tokens, 0);
    if (first_keys < kN) mask_keys(scores, first_keys);
    state.step(scores, scale, factor, true);
    state.pack_probabilities(scores);
    for (int tile = 1; tile < tiles; ++tile) {
      mbarrier_wait(&barriers->k_full[keys.slot], keys.parity);
      barrier_sync(my_turn, 2 * kWarpgroup);
      wgmma_fence();
      multiply_keys<T, kD>(scores, my_rows, shared + Shape::kK + keys.slot * Shape::kKeyBytes);
      mbarrier_wait(&barriers->v_full[values.slot], values.parity);
      wgmma_fence();  // probabilities and outputs were just written; ptxas would insert one after the wait
      multiply_values<T, kD>(state, shared + Shape::kV + values.slot * Shape::kKeyBytes, tile > 1);
      barrier_arrive(next_turn, 2 * kWarpgroup);
      wgmma_wait_group<1>();
      if (lane == 0) mbarrier_arrive(&barriers->k_empty[keys.slot]);
      keys.next();
      const int existing = keys_in<kN>(work, image_tokens, tile);
      if (existing < kN) mask_keys(scores, existing);
      state.step(scores, scale, factor, false);
      // This wait could be left to the top of the loop; its branch keeps ptxas from moving the wait for P V above the
      // softmax, which touches none of its registers. The next K depends on nothing that is still to come.
      if (tile + 1 < tiles) mbarrier_wait(&barriers->k_full[keys.slot], keys.parity);
      wgmma_wait_group<0>();
      if (lane == 0) mbarrier_arrive(&barriers->v_empty[values.slot]);
      values.next();
      state.rescale(factor);
      state.pack_probabilities(scores);
    }
    mbarrier_wait(&barriers->v_full[values.slot], values.parity);
    wgmma_fence();
    multiply_values<T, kD>(state, shared + Shape::kV + values.slot * Shape::kKeyBytes, tiles > 1);
    wgmma_wait_group<0>();
    if (lane == 0) mbarrier_arrive(&barriers->v_empty[values.slot]);
    values.next();
    state.finish(p, work, group * 64 + warp * 16 + lane / 4);
    barrier_sync(whole_group, kWarpgroup);  // all warps have read their queries
    store_to_boxes<T, kD, Shape::kSpan, Shape::kM>(my_rows, state.out, 1.f, warp, lane);
    fence_proxy_async();
    barrier_sync(whole_group, kWarpgroup);
    if (thread == 0) {
#pragma unroll
      for (int box = 0; box < Shape::kBoxes; ++box)
        tma_store_4d(work.image ? maps.out_img : maps.out_txt, my_rows + box * Shape::kM * Shape::kSpan,
                     box * Shape::kBoxColumns, work.first_query + group * 64, work.head, work.batch);
      bulk_commit_group();
      bulk_wait_group_read<0>();
      mbarrier_arrive(&barriers->q_empty);
    }
  }
}

// Kernel ---------------------------------------------------------------------------------------------------------

template <typename T, int kD>
__global__ void __launch_bounds__(Tile<kD>::kThreads, 1)
    joint_attention_sm90_kernel(const __grid_constant__ pydit_joint_attention_params p,
                                const __grid_constant__ Maps maps) {
  using Shape = Tile<kD>;
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* barriers = reinterpret_cast<Barriers*>(shared + Shape::kBarriers);
  if (threadIdx.x == 0) {
    mbarrier_init(&barriers->q_full, 1);
    mbarrier_init(&barriers->q_empty, Shape::kConsumers);
    mbarrier_init(&barriers->v_landed, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&barriers->k_full[stage], 1);
      mbarrier_init(&barriers->v_full[stage], 1);
      mbarrier_init(&barriers->k_empty[stage], 4 * Shape::kConsumers);  // a lane of each warp
      mbarrier_init(&barriers->v_empty[stage], 4 * Shape::kConsumers);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    set_max_registers_down<Shape::kProducerRegisters>();
    if (threadIdx.x < 32) produce<T, kD>(p, maps, shared, barriers);
  } else {
    set_max_registers_up<Shape::kConsumerRegisters>();
    consume<T, kD>(p, maps, shared, barriers, static_cast<int>(threadIdx.x) / kWarpgroup - 1);
  }
}

// Launcher -------------------------------------------------------------------------------------------------------

template <typename T, int kD>
int launch(const pydit_joint_attention_params& p) {
  using Shape = Tile<kD>;
  Maps maps;
  const char* reason = nullptr;
  const auto add = [&](TensorMap* map, const pydit_heads& t, int64_t tokens, int rows) {
    if (reason == nullptr) reason = encode_heads<T>(map, t, tokens, p, rows, Shape::kSpan);
  };
  add(&maps.q_img, p.q_img, p.img_tokens, Shape::kM), add(&maps.q_txt, p.q_txt, p.txt_tokens, Shape::kM);
  add(&maps.k_img, p.k_img, p.img_tokens, Shape::kN), add(&maps.k_txt, p.k_txt, p.txt_tokens, Shape::kN);
  add(&maps.v_img, p.v_img, p.img_tokens, Shape::kN), add(&maps.v_txt, p.v_txt, p.txt_tokens, Shape::kN);
  add(&maps.out_img, p.out_img, p.img_tokens, 64);
  add(&maps.out_txt, p.q_txt.data == nullptr ? p.q_txt : p.out_txt, p.txt_tokens, 64);
  if (reason != nullptr) return bad_argument("joint_attention: %s", reason);
  const int64_t total = p.batch * p.heads * count_query_tiles<Shape::kM>(p);
  if (total > INT32_MAX) return bad_argument("joint_attention: expected at most 2^31 - 1 tiles, got more");
  constexpr auto kernel = joint_attention_sm90_kernel<T, kD>;
  int processors = 0;
  cudaError_t error = count_multiprocessors(&processors);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return launch_status("joint_attention", error);
  const auto blocks = static_cast<unsigned>(total < processors ? total : processors);
  name_joint_attention_tensors<T>(p);
  return launch_status("joint_attention",
                       PYDIT_LAUNCH((joint_attention_sm90_kernel<T, kD>), dim3(blocks), dim3(Shape::kThreads),
                                    Shape::kSharedBytes, static_cast<cudaStream_t>(p.stream), p, maps));
}

template <typename T>
int launch_head_dim(const pydit_joint_attention_params& p) {
  if (p.head_dim == 32) return launch<T, 32>(p);
  if (p.head_dim == 64) return launch<T, 64>(p);
  return launch<T, 128>(p);
}

}  // namespace

int launch_joint_attention_sm90(const pydit_joint_attention_params& p) {
  return p.dtype == PYDIT_FLOAT16 ? launch_head_dim<__half>(p) : launch_head_dim<__nv_bfloat16>(p);
}

}  // namespace pydit::PYDIT_BACKEND
