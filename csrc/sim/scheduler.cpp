#include "sim/scheduler.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "sim/async.h"
#include "sim/cluster.h"
#include "sim/progress.h"
#include "sim/race.h"

namespace simt {

__thread Fiber* current = nullptr;

namespace {

constexpr size_t kSharedAlignment = 1024;
constexpr size_t kCanaryBytes = 256;  // behind the dynamic shared memory of a block, 0xFF as well

struct KernelError {
  char reason[kReportBytes / 2];
};

uint32_t rotate_right(uint32_t x, int by) { return x >> by | x << (-by & 31); }

// A set bit of non-empty `mask`: the first from `start` on, going round.
int find_bit(uint32_t mask, int start, bool descending) {
  const uint32_t rotated = rotate_right(mask, start);
  return ((descending ? 31 - __builtin_clz(rotated) : __builtin_ctz(rotated)) + start) & 31;
}

}  // namespace

void fail(const char* format, ...) {
  KernelError error;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(error.reason, sizeof error.reason, format, arguments);
  va_end(arguments);
  throw error;
}

Block::Block(Cluster& cluster, size_t rank)
    : cluster_(cluster),
      rank_(static_cast<unsigned>(rank)),
      fibers_(new Fiber[kMaxThreads]),
      engine_(new Engine),
      arena_(new unsigned char[kMaxSharedBytes + kSharedAlignment + kCanaryBytes]) {
  const auto address = reinterpret_cast<uintptr_t>(arena_.get());
  shared_ = arena_.get() + (-address & (kSharedAlignment - 1));
}

Block::~Block() = default;

// Running a block ------------------------------------------------------------------------------------------------

void Block::start(const Kernel& kernel, uint64_t linear) {
  kernel_ = &kernel;
  index_.x = static_cast<unsigned>(linear % kernel.grid.x);
  index_.y = static_cast<unsigned>(linear / kernel.grid.x % kernel.grid.y);
  index_.z = static_cast<unsigned>(linear / kernel.grid.x / kernel.grid.y);
  const dim3 shape = kernel.block;
  if (shape.x != shape_.x || shape.y != shape_.y || shape.z != shape_.z) {
    shape_ = shape;
    threads_ = static_cast<int>(shape.x * shape.y * shape.z);
    stacks_.reserve(threads_);
    for (int i = 0; i < threads_; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.block = this;
      fiber.thread = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
      fiber.warp = i / kLanes;
      fiber.lane = i % kLanes;
    }
  }
  for (int i = 0; i < threads_; ++i) {
    stacks_.prepare(fibers_[i].context, i, thread_main);
    fibers_[i].stage = ClusterStage::kAway;
  }
  const int warps = (threads_ + kLanes - 1) / kLanes;
  for (int w = 0; w < warps; ++w) {
    const int lanes = threads_ - w * kLanes < kLanes ? threads_ - w * kLanes : kLanes;
    warps_[w].alive = warps_[w].ready = lanes == kLanes ? ~0u : (1u << lanes) - 1;
    warps_[w].collecting = 0;
    memset(warps_[w].at_barrier, 0, sizeof warps_[w].at_barrier);
  }
  if (pending_barriers_ != 0) {  // the last block failed
    for (Barrier& barrier : barriers_) barrier = Barrier();
    pending_barriers_ = 0;
  }
  alive_ = threads_;
  ready_warps_ = warps == kMaxWarps ? ~0u : (1u << warps) - 1;
  leave_warp_ = true;
  random_ = mix(kernel.seed + mix(linear)) | 1;
  engine_->start_block();
  memset(shared_, 0xFF, kernel.shared_bytes + kCanaryBytes);
}

void Block::check_end() {
  if (alive_ > 0) return report_deadlock();
  const size_t bytes = kernel_->shared_bytes;
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    if (shared_[bytes + i] != 0xFF) {
      char reason[160];
      snprintf(reason, sizeof reason, "byte %zu of the dynamic shared memory was written; the launch gave it %zu bytes",
               bytes + i, bytes);
      return report_error(fibers_[0], reason);
    }
  }
  const std::string unfinished = engine_->end_block(*this);
  if (!unfinished.empty()) report_error(fibers_[0], unfinished.c_str());
}

