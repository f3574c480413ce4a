// Self test of the simulator, part 3: planted bugs, each of which must be seen, and the clean twin where there is one.
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "selftest.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Races: a wrong result for some seed --------------------------------------------------------------------------------

// Sum of `n` floats per block, through static and dynamic shared memory. kBarriers: false plants the bug.
template <bool kBarriers>
__global__ void block_sum(const float* in, float* out, int n) {
  __shared__ float partial[32];
  PYDIT_DYNAMIC_SHARED(float, row);
  for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] = in[blockIdx.x * n + i];
  if (kBarriers) __syncthreads();
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += row[n - 1 - i];  // what another thread wrote
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(kAll, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += partial[w];
    out[blockIdx.x] = sum;
  }
}

// How many of 20 seeds give a wrong result.
template <bool kBarriers>
int wrong_seeds() {
  const int n = 1000, blocks = 3;
  std::vector<float> in(n * blocks), out(blocks);
  std::iota(in.begin(), in.end(), 0.f);
  for (float& x : in) x = std::fmod(x, 17.f);  // sums are exact
  int wrong = 0;
  for (int seed = 0; seed < 20; ++seed) {
    pydit_sim_set_seed(seed);
    CHECK_EQUAL(PYDIT_LAUNCH(block_sum<kBarriers>, blocks, 128, n * sizeof(float), nullptr, in.data(), out.data(), n),
                cudaSuccess);
    bool right = true;
    for (int b = 0; b < blocks; ++b) {
      right = right && out[b] == std::accumulate(in.begin() + b * n, in.begin() + (b + 1) * n, 0.f);
    }
    wrong += !right;
  }
  pydit_sim_set_seed(0);
  return wrong;
}

TEST(block_sum_with_barriers_is_right_for_every_seed) { CHECK_EQUAL(wrong_seeds<true>(), 0); }
TEST(missing_syncthreads_is_seen) { CHECK(wrong_seeds<false>() > 0); }

template <bool kSync>
__global__ void exchange_in_warp(int* out) {
  __shared__ int slot[32];
  slot[threadIdx.x] = threadIdx.x;
  if (kSync) __syncwarp();
  out[threadIdx.x] = slot[31 - threadIdx.x];
  if (kSync) __syncwarp();
  slot[threadIdx.x] = -1;
}

template <bool kSync>
int wrong_exchanges() {
  int wrong = 0;
  for (int seed = 0; seed < 10; ++seed) {
    pydit_sim_set_seed(seed);
    std::vector<int> out(32);
    CHECK_EQUAL(PYDIT_LAUNCH(exchange_in_warp<kSync>, 1, 32, 0, nullptr, out.data()), cudaSuccess);
    for (int i = 0; i < 32; ++i) wrong += out[i] != 31 - i;
  }
  pydit_sim_set_seed(0);
  return wrong;
}

TEST(missing_syncwarp_is_seen) {
  CHECK_EQUAL(wrong_exchanges<true>(), 0);
  CHECK(wrong_exchanges<false>() > 0);
}

// Errors that end a launch with a report ---------------------------------------------------------------------------

__global__ void overrun_shared(int bytes) {
  PYDIT_DYNAMIC_SHARED(unsigned char, memory);
  if (threadIdx.x == 7) memory[bytes] = 1;
}

TEST(write_behind_dynamic_shared_memory_is_reported) {
  CHECK_FAILS(PYDIT_LAUNCH(overrun_shared, 1, 32, 100, nullptr, 100), "byte 100", "100 bytes");
  CHECK_EQUAL(PYDIT_LAUNCH(overrun_shared, 1, 32, 100, nullptr, 99), cudaSuccess);
}

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  else if (threadIdx.x < 48) *out = __shfl_sync(kAll, 1, 0);  // lanes 16-31 of the warp never come
  else if (threadIdx.x < 64) __syncthreads();
}

