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

// A block of a cluster, as others reach into it.
struct Resident {
  const Block* block;
  Range dynamic;
  std::vector<uint32_t> visits;      // of each thread of other blocks, the epoch of its last access; empty: none
  std::vector<uint32_t> operations;  // asynchronous ones of other blocks that write here
  bool exited = false;
};

// What is known of the cluster that this OS thread runs. Threads are numbered through its blocks.
class Detector {
 public:
  void start(const Kernel& kernel, const Cluster& cluster) {
    kernel_ = &kernel;
    block_threads_ = cluster.block(0).threads();
    const int threads = threads_ = block_threads_ * static_cast<int>(cluster.size());
    block_warps_ = (block_threads_ + kLanes - 1) / kLanes;
    residents_.clear();
    for (unsigned rank = 0; rank < cluster.size(); ++rank) {
      const auto shared = reinterpret_cast<uintptr_t>(cluster.block(rank).shared());
      residents_.push_back({&cluster.block(rank), {shared, shared + kernel.shared_bytes}, {}, {}});
    }
    launch_ = launch_of(kernel);
    running_ = reinterpret_cast<uintptr_t>(&current);
    if (module_.thread_local_storage.end == 0) module_ = this_module();  // this detector is of one OS thread
    find_stacks();
    // The lines of the shadow begin where the addresses are multiples of their length, for static memory as well; and
    // a block's part where bank 0 is.
    constexpr size_t kAllBanks = 128;
    const Range& fixed = module_.thread_local_storage;
    pitch_ = (kernel.shared_bytes + kAllBanks - 1) / kAllBanks * kAllBanks;
    fixed_offset_ = residents_.size() * pitch_ + fixed.begin % Line::kBytes;
    shadow_.start(fixed_offset_ + (fixed.end - fixed.begin));
    width_ = (static_cast<size_t>(threads) + 7) / 8 * 8;
    clocks_.assign(threads * width_, 0);
    for (int t = 0; t < threads; ++t) clock(t)[t] = 1;
    fences_.clear();
    objects_.clear();
    numbers_.clear();
    operations_.clear();
    finished_.assign(threads, {});
    accumulators_.assign(threads, {});
    banks_.resize(block_warps_ * residents_.size());
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
    const int me = number(fiber);
    const auto bottom = reinterpret_cast<uintptr_t>(fiber.context.stack_bottom);
    if (address - bottom < fiber.context.stack_bytes) return access_local(accumulators_[me], address, write, pc);
    const ptrdiff_t first = offset(address, bytes);
    if (first < 0) check_overrun(address, bytes, write, pc);
    if (first < 0 && !is_global(address, bytes)) return;
    if (first >= static_cast<ptrdiff_t>(fixed_offset_) && residents_.size() > 1)
      stop(pc, "static shared memory in a cluster, which the simulator has only once for all blocks");
    if (address % alignment != 0)
      stop(pc, "misaligned %s of %zu bytes at %p", write ? "write" : "read", bytes, pointer);
    if (first < 0) return access_global(address, bytes, write, pc);
    count(write ? kSharedStored : kSharedLoaded, bytes);
    banks_[warp_number(*fiber.block, fiber.warp)].access(fiber.lane, pc, static_cast<uint32_t>(first),
                                                         static_cast<uint32_t>(bytes));
    if (const int rank = rank_of(first); rank != rank_of_thread(me)) visit(rank, pc);
    touch(first, bytes, write, name(pc, me, atomic), me);
  }

  void touch_mbarrier(const void* barrier, bool anew, const void* pc) {
    const ptrdiff_t first = offset(reinterpret_cast<uintptr_t>(barrier), sizeof(uint64_t));
    if (first >= 0) touch(first, sizeof(uint64_t), true, name(pc, self(), !anew), self());
  }