// Where every fiber starts. It never returns: its last act is to switch to another.
void Block::thread_main() {
  Block& block = *current->block;
  enter(block.cluster_.home().context);
  try {
    block.kernel_->invoke(block.kernel_->arguments);
    block.exit_thread();
  } catch (const KernelError& error) {
    block.report_error(*current, error.reason);
  } catch (const std::exception& error) {
    block.report_error(*current, error.what());
  } catch (...) {
    block.report_error(*current, "an exception that is not a std::exception");
  }
  block.wait();  // switches away for good: this thread is not ready and nobody will make it so
  __builtin_unreachable();
}

void Block::exit_thread() {
  Fiber& me = *current;
  Warp& warp = warps_[me.warp];
  race::release(&barriers_[0]);  // a thread that has exited counts as one that came
  warp.alive &= ~(1u << me.lane);
  --alive_;
  ++cluster_.events;
  if (alive_ == 0) race::block_exits(rank_);
  // Those who wait for this thread wait no longer.
  for (uint32_t left = warp.collecting; left != 0; left &= warp.collecting & (left - 1)) {
    finish_if_complete(warp, *warp.deposit[__builtin_ctz(left)], me.warp);
  }
  for (uint32_t left = pending_barriers_; left != 0; left &= left - 1) {
    const int id = __builtin_ctz(left);
    if (barriers_[id].needed == 0 && barriers_[id].arrived == alive_) release(barriers_[id], id);
  }
  cluster_.thread_exits();
}

void Block::abandon(const char* reason) {
  report_error(*current, reason);
  fault_exit();
}

void Block::fault_exit() {
  current->block->wait();  // the block has failed, so this goes to the OS thread's context
  __builtin_unreachable();
}

// Scheduling -----------------------------------------------------------------------------------------------------

inline uint64_t Block::random() {  // xorshift64
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_;
}

inline void Block::make_ready(int warp_index, uint32_t lanes) {
  warps_[warp_index].ready |= lanes;
  ready_warps_ |= 1u << warp_index;
}

Fiber& Block::next() {
  if (cluster_.failed()) return cluster_.home();
  if (leave_warp_ || ready_warps_ == 0) return cluster_.choose(*this, random_).next_here();
  return next_here();
}

inline Fiber& Block::next_here() {
  if (ready_warps_ == 0) return cluster_.home();
  if (leave_warp_ || warps_[running_warp_].ready == 0) {
    const uint64_t r = random();
    running_warp_ = find_bit(ready_warps_, r >> 8 & 31, r >> 16 & 1);
    first_lane_ = r >> 24 & 31;
    descending_ = r >> 32 & 1;
    leave_warp_ = false;
  }
  Warp& warp = warps_[running_warp_];
  const int lane = find_bit(warp.ready, first_lane_, descending_);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) ready_warps_ &= ~(1u << running_warp_);
  return fibers_[running_warp_ * kLanes + lane];
}

inline void Block::wait() {
  Fiber& me = *current;
  Fiber& other = next();
  if (&other == &me) return;
  current = &other;
  switch_context(me.context, other.context);
}

void Block::wake(const Fiber& fiber) {
  ++cluster_.events;
  make_ready(fiber.warp, 1u << fiber.lane);
  leave_warp_ = true;
}

void Block::yield() {
  if (kernel_->progress->cancelled()) fail("stopped: another block of the launch failed");
  make_ready(current->warp, 1u << current->lane);
  leave_warp_ = true;
  wait();
}

void Block::fall_behind() {
  constexpr uint64_t kSeldom = 1 << 9;  // one call in so many
  constexpr int kLong = 1 << 11;        // turns of other threads
  if ((random() >> 40) % kSeldom != 0) return;
  for (int i = 0; i < kLong; ++i) yield();
}

// Barriers -------------------------------------------------------------------------------------------------------

