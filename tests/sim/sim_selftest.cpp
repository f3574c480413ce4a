// Self test of the simulator, part 2: launches, shared memory, barriers, collectives, order; and main().
//   sim_selftest            runs every test
//   sim_selftest NAME...    runs those
#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "selftest.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Launches and indices -------------------------------------------------------------------------------------------

__global__ void record_indices(uint3* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = {threadIdx.x, blockIdx.y, threadIdx.z + blockIdx.z};
}

TEST(grid_and_block_of_three_dimensions) {
  const dim3 grid(3, 5, 2), block(4, 3, 7);
  const unsigned per_block = 4 * 3 * 7;
  std::vector<uint3> out(3 * 5 * 2 * per_block, {999, 999, 999});
  CHECK_EQUAL(PYDIT_LAUNCH(record_indices, grid, block, 0, nullptr, out.data()), cudaSuccess);
  for (unsigned i = 0; i < out.size(); ++i) {
    const unsigned b = i / per_block, t = i % per_block;
    CHECK_EQUAL(out[i].x, t % 4);
    CHECK_EQUAL(out[i].y, b / 3 % 5);
    CHECK_EQUAL(out[i].z, t / 12 + b / 15);
  }
}

struct ByValue {
  int numbers[20];
};

template <typename T, int kScale>
__global__ void change_parameter(ByValue parameter, T* out) {
  const T before = parameter.numbers[3];
  parameter.numbers[3] = 7;  // the thread's own copy
  out[threadIdx.x] = before * kScale;
}

TEST(parameters_are_copied_to_each_thread) {
  ByValue parameter = {};
  parameter.numbers[3] = 5;
  std::vector<long long> out(64);
  CHECK_EQUAL(PYDIT_LAUNCH((change_parameter<long long, 4>), 1, 64, 0, nullptr, parameter, out.data()), cudaSuccess);
  for (const long long x : out) CHECK_EQUAL(x, 20);
}

__global__ void nothing() {}

TEST(launches_are_counted_and_checked) {
  const uint64_t before = pydit_sim_launch_count();
  CHECK_EQUAL(PYDIT_LAUNCH(nothing, 1, 1, 0, nullptr), cudaSuccess);
  CHECK_EQUAL(PYDIT_LAUNCH(nothing, 1, 1024, 48 * 1024, nullptr), cudaSuccess);
  CHECK_EQUAL(pydit_sim_launch_count() - before, 2u);
  CHECK_REFUSED(PYDIT_LAUNCH(nothing, 0, 32, 0, nullptr), "nothing: grid", "got (0, 1, 1)");
  CHECK_REFUSED(PYDIT_LAUNCH(nothing, dim3(1, 65536), 32, 0, nullptr), "grid", "65536");
  CHECK_REFUSED(PYDIT_LAUNCH(nothing, 1, 1025, 0, nullptr), "block", "1025");
  CHECK_REFUSED(PYDIT_LAUNCH(nothing, 1, dim3(32, 32, 2), 0, nullptr), "block", "(32, 32, 2)");
  CHECK_REFUSED(PYDIT_LAUNCH(nothing, 1, 32, 48 * 1024 + 1, nullptr), "shared memory", "49152", "49153");
  pydit_sim_set_arch(90);
  CHECK_EQUAL(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024), cudaSuccess);
  CHECK_EQUAL(PYDIT_LAUNCH(nothing, 1, 32, 227 * 1024, nullptr), cudaSuccess);
  CHECK_EQUAL(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 * 1024),
              cudaErrorInvalidValue);
  CHECK_EQUAL(cudaPeekAtLastError(), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaGetLastError(), cudaErrorInvalidValue);
  CHECK_EQUAL(cudaGetLastError(), cudaSuccess);
  int value = 0;
  CHECK_EQUAL(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0), cudaSuccess);
  CHECK(value > 0);
  CHECK_EQUAL(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaSuccess);
  CHECK_EQUAL(value, 227 * 1024);
  pydit_sim_set_arch(80);
}

// Shared memory and barriers -------------------------------------------------------------------------------------

