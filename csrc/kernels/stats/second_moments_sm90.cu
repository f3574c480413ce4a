// Second moments for Hopper (sm_90a): TMA, wgmma, warp specialisation. What is computed, and how its numbers are
// rounded, is in second_moments.cu; how blocks share the work, in second_moments.cuh.
//
// A block's tile is 128 columns of x by 192 of x or y. Both operands are stored as tokens by columns, so wgmma
// transposes both; TMA brings boxes of 64 tokens by 64 columns, with zeros for what does not exist.
//
// A cluster of two blocks takes two tiles, one below the other. Each block loads half of the tokens of the 192 columns
// that they share, for both. A slot is free when the consumers of both blocks have read it.
//
// Cost at N = 7401, d = 3072. Blocks alone: 208 tiles meet the triangle, 75.9 GFLOP: 77 us at 989 TFLOP/s. They read
// 640 bytes per token and tile from L2, 985 MB: 77 FLOP per byte, so that L2 is the limit: 164 us at 6 TB/s. 128 x 128
// tiles would read 1.1 GB. A larger tile does not fit: its sums of a chunk and of the run would need more than 64 K
// registers. Clusters: 216 tiles, 78.8 GFLOP: 80 us; 448 bytes per token and tile, 716 MB: 119 us. All of this is
// arithmetic, not measured yet.
//
// Clusters are used where they read fewer bytes both in all and in the busiest block (Reads): not where much of a pair
// lies below the diagonal or beyond the last column, as with up to 128 columns.
//
// Several layers in one launch would gain little. 108 pairs of tiles of 29 chunks are 3132 units, 47 or 48 for each of
// 66 clusters, all of which work 98.9 % of the time; with four layers together 99.9 %. Clusters begin and end within
// tiles, so that sums are added to memory 336 times instead of 216, 132 MB read and written; for four layers together
// 249 times each, 98 MB. That saves 5 % of what L2 moves, and the drain and fill of a launch.
//
// Roles. One thread loads; two warpgroups of 64 x 192 multiply, 96 registers of a chunk's sums and 96 of the run's
// each. While one adds a chunk to the run, the other multiplies.
#include "device/arch.h"
#include "device/dispatch.h"
#include "device/ptx.cuh"
#include "device/ring.cuh"
#include "device/tensor_map.h"
#include "device/vector.cuh"
#include "kernels/stats/second_moments.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kWarpgroup = 128, kConsumers = 2, kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kM = 64 * kConsumers, kN = 192;  // columns of x, and of x or y
constexpr int kStep = 64, kStages = 5;         // tokens of a stage
constexpr int kBoxColumns = 64, kBoxBytes = kStep * kBoxColumns * 2;
constexpr int kLeftBytes = kM / kBoxColumns * kBoxBytes, kStageBytes = kLeftBytes + kN / kBoxColumns * kBoxBytes;
constexpr int kBarriers = kStages * kStageBytes, kSharedBytes = kBarriers + 128;
constexpr int kStepsOfChunk = kChunkTokens / kStep;
constexpr int kLoaderRegisters = 24, kConsumerRegisters = 240;
static_assert(kM == kTile && kSharedBytes <= 227 * 1024, "rows of tiles as in the portable kernel; shared memory");

struct Maps {
  TensorMap left, right_x, right_y;  // right: boxes of the tokens that one block of a cluster loads
};

struct Barriers {
  uint64_t full[kStages], empty[kStages];
};

// Tiles of a cluster of kCluster blocks, one below the other: of x^T x, row by row from the one with the diagonal's
// first element on, then those of x^T y.
template <int kCluster>
struct Tiles {
  static constexpr int kRows = kCluster * kM;
  int rows, columns_x, columns_y;

  __host__ __device__ explicit Tiles(const pydit_second_moments_params& p)
      : rows(static_cast<int>(ceil_div(p.dim_x, kRows))),
        columns_x(static_cast<int>(ceil_div(p.dim_x, kN))),
        columns_y(static_cast<int>(ceil_div(p.dim_y, kN))) {}

  __host__ __device__ int first_column(int row) const { return row * kRows / kN; }

  __host__ __device__ int64_t count() const {
    int64_t total = static_cast<int64_t>(rows) * columns_y;
    for (int row = 0; row < rows; ++row) total += columns_x - first_column(row);
    return total;
  }

