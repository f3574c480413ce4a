#include "sim/race.h"

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "sim/banks.h"
#include "sim/control.h"
#include "sim/scheduler.h"
#include "sim/symbols.h"

namespace simt::race {

#ifdef PYDIT_SIM_RACE
bool enabled = true;
#else
bool enabled = false;
#endif

enum Kind : uint8_t { kPlain, kAtomic };  // as in race_observe.cpp
void observe(const void* pointer, size_t bytes, bool write, Kind kind, size_t alignment, const void* pc);

namespace {

struct Span {
  Range range;
  bool writable;
  std::string name;
};

struct Launch {
  std::vector<Span> spans;
  std::atomic<uint64_t> counts[PYDIT_SIM_COUNTERS] = {};  // in the order of pydit_sim_counters
};
enum Counter {
  kGlobalLoaded,
  kGlobalStored,
  kSharedLoaded,
  kSharedStored,
  kTensorOps,
  kSharedRequests,
  kConflicts,
  kWarpgroups
};

std::mutex mutex;
std::map<const Kernel*, std::unique_ptr<Launch>> launches;
uint64_t last_counts[PYDIT_SIM_COUNTERS] = {};
thread_local std::vector<Span> named;  // by allow(), for the next launch of this host thread

// Who made an access: a thread in one of its epochs, or an engine for a thread, named by a token.
struct Access {
  const void* pc = nullptr;
  uint64_t token = 0;
  uint32_t epoch = 0;  // 0: no access
  uint16_t thread = 0;
  bool atomic = false, engine = false;
};

struct Byte {
  Access write;
  std::vector<Access> reads;
};

struct Accumulator {
  Range range;
  uint64_t token;
};

using Clock = std::vector<uint32_t>;
struct Done {
  int thread;
  uint32_t epoch;
};

// What is known of the block that this OS thread runs.
class Detector {
 public:
  void start(const Kernel& kernel, const Fiber* fibers, int threads, const void* shared) {
    kernel_ = &kernel;
    fibers_ = fibers;
    threads_ = threads;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      const auto found = launches.find(&kernel);
      launch_ = found == launches.end() ? nullptr : found->second.get();
    }
    module_ = this_module();
    dynamic_.begin = reinterpret_cast<uintptr_t>(shared);
    dynamic_.end = dynamic_.begin + kernel.shared_bytes;
    const size_t fixed = module_.thread_local_storage.end - module_.thread_local_storage.begin;
    bytes_.assign(kernel.shared_bytes + fixed, Byte());
    clocks_.assign(threads, Clock(threads, 0));
    for (int t = 0; t < threads; ++t) clocks_[t][t] = 1;
    fences_.assign(threads, Clock());
    objects_.clear();
    done_.clear();
    signals_.clear();
    accumulators_.assign(threads, {});
    banks_.assign((threads + kLanes - 1) / kLanes, BankCounter());
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

  void access(const void* pointer, size_t bytes, bool write, bool atomic, size_t alignment, const void* pc) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const Context& stack = current->context;
    const auto bottom = reinterpret_cast<uintptr_t>(stack.stack_bottom);
    if (address >= bottom && address < bottom + stack.stack_bytes) return access_local(address, write, pc);
    const ptrdiff_t first = offset(address, bytes);
    if (first < 0 && !is_global(address, bytes)) return;
    if (address % alignment != 0)
      stop(pc, "misaligned %s of %zu bytes at %p", write ? "write" : "read", bytes, pointer);
    if (first < 0) return access_global(address, bytes, write, pc);
    count(write ? kSharedStored : kSharedLoaded, bytes);
    const int me = self();
    banks_[current->warp].access(current->lane, pc, static_cast<uint32_t>(first), static_cast<uint32_t>(bytes));
    touch(first, bytes, write, {pc, 0, clocks_[me][me], static_cast<uint16_t>(me), atomic, false});
  }

  void engine_access(const void* pointer, size_t bytes, uint64_t token, bool write, const void* pc) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const ptrdiff_t first = offset(address, bytes);
    if (first < 0) {
      if (is_global(address, bytes)) access_global(address, bytes, write, pc);
      return;
    }
    count(write ? kSharedStored : kSharedLoaded, bytes);
    const int me = self();
    touch(first, bytes, write, {pc, token, clocks_[me][me], static_cast<uint16_t>(me), false, true});
  }

  void release(const void* object) {
    const int me = self();
    Clock& clock = objects_[object];
    join(clock, clocks_[me]);
    ++clocks_[me][me];
  }

  void acquire(const void* object) { acquire_as(object, self()); }

  void barrier_passed(const void* object, int warp, uint32_t lanes) {
    banks_[warp].flush();
    for (; lanes != 0; lanes &= lanes - 1) acquire_as(object, warp * kLanes + __builtin_ctz(lanes));
  }

  void acquire_as(const void* object, int thread) {
    const auto found = objects_.find(object);
    if (found != objects_.end()) join(clocks_[thread], found->second);
    const auto signalled = signals_.find(object);
    if (signalled == signals_.end()) return;
    for (const uint64_t token : signalled->second) finish(token, thread);
  }

