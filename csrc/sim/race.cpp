#include "sim/race.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <string>
#include <vector>

#include "sim/accumulators.h"
#include "sim/banks.h"
#include "sim/cluster.h"
#include "sim/control.h"
#include "sim/race_launch.h"
#include "sim/race_map.h"
#include "sim/race_observe.h"
#include "sim/race_order.h"
#include "sim/scheduler.h"
#include "sim/shadow.h"
#include "sim/symbols.h"

namespace simt::race {

#ifdef PYDIT_SIM_RACE
bool enabled = true;
#else
bool enabled = false;
#endif

namespace {

static_assert(kMaxClusterBlocks * kMaxThreads <= 1 << 13, "Access keeps a thread in 13 bits");

// What happened to a block of a cluster as others reached into it.
struct Resident {
  std::vector<uint32_t> visits;      // of each thread of other blocks, the epoch of its last access; empty: none
  std::vector<uint32_t> operations;  // asynchronous ones of other blocks that write here
  bool exited = false;
};

// Of the cluster that this OS thread runs: who accessed what, and who knows of it.
class Detector {
 public:
  void start(const Kernel& kernel, const Cluster& cluster) {
    map_.start(kernel, cluster);
    const int threads = map_.threads();
    residents_.assign(map_.blocks(), {});
    launch_ = launch_of(kernel);
    shadow_.start(map_.shadow_bytes());
    order_.start(threads);
    accumulators_.assign(threads, {});
    banks_.resize(map_.warps());
    for (BankCounter& warp : banks_) {
      warp.flush();
      warp.total = {};
    }
    std::fill(std::begin(counts_), std::end(counts_), 0);
  }

  void end() {
    if (launch_ == nullptr) return;
    for (BankCounter& warp : banks_) {
      warp.flush();
      count(kSharedRequests, warp.total.requests);
      count(kConflicts, warp.total.conflicts);
    }
    for (int i = 0; i < PYDIT_SIM_COUNTERS; ++i) launch_->counts[i] += counts_[i];
    launch_ = nullptr;
  }

  void count(Counter counter, uint64_t n) { counts_[counter] += n; }

  void access(const Fiber& fiber, const void* pointer, size_t bytes, bool write, bool atomic, size_t alignment,
              const void* pc) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const int me = map_.number(fiber);
    const auto bottom = reinterpret_cast<uintptr_t>(fiber.context.stack_bottom);
    if (address - bottom < fiber.context.stack_bytes) return access_local(accumulators_[me], address, write, pc);
    const ptrdiff_t first = map_.offset(address, bytes);
    if (first < 0) check_overrun(address, bytes, write, pc);
    if (first < 0 && !map_.is_global(address, bytes)) return;
    if (first >= 0 && residents_.size() > 1 && map_.is_static(first))
      stop(pc, "static shared memory in a cluster, which the simulator has only once for all blocks");
    if (address % alignment != 0)
      stop(pc, "misaligned %s of %zu bytes at %p", write ? "write" : "read", bytes, pointer);
    if (first < 0) return access_global(address, bytes, write, pc);
    count(write ? kSharedStored : kSharedLoaded, bytes);
    banks_[map_.warp_number(*fiber.block, fiber.warp)].access(fiber.lane, pc, static_cast<uint32_t>(first),
                                                              static_cast<uint32_t>(bytes));
    if (const int rank = map_.rank_of(first); rank != map_.rank_of_thread(me)) visit(rank, pc);
    touch(first, bytes, write, name(pc, me, atomic), me);
  }

  void touch_mbarrier(const void* barrier, bool anew, const void* pc) {
    const ptrdiff_t first = map_.offset(reinterpret_cast<uintptr_t>(barrier), sizeof(uint64_t));
    if (first >= 0) touch(first, sizeof(uint64_t), true, name(pc, self(), !anew), self());
  }

