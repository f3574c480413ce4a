// What a failed launch says: which kernel, block and thread, and what happened, or who waits for whom.
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "sim/async.h"
#include "sim/cluster.h"
#include "sim/scheduler.h"

namespace simt {
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
  if (cluster_.failed()) return;
  begin_report(report_, *kernel_, index_);
  append(report_, ", thread (%u, %u, %u) [warp %d, lane %d]: %s", fiber.thread.x, fiber.thread.y, fiber.thread.z,
         fiber.warp, fiber.lane, reason);
  cluster_.fail_in(*this);
}

void Block::describe_fault(int signal, const void* address) {
  char reason[160];
  if (signal == SIGSEGV && stacks_.is_guard(address)) {
    snprintf(reason, sizeof reason, "stack overflow: its local variables and calls need more than %zu KB",
             current->context.stack_bytes / 1024);
  } else if (signal == SIGFPE) {
    snprintf(reason, sizeof reason, "integer division by zero");
  } else if (signal == SIGILL) {
    snprintf(reason, sizeof reason, "illegal instruction (a trap)");
  } else {
    snprintf(reason, sizeof reason, "access to memory at 0x%llx, which is not there, read-only or misaligned",
             static_cast<unsigned long long>(reinterpret_cast<uintptr_t>(address)));
  }
  report_error(*current, reason);
}

void Block::report_deadlock() {
  begin_report(report_, *kernel_, index_);
  append(report_, ": deadlock, no thread can run; %d of %d threads have exited", threads_ - alive_, threads_);
  append_waiters(report_);
  for (unsigned rank = 0; rank < cluster_.size(); ++rank) {
    const Block& other = cluster_.block(rank);
    if (&other == this) continue;
    append(report_, "\nblock (%u, %u, %u) of the same cluster: %d of %d threads have exited", other.index_.x,
           other.index_.y, other.index_.z, other.threads_ - other.alive_, other.threads_);
    other.append_waiters(report_);
  }
  cluster_.fail_in(*this);
}

void Block::append_waiters(char (&text)[kReportBytes]) const {
  for (int id = 0; id < kBarriers; ++id) {
    const Barrier& barrier = barriers_[id];
    if (barrier.arrived == 0) continue;
    append(text, "\n  %d threads wait in %s", barrier.arrived, barrier.name);
    if (id > 0) append(text, " at barrier %d", id);
    if (barrier.needed == 0)
      append(text, " for all %d that have not exited:", alive_);
    else
      append(text, " for %d to come:", barrier.needed);
    const char* separator = " ";
    for (int w = 0; w * kLanes < threads_; ++w) {
      const uint32_t lanes = warps_[w].at_barrier[id];
      if (lanes == 0) continue;
      append(text, "%swarp %d ", separator, w);
      append_lanes(text, lanes);
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
      append(text, "\n  warp %d ", w);
      append_lanes(text, same);
      append(text, " wait in %s, mask 0x%08x, for ", deposit.name, deposit.mask);
      append_lanes(text, deposit.mask & warp.alive & ~same);
      left &= ~same;
    }
  }
  append(text, "%s", engine_->describe_waiters().c_str());
  int in_cluster = 0;
  for (int i = 0; i < threads_; ++i) in_cluster += fibers_[i].stage == ClusterStage::kWaiting;
  if (in_cluster > 0)
    append(text, "\n  %d threads wait in barrier.cluster.wait; %d of the cluster have come", in_cluster,
           cluster_.arrived());
}

}  // namespace simt
