// The gram kernel of hsic_matrix for Hopper (sm_90a): TMA, wgmma, warp specialisation. What is computed, the shift and
// the other kernels are in hsic_matrix.cu; where things lie, in hsic_matrix.cuh.
//
// A job is work for one layer. On the diagonal: the triangle of a super tile, ten of its sixteen blocks of 64 x 64, of
// 256 rows that are both operands. Above it: 128 x 256, eight blocks, of 128 + 256 rows. Both operands are K-major, so
// TMA's boxes of 128 rows by 64 channels are what wgmma reads. Two warpgroups multiply:
//
//   diagonal   0 0 0 0     Warpgroup 0 has rows 0 as 64 x 256 and rows 3 as 64 x 64, warpgroup 1 rows 1 as 64 x 192 and
//                1 1 1     rows 2 as 64 x 128: five blocks and 160 registers of sums each. Above it each has 64 x 256,
//                  1 1     128 registers. At n = 512 a layer is two jobs of either kind: 36 of the 64 blocks, none
//                    0     twice.
//
// Cost at n = 512, L = 60, d = 3072: 54 GFLOP, 55 us at 989 TFLOP/s. 240 jobs for 132 SMs: the busiest have one of
// either kind, 18 blocks, where 16.4 would be an equal share: 61 us. L2 gives 256 or 384 rows to a job, 472 MB where
// the portable kernel asks for 755: 79 us at 6 TB/s, a rate that is assumed. Memory: the features once, 189 MB, 39 us
// at 4.8 TB/s, and 35 MB of K written. Expected: 85 us, with what the ends of jobs cost (below). None of it is measured
// yet.
//
// Order. Jobs are numbered layer by layer, so that those of a layer run side by side and its rows come from memory to
// L2 once: with all diagonal jobs first they would come twice, 378 MB, 79 us. Blocks take every gridDim.x-th job, in
// every second round from the last block to the first, which pairs long jobs with short ones: of the first 132 jobs the
// diagonal ones go to blocks 4 i and 4 i + 1, of the other 108 to blocks 4 i + 2 and 4 i + 3.
//
// Shifts. wgmma reads shared memory, so a shift is subtracted there, in place, by three warps between two barriers:
// full, by TMA, and ready. Most steps of 64 channels have no shift, and the warps only pass them on; the shifts of a
// step are on their way while the one before is looked at. Of a step with one they read and write the 16 bytes of each
// row that hold a channel with a shift: at most 96 KB, 768 clocks of shared memory, beside the 640 of 1024 (above the
// diagonal) or 896 of 1280 that wgmma takes. Every step shifted would cost about a third more time, not measured.
//
// Numbers. 160 registers leave no room for a second set of sums, as the portable kernel has: the tensor cores sum all d
// channels in fp32, d / 16 additions, which may truncate (Fasi et al. 2021, of A100 and before). Relative to the sum of
// |x_ik x_jk| the error is below d / 16 / 2^23, 2.3e-5 at d = 3072 and 6.1e-5 at 8192; more channels take the portable
// kernel. hsic_matrix promises 1e-4 of the HSICs, which average over n^2 elements.
//
// The end of a job: each thread has 160 or 128 sums, stores them as pairs, 32 bytes of a row for each four lanes, and
// adds them up in fp64, rows among four lanes, columns among eight, each step of which halves what a lane keeps, and
// then among the warps. 160 conversions to fp64 at 16 per clock are 2,560 clocks of a job's 61,440, in which the tensor
// cores idle, and the four stages of the next job come in.
#include "device/arch.h"
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "device/ring.cuh"
#include "device/tensor_map.h"
#include "kernels/stats/hsic_matrix.cuh"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kWarpgroup = 128, kWarps = 4, kConsumers = 2, kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kShifters = kWarps - 1;  // warps; the first loads
constexpr int kStages = 4, kRowBytes = kStep * 2, kBoxBytes = kTile * kRowBytes, kStageBytes = 3 * kBoxBytes;
constexpr int kScratch = kStages * kStageBytes;  // sums of columns [consumer, warp, kSuper], fp64
constexpr int kBarriers = kScratch + kConsumers * kWarps * kSuper * 8, kSharedBytes = kBarriers + 128;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kRowBytes == 128 && kSharedBytes <= 227 * 1024, "rows as wide as the swizzle; what a block may have");

