// grouped_linear for Hopper (sm_90a): TMA, wgmma, warp specialisation. The order of tiles and the epilogue's arithmetic
// are in grouped_linear.cuh.
//
// Cost, QKV of a Qwen-Image block at 1328 x 1328: (6889 + 512) x 9216 x 3072, 419 GFLOP, 424 us at 989 TFLOP/s. Memory:
// x, weights and outputs once, 45 + 113 + 136 MB, 61 us at 4.8 TB/s. L2: a tile of 128 x 256 reads 48 KB for a step of
// 64 along K, 1024 clocks of the tensor cores: 48 bytes per clock and SM, 11.6 TB/s at the floor. L2's rate has not
// been measured here; at 7 TB/s it is the limit: 4.9 GB, 703 us. Tiles: 58 x 36 on 132 SMs are 15.8 waves that take the
// time of 16: 99 %. A projection to 3072 columns (attention's output, the MLP's second layer) has 58 x 12 = 696 tiles,
// 5.27 waves that take the time of 6: 88 %.
//
// Cut tiles. Those 36 tiles, which would be the last wave, are cut along K (stream-K: Osama et al. 2023). In three
// parts each, they keep 108 blocks busy for a third of the time: 5.33 waves instead of 6, 11 % less. Blocks have equal
// runs of parts, as in second_moments.cuh, and do them first, while they are in step and nobody waits long. A block
// leaves the sums of a part that another finishes in L2, as they lie in registers, 128 KB; the block with the tile's
// last part adds them, from the next lower ticket down, the same in every run, and goes on to the epilogue. It waits
// only for lower tickets, and for parts that those do before anything else.
//
// What cutting costs, in steps of 64 along K: the slowest block writes 128 KB and reads as much from each other block
// that has parts of its tile, converted at the bytes that a step reads; and 8 steps, a guess, to clear the counters and
// to wait. choose_parts takes the cheapest, and cuts nothing for less than 2 % of the whole. The layers of a Qwen-Image
// block, in clusters of two (below), in steps of the slowest:
//
//               K      N  waves  nothing cut                     cut  less
//   B = 1    3072   3072   5.27          288  in 3:  240 +  16 + 20   4 %
//           12288   3072   5.27         1152  in 3:  960 +  64 + 20   9 %
//            3072  12288  21.09         1056  in 3: 1008 +  16 + 20   1 %, not taken
//   B = 2    3072   3072  10.55          528                       -     -
//           12288   3072  10.55         2112  in 7: 1920 + 110 + 20   3 %
//
// QKV is not cut. A step is 0.56 us at 989 TFLOP/s: cutting the first two at B = 1 saves 67 us of a block.
//
// A cluster of two blocks takes two tiles, one below the other. Each block loads half of the weight's rows, which they
// share, for both, 32 KB a step instead of 48: 3.3 GB, 469 us at 7 TB/s. A slot is free when the consumers of both
// blocks have read it. Clusters are used where they read fewer bytes both in all and in the busiest block (Reads): not
// where half of a pair would be rows that do not exist. Neither clusters nor cut tiles have been measured yet.
//
// Three warpgroups on 192 x 256, 37 bytes per clock, are not possible: with 512 threads ptxas has 128 registers, which
// the sums alone would take (C7602; as two products of 128 columns it spills 3 KB).
//
// Roles. One thread loads x and the weight, four stages ahead. Two warpgroups multiply 64 x 256 each, 128 registers of
// sums, and drift apart freely: one's epilogue runs while the other multiplies, as long as the stages last: four, of
// 512 clocks each for the one that multiplies. A warpgroup whose rows do not exist hands its stages back at once.
//
// Epilogue. Anything that takes longer than those 2048 clocks stops both warpgroups, and each trip to L2 takes
// hundreds. So a lane requests its bias and the gate of two slabs before the product (in a cut tile, after others' sums
// have come, which need the registers), and the gate of the other slabs when the first slab is done and its sums have
// freed their registers. Slabs of 64 columns go through two buffers per warpgroup to TMA, which leaves out what lies
// outside the tensor. The residual comes the same way, into the buffer where its sum will lie: the first two slabs
// before the product, each other one when its buffer has been stored.
#include "device/arch.h"
#include "device/check.h"
#include "device/ptx.cuh"
#include "device/ring.cuh"
#include "device/tensor_map.h"
#include "kernels/linear/grouped_linear.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kM = 64 * kConsumers, kN = 256, kStep = 64, kStages = 4;
constexpr int kRowBytes = kStep * 2, kLeftBytes = kM * kRowBytes, kStageBytes = kLeftBytes + kN * kRowBytes;
constexpr int kSlab = 64, kSlabBytes = 64 * kSlab * 2, kBuffers = 2;  // columns of the output; per warpgroup
constexpr int kOutput = kStages * kStageBytes, kBarriers = kOutput + kConsumers * kBuffers * kSlabBytes;
constexpr int kSharedBytes = kBarriers + 128;
constexpr int kSums = 64 * kN;    // of a warpgroup
constexpr int kStepsOfWaits = 8;  // the cost of clearing the counters and of waiting for other blocks, a guess
constexpr int kLeastGain = 50;    // cut only to save one step in so many, as these costs are guesses
constexpr int kLoaderRegisters = 24, kConsumerRegisters = 240;
static_assert(kSharedBytes <= 227 * 1024, "what a block may have");

