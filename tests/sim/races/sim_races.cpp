// Planted bugs for the race detector that any GPU has: shared memory and barriers, warp collectives, cp.async, accesses
// outside tensors; and the detector's counters. Those of Hopper kernels are in hopper_races.cpp. Built with
// -fsanitize=thread, as that file is.
#include <string>
#include <vector>

#include "device/ptx.cuh"
#include "hopper.cuh"
#include "pairs.h"
#include "sim/matrix.h"
#include "sim/race.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Written by one warp, read by another, with no barrier between.
template <bool kBug>
__global__ void write_read(int* out) {
  __shared__ int values[64];
  values[63 - threadIdx.x] = 1;
  if (kBug)
    __syncwarp();
  else
    __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}
TEST(missing_barrier_between_write_and_read) {
  std::vector<int> out(64);
  PAIR(write_read, 64, 0, Words{}, out.data());  // a race, or not yet written, as the order has it
}

// The same without the chance that the memory is seen unwritten.
template <bool kBug>
__global__ void rewrite_read(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[63 - threadIdx.x] = 1;
  if (!kBug) __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}
TEST(missing_barrier_names_both_lines) {
  std::vector<int> out(64);
  PAIR(rewrite_read, 64, 0,
       (Words{"race on static shared memory", "sim_races.cpp:", "write", "read", "thread (", ", then "}), out.data());
}

// Read by all, then overwritten for the next round: the reused scratch buffer of a block-wide sum.
template <bool kBug>
__global__ void reused_scratch(int* out) {
  __shared__ int partial[4];
  int total = 0;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = round;
    __syncthreads();
    for (int w = 0; w < 4; ++w) total += partial[w];
    if (!kBug) __syncthreads();
  }
  out[threadIdx.x] = total;
}
TEST(scratch_reused_before_all_have_read) {
  std::vector<int> out(128);
  PAIR(reused_scratch, 128, 0, (Words{"race on", "then"}), out.data());
}

// Two threads write one element.
template <bool kBug>
__global__ void write_write(int* out) {
  __shared__ int value;
  if (threadIdx.x == (kBug ? threadIdx.x % 32 : 0u)) value = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = value;
}
TEST(two_threads_write_one_element) {
  std::vector<int> out(64);
  PAIR(write_write, 64, 0, (Words{"race on", "write by thread", "then write by thread"}), out.data());
}

// Lanes of a warp exchange through shared memory without __syncwarp.
template <bool kBug>
__global__ void lanes_exchange(int* out) {
  __shared__ int values[32];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = 5;
  if (!kBug) __syncwarp();
  out[threadIdx.x] = values[31 - threadIdx.x];
}
TEST(missing_syncwarp) {
  std::vector<int> out(32);
  PAIR(lanes_exchange, 32, 0, (Words{"race on", "lane"}), out.data());
}

// __syncwarp of each half where lanes read across the halves.
template <bool kBug>
__global__ void half_mask(int* out) {
  __shared__ int values[32];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = 5;
  __syncwarp(kBug ? (threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u) : kAll);
  out[threadIdx.x] = values[31 - threadIdx.x];
}
TEST(syncwarp_of_the_wrong_lanes) {
  std::vector<int> out(32);
  PAIR(half_mask, 32, 0, (Words{"race on", "then"}), out.data());
}

// A named barrier for half of the warps, though the other half writes too.
template <bool kBug>
__global__ void half_barrier(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  values[threadIdx.x] = 3;
  simt::current->block->barrier(kBug ? 1 + threadIdx.x / 32 : 1, kBug ? 32 : 64, "bar.sync", false);
  out[threadIdx.x] = values[63 - threadIdx.x];
}
TEST(barrier_of_half_the_warps) {
  std::vector<int> out(64);
  PAIR(half_barrier, 64, 0, (Words{"race on", "then"}), out.data());
}