  __device__ TileOfSums at(int64_t index) const {
    for (int row = 0; row < rows; ++row) {
      const int width = columns_x - first_column(row);
      if (index < width) return {row, first_column(row) + static_cast<int>(index), false};
      index -= width;
    }
    return {static_cast<int>(index / columns_y), static_cast<int>(index % columns_y), true};
  }
};

// A tile's chunks [from, to) of a block's run, from the run's last tile to its first.
struct Walk {
  Run run;
  int64_t end;
  int64_t index = 0;
  int from = 0, to = 0;

  __device__ explicit Walk(const Run& run) : run(run), end(run.last) {}

  __device__ bool next() {
    if (end <= run.first) return false;
    index = (end - 1) / run.chunks;
    const int64_t base = index * run.chunks;
    from = static_cast<int>(base > run.first ? 0 : run.first - base), to = static_cast<int>(end - base);
    end = base + from;
    return true;
  }
};

// One thread: lanes that only waited along could fall behind by a whole round of the ring. Block `rank` of the cluster
// loads its share of the right operand's tokens, for all blocks.
template <int kCluster>
__device__ __forceinline__ void load(const Tiles<kCluster>& tiles, const Maps& maps, char* shared, Barriers* barriers,
                                     Walk walk, int rank) {
  constexpr int kShare = kStep / kCluster;
  static_assert(kShare % 8 == 0, "a share begins where the swizzle does");
  Ring<kStages> ring;
  while (walk.next()) {
    const TileOfSums tile = tiles.at(walk.index);
    const TensorMap& right = tile.cross ? maps.right_y : maps.right_x;
    const int row = tile.row * tiles.kRows + rank * kM;
    for (int step = walk.from * kStepsOfChunk; step < walk.to * kStepsOfChunk; ++step) {
      mbarrier_wait(&barriers->empty[ring.slot], ring.parity ^ 1);
      char* stage = shared + ring.slot * kStageBytes;
      uint64_t* full = &barriers->full[ring.slot];
      mbarrier_arrive_expect_tx(full, kStageBytes);
#pragma unroll
      for (int box = 0; box < kM / kBoxColumns; ++box)
        tma_load_2d(stage + box * kBoxBytes, maps.left, full, row + box * kBoxColumns, step * kStep);
#pragma unroll
      for (int box = 0; box < kN / kBoxColumns; ++box) {
        char* to = stage + kLeftBytes + box * kBoxBytes + rank * kShare * kBoxColumns * 2;
        const int column = tile.column * kN + box * kBoxColumns, token = step * kStep + rank * kShare;
        if (kCluster == 1)
          tma_load_2d(to, right, full, column, token);
        else
          tma_load_2d_multicast(to, right, full, column, token, (1 << kCluster) - 1);
      }
      ring.next();
    }
  }
}

// Sums of one column, and of its squares, over a stage's tokens. The swizzle permutes the 16-byte vectors of a token's
// row by the token's last three bits, so the loop takes eight tokens at a time.
template <typename T>
__device__ __forceinline__ float2 sum_stage(const char* right, int column) {
  float2 sums = make_float2(0.f, 0.f);
  const char* box = right + column / kBoxColumns * kBoxBytes + column % 8 * 2;
  const int vector = column % kBoxColumns / 8;
#pragma unroll 4
  for (int eight = 0; eight < kStep; eight += 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const char* at = box + (vector ^ i) * 16 + (eight + i) * kBoxColumns * 2;
      const float value = to_float(*reinterpret_cast<const T*>(at));
      sums.x += value;
      sums.y = fmaf(value, value, sums.y);
    }
  }
  return sums;
}