struct Maps {
  TensorMap x[PYDIT_MAX_LINEARS], weight[PYDIT_MAX_LINEARS], residual[PYDIT_MAX_LINEARS], out[PYDIT_MAX_LINEARS];
};

// How tiles are dealt out to clusters: the first `whole` one by one, the `cut` after them in `parts` along K. Parts are
// numbered tile by tile; the first `sharers` clusters by ticket have an equal run of them each, at least one part and
// at most a tile's. Where nothing is cut, a cluster's ticket is its number.
struct Deal {
  int clusters, whole, cut, parts, sharers;
  float* sums;        // [sharers, blocks, consumers, kSums]: of a cluster's last part, where another finishes the tile
  unsigned* written;  // [sharers, blocks, consumers]: 1 once the sums are there; then the ticket counter

  __device__ int first_part(int ticket) const { return cut * parts * ticket / sharers; }
  // Whether the run of `ticket` ends beyond the first part of the cut tile: first_part(ticket + 1) > tile * parts.
  __device__ bool reaches(int ticket, int tile) const {
    return cut * parts * (ticket + 1) >= (tile * parts + 1) * sharers;
  }
  __device__ int first_step(int depth, int part) const { return (depth + kStep - 1) / kStep * part / parts; }
};
static_assert(sizeof(Layers) + sizeof(Maps) + sizeof(Deal) <= 4096, "parameters of a kernel");

// A cluster's tiles, parts [from, to) of each: its run from the last tile to the first, then whole tiles. As a run is
// no longer than a tile, only the first of them can be one that another cluster finishes.
struct Walk {
  const Deal& deal;
  int first = 0, end = 0, whole;  // parts that are left; the next whole tile
  int index = 0, from = 0, to = 0;

  __device__ Walk(const Deal& deal, int ticket) : deal(deal), whole(ticket) {
    if (ticket < deal.sharers) first = deal.first_part(ticket), end = deal.first_part(ticket + 1);
  }

  __device__ __forceinline__ bool next() {
    if (end > first) {
      const int tile = (end - 1) / deal.parts, base = tile * deal.parts;
      index = deal.whole + tile, from = max(first - base, 0), to = end - base;
      end = base + from;
      return true;
    }
    index = whole, from = 0, to = deal.parts;
    whole += deal.clusters;
    return index < deal.whole;
  }
};

struct Barriers {
  uint64_t full[kStages], empty[kStages];  // of the operands
  uint64_t ready[kConsumers][kBuffers];    // for sums
};
static_assert(sizeof(Barriers) + sizeof(unsigned) <= kSharedBytes - kBarriers, "room for the barriers and a ticket");

// The tile of block `rank` of a cluster, from the index of the cluster's.
template <int kCluster>
__device__ __forceinline__ TileOfLayer tile_of_block(const Layers& all, int index, int rank) {
  TileOfLayer tile = decode_tile<kCluster * kM, kN, 12 / kCluster>(all, index);
  tile.row += rank * kM;
  return tile;
}