__global__ void inspect_shared(unsigned* out, int words) {
  PYDIT_DYNAMIC_SHARED(unsigned, memory);
  unsigned all_ones = reinterpret_cast<uintptr_t>(memory) % 1024 == 0;
  for (int i = threadIdx.x; i < words; i += blockDim.x) all_ones &= memory[i] == 0xffffffffu;
  if (__syncthreads_and(all_ones)) out[blockIdx.x] = 1;
  for (int i = threadIdx.x; i < words; i += blockDim.x) memory[i] = 0;
}

TEST(dynamic_shared_memory_is_poisoned_before_every_block) {
  std::vector<unsigned> out(50);
  CHECK_EQUAL(PYDIT_LAUNCH(inspect_shared, 50, 96, 4000, nullptr, out.data(), 1000), cudaSuccess);
  for (const unsigned x : out) CHECK_EQUAL(x, 1u);
}

__global__ void barrier_votes(int* out) {
  const int count = __syncthreads_count(threadIdx.x % 3 == 0);
  const int any = __syncthreads_or(threadIdx.x == 50), none = __syncthreads_or(0);
  const int all = __syncthreads_and(threadIdx.x < 1000), some = __syncthreads_and(threadIdx.x < 50);
  out[threadIdx.x] = count * 10000 + any * 1000 + none * 100 + all * 10 + some;
}

TEST(barriers_that_vote) {
  std::vector<int> out(100);
  CHECK_EQUAL(PYDIT_LAUNCH(barrier_votes, 1, 100, 0, nullptr, out.data()), cudaSuccess);
  for (const int x : out) CHECK_EQUAL(x, 34 * 10000 + 1000 + 10);
}

__global__ void some_exit_early(int* out) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  if (threadIdx.x % 3 == 1) return;
  atomicAdd(&sum, 1);
  __syncthreads();
  const unsigned here = __ballot_sync(kAll, 1);
  out[threadIdx.x] = sum * 100 + __popc(here);
}

TEST(exited_threads_are_not_waited_for) {
  for (int seed = 0; seed < 10; ++seed) {
    pydit_sim_set_seed(seed);
    std::vector<int> out(96, -1);
    CHECK_EQUAL(PYDIT_LAUNCH(some_exit_early, 1, 96, 0, nullptr, out.data()), cudaSuccess);
    for (int i = 0; i < 96; ++i) {
      int lanes = 0;
      for (int lane = 0; lane < 32; ++lane) lanes += (i / 32 * 32 + lane) % 3 != 1;
      CHECK_EQUAL(out[i], i % 3 == 1 ? -1 : 64 * 100 + lanes);
    }
  }
  pydit_sim_set_seed(0);
}

__global__ void poll(int* out) {
  __shared__ volatile int flag;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == 40) flag = 5;
  while (flag == 0) __nanosleep(100);
  out[threadIdx.x] = flag;
}

TEST(polling_lets_others_run) {
  std::vector<int> out(64);
  CHECK_EQUAL(PYDIT_LAUNCH(poll, 1, 64, 0, nullptr, out.data()), cudaSuccess);
  for (const int x : out) CHECK_EQUAL(x, 5);
}

// Warp collectives -----------------------------------------------------------------------------------------------

template <typename T>
__global__ void shuffles(T* out) {
  const int lane = threadIdx.x;
  const T mine = static_cast<T>(lane * 3 + 1);
  out[lane] = __shfl_sync(kAll, mine, lane + 5);  // modulo the width
  out[32 + lane] = __shfl_sync(kAll, mine, 2, 8);
  out[64 + lane] = __shfl_xor_sync(kAll, mine, 20);
  out[96 + lane] = __shfl_xor_sync(kAll, mine, 9, 8);
  out[128 + lane] = __shfl_down_sync(kAll, mine, 3);
  out[160 + lane] = __shfl_down_sync(kAll, mine, 3, 4);
  out[192 + lane] = __shfl_up_sync(kAll, mine, 1);
  out[224 + lane] = __shfl_up_sync(kAll, mine, 1, 16);
}

template <typename T>
void check_shuffles() {
  std::vector<T> out(256);
  CHECK_EQUAL(PYDIT_LAUNCH(shuffles<T>, 1, 32, 0, nullptr, out.data()), cudaSuccess);
  for (int lane = 0; lane < 32; ++lane) {
    // xor with width 8: a source in an earlier segment may be read, one in a later segment may not.
    const int crossed = lane ^ 9, allowed = crossed < (lane / 8 + 1) * 8;
    const int sources[8] = {(lane + 5) % 32, lane / 8 * 8 + 2, lane ^ 20, allowed ? crossed : lane,
                            lane + 3 < 32 ? lane + 3 : lane, lane % 4 + 3 < 4 ? lane + 3 : lane,
                            lane > 0 ? lane - 1 : lane, lane % 16 > 0 ? lane - 1 : lane};
    for (int i = 0; i < 8; ++i) CHECK_EQUAL(out[i * 32 + lane], static_cast<T>(sources[i] * 3 + 1));
  }
}

