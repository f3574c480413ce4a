// A cluster: blocks that run at the same time and reach into each other's dynamic shared memory. A launch that asks for
// none has clusters of one block.
//
// The blocks of a cluster share one OS thread: whoever switches to another thread may go to another block (choose), in
// an order drawn from the seed. A pointer to shared memory means the same everywhere, as a generic address does on the
// GPU; map() turns one into that of the same place in another block. Static __shared__ memory is one per OS thread,
// hence not to be used in clusters; a race build says so.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sim/scheduler.h"

namespace simt {

constexpr unsigned kMaxClusterBlocks = 8;  // more than 8 not every Hopper can place

// What polling loops have seen (Engine::poll): of all blocks of a cluster, since they share a worker of the launch.
struct Polling {
  uint64_t fruitless = 0, events = 0, round = 0;
  bool voted = false;
};

class Cluster {
 public:
  Cluster() = default;
  Cluster(const Cluster&) = delete;
  Cluster& operator=(const Cluster&) = delete;

  // Runs the blocks of cluster number `index` of the grid. False when one failed; report() then says why.
  bool run(const Kernel& kernel, uint64_t index);
  const char* report() const { return failed_->report(); }

  // The rest is called by the blocks and their threads.
  unsigned size() const { return size_; }
  Block& block(unsigned rank) const { return *blocks_[rank]; }
  Fiber& home() { return home_; }
  // The block that runs next, if another than `block` can.
  Block& choose(Block& block, uint64_t random) const { return size_ == 1 ? block : choose_among(block, random); }
  bool failed() const { return failed_ != nullptr; }
  // The first block that fails ends them all, and its report stands.
  void fail_in(const Block& block) {
    if (failed_ == nullptr) failed_ = &block;
  }

  // The block in whose dynamic shared memory `pointer` lies; null: none.
  Block* owner(const void* pointer) const;
  // The place of `pointer`, into the running block's dynamic shared memory, in block `rank`.
  void* map(const void* pointer, unsigned rank, const char* instruction) const;
  // Block `rank`, for `instruction` to reach into: it must not have exited.
  Block& reach(unsigned rank, const char* instruction) const;

  // The barrier of all threads of the cluster that have not exited. Every thread waits once for each of its arrivals.
  void arrive();
  void wait();
  void thread_exits();
  int arrived() const { return arrived_; }

  uint64_t events = 0;  // counts everything that let a waiting thread go on, and every exit
  Polling polling;

 private:
  Block& choose_among(Block& block, uint64_t random) const;
  void complete_barrier();

  unsigned size_ = 0;
  std::vector<std::unique_ptr<Block>> blocks_;  // more than size_ after a launch of larger clusters
  Fiber home_;                                  // the OS thread's own context
  const Block* failed_ = nullptr;
  int arrived_ = 0;
  char arrivals_ = 0, passed_ = 0;  // addresses for the race detector: the phase that fills, and the last complete one
};

inline Cluster& cluster() { return current->block->cluster(); }

}  // namespace simt