// One thread. Block `rank` of the cluster loads its share of the weight's rows, for all blocks.
template <int kCluster>
__device__ __forceinline__ void load(const Layers& all, const Maps& maps, char* shared, Barriers* barriers, Walk walk,
                                     int rank) {
  constexpr int kShare = kN / kCluster;
  Ring<kStages> ring;
  while (walk.next()) {
    const TileOfLayer tile = tile_of_block<kCluster>(all, walk.index, rank);
    const TensorMap &x = maps.x[tile.layer], &weight = maps.weight[tile.layer];
    const int depth = all.layer[tile.layer].depth, end = walk.deal.first_step(depth, walk.to);
    for (int step = walk.deal.first_step(depth, walk.from); step < end; ++step) {
      const int k = step * kStep;
      mbarrier_wait(&barriers->empty[ring.slot], ring.parity ^ 1);
      char* stage = shared + ring.slot * kStageBytes;
      uint64_t* full = &barriers->full[ring.slot];
      mbarrier_arrive_expect_tx(full, kStageBytes);
      tma_load_3d(stage, x, full, k, tile.row, tile.batch);
      if (kCluster == 1)
        tma_load_2d(stage + kLeftBytes, weight, full, k, tile.column);
      else
        tma_load_2d_multicast(stage + kLeftBytes + rank * kShare * kRowBytes, weight, full, k,
                              tile.column + rank * kShare, (1 << kCluster) - 1);
      ring.next();
    }
  }
}

// The buffer of a warpgroup's slab; slabs are counted over the whole kernel.
__device__ __forceinline__ char* buffer_of(char* shared, int group, unsigned slab) {
  return shared + kOutput + (group * kBuffers + static_cast<int>(slab % kBuffers)) * kSlabBytes;
}

// Makes the buffer of a slab, whose last store has been read, ready: loads the residual into it, if any. One thread.
template <bool kHeads>
__device__ __forceinline__ void prepare(const Layer& l, const TensorMap& residual, const TileOfLayer& tile,
                                        char* shared, Barriers* barriers, int group, unsigned slab, int column) {
  uint64_t* ready = &barriers->ready[group][slab % kBuffers];
  if (!kHeads && l.residual) {
    mbarrier_arrive_expect_tx(ready, kSlabBytes);
    tma_load_3d(buffer_of(shared, group, slab), residual, ready, column, tile.row + group * 64, tile.batch);
  } else {
    mbarrier_arrive(ready);
  }
}

// A warpgroup's sums in memory lie as in its registers, 16 bytes of each thread next to each other.
__device__ __forceinline__ void write_sums(float* to, const float (&sums)[kN / 2], int thread) {
#pragma unroll
  for (int i = 0; i < kN / 2; i += 4)
    store_global_16(to + i * kWarpgroup + 4 * thread,
                    make_uint4(__float_as_uint(sums[i]), __float_as_uint(sums[i + 1]), __float_as_uint(sums[i + 2]),
                               __float_as_uint(sums[i + 3])));
}

__device__ __forceinline__ void add_sums(float (&sums)[kN / 2], const float* from, int thread) {
#pragma unroll
  for (int i = 0; i < kN / 2; i += 4) {
    const float4 more = *reinterpret_cast<const float4*>(from + i * kWarpgroup + 4 * thread);
    sums[i] += more.x, sums[i + 1] += more.y, sums[i + 2] += more.z, sums[i + 3] += more.w;
  }
}

// Which lane of each warp hands a stage back, to which blocks: each fills a part of both blocks' slots.
template <int kCluster>
__device__ __forceinline__ void release(Barriers* barriers, int slot, int lane) {
  if (kCluster == 1) {
    if (lane == 0) mbarrier_arrive(&barriers->empty[slot]);
  } else if (lane < kCluster) {
    mbarrier_arrive_cluster(&barriers->empty[slot], lane);
  }
}

// Hands `steps` stages back unread, those of a warpgroup whose rows do not exist.
template <int kCluster>
__device__ __forceinline__ void skip(Barriers* barriers, Ring<kStages>& ring, int steps, int lane) {
  for (int step = 0; step < steps; ++step, ring.next()) {
    mbarrier_wait(&barriers->full[ring.slot], ring.parity);
    __syncwarp();  // no lane may still wait for this phase when the slot is filled again
    release<kCluster>(barriers, ring.slot, lane);
  }
}