  void engine_access(const void* pointer, size_t bytes, uint64_t token, bool write, bool async_proxy, const void* pc) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const ptrdiff_t first = offset(address, bytes);
    if (first < 0) {
      check_overrun(address, bytes, write, pc);
      if (is_global(address, bytes)) access_global(address, bytes, write, pc);
      return;
    }
    count(write ? kSharedStored : kSharedLoaded, bytes);
    const int me = self();
    if (const int rank = rank_of(first); rank != rank_of_thread(me))
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
    banks_[warp_number(block, warp)].flush();
    for (; lanes != 0; lanes &= lanes - 1) acquire_as(object, number(block, warp, __builtin_ctz(lanes)));
  }

  void acquire_as(const void* object, int thread) {
    const auto found = objects_.find(object);
    if (found == objects_.end()) return;
    Object& from = found->second;
    if (from.released) join(clock(thread), from.clock.data());
    if (from.operations.empty()) return;
    from.acquired.resize(threads_, 0);
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
    const int first = rank * block_threads_;
    const uint32_t* mine = clock(me);
    if (std::all_of(mine + first, mine + first + block_threads_, [](uint32_t epoch) { return epoch == 0; }))
      stop(pc, "access to block %d of the cluster, which may not have started: no barrier.cluster before", rank);
    if (there.exited) stop(pc, "access to block %d of the cluster after the block's exit", rank);
    there.visits.resize(threads_, 0);
    there.visits[me] = mine[me];
  }

  void block_exits(int rank) {
    Resident& there = residents_[rank];
    there.exited = true;
    const int first = rank * block_threads_, end = first + block_threads_;
    joined_.assign(width_, 0);
    for (int thread = first; thread < end; ++thread) join(joined_.data(), clock(thread));
    for (size_t thread = 0; thread < there.visits.size(); ++thread) {
      if (joined_[thread] < there.visits[thread])
        leaves_early("an access to it by " + describe(static_cast<int>(thread)));
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
    banks_[warp_number(block, warp)].flush();
    joined_.assign(width_, 0);
    for (uint32_t left = lanes; left != 0; left &= left - 1)
      join(joined_.data(), clock(number(block, warp, __builtin_ctz(left))));
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const int thread = number(block, warp, __builtin_ctz(left));
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
    if (fences_.empty()) fences_.assign(threads_ * width_, 0);
    memcpy(&fences_[me * width_], clock(me), width_ * sizeof(uint32_t));
    ++clock(me)[me];
  }

 private:
  int number(const Block& block, int warp, int lane) const {
    return static_cast<int>(block.rank()) * block_threads_ + warp * kLanes + lane;
  }
  int number(const Fiber& fiber) const { return number(*fiber.block, fiber.warp, fiber.lane); }
  int self() const { return number(*current); }
  size_t warp_number(const Block& block, int warp) const { return block.rank() * block_warps_ + warp; }
  int rank_of_thread(int thread) const { return thread / block_threads_; }
  // Of the block whose dynamic memory has its shadow at `offset`; static memory counts as the running block's.
  int rank_of(size_t offset) const {
    return offset < residents_.size() * pitch_ ? static_cast<int>(offset / pitch_) : rank_of_thread(self());
  }

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

  // Where the shadow of a byte of shared memory is; negative for other memory.
  ptrdiff_t offset(uintptr_t address, size_t bytes) const {
    for (size_t rank = 0; rank < residents_.size(); ++rank) {
      const Range& dynamic = residents_[rank].dynamic;
      if (dynamic.holds(address, bytes)) return static_cast<ptrdiff_t>(rank * pitch_ + address - dynamic.begin);
    }
    const Range& fixed = module_.thread_local_storage;
    // `current` is of the runtime, though it lies there.
    if (!fixed.holds(address, bytes) || address - running_ < sizeof current) return -1;
    return static_cast<ptrdiff_t>(fixed_offset_ + address - fixed.begin);
  }

  // Stacks lie in a few slabs: where each begins and ends, guard pages between stacks included.
  void find_stacks() {
    stacks_.clear();
    for (int t = 0; t < threads_; ++t) {
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

  // Not a stack of another thread (deposits of collectives), nor memory of the runtime and the module.
  bool is_global(uintptr_t address, size_t bytes) const {
    if (module_.image.holds(address, bytes) || module_.thread_local_storage.holds(address, bytes)) return false;
    const auto near = [address](const void* object, size_t size) {
      return address - reinterpret_cast<uintptr_t>(object) < size;
    };
    for (const Resident& resident : residents_) {
      if (near(resident.block, sizeof(Block)) || near(resident.block->fibers(), sizeof(Fiber) * kMaxThreads))
        return false;
    }
    if (near(kernel_, sizeof(Kernel)) || near(kernel_->arguments, 4096)) return false;  // the launch and its arguments
    for (const Range& stacks : stacks_) {
      if (stacks.holds(address, 1)) return false;
    }
    return true;
  }

  // Memory of a block that its launch did not ask for.
  void check_overrun(uintptr_t address, size_t bytes, bool write, const void* pc) {
    for (const Resident& resident : residents_) {
      const Range& given = resident.dynamic;
      if (address + bytes <= given.end || address < given.begin || address >= given.begin + kMaxSharedBytes) continue;
      stop(pc, "%s of %zu bytes at byte %zu of the dynamic shared memory; the launch gave it %zu bytes",
           write ? "write" : "read", bytes, static_cast<size_t>(address - given.begin),
           static_cast<size_t>(given.end - given.begin));
    }
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
    if (cell.write.epoch == 0) stop(access.where(), "read of uninitialised %s", name(byte).c_str());
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

  std::string name(size_t byte) const {
    if (byte >= residents_.size() * pitch_)
      return "static shared memory (byte " + std::to_string(byte - fixed_offset_) + ")";
    return "byte " + std::to_string(byte % pitch_) + " of the dynamic shared memory" + of_block(rank_of(byte));
  }

  // " of block (1, 0, 0)" in a cluster of several.
  std::string of_block(int rank) const {
    if (residents_.size() == 1) return "";
    const uint3 index = residents_[rank].block->index();
    char text[60];
    snprintf(text, sizeof text, " of block (%u, %u, %u)", index.x, index.y, index.z);
    return text;
  }

  const Fiber& fiber_of(int thread) const {
    return residents_[rank_of_thread(thread)].block->fibers()[thread % block_threads_];
  }

  std::string describe(int thread) const {
    const Fiber& fiber = fiber_of(thread);
    const uint3& t = fiber.thread;
    char text[100];
    snprintf(text, sizeof text, "thread (%u, %u, %u) [warp %d, lane %d]", t.x, t.y, t.z, fiber.warp, fiber.lane);
    return text + of_block(rank_of_thread(thread));
  }
  std::string describe(const Access& access) const {
    return (access.engine ? "the engine for " : "by ") + describe(static_cast<int>(access.thread)) + " at " +
           source_line(access.where());
  }

  [[noreturn]] static void leaves_early(const std::string& who) {
    current->block->abandon(("the block's exit is not ordered behind " + who).c_str());
  }

  void report(size_t byte, const Access& before, const char* first, const Access& now, const char* second) {
    const std::string reason = std::string("race on ") + name(byte) + ": " + first + " " + describe(before) +
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

  const Kernel* kernel_ = nullptr;
  std::vector<Resident> residents_;  // by rank
  int block_threads_ = 0, block_warps_ = 0;
  int threads_ = 0;  // of all blocks
  Launch* launch_ = nullptr;
  Module module_;
  uintptr_t running_ = 0;  // address of `current`
  std::vector<Range> stacks_;
  size_t pitch_ = 0;         // from one block's dynamic shared memory to the next one's, in the shadow
  size_t fixed_offset_ = 0;  // in the shadow, of the static shared memory, which lies behind the dynamic
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
