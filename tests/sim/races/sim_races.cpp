// Planted bugs for the race detector, each beside its clean twin: the kernel is the same but for kBug. Built with
// -fsanitize=thread (this file only); every case runs with several seeds.
#include <cstring>
#include <string>
#include <vector>

#include "../ptx/clusters.cuh"
#include "../ptx/gemm_wgmma.cuh"
#include "../ptx/pieces_90.cuh"
#include "../selftest.h"
#include "device/ptx.cuh"
#include "hopper.cuh"
#include "sim/matrix.h"
#include "sim/race.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kSeeds = 4;

// Runs `launch(bug)` for several seeds: clean it must pass; with the bug it must fail and say `words` each time.
template <typename Clean, typename Bug>
void check_pair(int line, Clean clean, Bug bug, const std::vector<std::string>& words) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    pydit_sim_set_seed(seed);
    const cudaError_t error = clean();
    selftest::check(error == cudaSuccess,
                    error == cudaSuccess ? "" : std::string("a false report: ") + pydit_sim_last_report(), line);
    selftest::check_report(bug(), cudaErrorLaunchFailure, words, line);
  }
  pydit_sim_set_seed(0);
}
// PAIR(kernel<?>, threads, dynamic bytes, {words}, arguments...)
#define PAIR(kernel, threads, bytes, words, ...)                                                      \
  check_pair(                                                                                         \
      __LINE__, [&] { return PYDIT_LAUNCH(kernel<false>, 2, threads, bytes, nullptr, __VA_ARGS__); }, \
      [&] { return PYDIT_LAUNCH(kernel<true>, 2, threads, bytes, nullptr, __VA_ARGS__); }, words)
using Words = std::vector<std::string>;

// 1. Written by one warp, read by another, with no barrier between.
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

// 2. The same without the chance that the memory is seen unwritten.
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

// 3. Read by all, then overwritten for the next round: the reused scratch buffer of a block-wide sum.
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

// 4. Two threads write one element.
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

// 5. Lanes of a warp exchange through shared memory without __syncwarp.
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

// 6. __syncwarp of each half where lanes read across the halves.
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

// 7. A named barrier for half of the warps, though the other half writes too.
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

// 8. and 9. Reads of what nobody wrote, static and dynamic.
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

// 10. to 12. Global accesses outside the tensors that the launcher named.
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

// 13. A 16-byte load from an address that is not a multiple of 16.
template <bool kBug>
__global__ void vector_load(const float* in, float4* out) {
  out[threadIdx.x] = *reinterpret_cast<const float4*>(in + 4 * threadIdx.x + (kBug ? 1 : 0));
}
TEST(misaligned_vector_access) {
  std::vector<float4> memory(80);
  PAIR(vector_load, 32, 0, (Words{"misaligned read of"}), reinterpret_cast<float*>(memory.data()), memory.data() + 40);
}

// 14. An atomic sum read without a barrier: atomics order nothing.
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

// 15. The engine's accesses, as the asynchronous instructions announce them: a copy nobody waited for.
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

// 16. A tile written by threads and stored by the async proxy without a proxy fence.
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

// 17. Neighbouring halves of one word are no race; the same half is.
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

// 18. Half of a warp's lanes shuffle among themselves, the other half has gone on to another collective.
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

// 19. A named barrier that waits for more threads than come.
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