  void engine_access(const void* pointer, size_t bytes, uint64_t token, bool write, bool async_proxy, const void* pc) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const ptrdiff_t first = map_.offset(address, bytes);
    if (first < 0) {
      check_overrun(address, bytes, write, pc);
      if (map_.is_global(address, bytes)) access_global(address, bytes, write, pc);
      return;
    }
    count(write ? kSharedStored : kSharedLoaded, bytes);
    const int me = self();
    if (const int rank = map_.rank_of(first); rank != map_.rank_of_thread(me))
      residents_[rank].operations.push_back(operation(token));
    Access access = name(pc, me, false);
    access.engine = true;
    access.async_proxy = async_proxy;
    access.operation = operation(token);
    touch(first, bytes, write, access, me);
  }

  void release(const void* object) { order_.release(object, self()); }
  void acquire(const void* object) { order_.acquire(object, self()); }
  void forget(const void* object) { order_.forget(object); }
  void pass_on(const void* from, const void* to) { order_.pass_on(from, to); }
  void fence() { order_.proxy_fence(self()); }

  void barrier_passed(const void* object, const Block& block, int warp, uint32_t lanes) {
    banks_[map_.warp_number(block, warp)].flush();
    for (; lanes != 0; lanes &= lanes - 1) order_.acquire(object, map_.number(block, warp, __builtin_ctz(lanes)));
  }

  // Remembers that the running thread reaches into the block, which must be there.
  void visit(int rank, const void* pc) {
    const int me = self();
    Resident& there = residents_[rank];
    const int threads = map_.block_threads(), first = rank * threads;
    if (!order_.knows_one_of(first, first + threads, me))
      stop(pc, "access to block %d of the cluster, which may not have started: no barrier.cluster before", rank);
    if (there.exited) stop(pc, "access to block %d of the cluster after the block's exit", rank);
    there.visits.resize(map_.threads(), 0);
    there.visits[me] = order_.epoch(me);
  }

  void block_exits(int rank) {
    Resident& there = residents_[rank];
    there.exited = true;
    const int first = rank * map_.block_threads(), end = first + map_.block_threads();
    const uint32_t* joined = order_.joined(first, end);
    for (size_t thread = 0; thread < there.visits.size(); ++thread) {
      if (joined[thread] < there.visits[thread])
        leaves_early("an access to it by " + map_.describe(static_cast<int>(thread)));
    }
    for (const uint32_t operation : there.operations) {
      if (!order_.waited_for(operation, first, end)) leaves_early("a multicast copy into it");
    }
  }

  void join_lanes(const Block& block, int warp, uint32_t lanes) {
    banks_[map_.warp_number(block, warp)].flush();
    order_.join_lanes(map_.number(block, warp, 0), lanes);
  }

  void engine_done(uint64_t token) {
    const int me = self();
    order_.done(operation(token), me);
    accumulators_[me].done(token);
  }
  void accumulates(const void* pointer, size_t bytes, uint64_t token) {
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    if (!accumulators_[self()].add({begin, begin + bytes}, token))
      fail("wgmma: its accumulator was accessed after the last wgmma.fence, which is to come between");
  }
  void register_fence() { accumulators_[self()].fence(); }
  void engine_signals(uint64_t token, const void* object) { order_.signals(operation(token), object); }

 private:
  int self() const { return map_.number(*current); }

  Access name(const void* pc, int thread, bool atomic) {
    return {
        reinterpret_cast<uintptr_t>(pc), static_cast<uint64_t>(thread), atomic, false, false, order_.epoch(thread), 0};
  }

  uint32_t operation(uint64_t token) { return order_.operation(token, current->block->rank()); }

  // Memory of a block that its launch did not ask for.
  void check_overrun(uintptr_t address, size_t bytes, bool write, const void* pc) {
    const Range* given = map_.overrun(address, bytes);
    if (given == nullptr) return;
    stop(pc, "%s of %zu bytes at byte %zu of the dynamic shared memory; the launch gave it %zu bytes",
         write ? "write" : "read", bytes, static_cast<size_t>(address - given->begin),
         static_cast<size_t>(given->end - given->begin));
  }

