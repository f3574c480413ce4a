#include "sim/cluster.h"

#include "sim/async.h"
#include "sim/race.h"

namespace simt {

bool Cluster::run(const Kernel& kernel, uint64_t index) {
  size_ = kernel.cluster;
  while (blocks_.size() < size_) blocks_.push_back(std::make_unique<Block>(*this, blocks_.size()));
  failed_ = nullptr;
  arrived_ = 0;
  events = 0;
  polling = {};
  for (unsigned rank = 0; rank < size_; ++rank) blocks_[rank]->start(kernel, index * size_ + rank);
  race::start_cluster(kernel, *this);
  home_.context.stack_bottom = nullptr;  // of the OS thread that runs this cluster
  Fiber& first = blocks_[0]->next();
  current = &first;
  switch_context(home_.context, first.context);
  current = nullptr;
  race::end_cluster();
  for (unsigned rank = 0; rank < size_ && !failed(); ++rank) blocks_[rank]->check_end();
  if (!failed()) return true;
  for (unsigned rank = 0; rank < size_; ++rank) blocks_[rank]->forget_abandoned();
  return false;
}

Block& Cluster::choose_among(Block& block, uint64_t random) const {
  const unsigned first = random % size_;
  for (unsigned i = 0; i < size_; ++i) {
    Block& other = *blocks_[(first + i) % size_];
    if (other.can_run()) return other;
  }
  return block;
}

// Shared memory of other blocks -----------------------------------------------------------------------------------

Block* Cluster::owner(const void* pointer) const {
  for (unsigned rank = 0; rank < size_; ++rank) {
    const auto offset =
        static_cast<const unsigned char*>(pointer) - static_cast<unsigned char*>(blocks_[rank]->shared());
    if (offset >= 0 && static_cast<size_t>(offset) < kMaxSharedBytes) return blocks_[rank].get();
  }
  return nullptr;
}

void* Cluster::map(const void* pointer, unsigned rank, const char* instruction) const {
  const Block& mine = *current->block;
  if (rank >= size_) fail("%s: rank: expected a block of the cluster, 0 to %u, got %u", instruction, size_ - 1, rank);
  if (owner(pointer) != &mine) {
    fail("%s: expected a pointer into the block's own dynamic shared memory, got %s", instruction,
         place(pointer).c_str());
  }
  const auto offset = static_cast<const unsigned char*>(pointer) - static_cast<unsigned char*>(mine.shared());
  return static_cast<unsigned char*>(blocks_[rank]->shared()) + offset;
}

Block& Cluster::reach(unsigned rank, const char* instruction) const {
  Block& there = *blocks_[rank];
  if (there.alive() == 0) fail("%s: into block %u of the cluster after the block's exit", instruction, rank);
  if (&there != current->block) race::visit(rank);
  return there;
}

// The cluster's barrier ------------------------------------------------------------------------------------------

void Cluster::arrive() {
  ClusterStage& mine = current->stage;
  if (mine != ClusterStage::kAway) fail("barrier.cluster.arrive: the thread has not waited since it last arrived");
  mine = ClusterStage::kArrived;
  race::release(&arrivals_);
  ++arrived_;
  complete_barrier();
}

void Cluster::wait() {
  ClusterStage& mine = current->stage;
  if (mine == ClusterStage::kAway) fail("barrier.cluster.wait: the thread has not arrived");
  if (mine == ClusterStage::kArrived) {
    mine = ClusterStage::kWaiting;
    current->block->park();
  }
  mine = ClusterStage::kAway;
  race::acquire(&passed_);
}

void Cluster::thread_exits() {
  ClusterStage& mine = current->stage;
  if (mine == ClusterStage::kArrived) --arrived_;
  mine = ClusterStage::kAway;
  race::release(&arrivals_);  // as in Block::exit_thread: it counts as one that came
  complete_barrier();
}

void Cluster::complete_barrier() {
  int alive = 0;
  for (unsigned rank = 0; rank < size_; ++rank) alive += blocks_[rank]->alive();
  if (arrived_ == 0 || arrived_ < alive) return;
  arrived_ = 0;
  // Nobody comes to the next phase before all have left this one, so one object keeps what it passes on.
  race::pass_on(&arrivals_, &passed_);
  for (unsigned rank = 0; rank < size_; ++rank) {
    Block& block = *blocks_[rank];
    for (int i = 0; i < block.threads(); ++i) {
      Fiber& fiber = block.fibers()[i];
      if (fiber.stage == ClusterStage::kWaiting) block.wake(fiber);
      if (fiber.stage != ClusterStage::kAway) fiber.stage = ClusterStage::kComplete;
    }
  }
}

}  // namespace simt
