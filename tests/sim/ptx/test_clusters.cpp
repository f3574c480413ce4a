// Clusters: what their blocks hand each other, and what a launch refuses or reports.
#include <vector>

#include "../selftest.h"
#include "clusters.cuh"

namespace pydit::sim {
namespace {

struct Hopper {
  Hopper() { pydit_sim_set_arch(90); }
  ~Hopper() {
    pydit_sim_set_arch(80);
    pydit_sim_set_async(0);
    pydit_sim_set_seed(0);
  }
};

TEST(multicast_tiles_reach_both_blocks) {
  const Hopper restore;
  constexpr int kClusters = 3, kTiles = 5, kElements = kTileBytes / 4;
  std::vector<float> in(kClusters * kTiles * kElements);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i % 251);
  TensorMap map;
  const uint64_t size[2] = {32, in.size() / 32}, stride[1] = {128};
  const uint32_t box[2] = {32, kHalfRows};
  CHECK(encode_tensor_map(&map, in.data(), 2, size, stride, box, Swizzle::kNone) == nullptr);
  for (int run = 0; run < 8; ++run) {
    pydit_sim_set_async(run % 2);
    pydit_sim_set_seed(run / 2);
    std::vector<float> sums(kClusters * 2 * 64, -1.f);
    CHECK_EQUAL(PYDIT_LAUNCH_CLUSTER(shared_ring<RingBug::kNone>, 2, kClusters * 2, kRingThreads, kRingBytes, nullptr,
                                     map, sums.data(), kTiles),
                cudaSuccess);
    for (int block = 0; block < kClusters * 2; ++block) {
      for (int thread = 0; thread < 64; ++thread) {
        float expected = 0;
        for (int i = thread; i < kTiles * kElements; i += 64) expected += in[block / 2 * kTiles * kElements + i];
        CHECK_EQUAL(sums[block * 64 + thread], expected);
      }
    }
  }
}

TEST(blocks_of_a_cluster_read_each_other) {
  const Hopper restore;
  for (const int size : {1, 2, 4, 8}) {
    std::vector<int> out(8 * 40);
    CHECK_EQUAL(PYDIT_LAUNCH_CLUSTER(exchange<ExchangeBug::kNone>, size, 8, 40, 160, nullptr, out.data()), cudaSuccess);
    for (int i = 0; i < 8 * 40; ++i) {
      const int block = i / 40, next = block / size * size + (block % size + 1) % size;
      CHECK_EQUAL(out[i], next * 100 + i % 40);
    }
  }
}

TEST(refused_clusters) {
  std::vector<int> out(9 * 32);
  const auto launch = [&](unsigned cluster, unsigned grid) {
    return PYDIT_LAUNCH_CLUSTER(exchange<ExchangeBug::kNone>, cluster, grid, 32, 128, nullptr, out.data());
  };
  CHECK_REFUSED(launch(2, 4), "cluster: needs sm_90a; the simulated device is sm_80");
  const Hopper restore;
  CHECK_REFUSED(launch(2, 9), "cluster: expected 1 to 8 blocks that divide the grid's 9 along x, got 2");
  CHECK_REFUSED(launch(9, 9), "got 9");
  CHECK_REFUSED(launch(0, 9), "got 0");
}

enum class Misuse { kNone, kRank, kPointer, kTwice, kNoArrival, kOther, kRemoteWait };
template <Misuse kMisuse>
__global__ void misused(int* out) {
  PYDIT_DYNAMIC_SHARED(uint64_t, barrier);
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) mbarrier_init(barrier, 1);
  if (kMisuse == Misuse::kTwice) cluster_arrive(), cluster_arrive();
  if (kMisuse == Misuse::kNoArrival) cluster_wait();
  if (kMisuse == Misuse::kOther && rank == 1 && threadIdx.x > 0) __syncthreads();
  cluster_sync();
  if (kMisuse == Misuse::kRank) *cluster_map(barrier, 2) = 0;
  if (kMisuse == Misuse::kPointer) cluster_map(out, 1);
  if (kMisuse == Misuse::kRemoteWait) mbarrier_try_wait(cluster_map(barrier, 1 - rank), 0);
}
template <Misuse kMisuse>
cudaError_t misuse() {
  return PYDIT_LAUNCH_CLUSTER(misused<kMisuse>, 2, 2, 64, 8, nullptr, static_cast<int*>(nullptr));
}
TEST(bug_misuse_of_clusters) {
  const Hopper restore;
  CHECK_EQUAL(misuse<Misuse::kNone>(), cudaSuccess);
  CHECK_FAILS(misuse<Misuse::kRank>(), "mapa: rank: expected a block of the cluster, 0 to 1, got 2");
  CHECK_FAILS(misuse<Misuse::kPointer>(), "mapa: expected a pointer into the block's own dynamic shared memory");
  CHECK_FAILS(misuse<Misuse::kTwice>(), "barrier.cluster.arrive: the thread has not waited since it last arrived");
  CHECK_FAILS(misuse<Misuse::kNoArrival>(), "barrier.cluster.wait: the thread has not arrived");
  CHECK_FAILS(misuse<Misuse::kRemoteWait>(),
              "mbarrier.try_wait: expected an mbarrier of the thread's own block, got byte 0", "of block",
              "of the cluster");
  CHECK_FAILS(misuse<Misuse::kOther>(), "deadlock",
              "64 threads wait in barrier.cluster.wait; 65 of the cluster have come", "of the same cluster",
              "63 threads wait in __syncthreads");
}

}  // namespace
}  // namespace pydit::sim