  // A local variable.
  void access_local(Accumulators& mine, uintptr_t address, bool write, const void* pc) {
    if (const ptrdiff_t place = mine.access(address); place >= 0)
      stop(pc, "%s of register %zu of a wgmma accumulator before wgmma.wait_group", write ? "write" : "read",
           static_cast<size_t>(place));
  }

  void access_global(uintptr_t address, size_t bytes, bool write, const void* pc) {
    count(write ? kGlobalStored : kGlobalLoaded, bytes);
    if (launch_ == nullptr || launch_->spans.empty()) return;
    const Span* closest = &launch_->spans.front();
    for (const Span& span : launch_->spans) {
      if (span.range.holds(address, bytes) && (span.writable || !write)) return;
      const auto distance = [address](const Span& s) {
        return address < s.range.begin ? s.range.begin - address : address < s.range.end ? 0 : address - s.range.end;
      };
      if (distance(span) < distance(*closest)) closest = &span;
    }
    const Range& range = closest->range;
    stop(pc, "%s of %zu bytes of global memory outside the launch's tensors: byte %lld of %s, which has %zu%s",
         write ? "write" : "read", bytes, static_cast<long long>(address - range.begin), closest->name.c_str(),
         range.end - range.begin, range.holds(address, bytes) ? " and is not to be written" : "");
  }

  void touch(size_t first, size_t bytes, bool write, const Access& access, int me) {
    Access known = {};  // the last write that this access was found to be ordered behind
    for (size_t at = first; at < first + bytes;) {
      const size_t begin = at % Line::kBytes, end = std::min(Line::kBytes, begin + (first + bytes - at));
      Line& line = shadow_.line(at / Line::kBytes);
      const Line::Part part = line.part(begin, end);
      for (Cell* cell = part.first; cell != part.last; ++cell, at += part.bytes) {
        if (!(cell->write == known)) {
          if (!excused(cell->write, access) && !order_.is_behind(cell->write, me))
            report(at, cell->write, "write", access, write ? "write" : "read");
          if (access.async_proxy) check_proxy(at, cell->write, "write", access, write ? "written" : "read", me);
          known = cell->write;
        }
        if (write)
          note_write(*cell, at, access, me);
        else
          note_read(*cell, at, access, me);
      }
      if (write && end - begin == Line::kBytes) line.merge();
    }
  }

  // Atomics do not race with each other, nor accesses of one asynchronous operation.
  static bool excused(const Access& a, const Access& b) {
    return a.epoch == 0 || (a.atomic && b.atomic) || (a.engine && b.engine && a.operation == b.operation);
  }

  void note_write(Cell& cell, size_t byte, const Access& access, int me) {
    for (const Access& read : cell.reads) {
      if (!excused(read, access) && !order_.is_behind(read, me)) report(byte, read, "read", access, "write");
      if (access.async_proxy) check_proxy(byte, read, "read", access, "written", me);
    }
    cell.reads.clear();
    cell.write = access;
  }