// The product of the warpgroup's 64 rows over steps [first, end), at least one.
template <typename T, int kCluster>
__device__ __forceinline__ void multiply(float (&sums)[kN / 2], char* shared, Barriers* barriers, Ring<kStages>& ring,
                                         int first, int end, int group, int lane) {
  int step = first;
  do {  // not a while: as the sums may go to memory, ptxas would serialise the products of a loop that might not run
        // (C7520)
    const char* stage = shared + ring.slot * kStageBytes;
    mbarrier_wait(&barriers->full[ring.slot], ring.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      wgmma<T, kN>(sums, matrix_descriptor<128>(stage + group * 64 * kRowBytes + k * 2, 16, 8 * kRowBytes),
                   matrix_descriptor<128>(stage + kLeftBytes + k * 2, 16, 8 * kRowBytes), step > first || k > 0);
    }
    wgmma_commit_group();
    if (step > first) {
      wgmma_wait_group<1>();  // the step before
      release<kCluster>(barriers, (ring.slot + kStages - 1) % kStages, lane);
    }
    ring.next();
  } while (++step < end);
  wgmma_wait_group<0>();
  release<kCluster>(barriers, (ring.slot + kStages - 1) % kStages, lane);
}

// Puts the sums of one slab, gated where there is a gate, into its buffer as T, in TMA's swizzle. `gate`: of both rows.
// With a residual they are added to it, which lies there.
template <typename T, bool kHeads>
__device__ __forceinline__ void put_slab(char* buffer, float* sums, const uint32_t (&gate)[2][kSlab / 8],
                                         const Layer& l, int warp, int lane) {
#pragma unroll
  for (int column = 0; column < kSlab; column += 16) {
    float* s = sums + column / 2;
    if (!kHeads && l.gate != nullptr) apply_gate<T, 2>(s, &gate[0][column / 8], &gate[1][column / 8]);
    const int offset = (warp * 16 + lane % 16) * kSlab * 2 + (column + lane / 16 * 8) * 2;
    char* place = buffer + tma_swizzle<128>(offset);
    uint32_t matrices[4];
    if (!kHeads && l.residual) {
      ldmatrix(matrices, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto before = *reinterpret_cast<const Pack<T, 2>*>(&matrices[i]);
        matrices[i] = pack<T>(s[2 * i] + before[0], s[2 * i + 1] + before[1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) matrices[i] = pack<T>(s[2 * i], s[2 * i + 1]);
    }
    stmatrix(place, matrices);
  }
}

// One warpgroup of 64 rows; `group` counts the consumers from 0.
template <typename T, bool kHeads, int kCluster>
__device__ __forceinline__ void consume(const Layers& all, const Maps& maps, char* shared, Barriers* barriers,
                                        Walk walk, int ticket, int rank, int group) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, warp = thread / 32, lane = thread % 32;
  const Deal& deal = walk.deal;
  const auto place = [&](int ticket) { return (ticket * kCluster + rank) * kConsumers + group; };  // of sums
  Ring<kStages> ring;
  unsigned done = 0;  // slabs
  float sums[kN / 2];
  while (walk.next()) {
    const TileOfLayer tile = tile_of_block<kCluster>(all, walk.index, rank);
    const Layer& l = all.layer[tile.layer];
    const int first = deal.first_step(l.depth, walk.from), end = deal.first_step(l.depth, walk.to);
    const bool finishes = walk.to == deal.parts;
    if (tile.row + group * 64 >= l.tokens) {
      skip<kCluster>(barriers, ring, end - first, lane);
      continue;
    }
    const auto exists = [&](int slab) { return slab < kN / kSlab && tile.column + slab * kSlab < l.columns; };
    const auto prepare_slab = [&](int slab, unsigned number) {
      prepare<kHeads>(l, maps.residual[tile.layer], tile, shared, barriers, group, number, tile.column + slab * kSlab);
    };
    if (warp == 0 && finishes && elect_one()) {
      bulk_wait_group_read<0>();
      for (int slab = 0; slab < kBuffers && exists(slab); ++slab) prepare_slab(slab, done + slab);
    }
    const int row = tile.row + group * 64 + warp * 16 + lane / 4;
    uint32_t bias[kN / 8], gate[kN / kSlab][2][kSlab / 8];  // gate: of both rows
    const T* const gates[2] = {gate_of_row<T>(l, tile.batch, row), gate_of_row<T>(l, tile.batch, row + 8)};
    const auto load_gate = [&](int slab, int column) {
      if constexpr (!kHeads) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          load_pairs<T, true>(gate[slab][half], gates[half], column + slab * kSlab, l.columns);
      }
    };
    const auto load_early = [&](int column) {
      load_pairs<T, true>(bias, l.bias, column, l.columns);
      load_gate(0, column), load_gate(1, column);
    };
    load_early(finishes && walk.from == 0 ? tile.column : l.columns);  // in a cut tile: nothing yet
    multiply<T, kCluster>(sums, shared, barriers, ring, first, end, group, lane);

    if (!finishes) {
      write_sums(deal.sums + int64_t{place(ticket)} * kSums, sums, thread);
      barrier_sync(1 + group, kWarpgroup);
      if (thread == 0) store_release(deal.written + place(ticket), 1);
      continue;
    }
    if (walk.from > 0) {
      for (int other = ticket - 1; deal.reaches(other, walk.index - deal.whole); --other) {
        if (thread == 0) wait_at_least(deal.written + place(other), 1);
        barrier_sync(1 + group, kWarpgroup);
        add_sums(sums, deal.sums + int64_t{place(other)} * kSums, thread);
      }
      load_early(tile.column);
    }
    apply_epilogue<T, true, kHeads>(sums, bias, all, l, row);
#pragma unroll
    for (int slab = 0; slab < kN / kSlab; ++slab) {
      if (!exists(slab)) break;
      char* buffer = buffer_of(shared, group, done);
      mbarrier_wait(&barriers->ready[group][done % kBuffers], done / kBuffers % 2);
      put_slab<T, kHeads>(buffer, sums + slab * kSlab / 2, gate[slab], l, warp, lane);
      fence_proxy_async();
      barrier_sync(1 + group, kWarpgroup);
      if (warp == 0 && elect_one()) {
        tma_store_3d(maps.out[tile.layer], buffer, tile.column + slab * kSlab, tile.row + group * 64, tile.batch);
        bulk_commit_group();
        if (exists(slab + kBuffers)) {
          bulk_wait_group_read<0>();
          prepare_slab(slab + kBuffers, done + kBuffers);
        }
      }
      if (slab == 0) load_gate(2, tile.column), load_gate(3, tile.column);
      ++done;
    }
  }
  if (warp == 0 && elect_one()) bulk_wait_group_read<0>();
}