TEST(deadlock_is_reported) {
  int out = 0;
  CHECK_FAILS(PYDIT_LAUNCH(divergent_barrier, 2, 80, 0, nullptr, &out), "divergent_barrier", "deadlock",
              "16 of 80 threads have exited", "48 threads wait in __syncthreads for all 64",
              "warp 0 all lanes; warp 1 lanes 16-31", "warp 1 lanes 0-15 wait in __shfl_sync, mask 0xffffffff",
              "for lanes 16-31");
}

__global__ void two_kinds_of_barrier() {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads_count(1);
}

__global__ void two_kinds_of_collective() {
  if (threadIdx.x < 16) __syncwarp();
  else __ballot_sync(kAll, 1);
}

__global__ void not_in_mask() { __shfl_sync(0xfffffff7u, 1, 0); }
__global__ void bad_width() { __shfl_sync(kAll, 1, 0, 12); }

TEST(divergent_collectives_are_reported) {
  CHECK_FAILS(PYDIT_LAUNCH(two_kinds_of_barrier, 1, 64, 0, nullptr), "__syncthreads", "__syncthreads_count",
              "barrier 0");
  CHECK_FAILS(PYDIT_LAUNCH(two_kinds_of_collective, 1, 32, 0, nullptr), "divergent", "__syncwarp", "__ballot_sync");
  CHECK_FAILS(PYDIT_LAUNCH(not_in_mask, 1, 32, 0, nullptr), "lane 3", "mask 0xfffffff7");
  CHECK_FAILS(PYDIT_LAUNCH(bad_width, 1, 32, 0, nullptr), "width", "got 12");
}

__global__ void throws(int kind) {
  __syncthreads();
  if (blockIdx.x != 2 || blockIdx.y != 1 || threadIdx.x != 3 || threadIdx.y != 4) return;
  if (kind == 0) throw std::runtime_error("planted");
  if (kind == 1) throw 5;
  __trap();
}

TEST(exceptions_end_the_launch_and_the_next_one_works) {
  const std::vector<std::string> reasons = {"planted", "an exception", "__trap()"};
  for (int kind = 0; kind < 3; ++kind) {
    const cudaError_t error = PYDIT_LAUNCH(throws, dim3(5, 3), dim3(10, 10), 0, nullptr, kind);
    CHECK_FAILS(error, "kernel throws", "block (2, 1, 0), thread (3, 4, 0) [warp 1, lane 11]", reasons[kind]);
    CHECK(strstr(cudaGetErrorString(error), reasons[kind].c_str()) != nullptr);
    CHECK_EQUAL(PYDIT_LAUNCH(throws, 2, dim3(10, 10), 0, nullptr, kind), cudaSuccess);
  }
}

__global__ void launches_another() { (void)PYDIT_LAUNCH(not_in_mask, 1, 1, 0, nullptr); }

TEST(launch_inside_a_kernel_is_refused) {
  CHECK_FAILS(PYDIT_LAUNCH(launches_another, 1, 1, 0, nullptr), "a kernel cannot launch another");
}

#if !defined(__SANITIZE_ADDRESS__)  // a sanitizer wants these for itself
__global__ void wild_store(volatile int* pointer) {
  if (threadIdx.x == 5) *pointer = 1;
}

__attribute__((noinline)) int recurse(int depth, volatile int* sink) {
  volatile char local[600];
  local[0] = static_cast<char>(depth);
  return depth == 0 ? *sink : recurse(depth - 1, sink) + local[0];
}

__global__ void endless_recursion(int* out) { *out = recurse(1 << 20, out); }

TEST(memory_faults_end_the_launch) {
  int target = 0;
  for (int i = 0; i < 2; ++i) {
    CHECK_FAILS(PYDIT_LAUNCH(wild_store, 10, 64, 0, nullptr, reinterpret_cast<int*>(8)), "memory at 0x8", "wild_store",
                "thread (5, 0, 0)");
    CHECK_FAILS(PYDIT_LAUNCH(endless_recursion, 10, 64, 0, nullptr, &target), "stack overflow");
    CHECK_EQUAL(PYDIT_LAUNCH(wild_store, 10, 64, 0, nullptr, &target), cudaSuccess);
  }
}
#endif

}  // namespace
