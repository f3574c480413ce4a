#include "sim/race_map.h"

#include <cstdio>

#include "sim/shadow.h"

namespace simt::race {

void ClusterMap::start(const Kernel& kernel, const Cluster& cluster) {
  kernel_ = &kernel;
  block_threads_ = cluster.block(0).threads();
  block_warps_ = (block_threads_ + kLanes - 1) / kLanes;
  blocks_.clear();
  for (unsigned rank = 0; rank < cluster.size(); ++rank) {
    const auto shared = reinterpret_cast<uintptr_t>(cluster.block(rank).shared());
    blocks_.push_back({&cluster.block(rank), {shared, shared + kernel.shared_bytes}});
  }
  running_ = reinterpret_cast<uintptr_t>(&current);
  if (fixed().end == 0) module_ = this_module();  // a detector is of one OS thread
  find_stacks();
  // The lines of the shadow begin where the addresses are multiples of their length, for static memory as well; and
  // a block's part where bank 0 is.
  constexpr size_t kAllBanks = 128;
  pitch_ = (kernel.shared_bytes + kAllBanks - 1) / kAllBanks * kAllBanks;
  fixed_offset_ = blocks_.size() * pitch_ + fixed().begin % Line::kBytes;
}

// Stacks lie in a few slabs: where each begins and ends, guard pages between stacks included.
void ClusterMap::find_stacks() {
  stacks_.clear();
  for (int t = 0; t < threads(); ++t) {
    const Context& context = fiber_of(t).context;
    const auto begin = reinterpret_cast<uintptr_t>(context.stack_bottom);
    const uintptr_t end = begin + context.stack_bytes;
    constexpr uintptr_t kGap = 16 * 1024;
    if (!stacks_.empty() && begin >= stacks_.back().end && begin - stacks_.back().end < kGap)
      stacks_.back().end = end;
    else
      stacks_.push_back({begin, end});
  }
}

bool ClusterMap::is_global(uintptr_t address, size_t bytes) const {
  if (module_.image.holds(address, bytes) || fixed().holds(address, bytes)) return false;
  const auto near = [address](const void* object, size_t size) {
    return address - reinterpret_cast<uintptr_t>(object) < size;
  };
  for (const Member& member : blocks_) {
    if (near(member.block, sizeof(Block)) || near(member.block->fibers(), sizeof(Fiber) * kMaxThreads)) return false;
  }
  if (near(kernel_, sizeof(Kernel)) || near(kernel_->arguments, 4096)) return false;  // the launch and its arguments
  for (const Range& stacks : stacks_) {
    if (stacks.holds(address, 1)) return false;
  }
  return true;
}

const Range* ClusterMap::overrun(uintptr_t address, size_t bytes) const {
  for (const Member& member : blocks_) {
    const Range& given = member.dynamic;
    if (address + bytes > given.end && address >= given.begin && address < given.begin + kMaxSharedBytes) return &given;
  }
  return nullptr;
}

std::string ClusterMap::name(size_t offset) const {
  if (is_static(offset)) return "static shared memory (byte " + std::to_string(offset - fixed_offset_) + ")";
  return "byte " + std::to_string(offset % pitch_) + " of the dynamic shared memory" + of_block(rank_of(offset));
}

std::string ClusterMap::of_block(int rank) const {
  if (blocks() == 1) return "";
  const uint3 index = blocks_[rank].block->index();
  char text[60];
  snprintf(text, sizeof text, " of block (%u, %u, %u)", index.x, index.y, index.z);
  return text;
}

std::string ClusterMap::describe(int thread) const {
  const Fiber& fiber = fiber_of(thread);
  const uint3& t = fiber.thread;
  char text[100];
  snprintf(text, sizeof text, "thread (%u, %u, %u) [warp %d, lane %d]", t.x, t.y, t.z, fiber.warp, fiber.lane);
  return text + of_block(rank_of_thread(thread));
}

}  // namespace simt::race