constexpr int kMaxMaps = kLargeParameters ? PYDIT_MAX_LAYERS : 1;  // without room for all, the kernel is never launched

// The jobs of super tiles [first, first + count) of all layers.
struct Jobs {
  int64_t all;
  int of_layer, diagonals;    // of which are on the diagonal
  int first, first_diagonal;  // super tile; row of super tiles
  int before;                 // super tiles above the diagonal that precede `first`
};

struct Parameters {
  TensorMap map[kMaxMaps];  // of the features
  int32_t dim[PYDIT_MAX_LAYERS];
  Layout layout;
  Jobs jobs;
  Store store;
};
static_assert(sizeof(Parameters) <= 32764 || kMaxMaps == 1, "parameters of a kernel");

struct Barriers {
  uint64_t full[kStages], ready[kStages], empty[kStages];
};
static_assert(sizeof(Barriers) <= kSharedBytes - kBarriers, "room for the barriers");

struct Job {
  int layer, row, column;  // of tiles, its first
  bool diagonal;
  int64_t kept;  // its super tile, among those kept
};

// A block's jobs.
struct Walk {
  const Parameters& p;
  int64_t round = 0;

  __device__ explicit Walk(const Parameters& p) : p(p) {}

  __device__ bool next(Job& job) {
    const Jobs& jobs = p.jobs;
    const int64_t blocks = gridDim.x, mine = round % 2 == 0 ? blockIdx.x : blocks - 1 - blockIdx.x;
    const int64_t number = round++ * blocks + mine;
    if (number >= jobs.all) return false;  // only the last round has fewer jobs than blocks
    const int within = static_cast<int>(number % jobs.of_layer), across = static_cast<int>(p.layout.across);
    job.layer = static_cast<int>(number / jobs.of_layer);
    job.diagonal = within < jobs.diagonals;
    TileAt super = {jobs.first_diagonal + within, jobs.first_diagonal + within};
    int half = 0;
    if (!job.diagonal) {
      const int index = jobs.before + (within - jobs.diagonals) / 2;
      half = (within - jobs.diagonals) % 2;
      super = triangle_tile(across - 1, index);
      ++super.column;
    }
    job.row = 2 * super.row + half, job.column = 2 * super.column;
    job.kept = triangle_index(across, super.row, super.column) - jobs.first;
    return true;
  }

  __device__ int steps(const Job& job) const { return (p.dim[job.layer] + kStep - 1) / kStep; }
};

// Device code ----------------------------------------------------------------------------------------------------

// One thread. The boxes of a stage: on the diagonal two tiles of rows, above it one tile of rows and two of columns.
__device__ __forceinline__ void load(const Parameters& p, char* shared, Barriers* barriers) {
  Ring<kStages> ring;
  Job job;
  for (Walk walk(p); walk.next(job);) {
    const int boxes = job.diagonal ? 2 : 3, steps = walk.steps(job);
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(&barriers->empty[ring.slot], ring.parity ^ 1);
      uint64_t* full = &barriers->full[ring.slot];
      mbarrier_arrive_expect_tx(full, boxes * kBoxBytes);
      for (int box = 0; box < boxes; ++box) {
        const int tile = job.diagonal ? job.row + box : box == 0 ? job.row : job.column + box - 1;
        tma_load_2d(shared + ring.slot * kStageBytes + box * kBoxBytes, p.map[job.layer], full, step * kStep,
                    tile * kTile);
      }
      ring.next();
    }
  }
}