  void note_read(Cell& cell, size_t byte, const Access& access, int me) {
    // Atomics that change a byte are writes; the first of them may find it as another block left it.
    if (cell.write.epoch == 0) stop(access.where(), "read of uninitialised %s", map_.name(byte).c_str());
    for (Access& read : cell.reads) {
      if (read.thread != access.thread || read.engine != access.engine || read.operation != access.operation) continue;
      read = access;
      return;
    }
    // Reads that this one is ordered behind need not be kept: who is ordered behind this one is behind them too.
    if (cell.reads.size() >= cell.prune_at) {
      const auto behind = [this, me](const Access& read) { return order_.is_behind(read, me); };
      cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), behind), cell.reads.end());
      cell.prune_at = 4 + 2 * cell.reads.size();
    }
    cell.reads.push_back(access);
  }

  void check_proxy(size_t byte, const Access& before, const char* first, const Access& now, const char* second,
                   int me) {
    if (before.epoch == 0 || before.async_proxy) return;
    if (order_.is_fenced(before, me)) return;
    const std::string how = std::string(second) + " by the async proxy without fence.proxy.async between";
    report(byte, before, first, now, how.c_str());
  }

  std::string describe(const Access& access) const {
    return (access.engine ? "the engine for " : "by ") + map_.describe(static_cast<int>(access.thread)) + " at " +
           source_line(access.where());
  }

  [[noreturn]] static void leaves_early(const std::string& who) {
    current->block->abandon(("the block's exit is not ordered behind " + who).c_str());
  }

  void report(size_t byte, const Access& before, const char* first, const Access& now, const char* second) {
    const std::string reason = std::string("race on ") + map_.name(byte) + ": " + first + " " + describe(before) +
                               ", then " + second + " " + describe(now);
    current->block->abandon(reason.c_str());
  }

  [[gnu::format(printf, 3, 4)]] void stop(const void* pc, const char* format, ...) {
    char reason[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(reason, sizeof reason, format, arguments);
    va_end(arguments);
    current->block->abandon((std::string(reason) + ", at " + source_line(pc)).c_str());
  }

  ClusterMap map_;
  std::vector<Resident> residents_;  // by rank
  Launch* launch_ = nullptr;
  Shadow shadow_;
  Order order_;
  std::vector<Accumulators> accumulators_;  // of each thread, not waited for
  std::vector<BankCounter> banks_;          // of each warp
  uint64_t counts_[PYDIT_SIM_COUNTERS] = {};
};

// Each access of a kernel asks for its OS thread's detector: a pointer is found at once, an object after the question
// whether it was made.
__thread Detector* mine = nullptr;

Detector& detector() {
  if (__builtin_expect(mine == nullptr, false)) {
    static thread_local Detector instance;
    mine = &instance;
  }
  return *mine;
}

}  // namespace

void observe(const Fiber& fiber, const void* pointer, size_t bytes, bool write, Kind kind, size_t alignment,
             const void* pc) {
  detector().access(fiber, pointer, bytes, write, kind == kAtomic, alignment, pc);
}

namespace detail {

void access(const void* pointer, size_t bytes, bool write, const void* pc) {
  if (current != nullptr) detector().access(*current, pointer, bytes, write, false, 1, pc);
}
void engine_access(const void* pointer, size_t bytes, uint64_t token, bool write, bool async_proxy, const void* pc) {
  detector().engine_access(pointer, bytes, token, write, async_proxy, pc);
}
void release(const void* object) { detector().release(object); }
void acquire(const void* object) { detector().acquire(object); }
void engine_done(uint64_t token) { detector().engine_done(token); }
void engine_signals(uint64_t token, const void* object) { detector().engine_signals(token, object); }
void accumulates(const void* pointer, size_t bytes, uint64_t token) { detector().accumulates(pointer, bytes, token); }
void register_fence() { detector().register_fence(); }
void touch_mbarrier(const void* barrier, bool anew, const void* pc) { detector().touch_mbarrier(barrier, anew, pc); }
void forget(const void* object) { detector().forget(object); }
void generic_proxy_fence() { detector().fence(); }
void pass_on(const void* from, const void* to) { detector().pass_on(from, to); }
void visit(unsigned rank, const void* pc) { detector().visit(static_cast<int>(rank), pc); }
void block_exits(unsigned rank) { detector().block_exits(static_cast<int>(rank)); }
void join_warp(const Block& block, int warp, uint32_t lanes) { detector().join_lanes(block, warp, lanes); }
void acquire_lanes(const void* object, const Block& block, int warp, uint32_t lanes) {
  detector().barrier_passed(object, block, warp, lanes);
}
void start_cluster(const Kernel& kernel, const Cluster& cluster) { detector().start(kernel, cluster); }
void end_cluster() { detector().end(); }

}  // namespace detail
}  // namespace simt::race

namespace simt::count::detail {
void tensor_ops(uint64_t n) { race::detector().count(race::kTensorOps, n); }
void warpgroup() { race::detector().count(race::kWarpgroups, 1); }
}  // namespace simt::count::detail

void pydit_sim_set_race(int on) { simt::race::enabled = on != 0; }
int pydit_sim_race_build(void) {
#ifdef PYDIT_SIM_RACE
  return 1;
#else
  return 0;
#endif
}
