#include "sim/scheduler.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>

namespace simt {

__thread Fiber* current = nullptr;

namespace {

constexpr size_t kSharedAlignment = 1024;
constexpr size_t kCanaryBytes = 256;  // behind the dynamic shared memory of a block, 0xFF as well

struct KernelError {
  char reason[kReportBytes / 2];
};

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

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

Block::Block()
    : fibers_(new Fiber[kMaxThreads]), arena_(new unsigned char[kMaxSharedBytes + kSharedAlignment + kCanaryBytes]) {
  const auto address = reinterpret_cast<uintptr_t>(arena_.get());
  shared_ = arena_.get() + (-address & (kSharedAlignment - 1));
}

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
  for (int i = 0; i < threads_; ++i) stacks_.prepare(fibers_[i].context, i, thread_main);
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
  failed_ = false;
  random_ = mix(kernel.seed ^ mix(linear)) | 1;
  memset(shared_, 0xFF, kernel.shared_bytes + kCanaryBytes);
}

bool Block::run(const Kernel& kernel, uint64_t linear) {
  start(kernel, linear);
  Fiber& first = next();
  current = &first;
  switch_context(main_.context, first.context);
  current = nullptr;
  if (!failed_ && alive_ > 0) report_deadlock();
  if (failed_ || alive_ > 0) {
    stacks_.forget_abandoned();
    failed_ = true;
    return false;
  }
  for (size_t i = 0; i < kCanaryBytes; ++i) {
    if (shared_[kernel.shared_bytes + i] != 0xFF) {
      char reason[160];
      snprintf(reason, sizeof reason, "byte %zu of the dynamic shared memory was written; the launch asked for %zu bytes",
               kernel.shared_bytes + i, kernel.shared_bytes);
      report_error(fibers_[0], reason);
      return false;
    }
  }
  return true;
}

// Where every fiber starts. It never returns: its last act is to switch to another.
void Block::thread_main() {
  Block& block = *current->block;
  enter(block.main_.context);
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
  warp.alive &= ~(1u << me.lane);
  --alive_;
  // Those who wait for this thread wait no longer.
  for (uint32_t left = warp.collecting; left != 0; left &= warp.collecting & (left - 1)) {
    finish_if_complete(warp, *warp.deposit[__builtin_ctz(left)], me.warp);
  }
  for (uint32_t left = pending_barriers_; left != 0; left &= left - 1) {
    const int id = __builtin_ctz(left);
    if (barriers_[id].needed == 0 && barriers_[id].arrived == alive_) release(barriers_[id], id);
  }
}

// Scheduling -----------------------------------------------------------------------------------------------------

uint64_t Block::random() {  // xorshift64
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_;
}

void Block::make_ready(int warp_index, uint32_t lanes) {
  warps_[warp_index].ready |= lanes;
  ready_warps_ |= 1u << warp_index;
}

Fiber& Block::next() {
  if (failed_ || ready_warps_ == 0) return main_;
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

void Block::wait() {
  Fiber& me = *current;
  Fiber& other = next();
  if (&other == &me) return;
  current = &other;
  switch_context(me.context, other.context);
}

void Block::yield() {
  make_ready(current->warp, 1u << current->lane);
  leave_warp_ = true;
  wait();
}

// Barriers -------------------------------------------------------------------------------------------------------

int Block::barrier(int id, int needed, const char* name, bool vote) {
  Fiber& me = *current;
  Barrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier.name = name;
    barrier.needed = needed;
    pending_barriers_ |= 1u << id;
  } else if (barrier.needed != needed || strcmp(barrier.name, name) != 0) {
    fail("%s (%d threads) at barrier %d, where %d others wait in %s (%d threads); 0 threads means all", name, needed,
         id, barrier.arrived, barrier.name, barrier.needed);
  }
  ++barrier.arrived;
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
    warps_[w].at_barrier[id] = 0;
  }
  barrier.result = barrier.votes;
  barrier.votes = 0;
  barrier.arrived = 0;
  pending_barriers_ &= ~(1u << id);
  leave_warp_ = true;
}

// Warp collectives -----------------------------------------------------------------------------------------------

uint32_t Block::alive_lanes() const { return warps_[current->warp].alive; }

