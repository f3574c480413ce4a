#include "sim/launch.h"

#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

#include "sim/async.h"
#include "sim/cluster.h"
#include "sim/control.h"
#include "sim/fault.h"
#include "sim/progress.h"
#include "sim/race.h"

namespace simt {
namespace {

std::atomic<uint64_t> seed_setting{0};
std::atomic<int> threads_setting{0};
std::atomic<uint64_t> launches{0};

// A Block is 300 KB and holds up to 64 MB of address space in stacks, so it is kept for the next launch. (The OS
// threads are not: starting one takes 20 us, and a process that forks would lose them.) A Cluster keeps its blocks.
class ClusterPool {
 public:
  std::unique_ptr<Cluster> take() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        auto cluster = std::move(free_.back());
        free_.pop_back();
        return cluster;
      }
    }
    return std::make_unique<Cluster>();
  }
  void give(std::unique_ptr<Cluster> cluster) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(cluster));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Cluster>> free_;
};

ClusterPool& pool() {
  static ClusterPool& instance = *new ClusterPool;  // never destroyed: a kernel may run while the process ends
  return instance;
}

// The clusters of a grid in an order drawn from the seed: start + i * step modulo their number.
class Order {
 public:
  Order(uint64_t clusters, uint64_t seed) : clusters_(clusters) {
    start_ = mix(seed) % clusters;
    step_ = 1 + mix(~seed) % (clusters < 65536 ? clusters : 65536);  // small enough that no product reaches 2^64
    while (std::gcd(step_, clusters) != 1) ++step_;
  }
  uint64_t operator[](uint64_t i) const { return (start_ + i * step_) % clusters_; }

 private:
  uint64_t clusters_, start_, step_;
};

// One launch: workers take clusters until none is left or one has failed.
class Grid {
 public:
  Grid(const Kernel& kernel, uint64_t clusters) : kernel_(kernel), clusters_(clusters), order_(clusters, kernel.seed) {}

  void work() {
    try {
      const FaultGuard faults;
      std::unique_ptr<Cluster> cluster = pool().take();
      while (!failed_.load(std::memory_order_relaxed)) {
        const uint64_t i = next_.fetch_add(1, std::memory_order_relaxed);
        if (i >= clusters_) break;
        if (!cluster->run(kernel_, order_[i])) record(cudaErrorLaunchFailure, cluster->report());
      }
      pool().give(std::move(cluster));
    } catch (const std::bad_alloc&) {
      record(cudaErrorMemoryAllocation, "no memory for the stacks of a block");
    }
    kernel_.progress->leave();
  }

  // The first failure, to the host thread that launched.
  void finish() const {
    if (failed_.load()) set_error(error_, "%s", report_);
  }

 private:
  void record(cudaError_t error, const char* report) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (failed_.exchange(true)) return;
    kernel_.progress->cancel();
    error_ = error;
    snprintf(report_, sizeof report_, "%s", report);
  }

  const Kernel& kernel_;
  const uint64_t clusters_;
  const Order order_;
  std::atomic<uint64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  cudaError_t error_ = cudaSuccess;
  char report_[kReportBytes] = "";
};

int worker_count(const Kernel& kernel, uint64_t clusters) {
  int threads = threads_setting.load();
  if (threads <= 0) threads = static_cast<int>(std::thread::hardware_concurrency());
  // A worker with fewer than this many CUDA threads to run would take longer to start than to work.
  constexpr uint64_t kWorthStarting = 4096;
  const uint64_t useful =
      clusters * kernel.cluster * (kernel.block.x * kernel.block.y * kernel.block.z) / kWorthStarting + 1;
  uint64_t count = threads < 1 ? 1 : static_cast<uint64_t>(threads);
  if (count > clusters) count = clusters;
  if (count > useful) count = useful;
  return static_cast<int>(count);
}

// Whether the configuration can be launched; otherwise the error is set.
bool valid(const Kernel& kernel, const void* function) {
  const dim3 grid = kernel.grid, block = kernel.block;
  if (current != nullptr) {
    fail("launch of %s: a kernel cannot launch another", kernel.name);
  } else if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    set_error(cudaErrorInvalidConfiguration,
              "%s: grid: expected 1 to (2147483647, 65535, 65535) blocks, got (%u, %u, %u)", kernel.name, grid.x,
              grid.y, grid.z);
  } else if (kernel.cluster > 1 && arch() < 90) {
    set_error(cudaErrorInvalidConfiguration, "%s: cluster: needs sm_90a; the simulated device is sm_%d", kernel.name,
              arch());
  } else if (kernel.cluster < 1 || kernel.cluster > kMaxClusterBlocks || grid.x % kernel.cluster != 0) {
    set_error(cudaErrorInvalidConfiguration,
              "%s: cluster: expected 1 to %u blocks that divide the grid's %u along x, got %u", kernel.name,
              kMaxClusterBlocks, grid.x, kernel.cluster);
  } else if (block.x < 1 || block.y < 1 || block.z < 1 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
             block.x * block.y * block.z > kMaxThreads) {
    set_error(cudaErrorInvalidConfiguration,
              "%s: block: expected 1 to (1024, 1024, 64) threads and at most 1024 in all, got (%u, %u, %u)",
              kernel.name, block.x, block.y, block.z);
  } else if (kernel.shared_bytes > 0 && kernel.shared_bytes > shared_limit(function)) {
    set_error(cudaErrorInvalidConfiguration,
              "%s: dynamic shared memory: expected at most %zu bytes (cudaFuncSetAttribute allows up to %zu), got %zu",
              kernel.name, shared_limit(function), kMaxSharedBytes, kernel.shared_bytes);
  } else {
    return true;
  }
  return false;
}

}  // namespace

void run_grid(Kernel& kernel, const void* function) {
  if (!valid(kernel, function)) return;
  launches.fetch_add(1);
  const race::LaunchScope observed(kernel);
  kernel.seed = seed_setting.load();
  const uint64_t clusters = static_cast<uint64_t>(kernel.grid.x) * kernel.grid.y * kernel.grid.z / kernel.cluster;
  Progress progress;
  kernel.progress = &progress;
  Grid grid(kernel, clusters);
  std::vector<std::thread> helpers;
  try {
    for (int i = worker_count(kernel, clusters); i > 1; --i) {
      progress.enter();
      helpers.emplace_back([&grid] { grid.work(); });
    }
  } catch (const std::system_error&) {
    progress.leave();  // No more OS threads to be had: those that started, and this one, do the work.
  }
  progress.enter();
  grid.work();
  for (std::thread& helper : helpers) helper.join();
  grid.finish();
}

}  // namespace simt

extern "C" {
void pydit_sim_set_seed(uint64_t seed) { simt::seed_setting.store(seed); }
void pydit_sim_set_threads(int threads) { simt::threads_setting.store(threads); }
const char* pydit_sim_last_report(void) { return simt::last_report(); }
uint64_t pydit_sim_launch_count(void) { return simt::launches.load(); }
}