// Reads of what nobody wrote, static and dynamic.
template <bool kBug>
__global__ void unwritten_static(int* out) {
  __shared__ int values[33];
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + (kBug ? 1 : 0)];
}
TEST(uninitialised_static_shared_memory) {
  std::vector<int> out(32);
  PAIR(unwritten_static, 32, 0, (Words{"read of uninitialised static shared memory", "sim_races.cpp:"}), out.data());
}
template <bool kBug>
__global__ void unwritten_dynamic(int* out) {
  PYDIT_DYNAMIC_SHARED(int, values);
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x + (kBug ? 1 : 0)];
}
TEST(uninitialised_dynamic_shared_memory) {
  std::vector<int> out(32);
  PAIR(unwritten_dynamic, 32, 132, (Words{"read of uninitialised byte 128 of the dynamic shared memory"}), out.data());
}

// Global accesses outside the tensors that the launcher named.
template <bool kBug>
__global__ void copy(const float* in, float* out, int n, bool write_too_far) {
  const int i = threadIdx.x;
  const float x = kBug && !write_too_far && i == n - 1 ? in[n] : in[i];
  out[kBug && write_too_far && i == n - 1 ? n : i] = x;
}
template <bool kBug>
cudaError_t launch_copy(bool write_too_far, bool writable) {
  std::vector<float> in(80), out(80);
  simt::race::allow(in.data(), 32 * sizeof(float), false, "in");
  simt::race::allow(out.data(), 32 * sizeof(float), writable, "out");
  return PYDIT_LAUNCH(copy<kBug>, 1, 32, 0, nullptr, in.data(), out.data(), 32, write_too_far);
}
TEST(read_outside_a_tensor) {
  check_pair(
      __LINE__, [] { return launch_copy<false>(false, true); }, [] { return launch_copy<true>(false, true); },
      {"read of 4 bytes of global memory outside", "byte 128 of in, which has 128", "sim_races.cpp:"});
}
TEST(write_outside_a_tensor) {
  check_pair(
      __LINE__, [] { return launch_copy<false>(true, true); }, [] { return launch_copy<true>(true, true); },
      {"write of 4 bytes of global memory outside", "byte 128 of out, which has 128"});
}
TEST(write_to_an_input) {
  check_pair(
      __LINE__, [] { return launch_copy<false>(false, true); }, [] { return launch_copy<false>(false, false); },
      {"of out, which has 128 and is not to be written"});
}

// A 16-byte load from an address that is not a multiple of 16.
template <bool kBug>
__global__ void vector_load(const float* in, float4* out) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + (kBug ? 1 : 0));
}
TEST(misaligned_vector_access) {
  std::vector<float4> memory(80);
  PAIR(vector_load, 32, 0, (Words{"misaligned read of"}), reinterpret_cast<float*>(memory.data()), memory.data() + 40);
}

// An atomic sum read without a barrier: atomics order nothing.
template <bool kBug>
__global__ void atomic_sum(int* out) {
  __shared__ int sum;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, 1);
  if (!kBug) __syncthreads();
  out[threadIdx.x] = sum;
}
TEST(atomics_do_not_order) {
  std::vector<int> out(64);
  PAIR(atomic_sum, 64, 0, (Words{"race on", "then"}), out.data());
}

// The engine's accesses, as the asynchronous instructions announce them: a copy nobody waited for.
template <bool kBug>
__global__ void copy_in_flight(int* out) {
  PYDIT_DYNAMIC_SHARED(int, values);
  simt::race::engine_write(values + threadIdx.x, 4, threadIdx.x + 1);
  values[32 + threadIdx.x] = 1;
  if (!kBug) simt::race::engine_done(threadIdx.x + 1);
  __syncthreads();
  out[threadIdx.x] = values[31 - threadIdx.x];
}
TEST(copy_not_waited_for) {
  std::vector<int> out(32);
  PAIR(copy_in_flight, 32, 256, (Words{"race on byte", "write the engine for thread", "then read by thread"}),
       out.data());
}