// Kernel ---------------------------------------------------------------------------------------------------------

template <typename T, bool kHeads, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_linear_sm90_kernel(const __grid_constant__ Layers all, const __grid_constant__ Maps maps,
                               const __grid_constant__ Deal deal) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* barriers = reinterpret_cast<Barriers*>(shared + kBarriers);
  auto* drawn = reinterpret_cast<unsigned*>(barriers + 1);
  const int rank = kCluster == 1 ? 0 : static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&barriers->full[stage], 1);
      mbarrier_init(&barriers->empty[stage], 4 * kConsumers * kCluster);  // a lane of each warp
    }
    for (int i = 0; i < kConsumers * kBuffers; ++i) mbarrier_init(&barriers->ready[i / kBuffers][i % kBuffers], 1);
    fence_barrier_init();
    if (deal.cut > 0 && rank == 0) *drawn = atomicAdd(deal.written + deal.sharers * kCluster * kConsumers, 1u);
  }
  if (kCluster == 1)
    __syncthreads();
  else
    cluster_sync();
  int ticket = static_cast<int>(blockIdx.x) / kCluster;
  if (deal.cut > 0) ticket = static_cast<int>(kCluster == 1 ? *drawn : *cluster_map(drawn, 0));
  if (threadIdx.x < kWarpgroup) {
    set_max_registers_down<kLoaderRegisters>();
    if (threadIdx.x < 32 && elect_one()) load<kCluster>(all, maps, shared, barriers, Walk(deal, ticket), rank);
    __syncwarp();  // the warp reaches the barrier below converged
  } else {
    set_max_registers_up<kConsumerRegisters>();
    consume<T, kHeads, kCluster>(all, maps, shared, barriers, Walk(deal, ticket), ticket, rank,
                                 static_cast<int>(threadIdx.x) / kWarpgroup - 1);
  }
  if (kCluster > 1) cluster_sync();  // the other block still arrives at this one's mbarriers and reads its ticket
}

// Launcher -------------------------------------------------------------------------------------------------------

// How many clusters run at a time.
template <int kCluster>
int64_t count_places(int processors) {
  return processors < kCluster ? 1 : processors / kCluster;
}

// What a launch on `processors` multiprocessors reads of x and the weight from L2 if no tile is cut, by the arithmetic
// at the top of this file.
struct Reads {
  int64_t all, busiest;  // bytes of all blocks; of the one with the most tiles, each taken as deep as the deepest layer
};