// Three warps, whose threads `thread` counts: subtract the shifts, each thread from 16 bytes of every twelfth row.
template <typename T>
__device__ __forceinline__ void shift(const Parameters& p, char* shared, Barriers* barriers, int thread) {
  const int vector = thread % 8;
  Ring<kStages> ring;
  Job job;
  for (Walk walk(p); walk.next(job);) {
    const int rows = job.diagonal ? 2 * kTile : 3 * kTile, steps = walk.steps(job);
    const auto* shifts = reinterpret_cast<const uint4*>(p.layout.shifts + job.layer * p.layout.channels) + vector;
    uint4 next = *shifts;
    for (int step = 0; step < steps; ++step) {
      const uint4 of = next;
      if (step + 1 < steps) next = shifts[(step + 1) * 8];
      const bool mine = (of.x | of.y | of.z | of.w) != 0;
      mbarrier_wait(&barriers->full[ring.slot], ring.parity);
      if (mine) {
        char* stage = shared + ring.slot * kStageBytes;
#pragma unroll 2
        for (int row = thread / 8; row < rows; row += kShifters * 4) {
          auto* at = reinterpret_cast<uint4*>(stage + row * kRowBytes + (vector ^ row % 8) * 16);
          uint4 x = *at;
          x.x = subtract<T>(x.x, of.x), x.y = subtract<T>(x.y, of.y);
          x.z = subtract<T>(x.z, of.z), x.w = subtract<T>(x.w, of.w);
          *at = x;
        }
        fence_proxy_async();
      }
      __syncwarp();
      if (thread % 32 == 0) mbarrier_arrive(&barriers->ready[ring.slot]);
      ring.next();
    }
  }
}

// What a warpgroup multiplies: 64 rows of a stage by N of its rows. In the Gram matrix the product is block (row,
// column) and those to its right.
struct Strip {
  int stage_row, stage_column, row, column;
};

// sums += left right^T over a step of 64 channels.
template <typename T, int kN>
__device__ __forceinline__ void multiply(float (&sums)[kN / 2], const char* stage, const Strip& strip) {
  const char *left = stage + strip.stage_row * kRowBytes, *right = stage + strip.stage_column * kRowBytes;
#pragma unroll
  for (int k = 0; k < kRowBytes; k += 32)
    wgmma<T, kN>(sums, matrix_descriptor<128>(left + k, 16, 8 * kRowBytes),
                 matrix_descriptor<128>(right + k, 16, 8 * kRowBytes), true);
}

// Adds up 16 columns of each lane over the warp's rows. Lanes with the same lane % 4 hold the same columns, column i
// being 8 (i / 2) + 2 (lane % 4) + i % 2; in the end a lane has the sums of columns 2 lane and 2 lane + 1.
__device__ __forceinline__ double2 sum_columns(double (&columns)[16], int lane) {
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int half = 8 >> step;
    const bool upper = (lane & 2 * half) != 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i >= half) break;
      const double keep = upper ? columns[i + half] : columns[i], give = upper ? columns[i] : columns[i + half];
      columns[i] = keep + __shfl_xor_sync(kFullWarp, give, 2 * half);
    }
  }
  return make_double2(columns[0], columns[1]);
}