// A tile written by threads and stored by the async proxy without a proxy fence.
template <bool kBug>
__global__ void stored_tile(int*) {
  PYDIT_DYNAMIC_SHARED(int, values);
  values[threadIdx.x] = 1;
  if (!kBug) simt::race::generic_proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) simt::race::engine_read(values, 128, 1);
}
TEST(missing_proxy_fence) {
  PAIR(stored_tile, 32, 128, (Words{"without fence.proxy.async between"}), static_cast<int*>(nullptr));
}

// The same the other way round: a stage read by threads, then filled by the async proxy.
template <bool kBug>
__global__ void refilled_stage(int* out) {
  PYDIT_DYNAMIC_SHARED(int, values);
  if (threadIdx.x == 0) {
    simt::race::engine_write(values, 128, 1);
    simt::race::engine_done(1);
  }
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
  if (!kBug) simt::race::generic_proxy_fence();
  __syncthreads();
  if (threadIdx.x == 0) simt::race::engine_write(values, 128, 2);
}
TEST(missing_proxy_fence_before_a_stage_is_filled_again) {
  std::vector<int> out(32);
  PAIR(refilled_stage, 32, 128,
       (Words{"read by thread", "then written by the async proxy without fence.proxy.async between"}), out.data());
}

// Neighbouring halves of one word are no race; the same half is.
template <bool kBug>
__global__ void halves_of_a_word(int* out) {
  __shared__ __nv_bfloat16 values[64];
  const int mine = kBug ? threadIdx.x / 2 : threadIdx.x;
  values[mine] = __float2bfloat16_rn(1.f);
  __syncthreads();
  out[threadIdx.x] = __bfloat162float(values[mine]) == 1.f;
}
TEST(neighbouring_halves_of_a_word) {
  std::vector<int> out(64);
  PAIR(halves_of_a_word, 64, 0, (Words{"race on", "then write"}), out.data());
}

// Half of a warp's lanes shuffle among themselves, the other half has gone on to another collective.
template <bool kBug>
__global__ void divergent(int* out) {
  int value = static_cast<int>(threadIdx.x);
  if (!kBug || threadIdx.x % 32 < 16) value = __shfl_xor_sync(kAll, value, 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = __any_sync(kAll, value > 0);
}
TEST(divergent_collectives) {
  std::vector<int> out(128);
  PAIR(divergent, 64, 0, (Words{"divergent", "__shfl_xor_sync", "__any_sync"}), out.data());
}

// A named barrier that waits for more threads than come.
template <bool kBug>
__global__ void miscounted(int* out) {
  __shared__ int values[64];
  if (threadIdx.x >= 64) return;
  values[threadIdx.x] = 2;
  pydit::sim::barrier_sync(1, kBug ? 96 : 64);
  out[threadIdx.x] = values[63 - threadIdx.x];
}
TEST(barrier_of_the_wrong_count) {
  std::vector<int> out(64);
  PAIR(miscounted, 96, 0, (Words{"deadlock", "64 threads wait", "at barrier 1 for 96 to come"}), out.data());
}

using pydit::sim::CopyBug;
template <CopyBug kBug>
cudaError_t launch_copied() {
  alignas(16) static float in[256] = {};
  float out[64];
  return PYDIT_LAUNCH(pydit::sim::copied<kBug>, 1, 64, 1024, nullptr, +in, +out);
}
TEST(copies_not_committed) {
  check_pair(__LINE__, launch_copied<CopyBug::kNone>, launch_copied<CopyBug::kNoCommit>,
             {"race on byte", "the engine"});
}
TEST(copies_waited_for_by_their_own_threads_alone) {
  check_pair(__LINE__, launch_copied<CopyBug::kNone>, launch_copied<CopyBug::kNoBarrier>, {"byte"});
}

TEST(barrier_of_two_counts) {
  std::vector<int> out(32);
  PAIR(pydit::sim::handed_over, 64, 0, (Words{"at barrier 1"}), out.data());  // where others wait, or nobody comes
}
TEST(write_beyond_the_dynamic_shared_memory) {
  std::vector<int> out(32);
  PAIR(pydit::sim::overrun, 32, 128, (Words{"write of 4 bytes at byte 128", "the launch gave it 128 bytes"}),
       out.data());
}

__global__ void reads_twice(const volatile float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x] + in[threadIdx.x];
}