template <int kCluster>
Reads reads_of(const Layers& all, int processors) {
  constexpr int64_t kBytes = (kM + kN / kCluster) * 2;  // of a tile and one of its depth, per block
  Reads reads = {};
  int64_t deepest = 0;
  for (int i = 0; i < all.count; ++i) {
    const Layer& l = all.layer[i];
    deepest = l.depth > deepest ? l.depth : deepest;
    reads.all += all.batch * ceil_div(l.tokens, kCluster * kM) * ceil_div(l.columns, kN) * kCluster * kBytes * l.depth;
  }
  const int64_t tiles = count_tiles<kCluster * kM, kN>(all);
  reads.busiest = ceil_div(tiles, count_places<kCluster>(processors)) * kBytes * deepest;
  return reads;
}

// The number of parts, for `cut` tiles of `steps` steps each, with which the slowest cluster takes the fewest steps, by
// the arithmetic at the top of this file.
template <int kCluster>
int choose_parts(int64_t whole_waves, int64_t cut, int64_t places, int64_t steps) {
  constexpr int64_t kStepBytes = (kM + kN / kCluster) * kRowBytes, kSumBytes = kConsumers * kSums * sizeof(float);
  int best = 1;
  int64_t fewest = steps;
  for (int parts = 2; parts <= PYDIT_MAX_PARTS && parts <= steps; ++parts) {
    const int64_t shortest = cut * parts < places ? 1 : cut * parts / places, longest = ceil_div(cut * parts, places);
    const int64_t others = ceil_div(parts - 1, shortest);  // clusters whose sums the one that finishes a tile adds
    const int64_t total = ceil_div(steps * longest, parts) + kStepsOfWaits + (1 + others) * kSumBytes / kStepBytes;
    if (total < fewest) best = parts, fewest = total;
  }
  return (steps - fewest) * kLeastGain < (whole_waves + 1) * steps ? 1 : best;
}

// Without a workspace; nothing is cut with `parts` 1.
template <int kCluster>
Deal deal_of(const Layers& all, int processors, int parts) {
  const int64_t tiles = count_tiles<kCluster * kM, kN>(all), places = count_places<kCluster>(processors);
  const int64_t cut = tiles % places;
  int64_t steps = INT32_MAX;  // of the shallowest layer: every part needs a step
  for (int i = 0; i < all.count; ++i) {
    if (all.layer[i].tokens == 0) continue;
    const int64_t of_layer = ceil_div(all.layer[i].depth, kStep);
    steps = of_layer < steps ? of_layer : steps;
  }
  if (parts == 0) parts = choose_parts<kCluster>(tiles / places, cut, places, steps);
  if (parts > steps) parts = static_cast<int>(steps);
  const auto all_tiles = static_cast<int>(tiles), clusters = static_cast<int>(tiles < places ? tiles : places);
  if (cut == 0 || parts == 1) return {clusters, all_tiles, 0, 1, 0, nullptr, nullptr};
  const auto sharers = static_cast<int>(cut * parts < places ? cut * parts : places);
  return {clusters < sharers ? sharers : clusters,
          static_cast<int>(tiles - cut),
          static_cast<int>(cut),
          parts,
          sharers,
          nullptr,
          nullptr};
}

// For the sums and their flags; 0: nothing is cut.
template <int kCluster>
int64_t workspace_bytes(const Deal& deal) {
  const int64_t warpgroups = int64_t{deal.sharers} * kCluster * kConsumers;
  return deal.cut == 0 ? 0 : warpgroups * (kSums * sizeof(float) + sizeof(unsigned)) + sizeof(unsigned);
}

// Boxes of `rows` tokens by 64 columns of [B, S, columns].
template <typename T>
const char* encode(TensorMap* map, const pydit_tokens& t, int64_t batch, int64_t tokens, int64_t columns, int rows) {
  const uint64_t size[3] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(tokens),
                            static_cast<uint64_t>(batch)};
  const uint64_t stride[2] = {static_cast<uint64_t>(t.stride_s) * sizeof(T),
                              static_cast<uint64_t>(t.stride_b) * sizeof(T)};
  const uint32_t box[3] = {64, static_cast<uint32_t>(rows), 1};
  return encode_tensor_map(map, static_cast<const T*>(t.data), 3, size, stride, box, Swizzle::k128);
}

