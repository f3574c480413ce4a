// Planted bugs for the race detector that only Hopper kernels have: wgmma, clusters and multicast, mbarriers and bulk
// copies, register budgets.
#include <string>
#include <vector>

#include "../ptx/clusters.cuh"
#include "../ptx/gemm_wgmma.cuh"
#include "../ptx/pieces_90.cuh"
#include "device/ptx.cuh"
#include "hopper.cuh"
#include "pairs.h"

namespace {

// A product of ones (any layout of them is the same matrix): its accumulator read before the wait; its operands written
// through the generic proxy without a fence.
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
  check_product<ProductBug::kWrite>(__LINE__,
                                    {"write of register 2 of a wgmma accumulator before", "hopper_races.cpp:"});
}
TEST(operand_written_without_a_proxy_fence) {
  check_product<ProductBug::kProxy>(__LINE__, {"then read by the async proxy without fence.proxy.async"});
}

// Clusters of two blocks: a ring of tiles that both fill by multicast, and reads of each other's memory.
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

// What Hopper kernels get wrong within a block (hopper.cuh).
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

TEST(a_multicast_copy_reads_its_tensor_once) {
  pydit_sim_set_arch(90);
  uint64_t counts[PYDIT_SIM_COUNTERS];
  CHECK_EQUAL(launch_ring<pydit::sim::RingBug::kNone>(), cudaSuccess);
  pydit_sim_counters(counts);
  CHECK_EQUAL(counts[0], 2u * kRingTiles * pydit::sim::kTileBytes);       // two clusters
  CHECK_EQUAL(counts[3], 2u * 2u * kRingTiles * pydit::sim::kTileBytes);  // each tile in both blocks
  pydit_sim_set_arch(80);
}

}  // namespace