// `thread` of both warpgroups.
template <typename T, int kCluster>
__device__ __forceinline__ void consume(const pydit_second_moments_params& p, const Tiles<kCluster>& tiles,
                                        const char* shared, Barriers* barriers, Walk walk, int rank, int thread) {
  constexpr int kAll = kConsumers * kWarpgroup;
  const int group = thread / kWarpgroup, warp = thread % kWarpgroup / 32, lane = thread % 32;
  auto* done = static_cast<unsigned*>(p.workspace);
  const auto release = [&](int slot) {
    __syncwarp();  // all lanes have read the stage for column sums
    if (kCluster == 1) {
      if (lane == 0) mbarrier_arrive(&barriers->empty[slot]);
    } else if (lane < kCluster) {
      mbarrier_arrive_cluster(&barriers->empty[slot], lane);  // each block fills a part of both blocks' slots
    }
  };
  Ring<kStages> ring;
  float chunk[kN / 2], sums[kN / 2];
  while (walk.next()) {
    const TileOfSums tile = tiles.at(walk.index);
    const bool counts = tile.row == 0 && rank == 0 && thread < kN;  // this tile also makes its columns' sums
    unsigned* const added = done + walk.index * kCluster + rank;
    const int64_t width = tile.cross ? p.dim_y : p.dim_x;
    double* target = tile.cross ? p.xy : p.xx;
    bool turn = walk.from == 0;
    double columns[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kN / 2; ++i) sums[i] = 0;
    for (int at = walk.from; at < walk.to; ++at) {
      float2 partial = make_float2(0.f, 0.f);
#pragma unroll
      for (int step = 0; step < kStepsOfChunk; ++step) {
        const char* stage = shared + ring.slot * kStageBytes;
        const char* right = stage + kLeftBytes;
        mbarrier_wait(&barriers->full[ring.slot], ring.parity);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kStep; k += 16) {
          const int offset = k * kBoxColumns * 2;
          wgmma<T, kN, true, true>(chunk,
                                   matrix_descriptor<128>(stage + group * kBoxBytes + offset, kBoxBytes, 8 * 128),
                                   matrix_descriptor<128>(right + offset, kBoxBytes, 8 * 128), step > 0 || k > 0);
        }
        wgmma_commit_group();
        if (step > 0) {
          wgmma_wait_group<1>();  // the step before
          release((ring.slot + kStages - 1) % kStages);
        }
        if (counts) {
          const float2 more = sum_stage<T>(right, thread);
          partial.x += more.x, partial.y += more.y;
          fence_proxy_async();  // TMA will overwrite what was read
        }
        if (step + 1 == kStepsOfChunk) {
          wgmma_wait_group<0>();
          release(ring.slot);
        }
        ring.next();
      }
#pragma unroll
      for (int i = 0; i < kN / 2; ++i) sums[i] += chunk[i];
      columns[0] += partial.x, columns[1] += partial.y;
      if ((at + 1 - walk.from) % kChunksOfSum != 0 && at + 1 < walk.to) continue;
      if (!turn) {
        if (thread == 0) wait_at_least(added, static_cast<unsigned>(walk.from));
        barrier_sync(1, kAll);
        turn = true;
      }
      const int64_t row = tile.row * tiles.kRows + rank * kM + group * 64 + warp * 16 + lane / 4;
      const int64_t column = tile.column * kN + lane % 4 * 2;
      add_to_memory<kN / 2, 24>(
          target, p.dim_x, width, [&](int i) -> float& { return sums[i]; },
          [&](int i) { return make_longlong2(row + i / 2 % 2 * 8, column + i / 4 * 8 + i % 2); });
    }
    const int64_t place = static_cast<int64_t>(tile.column) * kN + thread;
    if (counts && place < width) {
      (tile.cross ? p.sum_y : p.sum_x)[place] += columns[0];
      if (tile.cross) p.sum_yy[place] += columns[1];
    }
    if (walk.to < walk.run.chunks) {  // somebody waits
      barrier_sync(1, kAll);
      if (thread == 0) store_release(added, static_cast<unsigned>(walk.to));
    }
  }
}

template <typename T, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    second_moments_sm90_kernel(const __grid_constant__ pydit_second_moments_params p,
                               const __grid_constant__ Maps maps) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* barriers = reinterpret_cast<Barriers*>(shared + kBarriers);
  auto* drawn = reinterpret_cast<unsigned*>(barriers + 1);
  const Tiles<kCluster> tiles(p);
  const int64_t count = tiles.count();
  const int rank = kCluster == 1 ? 0 : static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&barriers->full[stage], 1);
      mbarrier_init(&barriers->empty[stage], 4 * kConsumers * kCluster);  // a lane of each warp
    }
    fence_barrier_init();
    if (rank == 0) *drawn = atomicAdd(static_cast<unsigned*>(p.workspace) + count * kCluster, 1u);
  }
  if (kCluster == 1)
    __syncthreads();
  else
    cluster_sync();
  const unsigned ticket = kCluster == 1 ? *drawn : *cluster_map(drawn, 0);
  const Walk walk(run_of(p, count, ticket, gridDim.x / kCluster));
  if (threadIdx.x < kWarpgroup) {
    set_max_registers_down<kLoaderRegisters>();
    if (threadIdx.x < 32 && elect_one()) load(tiles, maps, shared, barriers, walk, rank);
    __syncwarp();  // the warp reaches the barrier below converged
  } else {
    set_max_registers_up<kConsumerRegisters>();
    consume<T>(p, tiles, shared, barriers, walk, rank, static_cast<int>(threadIdx.x) - kWarpgroup);
  }
  if (kCluster > 1) cluster_sync();  // the other block still arrives at this one's mbarriers and reads its ticket
}