template <typename T, bool kHeads, int kCluster>
int launch(const pydit_grouped_linear_params& p) {
  const Layers all = layers_of(p);
  Maps maps;
  for (int i = 0; i < p.count; ++i) {
    const pydit_linear& l = p.linear[i];
    if (l.tokens == 0) continue;
    const uint64_t size[2] = {static_cast<uint64_t>(l.in_features), static_cast<uint64_t>(l.out_features)};
    const uint64_t bytes[1] = {static_cast<uint64_t>(l.weight_stride) * sizeof(T)};
    const uint32_t box[2] = {kStep, kN / kCluster};
    const char* reason = encode<T>(&maps.x[i], l.x, p.batch, l.tokens, l.in_features, kM);
    if (reason == nullptr)
      reason = encode_tensor_map(&maps.weight[i], static_cast<const T*>(l.weight), 2, size, bytes, box, Swizzle::k128);
    if (reason == nullptr) reason = encode<T>(&maps.out[i], l.out, p.batch, l.tokens, l.out_features, 64);
    if (reason == nullptr && l.residual.data != nullptr)
      reason = encode<T>(&maps.residual[i], l.residual, p.batch, l.tokens, l.out_features, 64);
    if (reason != nullptr) return bad_argument("%s: layer %d: %s", kGroupedLinear, i, reason);
  }
  int processors = 0;
  cudaError_t error = count_multiprocessors(&processors);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(grouped_linear_sm90_kernel<T, kHeads, kCluster>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return launch_status(kGroupedLinear, error);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  Deal deal = deal_of<kCluster>(all, processors, p.workspace == nullptr ? 1 : p.parts);
  name_grouped_linear_tensors<T>(p);
  if (deal.cut > 0) {
    const int warpgroups = deal.sharers * kCluster * kConsumers;
    deal.sums = static_cast<float*>(p.workspace);
    deal.written = reinterpret_cast<unsigned*>(deal.sums + int64_t{warpgroups} * kSums);
    error = cudaMemsetAsync(deal.written, 0, (static_cast<size_t>(warpgroups) + 1) * sizeof(unsigned), stream);
    if (error != cudaSuccess) return launch_status(kGroupedLinear, error);
    name_tensor("workspace", p.workspace, true, 1, workspace_bytes<kCluster>(deal), {1}, {0});
  }
  return launch_status(kGroupedLinear, PYDIT_LAUNCH_CLUSTER((grouped_linear_sm90_kernel<T, kHeads, kCluster>), kCluster,
                                                            dim3(static_cast<unsigned>(deal.clusters * kCluster)),
                                                            dim3(kThreads), kSharedBytes, stream, all, maps, deal));
}

template <typename T, bool kHeads>
int launch_cluster_size(const pydit_grouped_linear_params& p) {
  return cluster_of_grouped_linear_sm90(p) == 1 ? launch<T, kHeads, 1>(p) : launch<T, kHeads, 2>(p);
}

template <typename T>
int launch_heads(const pydit_grouped_linear_params& p) {
  return layers_of(p).heads ? launch_cluster_size<T, true>(p) : launch_cluster_size<T, false>(p);
}

}  // namespace

int cluster_of_grouped_linear_sm90(const pydit_grouped_linear_params& p) {
  if (p.cluster != 0) return p.cluster;
  const Layers all = layers_of(p);
  int processors = 0;
  if (count_multiprocessors(&processors) != cudaSuccess) return 1;  // the launch will say why
  const Reads alone = reads_of<1>(all, processors), pairs = reads_of<2>(all, processors);
  return pairs.all < alone.all && pairs.busiest < alone.busiest ? 2 : 1;
}

int64_t workspace_of_grouped_linear_sm90(const pydit_grouped_linear_params& p) {
  const Layers all = layers_of(p);
  int processors = 0;
  if (count_multiprocessors(&processors) != cudaSuccess) return 0;  // the launch will say why
  return cluster_of_grouped_linear_sm90(p) == 1 ? workspace_bytes<1>(deal_of<1>(all, processors, p.parts))
                                                : workspace_bytes<2>(deal_of<2>(all, processors, p.parts));
}

int launch_grouped_linear_sm90(const pydit_grouped_linear_params& p) {
  return p.dtype == PYDIT_FLOAT16 ? launch_heads<__half>(p) : launch_heads<__nv_bfloat16>(p);
}

}  // namespace pydit::PYDIT_BACKEND