// Computes `deposit`'s collective and makes its lanes ready when all of them have come.
bool Block::finish_if_complete(Warp& warp, Deposit& deposit, int warp_index) {
  const uint32_t participants = deposit.mask & warp.alive;
  if ((participants & ~warp.collecting) != 0) return false;
  for (uint32_t left = participants; left != 0; left &= left - 1) {
    const Deposit& other = *warp.deposit[__builtin_ctz(left)];
    if (other.mask != deposit.mask) return false;  // in another collective first; it may still come here
    if (other.finish != deposit.finish || strcmp(other.name, deposit.name) != 0) {
      fail("divergent warp collective, mask 0x%08x: lane %d is in %s, others are in %s", deposit.mask,
           __builtin_ctz(left), other.name, deposit.name);
    }
  }
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
  warp.deposit[me.lane] = &mine;
  warp.collecting |= bit;
  finish_if_complete(warp, mine, me.warp);
  wait();
}

// Reports --------------------------------------------------------------------------------------------------------

namespace {

// snprintf that appends, and stops quietly at the end of the buffer.
[[gnu::format(printf, 2, 3)]] void append(char (&text)[kReportBytes], const char* format, ...) {
  const size_t used = strlen(text);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text + used, sizeof text - used, format, arguments);
  va_end(arguments);
}

// "lanes 0-3, 7"
void append_lanes(char (&text)[kReportBytes], uint32_t lanes) {
  if (lanes == ~0u) return append(text, "all lanes");
  const char* separator = (lanes & (lanes - 1)) == 0 ? "lane " : "lanes ";
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) == 0) continue;
    int last = lane;
    while (last + 1 < kLanes && (lanes >> (last + 1) & 1) != 0) ++last;
    append(text, last > lane ? "%s%d-%d" : "%s%d", separator, lane, last);
    separator = ", ";
    lane = last;
  }
}

void begin_report(char (&text)[kReportBytes], const Kernel& kernel, uint3 block) {
  // A kernel in parentheses is named without them.
  const size_t length = strlen(kernel.name);
  const bool parentheses = length > 2 && kernel.name[0] == '(' && kernel.name[length - 1] == ')';
  text[0] = '\0';
  append(text, "kernel %.*s, grid (%u, %u, %u), block shape (%u, %u, %u), seed %llu: block (%u, %u, %u)",
         static_cast<int>(parentheses ? length - 2 : length), kernel.name + parentheses, kernel.grid.x, kernel.grid.y,
         kernel.grid.z, kernel.block.x, kernel.block.y, kernel.block.z, static_cast<unsigned long long>(kernel.seed),
         block.x, block.y, block.z);
}

}  // namespace

void Block::report_error(const Fiber& fiber, const char* reason) {
  begin_report(report_, *kernel_, index_);
  append(report_, ", thread (%u, %u, %u) [warp %d, lane %d]: %s", fiber.thread.x, fiber.thread.y, fiber.thread.z,
         fiber.warp, fiber.lane, reason);
  failed_ = true;
}

void Block::report_deadlock() {
  begin_report(report_, *kernel_, index_);
  append(report_, ": deadlock, no thread can run; %d of %d threads have exited", threads_ - alive_, threads_);
  for (int id = 0; id < kBarriers; ++id) {
    const Barrier& barrier = barriers_[id];
    if (barrier.arrived == 0) continue;
    append(report_, "\n  %d threads wait in %s", barrier.arrived, barrier.name);
    if (id > 0) append(report_, " at barrier %d", id);
    if (barrier.needed == 0) append(report_, " for all %d that have not exited:", alive_);
    else append(report_, " for %d to come:", barrier.needed);
    const char* separator = " ";
    for (int w = 0; w * kLanes < threads_; ++w) {
      const uint32_t lanes = warps_[w].at_barrier[id];
      if (lanes == 0) continue;
      append(report_, "%swarp %d ", separator, w);
      append_lanes(report_, lanes);
      separator = "; ";
    }
  }
  for (int w = 0; w * kLanes < threads_; ++w) {
    const Warp& warp = warps_[w];
    for (uint32_t left = warp.collecting; left != 0;) {
      // One line for the lanes that wait in the same collective.
      const Deposit& deposit = *warp.deposit[__builtin_ctz(left)];
      uint32_t same = 0;
      for (int lane = 0; lane < kLanes; ++lane) {
        if ((left >> lane & 1) != 0 && warp.deposit[lane]->mask == deposit.mask) same |= 1u << lane;
      }
      append(report_, "\n  warp %d ", w);
      append_lanes(report_, same);
      append(report_, " wait in %s, mask 0x%08x, for ", deposit.name, deposit.mask);
      append_lanes(report_, deposit.mask & warp.alive & ~same);
      left &= ~same;
    }
  }
}

}  // namespace simt
