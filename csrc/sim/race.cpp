#include "sim/race.h"

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "sim/accumulators.h"
#include "sim/banks.h"
#include "sim/cluster.h"
#include "sim/control.h"
#include "sim/race_launch.h"
#include "sim/race_map.h"
#include "sim/scheduler.h"
#include "sim/shadow.h"
#include "sim/symbols.h"

namespace simt::race {

#ifdef PYDIT_SIM_RACE
bool enabled = true;
#else
bool enabled = false;
#endif

enum Kind : uint8_t { kPlain, kAtomic };  // as in race_observe.cpp
void observe(const Fiber& fiber, const void* pointer, size_t bytes, bool write, Kind kind, size_t alignment,
             const void* pc);

namespace {

static_assert(kMaxClusterBlocks * kMaxThreads <= 1 << 13, "Access keeps a thread in 13 bits");

// An asynchronous operation, and who waited for it when. Of one thread the first wait alone counts.
struct Operation {
  struct Wait {
    uint32_t thread, epoch;
  };
  std::vector<Wait> waits;
};

// What a barrier, an mbarrier or an atomic variable passes on.
struct Object {
  bool released = false;
  std::vector<uint32_t> clock;       // valid once released
  std::vector<uint32_t> operations;  // whose completion this object signals
  std::vector<uint32_t> acquired;    // of each thread, how many of those it has waited for
};

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
    width_ = (static_cast<size_t>(threads) + 7) / 8 * 8;
    clocks_.assign(threads * width_, 0);
    for (int t = 0; t < threads; ++t) clock(t)[t] = 1;
    fences_.clear();
    objects_.clear();
    numbers_.clear();
    operations_.clear();
    finished_.assign(threads, {});
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

  void release(const void* object) {
    const int me = self();
    Object& to = objects_[object];
    if (!to.released) to.clock.assign(width_, 0);
    to.released = true;
    join(to.clock.data(), clock(me));
    ++clock(me)[me];
  }

  void acquire(const void* object) { acquire_as(object, self()); }

  void barrier_passed(const void* object, const Block& block, int warp, uint32_t lanes) {
    banks_[map_.warp_number(block, warp)].flush();
    for (; lanes != 0; lanes &= lanes - 1) acquire_as(object, map_.number(block, warp, __builtin_ctz(lanes)));
  }

  void acquire_as(const void* object, int thread) {
    const auto found = objects_.find(object);
    if (found == objects_.end()) return;
    Object& from = found->second;
    if (from.released) join(clock(thread), from.clock.data());
    if (from.operations.empty()) return;
    from.acquired.resize(map_.threads(), 0);
    uint32_t& acquired = from.acquired[thread];
    for (; acquired < from.operations.size(); ++acquired) finish(from.operations[acquired], thread);
  }

  void forget(const void* object) {
    const auto found = objects_.find(object);
    if (found != objects_.end()) found->second.released = false;
  }

  void pass_on(const void* from, const void* to) {
    Object &target = objects_[to], &source = objects_[from];
    target.clock = source.clock;
    target.released = source.released;
    source.released = false;
  }

  // Remembers that the running thread reaches into the block, which must be there.
  void visit(int rank, const void* pc) {
    const int me = self();
    Resident& there = residents_[rank];
    const int threads = map_.block_threads(), first = rank * threads;
    const uint32_t* mine = clock(me);
    if (std::all_of(mine + first, mine + first + threads, [](uint32_t epoch) { return epoch == 0; }))
      stop(pc, "access to block %d of the cluster, which may not have started: no barrier.cluster before", rank);
    if (there.exited) stop(pc, "access to block %d of the cluster after the block's exit", rank);
    there.visits.resize(map_.threads(), 0);
    there.visits[me] = mine[me];
  }

  void block_exits(int rank) {
    Resident& there = residents_[rank];
    there.exited = true;
    const int first = rank * map_.block_threads(), end = first + map_.block_threads();
    joined_.assign(width_, 0);
    for (int thread = first; thread < end; ++thread) join(joined_.data(), clock(thread));
    for (size_t thread = 0; thread < there.visits.size(); ++thread) {
      if (joined_[thread] < there.visits[thread])
        leaves_early("an access to it by " + map_.describe(static_cast<int>(thread)));
    }
    for (const uint32_t operation : there.operations) {
      const std::vector<Operation::Wait>& waits = operations_[operation].waits;
      const auto ours = [&](const Operation::Wait& wait) {
        return static_cast<int>(wait.thread) >= first && static_cast<int>(wait.thread) < end;
      };
      if (std::none_of(waits.begin(), waits.end(), ours)) leaves_early("a multicast copy into it");
    }
  }

  void join_lanes(const Block& block, int warp, uint32_t lanes) {
    banks_[map_.warp_number(block, warp)].flush();
    joined_.assign(width_, 0);
    for (uint32_t left = lanes; left != 0; left &= left - 1)
      join(joined_.data(), clock(map_.number(block, warp, __builtin_ctz(left))));
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const int thread = map_.number(block, warp, __builtin_ctz(left));
      uint32_t* mine = clock(thread);
      const uint32_t epoch = mine[thread];
      memcpy(mine, joined_.data(), width_ * sizeof *mine);
      mine[thread] = epoch + 1;
    }
  }