// 20. and 21. A product of ones (any layout of them is the same matrix): its accumulator read before the wait; its
// operands written through the generic proxy without a fence.
enum class ProductBug { kRead, kWrite, kProxy };
template <ProductBug kKind, bool kBug>
__global__ void product(float* out) {
  PYDIT_DYNAMIC_SHARED(char, shared);
  auto* operands = reinterpret_cast<__nv_bfloat16*>(shared);  // 64 x 16, then 8 x 16
  for (int i = threadIdx.x; i < 72 * 16; i += 128) operands[i] = __float2bfloat16_rn(1.f);
  if (!(kBug && kKind == ProductBug::kProxy)) pydit::sim::fence_proxy_async();
  __syncthreads();
  float d[4] = {1, 1, 1, 1};
  pydit::sim::wgmma_fence();
  pydit::sim::wgmma<__nv_bfloat16, 8>(d, pydit::sim::matrix_descriptor<0>(shared, 128, 256),
                                      pydit::sim::matrix_descriptor<0>(shared + 64 * 32, 128, 256), true);
  pydit::sim::wgmma_commit_group();
  if (kBug && kKind == ProductBug::kRead) out[threadIdx.x] = d[1];
  if (kBug && kKind == ProductBug::kWrite) d[2] = 0;
  pydit::sim::wgmma_wait_group<0>();
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
template <ProductBug kKind>
void check_product(int line, const Words& words) {
  pydit_sim_set_arch(90);
  std::vector<float> out(128);
  const auto launch = [&](auto kernel) { return PYDIT_LAUNCH(kernel, 1, 128, 72 * 32, nullptr, out.data()); };
  check_pair(line, [&] { return launch(product<kKind, false>); }, [&] { return launch(product<kKind, true>); }, words);
  selftest::check(launch(product<kKind, false>) == cudaSuccess && out[77] == 4 * 17, "not the product", line);
  pydit_sim_set_arch(80);
}
TEST(accumulator_read_before_its_wait) {
  check_product<ProductBug::kRead>(__LINE__, {"read of register 1 of a wgmma accumulator before wgmma.wait_group"});
}
TEST(accumulator_written_before_its_wait) {
  check_product<ProductBug::kWrite>(__LINE__, {"write of register 2 of a wgmma accumulator before", "sim_races.cpp:"});
}
TEST(operand_written_without_a_proxy_fence) {
  check_product<ProductBug::kProxy>(__LINE__, {"then read by the async proxy without fence.proxy.async"});
}

// 22. to 36. Clusters of two blocks: a ring of tiles that both fill by multicast, and reads of each other's memory.
constexpr int kRingTiles = 5;
template <pydit::sim::RingBug kBug>
cudaError_t launch_ring() {
  static std::vector<float> in(2 * kRingTiles * pydit::sim::kTileBytes / 4, 1.f);
  std::vector<float> sums(4 * 64);
  pydit::sim::TensorMap map;
  const uint64_t size[2] = {32, in.size() / 32}, stride[1] = {128};
  const uint32_t box[2] = {32, pydit::sim::kHalfRows};
  CHECK(pydit::sim::encode_tensor_map(&map, in.data(), 2, size, stride, box, pydit::sim::Swizzle::kNone) == nullptr);
  return PYDIT_LAUNCH_CLUSTER(pydit::sim::shared_ring<kBug>, 2, 4, pydit::sim::kRingThreads, pydit::sim::kRingBytes,
                              nullptr, map, sums.data(), kRingTiles);
}
template <pydit::sim::RingBug kBug>
void check_ring(int line, const Words& words) {
  pydit_sim_set_arch(90);
  check_pair(line, launch_ring<pydit::sim::RingBug::kNone>, launch_ring<kBug>, words);
  pydit_sim_set_arch(80);
}
TEST(cluster_not_synchronised_after_initialisation) {
  // Either nothing is there yet, or nobody could know that it is.
  check_ring<pydit::sim::RingBug::kNoStart>(__LINE__, {"of the cluster"});
}
TEST(arrival_where_no_mbarrier_is_initialised) {
  check_ring<pydit::sim::RingBug::kUninitialised>(__LINE__, {"no mbarrier is initialised at byte"});
}
TEST(block_exits_before_the_last_arrival) {
  check_ring<pydit::sim::RingBug::kNoEnd>(__LINE__, {"the block's exit"});  // after it, or unordered with it
}
TEST(block_exits_before_the_last_copy) { check_ring<pydit::sim::RingBug::kUnread>(__LINE__, {"the block's exit"}); }
TEST(slot_not_free_in_the_other_block) {
  check_ring<pydit::sim::RingBug::kOwnRelease>(__LINE__, {"race on byte", "the engine for thread (0, 0, 0)"});
}
TEST(slot_released_to_the_other_block_before_it_is_read) {
  check_ring<pydit::sim::RingBug::kEarlyRelease>(__LINE__, {"race on byte", "the engine for thread (0, 0, 0)"});
}
TEST(slot_released_without_a_proxy_fence) {
  check_ring<pydit::sim::RingBug::kNoFence>(__LINE__, {"race on byte", "then written by the async proxy without"});
}
TEST(multicast_outside_the_cluster) {
  check_ring<pydit::sim::RingBug::kMask>(__LINE__,
                                         {"mask: expected some of the cluster's 2 blocks, one bit each, got 0x5"});
}
TEST(multicast_bytes_not_announced) { check_ring<pydit::sim::RingBug::kBytes>(__LINE__, {}); }

template <pydit::sim::ExchangeBug kBug>
void check_exchange(int line, const Words& words) {
  pydit_sim_set_arch(90);
  std::vector<int> out(4 * 32);
  const auto launch = [&](auto kernel) { return PYDIT_LAUNCH_CLUSTER(kernel, 2, 4, 32, 128, nullptr, out.data()); };
  check_pair(
      line, [&] { return launch(pydit::sim::exchange<pydit::sim::ExchangeBug::kNone>); },
      [&] { return launch(pydit::sim::exchange<kBug>); }, words);
  pydit_sim_set_arch(80);
}
TEST(block_reached_into_before_it_has_started) {
  check_exchange<pydit::sim::ExchangeBug::kNoStart>(__LINE__,
                                                    {"which may not have started: no barrier.cluster before"});
}
TEST(missing_barrier_of_the_cluster) {
  check_exchange<pydit::sim::ExchangeBug::kNoBarrier>(__LINE__, {"race on byte", "of block (", "then"});
}
TEST(read_between_arrival_and_wait) {
  check_exchange<pydit::sim::ExchangeBug::kBetween>(__LINE__, {"race on byte", "of block (", "then"});
}
TEST(block_exits_while_it_is_read) { check_exchange<pydit::sim::ExchangeBug::kNoEnd>(__LINE__, {"the block's exit"}); }
TEST(block_exits_while_it_is_written) {
  check_exchange<pydit::sim::ExchangeBug::kLateWrite>(__LINE__, {"the block's exit"});
}
TEST(static_shared_memory_in_a_cluster) {
  check_exchange<pydit::sim::ExchangeBug::kStatic>(__LINE__, {"static shared memory in a cluster", "clusters.cuh:"});
}
// 37. to 62. What Hopper kernels get wrong within a block (hopper.cuh).
template <typename T>
pydit::sim::TensorMap map_of(const std::vector<T>& data, uint64_t width, uint32_t columns, uint32_t rows,
                             pydit::sim::Swizzle swizzle = pydit::sim::Swizzle::kNone) {
  pydit::sim::TensorMap map;
  const uint64_t size[2] = {width, data.size() / width}, stride[1] = {width * sizeof(T)};
  const uint32_t box[2] = {columns, rows};
  CHECK(pydit::sim::encode_tensor_map(&map, data.data(), 2, size, stride, box, swizzle) == nullptr);
  return map;
}
// Both twins on a Hopper.
template <typename Clean, typename Bug>
void check_on_hopper(int line, Clean clean, Bug bug, const Words& words) {
  pydit_sim_set_arch(90);
  check_pair(line, clean, bug, words);
  pydit_sim_set_arch(80);
}

using pydit::sim::StageBug;
template <StageBug kBug>
cudaError_t launch_staged() {
  constexpr int kTiles = 5;
  static std::vector<float> in(kTiles * pydit::sim::kStageBytes / 4, 1.f);
  std::vector<float> out(2 * pydit::sim::kStageThreads);
  const uint32_t rows = pydit::sim::kStageRows * (kBug == StageBug::kBoxTooLarge ? 2 : 1);
  const int bytes = pydit::sim::kStageShared - (kBug == StageBug::kBeyondMemory ? 64 : 0) +
                    (kBug == StageBug::kBoxTooLarge ? pydit::sim::kStageBytes : 0);
  const cudaError_t error = PYDIT_LAUNCH(pydit::sim::staged<kBug>, 2, pydit::sim::kStageThreads, bytes, nullptr,
                                         map_of(in, 32, 32, rows), out.data(), kTiles);
  if (kBug == StageBug::kNone) CHECK_EQUAL(out[77], kTiles * 4.f);
  return error;
}
template <StageBug kBug>
void check_staged(int line, const Words& words) {
  check_on_hopper(line, launch_staged<StageBug::kNone>, launch_staged<kBug>, words);
}
TEST(mbarrier_used_before_others_know_of_it) {
  check_staged<StageBug::kNotSynchronised>(__LINE__, {"byte 20"});  // not initialised there, or a race
}
TEST(mbarrier_unknown_to_the_copy_engine) {
  check_staged<StageBug::kNoInitFence>(__LINE__, {"no fence.mbarrier_init after mbarrier.init"});
}
TEST(mbarrier_initialised_twice) {
  check_staged<StageBug::kInitialisedTwice>(__LINE__, {"an mbarrier is initialised at byte 2048", "already"});
}
TEST(mbarrier_invalidated_while_in_use) {
  check_staged<StageBug::kInvalidatedEarly>(__LINE__, {"byte 2048"});  // no mbarrier any more, or a race
}
TEST(wait_for_the_wrong_parity) {
  check_staged<StageBug::kParity>(__LINE__, {"of the dynamic shared memory"});  // unwritten, or a race
}
TEST(too_few_bytes_announced) { check_staged<StageBug::kTooFewBytes>(__LINE__, {"bytes"}); }
TEST(too_many_bytes_announced) {
  check_staged<StageBug::kTooManyBytes>(__LINE__, {"deadlock", "0 of 1 arrivals", "bytes outstanding"});
}
TEST(box_larger_than_its_stage) { check_staged<StageBug::kBoxTooLarge>(__LINE__, {"race on byte", "the engine for"}); }
TEST(box_beyond_the_shared_memory) {
  check_staged<StageBug::kBeyondMemory>(
      __LINE__, {"destination: 1024 bytes from byte 1280", "reach byte 2304; the launch gave it 2112 bytes"});
}
TEST(proxy_fence_on_the_wrong_side_of_the_barrier) {
  check_staged<StageBug::kFenceTooEarly>(__LINE__, {"then written by the async proxy without fence.proxy.async"});
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

using pydit::sim::ProductsBug;
template <ProductsBug kBug>
cudaError_t launch_products() {
  alignas(16) static __nv_bfloat16 ones[72 * 16];
  for (__nv_bfloat16& one : ones) one = __float2bfloat16_rn(1.f);
  float out[128];
  const cudaError_t error = PYDIT_LAUNCH(pydit::sim::products<kBug>, 1, 128, 72 * 32, nullptr, +ones, +out);
  if (kBug == ProductsBug::kNone) CHECK_EQUAL(out[77], 4 * 33.f + 1);
  return error;
}
template <ProductsBug kBug>
void check_products(int line, const Words& words) {
  check_on_hopper(line, launch_products<ProductsBug::kNone>, launch_products<kBug>, words);
}
TEST(copied_operand_without_a_proxy_fence) {
  check_products<ProductsBug::kNoProxyFence>(__LINE__, {"the engine", "async proxy without fence.proxy.async"});
}
TEST(products_without_a_wgmma_fence) {
  check_products<ProductsBug::kNoWgmmaFence>(__LINE__, {"its accumulator was accessed after the last wgmma.fence"});
}
TEST(products_not_committed) {
  check_products<ProductsBug::kNoCommit>(__LINE__, {"read of register 0 of a wgmma accumulator before"});
}
TEST(accumulator_of_a_later_product) {
  check_products<ProductsBug::kWaitDepth>(__LINE__, {"read of register 0 of a wgmma accumulator before"});
}
TEST(operand_overwritten_before_the_wait) {
  check_products<ProductsBug::kOverwritten>(__LINE__, {"race on byte", "the engine for thread"});
}

template <bool kBug>
cudaError_t launch_store_rows() {
  alignas(16) static float in[64] = {}, copy[32];
  std::vector<float> out(64);
  return PYDIT_LAUNCH(pydit::sim::store_rows<kBug>, 1, 32, 320, nullptr, map_of(out, 32, 32, 1), +in, +copy);
}
TEST(buffer_rewritten_before_the_store_has_read_it) {
  check_on_hopper(__LINE__, launch_store_rows<false>, launch_store_rows<true>,
                  {"race on byte", "read the engine for thread", "then write"});
}

using pydit::sim::WgmmaBug;
template <WgmmaBug kBug>
cudaError_t launch_gemm() {
  using pydit::sim::OperandA;
  using pydit::sim::Swizzle;
  static std::vector<__nv_bfloat16> a(64 * 256), b(32 * 256);
  std::vector<float> c(64 * 32);
  constexpr int kBytes = pydit::sim::wgmma_shared_bytes<32, 64, OperandA::kShared, false>();
  return PYDIT_LAUNCH((pydit::sim::gemm_wgmma<__nv_bfloat16, 32, 64, OperandA::kShared, false, kBug>), 1,
                      pydit::sim::kWgmmaThreads, kBytes, nullptr, map_of(a, 256, 32, 64, Swizzle::k64),
                      map_of(b, 256, 32, 32, Swizzle::k64), c.data(), 64, 32, 256);
}
TEST(stage_released_before_its_products_are_done) {
  check_on_hopper(__LINE__, launch_gemm<WgmmaBug::kNone>, launch_gemm<WgmmaBug::kEarlyRelease>,
                  {"race on byte", "read the engine for", "then write the engine for"});
}

using pydit::sim::BudgetBug;
template <BudgetBug kBug>
cudaError_t launch_budgets() {
  std::vector<int> out(2 * 384);
  return PYDIT_LAUNCH(pydit::sim::budgets_of_three<kBug>, 2, 384, 0, nullptr, out.data());
}
template <BudgetBug kBug>
void check_budgets(int line, const Words& words) {
  check_on_hopper(line, launch_budgets<BudgetBug::kNone>, launch_budgets<kBug>, words);
}
TEST(registers_beyond_what_the_block_has) {
  check_budgets<BudgetBug::kBeyondThePool>(__LINE__, {"ask for 66560 registers, it was launched with 64512"});
}
TEST(registers_taken_that_are_to_be_given) {
  check_budgets<BudgetBug::kUp>(__LINE__, {"setmaxnreg.inc: expected at least the thread's 168 registers, got 24"});
}
TEST(registers_of_half_a_warpgroup) {
  check_budgets<BudgetBug::kHalf>(__LINE__, {"warps of a warpgroup ask for different budgets"});
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

TEST(a_multicast_copy_reads_its_tensor_once) {
  pydit_sim_set_arch(90);
  uint64_t counts[PYDIT_SIM_COUNTERS];
  CHECK_EQUAL(launch_ring<pydit::sim::RingBug::kNone>(), cudaSuccess);
  pydit_sim_counters(counts);
  CHECK_EQUAL(counts[0], 2u * kRingTiles * pydit::sim::kTileBytes);       // two clusters
  CHECK_EQUAL(counts[3], 2u * 2u * kRingTiles * pydit::sim::kTileBytes);  // each tile in both blocks
  pydit_sim_set_arch(80);
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

int main(int count, char** names) {
  int failed = 0, ran = 0;
  for (const selftest::Test& test : selftest::tests()) {
    if (count > 1 && strcmp(names[1], test.name) != 0) continue;
    selftest::failures = 0;
    test.run();
    ++ran;
    if (selftest::failures > 0) fprintf(stderr, "%s: %d checks failed\n", test.name, selftest::failures), ++failed;
  }
  printf("%d tests, %d failed\n", ran, failed);
  return failed > 0 || ran == 0;
}