// Stores a strip: its elements, sums of rows for each block, and sums of columns for each block above the diagonal,
// which are the row sums of its mirror image. Warpgroup `group` calls.
template <int kN>
__device__ __forceinline__ void store(const float (&sums)[kN / 2], const Parameters& p, const Job& job,
                                      const Strip& strip, char* shared, int group) {
  const Layout& layout = p.layout;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup, warp = thread / 32, lane = thread % 32;
  const int blocks = static_cast<int>(2 * layout.blocks), rows = static_cast<int>(layout.rows);
  auto* scratch = reinterpret_cast<double*>(shared + kScratch) + group * kWarps * kSuper;
  if (strip.row >= blocks) return;
  const int in_block = warp * 16 + lane / 4, row = strip.row * kBlock + in_block;
  const int block_row = strip.row % kBlocksOfSuper, row_in_super = block_row * kBlock + in_block;
#pragma unroll
  for (int i = 0; i < kN / kBlock; ++i) {
    const int block = strip.column + i;
    if (block >= blocks) break;
    float* tile = layout.tile_of(job.kept, strip.row / 2, block / 2, job.layer) + strip.row % 2 * kBlock * kTile +
                  block % 2 * kBlock;
    double of_rows[2] = {0, 0}, of_columns[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int column = block * kBlock + j * 8 + lane % 4 * 2;
      float x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int my_row = row + k / 2 * 8, my_column = column + k % 2;
        x[k] = my_row < rows && my_column < rows && my_row != my_column ? sums[i * 32 + j * 4 + k] : 0;
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (p.store != Store::kSums)
          *reinterpret_cast<float2*>(tile + (in_block + k * 8) * kTile + j * 8 + lane % 4 * 2) =
              make_float2(x[2 * k], x[2 * k + 1]);
        of_rows[k] += static_cast<double>(x[2 * k]) + x[2 * k + 1];
        of_columns[2 * j + k] = static_cast<double>(x[k]) + x[k + 2];
      }
    }
    if (p.store == Store::kTiles) continue;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      of_rows[k] += __shfl_xor_sync(kFullWarp, of_rows[k], 1);
      of_rows[k] += __shfl_xor_sync(kFullWarp, of_rows[k], 2);
      if (lane % 4 == 0)
        layout.sums_of(job.kept, job.layer, false, block % kBlocksOfSuper)[row_in_super + k * 8] = of_rows[k];
    }
    if (block != strip.row)
      *reinterpret_cast<double2*>(scratch + warp * kSuper + i * kBlock + 2 * lane) = sum_columns(of_columns, lane);
  }
  if (p.store == Store::kTiles) return;
  barrier_sync(1 + group, kWarpgroup);
  for (int i = thread; i < kN; i += kWarpgroup) {
    const int block = strip.column + i / kBlock;
    if (block >= blocks || block == strip.row) continue;
    layout.sums_of(job.kept, job.layer, !job.diagonal, block_row)[block % kBlocksOfSuper * kBlock + i % kBlock] =
        scratch[i] + scratch[kSuper + i] + scratch[2 * kSuper + i] + scratch[3 * kSuper + i];
  }
  barrier_sync(1 + group, kWarpgroup);  // the scratch is free
}

// A warpgroup's part of a job: a strip of kWide columns and, unless kNarrow is 0, one of kNarrow.
template <typename T, int kWide, int kNarrow>
__device__ __forceinline__ void work(const Parameters& p, const Job& job, const Strip& wide, const Strip& narrow,
                                     int steps, Ring<kStages>& ring, char* shared, Barriers* barriers, int group) {
  // Cleared rather than overwritten by the first product: ptxas keeps registers that nothing visibly sets alive from
  // job to job, and those of all three kinds of work together are too many (C7512).
  float sums[kWide / 2] = {}, more[kNarrow > 0 ? kNarrow / 2 : 1] = {};
  const auto release = [&] {  // the slot of the step before
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&barriers->empty[(ring.slot + kStages - 1) % kStages]);
  };
  int step = 0;
  do {  // dim >= 1: there is a step
    const char* stage = shared + ring.slot * kStageBytes;
    mbarrier_wait(&barriers->full[ring.slot], ring.parity);
    mbarrier_wait(&barriers->ready[ring.slot], ring.parity);
    wgmma_fence();
    multiply<T, kWide>(sums, stage, wide);
    if constexpr (kNarrow > 0) multiply<T, kNarrow>(more, stage, narrow);
    wgmma_commit_group();
    if (step > 0) {
      wgmma_wait_group<1>();
      release();
    }
    ring.next();
  } while (++step < steps);
  wgmma_wait_group<0>();
  release();
  store<kWide>(sums, p, job, wide, shared, group);
  if constexpr (kNarrow > 0) store<kNarrow>(more, p, job, narrow, shared, group);
}