  void forget(const void* object) { objects_.erase(object); }

  void join_lanes(int warp, uint32_t lanes) {
    banks_[warp].flush();
    scratch_.assign(threads_, 0);
    for (uint32_t left = lanes; left != 0; left &= left - 1)
      join(scratch_, clocks_[warp * kLanes + __builtin_ctz(left)]);
    for (uint32_t left = lanes; left != 0; left &= left - 1) {
      const int thread = warp * kLanes + __builtin_ctz(left);
      const uint32_t mine = clocks_[thread][thread];
      clocks_[thread] = scratch_;
      clocks_[thread][thread] = mine + 1;
    }
  }

  void engine_done(uint64_t token) {
    finish(token, self());
    std::vector<Accumulator>& mine = accumulators_[self()];
    mine.erase(std::remove_if(mine.begin(), mine.end(), [token](const Accumulator& a) { return a.token == token; }),
               mine.end());
  }
  void accumulates(const void* pointer, size_t bytes, uint64_t token) {
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    accumulators_[self()].push_back({{begin, begin + bytes}, token});
  }
  void engine_signals(uint64_t token, const void* object) { signals_[object].push_back(token); }

  void fence() {
    const int me = self();
    fences_[me] = clocks_[me];
    ++clocks_[me][me];
  }

 private:
  static int self() { return current->warp * kLanes + current->lane; }

  static void join(Clock& to, const Clock& from) {
    if (to.size() < from.size()) to.resize(from.size(), 0);
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
  }

  void finish(uint64_t token, int thread) { done_[token].push_back({thread, clocks_[thread][thread]}); }

  // Where the shadow of a byte of shared memory is; negative for other memory.
  ptrdiff_t offset(uintptr_t address, size_t bytes) const {
    if (dynamic_.holds(address, bytes)) return static_cast<ptrdiff_t>(address - dynamic_.begin);
    const Range& fixed = module_.thread_local_storage;
    const auto running = reinterpret_cast<uintptr_t>(&current);  // of the runtime, though it lies there
    if (!fixed.holds(address, bytes) || (address >= running && address < running + sizeof current)) return -1;
    return static_cast<ptrdiff_t>(dynamic_.end - dynamic_.begin + address - fixed.begin);
  }

  // Not a stack of another thread (deposits of collectives), nor memory of the runtime and the module.
  bool is_global(uintptr_t address, size_t bytes) const {
    if (module_.image.holds(address, bytes) || module_.thread_local_storage.holds(address, bytes)) return false;
    const auto near = [address](const void* object, size_t size) {
      const auto begin = reinterpret_cast<uintptr_t>(object);
      return address >= begin && address < begin + size;
    };
    if (near(current->block, sizeof(Block)) || near(fibers_, sizeof(Fiber) * kMaxThreads)) return false;
    if (near(kernel_, sizeof(Kernel)) || near(kernel_->arguments, 4096)) return false;  // the launch and its arguments
    for (int t = 0; t < threads_; ++t) {
      if (near(fibers_[t].context.stack_bottom, fibers_[t].context.stack_bytes)) return false;
    }
    return true;
  }