// Launcher -------------------------------------------------------------------------------------------------------

// What a launch on `processors` multiprocessors reads from L2, by the arithmetic at the top of this file.
struct Reads {
  int64_t clusters;      // of the launch
  int64_t all, busiest;  // bytes of all blocks, and of the one with the longest run
};

template <int kCluster>
Reads reads_of(const pydit_second_moments_params& p, int processors) {
  constexpr int64_t kBytes = (kM + kN / kCluster) * 2 * kChunkTokens;  // of a unit, per block
  const int64_t units = Tiles<kCluster>(p).count() * ceil_div(p.tokens, kChunkTokens);
  if (units == 0) return {};
  const int64_t places = processors < kCluster ? 1 : processors / kCluster, clusters = units < places ? units : places;
  return {clusters, units * kCluster * kBytes, ceil_div(units, clusters) * kBytes};
}

template <typename T>
const char* encode(TensorMap* map, const void* data, int64_t stride, int64_t tokens, int64_t columns, int box_tokens) {
  const uint64_t size[2] = {static_cast<uint64_t>(columns), static_cast<uint64_t>(tokens)};
  const uint64_t bytes[1] = {static_cast<uint64_t>(stride) * sizeof(T)};
  const uint32_t box[2] = {kBoxColumns, static_cast<uint32_t>(box_tokens)};
  return encode_tensor_map(map, static_cast<const T*>(data), 2, size, bytes, box, Swizzle::k128);
}

template <typename T, int kCluster>
int launch(const pydit_second_moments_params& p) {
  constexpr int kShare = kStep / kCluster;
  Maps maps = {};
  const char* reason = encode<T>(&maps.left, p.x, p.stride_x, p.tokens, p.dim_x, kStep);
  if (reason == nullptr) reason = encode<T>(&maps.right_x, p.x, p.stride_x, p.tokens, p.dim_x, kShare);
  if (reason == nullptr && p.dim_y > 0) reason = encode<T>(&maps.right_y, p.y, p.stride_y, p.tokens, p.dim_y, kShare);
  if (reason != nullptr) return bad_argument("%s: %s", kSecondMoments, reason);
  int processors = 0;
  cudaError_t error = count_multiprocessors(&processors);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(second_moments_sm90_kernel<T, kCluster>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 kSharedBytes);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  const int64_t counters = Tiles<kCluster>(p).count() * kCluster + 1;
  if (error == cudaSuccess)
    error = cudaMemsetAsync(p.workspace, 0, static_cast<size_t>(counters) * sizeof(unsigned), stream);
  if (error != cudaSuccess) return launch_status(kSecondMoments, error);
  const auto blocks = static_cast<unsigned>(reads_of<kCluster>(p, processors).clusters * kCluster);
  name_second_moments_tensors<T>(p);
  return launch_status(kSecondMoments,
                       PYDIT_LAUNCH_CLUSTER((second_moments_sm90_kernel<T, kCluster>), kCluster, dim3(blocks),
                                            dim3(kThreads), kSharedBytes, stream, p, maps));
}

template <typename T>
int launch_cluster_size(const pydit_second_moments_params& p) {
  return cluster_of_second_moments_sm90(p) == 1 ? launch<T, 1>(p) : launch<T, 2>(p);
}

}  // namespace

int cluster_of_second_moments_sm90(const pydit_second_moments_params& p) {
  if (p.cluster != 0) return p.cluster;
  int processors = 0;
  if (count_multiprocessors(&processors) != cudaSuccess) return 1;  // the launch will say why
  const Reads alone = reads_of<1>(p, processors), pairs = reads_of<2>(p, processors);
  return pairs.all < alone.all && pairs.busiest < alone.busiest ? 2 : 1;
}

int launch_second_moments_sm90(const pydit_second_moments_params& p) {
  return p.dtype == PYDIT_FLOAT16 ? launch_cluster_size<__half>(p) : launch_cluster_size<__nv_bfloat16>(p);
}

}  // namespace pydit::PYDIT_BACKEND