TEST(a_second_read_of_a_tensor_is_counted) {
  std::vector<float> in(32), out(32);
  uint64_t counts[PYDIT_SIM_COUNTERS];
  CHECK_EQUAL(PYDIT_LAUNCH(reads_twice, 1, 32, 0, nullptr, in.data(), out.data()), cudaSuccess);
  pydit_sim_counters(counts);
  CHECK_EQUAL(counts[0], 256u);
  CHECK_EQUAL(counts[1], 128u);
}

TEST(counts_every_access) {
  uint64_t counts[PYDIT_SIM_COUNTERS];
  CHECK_EQUAL(launch_copy<false>(false, true), cudaSuccess);
  pydit_sim_counters(counts);
  CHECK_EQUAL(counts[0], 128u);
  CHECK_EQUAL(counts[1], 128u);
  CHECK_EQUAL(counts[2], 0u);
}

// Bank conflicts: the cycles a request takes beyond one per 128 bytes. Of each kernel only the last access may
// conflict.
template <int kPitch>
__global__ void column(float* out) {
  __shared__ float values[32 * kPitch];
  for (int row = 0; row < 32; ++row) values[row * kPitch + threadIdx.x] = 1;
  __syncwarp();
  out[threadIdx.x] = values[threadIdx.x * kPitch];
}
__global__ void vectors(float* out) {
  __shared__ float4 values[32];
  float4 ones = {1, 1, 1, 1};
  values[threadIdx.x] = ones;
  __syncwarp();
  const float4 mine = values[31 - threadIdx.x];
  out[threadIdx.x] = mine.x + mine.y + mine.z + mine.w;
}
template <bool kSwizzle>
__global__ void matrices(float* out) {  // rows of 128 bytes, eight of which ldmatrix takes in one pass
  __shared__ uint4 rows[8 * 8];
  const uint4 ones = {1, 1, 1, 1};
  for (int i = threadIdx.x; i < 64; i += 32) rows[i] = ones;
  __syncwarp();
  uint32_t registers[4];
  const int row = threadIdx.x % 8, vector = threadIdx.x / 8;
  simt::ldmatrix(registers, &rows[row * 8 + (kSwizzle ? vector ^ row : vector)], 4, false);
  out[threadIdx.x] = static_cast<float>(registers[0]);
}

template <typename Kernel>
void check_conflicts(int line, Kernel kernel, uint64_t requests, uint64_t conflicts) {
  std::vector<float> out(32);
  uint64_t counts[PYDIT_SIM_COUNTERS];
  selftest::check(PYDIT_LAUNCH(kernel, 1, 32, 0, nullptr, out.data()) == cudaSuccess, pydit_sim_last_report(), line);
  pydit_sim_counters(counts);
  const std::string found = std::to_string(counts[5]) + " requests, " + std::to_string(counts[6]) + " conflicts";
  selftest::check(counts[5] == requests && counts[6] == conflicts, found, line);
}
TEST(bank_conflicts) {
  check_conflicts(__LINE__, column<32>, 33, 31);  // a column of a matrix of 32 words a row
  check_conflicts(__LINE__, column<33>, 33, 0);
  check_conflicts(__LINE__, column<34>, 33, 1);  // every second bank
  check_conflicts(__LINE__, vectors, 2, 0);      // consecutive vectors of 16 bytes
  check_conflicts(__LINE__, matrices<true>, 3, 0);
  check_conflicts(__LINE__, matrices<false>, 3, 4 * 7);
}

}  // namespace

int main(int count, char** names) { return selftest::run(count, names); }
