// What the race detector knows of the cluster that runs: whose a thread is, and which memory an address is of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "sim/cluster.h"
#include "sim/launch.h"
#include "sim/scheduler.h"
#include "sim/symbols.h"

namespace simt::race {

// Threads are numbered through the blocks of the cluster, shared memory through the shadow: the dynamic memory of one
// block after the other, then the static one, which the simulator has once for every OS thread.
class ClusterMap {
 public:
  void start(const Kernel& kernel, const Cluster& cluster);
  size_t shadow_bytes() const { return fixed_offset_ + (fixed().end - fixed().begin); }

  int blocks() const { return static_cast<int>(blocks_.size()); }
  int block_threads() const { return block_threads_; }
  int threads() const { return block_threads_ * blocks(); }
  int number(const Block& block, int warp, int lane) const {
    return static_cast<int>(block.rank()) * block_threads_ + warp * kLanes + lane;
  }
  int number(const Fiber& fiber) const { return number(*fiber.block, fiber.warp, fiber.lane); }
  int warps() const { return block_warps_ * blocks(); }
  int warp_number(const Block& block, int warp) const { return static_cast<int>(block.rank()) * block_warps_ + warp; }
  int rank_of_thread(int thread) const { return thread / block_threads_; }

  // Where the shadow of a byte of shared memory is; negative for other memory.
  ptrdiff_t offset(uintptr_t address, size_t bytes) const {
    for (size_t rank = 0; rank < blocks_.size(); ++rank) {
      const Range& dynamic = blocks_[rank].dynamic;
      if (dynamic.holds(address, bytes)) return static_cast<ptrdiff_t>(rank * pitch_ + address - dynamic.begin);
    }
    // `current` is of the runtime, though it lies there.
    if (!fixed().holds(address, bytes) || address - running_ < sizeof current) return -1;
    return static_cast<ptrdiff_t>(fixed_offset_ + address - fixed().begin);
  }
  bool is_static(size_t offset) const { return offset >= blocks_.size() * pitch_; }
  // Of the block whose dynamic memory has its shadow at `offset`; static memory counts as the running block's.
  int rank_of(size_t offset) const {
    return is_static(offset) ? static_cast<int>(current->block->rank()) : static_cast<int>(offset / pitch_);
  }
  // Not shared, no stack of another thread (deposits of collectives), nor memory of the runtime and the module.
  bool is_global(uintptr_t address, size_t bytes) const;
  // The dynamic memory before `address`, which lies behind what the launch asked for; null elsewhere.
  const Range* overrun(uintptr_t address, size_t bytes) const;

  std::string name(size_t offset) const;  // of a byte of shared memory
  std::string describe(int thread) const;

 private:
  struct Member {
    const Block* block;
    Range dynamic;
  };

  const Range& fixed() const { return module_.thread_local_storage; }
  const Fiber& fiber_of(int thread) const {
    return blocks_[rank_of_thread(thread)].block->fibers()[thread % block_threads_];
  }
  void find_stacks();
  std::string of_block(int rank) const;  // " of block (1, 0, 0)" in a cluster of several

  const Kernel* kernel_ = nullptr;
  std::vector<Member> blocks_;  // by rank
  int block_threads_ = 0, block_warps_ = 0;
  Module module_;
  uintptr_t running_ = 0;  // address of `current`
  std::vector<Range> stacks_;
  size_t pitch_ = 0;         // from one block's dynamic shared memory to the next one's, in the shadow
  size_t fixed_offset_ = 0;  // in the shadow, of the static shared memory
};

}  // namespace simt::race