  void engine_done(uint64_t token) {
    const int me = self();
    finish(operation(token), me);
    accumulators_[me].done(token);
  }
  void accumulates(const void* pointer, size_t bytes, uint64_t token) {
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    if (!accumulators_[self()].add({begin, begin + bytes}, token))
      fail("wgmma: its accumulator was accessed after the last wgmma.fence, which is to come between");
  }
  void register_fence() { accumulators_[self()].fence(); }
  void engine_signals(uint64_t token, const void* object) { objects_[object].operations.push_back(operation(token)); }

  void fence() {
    const int me = self();
    if (fences_.empty()) fences_.assign(map_.threads() * width_, 0);
    memcpy(&fences_[me * width_], clock(me), width_ * sizeof(uint32_t));
    ++clock(me)[me];
  }

 private:
  int self() const { return map_.number(*current); }

  uint32_t* clock(int thread) { return &clocks_[thread * width_]; }

  void join(uint32_t* to, const uint32_t* from) const {
    for (size_t i = 0; i < width_; i += 8) {
      for (size_t j = i; j < i + 8; ++j) to[j] = std::max(to[j], from[j]);
    }
  }

  Access name(const void* pc, int thread, bool atomic) {
    return {
        reinterpret_cast<uintptr_t>(pc), static_cast<uint64_t>(thread), atomic, false, false, clock(thread)[thread], 0};
  }

  // Tokens are numbered as they come; mostly the same one comes again. Each block of a cluster has its own.
  uint32_t operation(uint64_t token) {
    token ^= static_cast<uint64_t>(current->block->rank()) << 56;
    if (operations_.empty() || token != last_token_) {
      const auto [found, added] = numbers_.try_emplace(token, static_cast<uint32_t>(operations_.size()));
      if (added) operations_.emplace_back();
      last_token_ = token;
      last_operation_ = found->second;
    }
    return last_operation_;
  }

  void finish(uint32_t operation, int thread) {
    operations_[operation].waits.push_back({static_cast<uint32_t>(thread), clock(thread)[thread]});
  }

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

  // Whether thread `me` may rely on `access`. Once it may, it always may: operations that it asked for are kept.
  bool ordered(const Access& access, int me) {
    const uint32_t* mine = clock(me);
    if (!access.engine) return mine[access.thread] >= access.epoch;
    uint32_t& kept = finished_[me][access.operation % kFinished];
    if (kept == access.operation + 1) return true;
    for (const Operation::Wait& wait : operations_[access.operation].waits) {
      if (mine[wait.thread] < wait.epoch) continue;
      kept = access.operation + 1;
      return true;
    }
    return false;
  }

  void touch(size_t first, size_t bytes, bool write, const Access& access, int me) {
    Access known = {};  // the last write that this access was found to be ordered behind
    for (size_t at = first; at < first + bytes;) {
      const size_t begin = at % Line::kBytes, end = std::min(Line::kBytes, begin + (first + bytes - at));
      Line& line = shadow_.line(at / Line::kBytes);
      const Line::Part part = line.part(begin, end);
      for (Cell* cell = part.first; cell != part.last; ++cell, at += part.bytes) {
        if (!(cell->write == known)) {
          if (!excused(cell->write, access) && !ordered(cell->write, me))
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
      if (!excused(read, access) && !ordered(read, me)) report(byte, read, "read", access, "write");
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
      const auto behind = [this, me](const Access& read) { return ordered(read, me); };
      cell.reads.erase(std::remove_if(cell.reads.begin(), cell.reads.end(), behind), cell.reads.end());
      cell.prune_at = 4 + 2 * cell.reads.size();
    }
    cell.reads.push_back(access);
  }

  void check_proxy(size_t byte, const Access& before, const char* first, const Access& now, const char* second,
                   int me) {
    if (before.epoch == 0 || before.async_proxy) return;
    // By `thread` itself or by the issuing one, after that thread's `epoch`.
    const auto fenced = [&](int thread, uint32_t epoch) {
      return !fences_.empty() && (fences_[thread * width_ + thread] >= epoch || fences_[me * width_ + thread] >= epoch);
    };
    if (!before.engine && fenced(static_cast<int>(before.thread), before.epoch)) return;
    if (before.engine) {  // of cp.async
      for (const Operation::Wait& wait : operations_[before.operation].waits) {
        if (fenced(static_cast<int>(wait.thread), wait.epoch)) return;
      }
    }
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
  size_t width_ = 0;              // of a clock: the threads, rounded up
  std::vector<uint32_t> clocks_;  // of each thread
  std::vector<uint32_t> fences_;  // each thread's clock at its last proxy fence; empty when there was none
  std::vector<uint32_t> joined_;
  std::unordered_map<const void*, Object> objects_;
  std::unordered_map<uint64_t, uint32_t> numbers_;  // of tokens, in operations_
  std::vector<Operation> operations_;
  uint64_t last_token_ = 0;
  uint32_t last_operation_ = 0;
  static constexpr size_t kFinished = 64;
  // Per thread, 1 + operations that it was found to be ordered behind, each in the place of its number.
  std::vector<std::array<uint32_t, kFinished>> finished_;
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