TEST(shuffles_of_every_type) {
  check_shuffles<int>();
  check_shuffles<unsigned>();
  check_shuffles<float>();
  check_shuffles<double>();
  check_shuffles<long long>();
}

__global__ void halves(unsigned* out, float* undefined) {
  const int lane = threadIdx.x;
  unsigned votes;
  float x = static_cast<float>(lane);
  if (lane < 16) {
    for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(0x0000ffffu, x, offset);
    votes = __ballot_sync(0x0000ffffu, lane % 2);
  } else {
    votes = __ballot_sync(0xffff0000u, lane % 2 == 0);
    for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffff0000u, x, offset);
    undefined[lane] = __shfl_sync(0xffff0000u, x, 3);  // lane 3 does not take part
  }
  __syncwarp();
  out[lane] = votes + static_cast<unsigned>(x);
  out[32 + lane] = __any_sync(kAll, lane == 9) * 8 + __any_sync(kAll, 0) * 4 + __all_sync(kAll, lane < 40) * 2 +
                   __all_sync(kAll, lane != 3);
  out[64 + lane] = __reduce_add_sync(kAll, lane) + __reduce_max_sync(kAll, lane) * 1000 +
                   __reduce_min_sync(kAll, lane + 2) * 100000;
}

TEST(votes_reductions_and_partial_masks) {
  std::vector<unsigned> out(96);
  std::vector<float> undefined(32);
  CHECK_EQUAL(PYDIT_LAUNCH(halves, 1, 32, 0, nullptr, out.data(), undefined.data()), cudaSuccess);
  for (int lane = 0; lane < 32; ++lane) {
    CHECK_EQUAL(out[lane], lane < 16 ? 0xaaaau + 120 : 0x55550000u + 376);
    CHECK_EQUAL(out[32 + lane], 10u);
    CHECK_EQUAL(out[64 + lane], 496u + 31000 + 200000);
    if (lane >= 16) CHECK(std::isnan(undefined[lane]));
  }
}

// Lane 1 is in two groups; whichever order the lanes run in, each waits for the right partner.
__global__ void overlapping_masks(int* out) {
  const int lane = threadIdx.x;
  int sum = 0;
  if (lane == 1 || lane == 2) sum += __shfl_xor_sync(0x6u, lane, 3);
  if (lane == 0 || lane == 1) sum += 10 * __shfl_xor_sync(0x3u, lane + 5, 1);
  out[lane] = sum;
}

TEST(collectives_with_overlapping_masks) {
  for (int seed = 0; seed < 400; ++seed) {
    pydit_sim_set_seed(seed);
    std::vector<int> out(32);
    CHECK_EQUAL(PYDIT_LAUNCH(overlapping_masks, 1, 32, 0, nullptr, out.data()), cudaSuccess);
    CHECK_EQUAL(out[0], 60);
    CHECK_EQUAL(out[1], 52);
    CHECK_EQUAL(out[2], 1);
  }
  pydit_sim_set_seed(0);
}

// Order and threads ----------------------------------------------------------------------------------------------

__global__ void record_order(unsigned* ticket, unsigned* order) {
  __syncthreads();
  order[atomicAdd(ticket, 1)] = (blockIdx.x * blockDim.x + threadIdx.x);
}

TEST(order_depends_on_the_seed_alone) {
  pydit_sim_set_threads(1);
  std::set<std::vector<unsigned>> orders;
  for (int round = 0; round < 2; ++round) {
    for (int seed = 0; seed < 8; ++seed) {
      pydit_sim_set_seed(seed);
      unsigned ticket = 0;
      std::vector<unsigned> order(6 * 96);
      CHECK_EQUAL(PYDIT_LAUNCH(record_order, 6, 96, 0, nullptr, &ticket, order.data()), cudaSuccess);
      CHECK_EQUAL(std::set<unsigned>(order.begin(), order.end()).size(), order.size());
      orders.insert(order);
    }
  }
  CHECK_EQUAL(orders.size(), 8u);
  pydit_sim_set_seed(0);
  pydit_sim_set_threads(0);
}