Barrier& Block::come_to_barrier(int id, int needed, const char* name) {
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier.name = name;
    barrier.needed = needed;
    pending_barriers_ |= 1u << id;
  } else if (barrier.needed != needed || strcmp(barrier.name, name) != 0) {
    fail("%s (%d threads) at barrier %d, where %d others wait in %s (%d threads); 0 threads means all", name, needed,
         id, barrier.arrived, barrier.name, barrier.needed);
  }
  race::release(&barrier);
  ++barrier.arrived;
  return barrier;
}

void Block::barrier_arrive(int id, int needed, const char* name) {
  Barrier& barrier = come_to_barrier(id, needed, name);
  if (barrier.arrived == needed) release(barrier, id);
}

int Block::barrier(int id, int needed, const char* name, bool vote) {
  Fiber& me = *current;
  Barrier& barrier = come_to_barrier(id, needed, name);
  barrier.votes += vote;
  warps_[me.warp].at_barrier[id] |= 1u << me.lane;
  if (barrier.arrived == (needed == 0 ? alive_ : needed)) release(barrier, id);
  wait();
  return barrier.result;
}

void Block::release(Barrier& barrier, int id) {
  for (int w = 0; w * kLanes < threads_; ++w) {
    if (warps_[w].at_barrier[id] == 0) continue;
    make_ready(w, warps_[w].at_barrier[id]);
    race::acquire_lanes(&barrier, *this, w, warps_[w].at_barrier[id]);
    warps_[w].at_barrier[id] = 0;
  }
  ++cluster_.events;
  race::forget(&barrier);
  barrier.result = barrier.votes;
  barrier.votes = 0;
  barrier.arrived = 0;
  pending_barriers_ &= ~(1u << id);
  leave_warp_ = true;
}

// Warp collectives -----------------------------------------------------------------------------------------------

uint32_t Block::alive_lanes() const { return warps_[current->warp].alive; }

// Whether two deposits of the same mask belong together; the same text may stand at several addresses.
bool Block::same_collective(const Deposit& a, const Deposit& b) {
  return a.finish == b.finish && (a.name == b.name || strcmp(a.name, b.name) == 0);
}

// Computes `deposit`'s collective and makes its lanes ready when all of them have come.
inline bool Block::finish_if_complete(Warp& warp, Deposit& deposit, int warp_index) {
  const uint32_t participants = deposit.mask & warp.alive;
  if ((participants & ~warp.collecting) != 0) return false;
  if (!warp.uniform) {
    for (uint32_t left = participants; left != 0; left &= left - 1) {
      const Deposit& other = *warp.deposit[__builtin_ctz(left)];
      if (other.mask != deposit.mask) return false;  // in another collective first; it may still come here
      if (!same_collective(other, deposit)) {
        fail("divergent warp collective, mask 0x%08x: lane %d is in %s, others are in %s", deposit.mask,
             __builtin_ctz(left), other.name, deposit.name);
      }
    }
  }
  ++cluster_.events;
  // CUDA's own collectives order memory; those of PTX that only have lanes in step (ldmatrix, mma) do not.
  if (deposit.name[0] == '_') race::join_warp(*this, warp_index, participants);
  deposit.finish(warp.deposit, participants);
  warp.collecting &= ~participants;
  make_ready(warp_index, participants);
  // Lane order is drawn anew, and now and then another warp goes first.
  const uint64_t r = random();
  first_lane_ = r >> 8 & 31;
  descending_ = r >> 16 & 1;
  leave_warp_ = (r >> 24 & 7) == 0;
  return true;
}

void Block::collective(Deposit& mine) {
  Fiber& me = *current;
  Warp& warp = warps_[me.warp];
  const uint32_t bit = 1u << me.lane;
  if ((mine.mask & bit) == 0) fail("%s: lane %d is not in its own mask 0x%08x", mine.name, me.lane, mine.mask);
  if (warp.collecting == 0) {
    warp.uniform = true;
  } else if (warp.uniform) {
    const Deposit& other = *warp.deposit[__builtin_ctz(warp.collecting)];
    warp.uniform = other.mask == mine.mask && same_collective(other, mine);
  }
  warp.deposit[me.lane] = &mine;
  warp.collecting |= bit;
  finish_if_complete(warp, mine, me.warp);
  wait();
}

}  // namespace simt