template <typename T>
__device__ __forceinline__ void consume(const Parameters& p, char* shared, Barriers* barriers, int group) {
  Ring<kStages> ring;
  Job job;
  for (Walk walk(p); walk.next(job);) {
    const int row = 2 * job.row, column = 2 * job.column, steps = walk.steps(job);
    const auto on_diagonal = [&](int i) { return Strip{i * kBlock, i * kBlock, row + i, row + i}; };
    if (!job.diagonal)
      work<T, 256, 0>(p, job, {group * kBlock, kTile, row + group, column}, {}, steps, ring, shared, barriers, group);
    else if (group == 0)
      work<T, 256, 64>(p, job, on_diagonal(0), on_diagonal(3), steps, ring, shared, barriers, group);
    else
      work<T, 192, 128>(p, job, on_diagonal(1), on_diagonal(2), steps, ring, shared, barriers, group);
  }
}

// Kernel ---------------------------------------------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) hsic_gram_sm90_kernel(const __grid_constant__ Parameters p) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* barriers = reinterpret_cast<Barriers*>(shared + kBarriers);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(&barriers->full[stage], 1);
      mbarrier_init(&barriers->ready[stage], kShifters);            // a lane of each warp
      mbarrier_init(&barriers->empty[stage], kWarps * kConsumers);  // as well
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kWarpgroup) {
    set_max_registers_down<kProducerRegisters>();
    if (thread >= 32)
      shift<T>(p, shared, barriers, thread - 32);
    else if (elect_one())
      load(p, shared, barriers);
  } else {
    set_max_registers_up<kConsumerRegisters>();
    consume<T>(p, shared, barriers, thread / kWarpgroup - 1);
  }
}

// Launcher -------------------------------------------------------------------------------------------------------

Jobs jobs_of(const Layout& layout, int64_t first, int64_t count) {
  Jobs jobs = {};
  for (int64_t row = 0; row < layout.across; ++row) {
    const int64_t at = triangle_index(layout.across, row, row);
    if (at >= first + count) break;
    if (at < first) {
      ++jobs.first_diagonal;
      continue;
    }
    ++jobs.diagonals;
  }
  jobs.first = static_cast<int>(first), jobs.before = jobs.first - jobs.first_diagonal;
  jobs.of_layer = static_cast<int>(2 * count - jobs.diagonals);
  jobs.all = int64_t{layout.layers} * jobs.of_layer;
  return jobs;
}

template <typename T>
int launch(const pydit_hsic_matrix_params& params, const Layout& layout, int64_t first, int64_t count, Store store) {
  Parameters p = {};
  p.layout = layout, p.jobs = jobs_of(layout, first, count), p.store = store;
  for (int layer = 0; layer < params.layers && layer < kMaxMaps; ++layer) {
    const uint64_t size[2] = {static_cast<uint64_t>(params.dim[layer]), static_cast<uint64_t>(params.rows)};
    const uint64_t stride[1] = {static_cast<uint64_t>(params.stride[layer]) * sizeof(T)};
    const uint32_t box[2] = {kStep, kTile};
    const char* reason = encode_tensor_map(&p.map[layer], static_cast<const T*>(params.features[layer]), 2, size,
                                           stride, box, Swizzle::k128);
    if (reason != nullptr) return bad_argument("%s: features[%d]: %s", kHsicMatrix, layer, reason);
    p.dim[layer] = params.dim[layer];
  }
  int processors = 0;
  cudaError_t error = count_multiprocessors(&processors);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(hsic_gram_sm90_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return launch_status(kHsicMatrix, error);
  const auto blocks = static_cast<unsigned>(p.jobs.all < processors ? p.jobs.all : processors);
  name_features<T>(params), name_workspace(params, layout);
  return launch_status(kHsicMatrix, PYDIT_LAUNCH(hsic_gram_sm90_kernel<T>, dim3(blocks), dim3(kThreads), kSharedBytes,
                                                 static_cast<cudaStream_t>(params.stream), p));
}

}  // namespace

int launch_hsic_gram_sm90(const pydit_hsic_matrix_params& p, const Layout& layout, int64_t first, int64_t count,
                          Store store) {
  return p.dtype == PYDIT_FLOAT16 ? launch<__half>(p, layout, first, count, store)
                                  : launch<__nv_bfloat16>(p, layout, first, count, store);
}

}  // namespace pydit::PYDIT_BACKEND