// A row-wise LayerNorm with 16-byte loads, the shape of kernel that the simulator runs most.
__global__ void layer_norm(const __nv_bfloat16* in, __nv_bfloat16* out, int channels) {
  __shared__ float2 partial[32];
  const __nv_bfloat16* row = in + static_cast<size_t>(blockIdx.x) * channels;
  float sum = 0, squares = 0;
  for (int c = threadIdx.x * 8; c < channels; c += blockDim.x * 8) {
    const uint4 packed = __ldg(reinterpret_cast<const uint4*>(row + c));
    __nv_bfloat162 pairs[4];
    memcpy(pairs, &packed, sizeof packed);
    for (const __nv_bfloat162 pair : pairs) {
      const float2 x = __bfloat1622float2(pair);
      sum += x.x + x.y;
      squares = fmaf(x.x, x.x, fmaf(x.y, x.y, squares));
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(kAll, sum, offset);
    squares += __shfl_xor_sync(kAll, squares, offset);
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = make_float2(sum, squares);
  __syncthreads();
  sum = squares = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += partial[w].x, squares += partial[w].y;
  const float mean = sum / channels, rstd = rsqrtf(squares / channels - mean * mean + 1e-6f);
  for (int c = threadIdx.x; c < channels; c += blockDim.x) {
    out[static_cast<size_t>(blockIdx.x) * channels + c] = __float2bfloat16_rn((__bfloat162float(row[c]) - mean) * rstd);
  }
}

// Returns the largest error against float64, relative to what one rounding to bf16 and fp32 sums allow.
double layer_norm_error(int rows, int channels) {
  std::vector<__nv_bfloat16> in(static_cast<size_t>(rows) * channels), out(in.size());
  uint32_t random = 1;
  for (__nv_bfloat16& x : in) {
    random = random * 1664525u + 1013904223u;
    x = __float2bfloat16_rn(static_cast<float>(random >> 8) * 0x1p-23f - 0.7f);
  }
  CHECK_EQUAL(PYDIT_LAUNCH(layer_norm, rows, 128, 0, nullptr, in.data(), out.data(), channels), cudaSuccess);
  double worst = 0;
  for (int r = 0; r < rows; ++r) {
    double sum = 0, squares = 0;
    for (int c = 0; c < channels; ++c) sum += __bfloat162float(in[r * channels + c]);
    for (int c = 0; c < channels; ++c) {
      const double deviation = __bfloat162float(in[r * channels + c]) - sum / channels;
      squares += deviation * deviation;
    }
    for (int c = 0; c < channels; ++c) {
      const double exact =
          (__bfloat162float(in[r * channels + c]) - sum / channels) / std::sqrt(squares / channels + 1e-6);
      const double allowed = std::fabs(exact) * 0x1p-8 + 2e-6;
      worst = std::fmax(worst, std::fabs(__bfloat162float(out[r * channels + c]) - exact) / allowed);
    }
  }
  return worst;
}

TEST(layer_norm_agrees_with_float64) { CHECK(layer_norm_error(300, 1536) <= 1.); }

__global__ void fails() { __trap(); }

TEST(two_host_threads_launch_at_once) {
  pydit_sim_set_threads(2);
  std::vector<double> errors(2, 1e9);
  std::string reports[2];
  std::vector<std::thread> hosts;
  for (int host = 0; host < 2; ++host) {
    hosts.emplace_back([host, &errors, &reports] {
      for (int round = 0; round < 5; ++round) {
        errors[host] = layer_norm_error(200, 256 + 8 * host);
        if (host == 1) CHECK_FAILS(PYDIT_LAUNCH(fails, 5, 32, 0, nullptr), "__trap()");
      }
      reports[host] = pydit_sim_last_report();
    });
  }
  for (std::thread& host : hosts) host.join();
  for (const double error : errors) CHECK(error <= 1.);
  CHECK(reports[0].empty());  // each host thread has its own report
  CHECK(!reports[1].empty());
  pydit_sim_set_threads(0);
}

}  // namespace

int main(int count, char** names) { return selftest::run(count, names); }