  // A local variable.
  void access_local(uintptr_t address, bool write, const void* pc) {
    for (const Accumulator& a : accumulators_[self()]) {
      if (!a.range.holds(address, 1)) continue;
      stop(pc, "%s of register %zu of a wgmma accumulator before wgmma.wait_group", write ? "write" : "read",
           (address - a.range.begin) / sizeof(float));
    }
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

  // Whether the running thread may rely on `access`.
  bool ordered(const Access& access) {
    const int me = self();
    if (!access.engine) return access.thread == me || clocks_[me][access.thread] >= access.epoch;
    const auto found = done_.find(access.token);
    if (found == done_.end()) return false;
    for (const Done& done : found->second) {
      if (done.thread == me || clocks_[me][done.thread] >= done.epoch) return true;
    }
    return false;
  }

  void touch(ptrdiff_t first, size_t bytes, bool write, const Access& access) {
    for (size_t i = 0; i < bytes; ++i) {
      Byte& byte = bytes_[first + i];
      if (byte.write.epoch != 0 && !excused(byte.write, access) && !ordered(byte.write))
        report(first + i, byte.write, "write", access, write ? "write" : "read");
      if (access.engine && !write) check_proxy(first + i, byte.write, access);
      if (!write) {
        // Atomics that change a byte are writes; the first of them may find it as another block left it.
        if (byte.write.epoch == 0) stop(access.pc, "read of uninitialised %s", name(first + i).c_str());
        note_read(byte, access);
        continue;
      }
      for (const Access& read : byte.reads) {
        if (!excused(read, access) && !ordered(read)) report(first + i, read, "read", access, "write");
      }
      byte.reads.clear();
      byte.write = access;
    }
  }

  // Atomics do not race with each other, nor accesses of one asynchronous operation.
  static bool excused(const Access& a, const Access& b) {
    return (a.atomic && b.atomic) || (a.engine && b.engine && a.token == b.token);
  }

  void note_read(Byte& byte, const Access& access) {
    for (Access& read : byte.reads) {
      if (read.thread == access.thread && read.engine == access.engine && read.token == access.token) {
        read = access;
        return;
      }
    }
    // Reads that this one is ordered behind need not be kept: who is ordered behind this one is behind them too.
    byte.reads.erase(
        std::remove_if(byte.reads.begin(), byte.reads.end(), [this](const Access& r) { return ordered(r); }),
        byte.reads.end());
    byte.reads.push_back(access);
  }

  void check_proxy(size_t byte, const Access& write, const Access& access) {
    if (write.epoch == 0 || write.engine) return;
    const Clock &of_writer = fences_[write.thread], &mine = fences_[self()];
    if (!of_writer.empty() && of_writer[write.thread] >= write.epoch) return;
    if (!mine.empty() && mine[write.thread] >= write.epoch) return;
    report(byte, write, "write", access, "read by the async proxy without fence.proxy.async between");
  }

  std::string name(size_t byte) const {
    const size_t dynamic = dynamic_.end - dynamic_.begin;
    return byte < dynamic ? "byte " + std::to_string(byte) + " of the dynamic shared memory"
                          : "static shared memory (byte " + std::to_string(byte - dynamic) + ")";
  }

  std::string describe(const Access& access) const {
    const uint3& t = fibers_[access.thread].thread;
    char text[120];
    snprintf(text, sizeof text, "%s thread (%u, %u, %u) [warp %d, lane %d] at ",
             access.engine ? "the engine for" : "by", t.x, t.y, t.z, access.thread / kLanes, access.thread % kLanes);
    return text + source_line(access.pc);
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
  const Fiber* fibers_ = nullptr;
  int threads_ = 0;
  Launch* launch_ = nullptr;
  Module module_;
  Range dynamic_;
  std::vector<Byte> bytes_;  // of the dynamic, then of the static shared memory
  std::vector<Clock> clocks_, fences_;
  Clock scratch_;
  std::unordered_map<const void*, Clock> objects_;
  std::unordered_map<uint64_t, std::vector<Done>> done_;            // who waited for a token, and when
  std::unordered_map<const void*, std::vector<uint64_t>> signals_;  // tokens that complete an object
  std::vector<std::vector<Accumulator>> accumulators_;              // of each thread, not waited for
  std::vector<BankCounter> banks_;                                  // of each warp
  uint64_t counts_[PYDIT_SIM_COUNTERS] = {};
};

Detector& detector() {
  static thread_local Detector instance;
  return instance;
}

}  // namespace

void observe(const void* pointer, size_t bytes, bool write, Kind kind, size_t alignment, const void* pc) {
  detector().access(pointer, bytes, write, kind == kAtomic, alignment, pc);
}

LaunchScope::LaunchScope(const Kernel& kernel) : kernel_(kernel) {
  if (!enabled) return;
  auto launch = std::make_unique<Launch>();
  launch->spans.swap(named);
  const std::lock_guard<std::mutex> lock(mutex);
  launches[&kernel] = std::move(launch);
}

LaunchScope::~LaunchScope() {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = launches.find(&kernel_);
  if (found == launches.end()) return;
  for (int i = 0; i < PYDIT_SIM_COUNTERS; ++i) last_counts[i] = found->second->counts[i];
  launches.erase(found);
}

namespace detail {

void access(const void* pointer, size_t bytes, bool write, const void* pc) {
  if (current != nullptr) detector().access(pointer, bytes, write, false, 1, pc);
}
void engine_access(const void* pointer, size_t bytes, uint64_t token, bool write, const void* pc) {
  detector().engine_access(pointer, bytes, token, write, pc);
}
void release(const void* object) { detector().release(object); }
void acquire(const void* object) { detector().acquire(object); }
void engine_done(uint64_t token) { detector().engine_done(token); }
void engine_signals(uint64_t token, const void* object) { detector().engine_signals(token, object); }
void accumulates(const void* pointer, size_t bytes, uint64_t token) { detector().accumulates(pointer, bytes, token); }
void forget(const void* object) { detector().forget(object); }
void generic_proxy_fence() { detector().fence(); }
void join_warp(int warp, uint32_t lanes) { detector().join_lanes(warp, lanes); }
void acquire_lanes(const void* object, int warp, uint32_t lanes) { detector().barrier_passed(object, warp, lanes); }
void start_block(const Kernel& kernel, const Fiber* fibers, int threads, const void* shared) {
  detector().start(kernel, fibers, threads, shared);
}
void end_block() { detector().end(); }
void allow(const void* pointer, size_t bytes, bool writable, const char* name) {
  if (pointer == nullptr) return;
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  named.push_back({{begin, begin + bytes}, writable, name});
}

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
void pydit_sim_counters(uint64_t counts[PYDIT_SIM_COUNTERS]) {
  const std::lock_guard<std::mutex> lock(simt::race::mutex);
  std::copy(std::begin(simt::race::last_counts), std::end(simt::race::last_counts), counts);
}
