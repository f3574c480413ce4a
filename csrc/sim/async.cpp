#include "sim/async.h"

#include <sched.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "sim/cluster.h"
#include "sim/control.h"
#include "sim/mbarrier.h"
#include "sim/progress.h"
#include "sim/warp.h"

namespace simt {
namespace {

constexpr int kUnset = -1;
std::atomic<int> eager_setting{kUnset}, arch_setting{kUnset};

// A misspelt setting falls back to the first value, and says so.
int from_environment(const char* variable, const char* first, int first_value, const char* second, int second_value) {
  const char* text = getenv(variable);
  if (text == nullptr || *text == '\0' || strcmp(text, first) == 0) return first_value;
  if (strcmp(text, second) == 0) return second_value;
  fprintf(stderr, "%s: expected %s or %s, got \"%s\"; using %s\n", variable, first, second, text, first);
  return first_value;
}

std::string describe(const char* format, const std::string& subject) {
  char text[300];
  snprintf(text, sizeof text, format, subject.c_str());
  return text;
}

// Of a thread when its block starts, as ptxas has it: all that the block's threads can have, if it is alone.
int launched_registers(const Block& block) {
  constexpr int kAll = 64 * 1024, kMost = 256;
  const int each = kAll / ((block.threads() + kLanes - 1) / kLanes * kLanes) / 8 * 8;
  return each < kMost ? each : kMost;
}

void land(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.valid);
  memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
}

}  // namespace

bool eager() {
  const int setting = eager_setting.load(std::memory_order_relaxed);
  static const int initial = from_environment("PYDIT_SIM_ASYNC", "lazy", 0, "eager", 1);
  return (setting == kUnset ? initial : setting) != 0;
}

int arch() {
  const int setting = arch_setting.load(std::memory_order_relaxed);
  static const int initial = from_environment("PYDIT_SIM_ARCH", "80", 80, "90a", 90);
  return setting == kUnset ? initial : setting;
}

void require_hopper(const char* instruction) {
  if (arch() < 90) fail("%s: needs sm_90a; the simulated device is sm_%d (PYDIT_SIM_ARCH)", instruction, arch());
}

std::string place(const void* pointer, const Block& block) {
  char text[120];
  const Block* owner = block.cluster().owner(pointer);
  if (owner == nullptr) {
    snprintf(text, sizeof text, "address %p", pointer);
    return text;
  }
  const auto offset = static_cast<const unsigned char*>(pointer) - static_cast<unsigned char*>(owner->shared());
  if (owner == &block)
    snprintf(text, sizeof text, "byte %td of the dynamic shared memory", offset);
  else
    snprintf(text, sizeof text, "byte %td of the dynamic shared memory of block %u of the cluster", offset,
             owner->rank());
  return text;
}

Engine& engine_of(const void* pointer) {
  Block* owner = cluster().owner(pointer);
  return owner == nullptr ? engine() : owner->engine();
}

void require_aligned(const char* instruction, const char* what, const void* pointer, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return;
  fail("%s: %s: expected a multiple of %zu bytes, got %s", instruction, what, alignment, place(pointer).c_str());
}

void require_inside(const char* instruction, const char* what, const void* pointer, size_t bytes) {
  const Block* owner = cluster().owner(pointer);
  if (owner == nullptr) return;
  const size_t given = owner->kernel().shared_bytes;
  const size_t end = static_cast<const unsigned char*>(pointer) - static_cast<unsigned char*>(owner->shared()) + bytes;
  if (end <= given) return;
  fail("%s: %s: %zu bytes from %s on reach byte %zu; the launch gave it %zu bytes", instruction, what, bytes,
       place(pointer).c_str(), end, given);
}

// cp.async -------------------------------------------------------------------------------------------------------

void cp_async(void* shared, const void* global, uint32_t bytes, uint32_t valid) {
  require_aligned("cp.async", "destination", shared, bytes);
  require_aligned("cp.async", "source", global, bytes);
  require_inside("cp.async", "destination", shared, bytes);
  if (valid > bytes) fail("cp.async: source size: expected at most %u bytes, got %u", bytes, valid);
  const Copy copy{shared, global, bytes, valid, engine().new_token()};
  race::engine_write(shared, bytes, copy.token, false);
  if (valid > 0) race::engine_read(global, valid, copy.token);
  if (eager()) land(copy);
  engine().mine().copies.add(copy);
}

void cp_async_commit() { engine().mine().copies.commit(); }

void cp_async_wait(size_t keep) {
  Groups<Copy>& copies = engine().mine().copies;
  const size_t due = copies.due(keep);
  for (size_t i = 0; i < due; ++i) {
    if (!eager()) land(copies[i]);
    race::engine_done(copies[i].token);
  }
  copies.forget(keep);
}

// Threads --------------------------------------------------------------------------------------------------------

void named_barrier(int id, int threads, bool wait) {
  const char* name = wait ? "bar.sync" : "bar.arrive";
  if (id < 1 || id >= kBarriers) fail("%s: barrier: expected 1 to %d, got %d", name, kBarriers - 1, id);
  const dim3 shape = block_dim();
  const int all = static_cast<int>(shape.x * shape.y * shape.z + kLanes - 1) / kLanes * kLanes;
  if (threads < 1 || threads > all || threads % kLanes != 0) {
    fail("%s: threads: expected a multiple of 32 up to the block's %d, got %d", name, all, threads);
  }
  // Those that wait and those that only come meet in one barrier, hence one name.
  if (wait)
    current->block->barrier(id, threads, "a named barrier", false);
  else
    current->block->barrier_arrive(id, threads, "a named barrier");
}

bool elect_one() {
  require_hopper("elect.sync");
  vote("elect.sync", ~0u, 1);
  return current->lane == static_cast<int>(mix(current->block->kernel().seed) % kLanes);
}

void proxy_fence() {
  require_hopper("fence.proxy.async");
  race::generic_proxy_fence();
  fence_mbarriers();
}

void set_max_registers(int registers, bool more) {
  const char* name = more ? "setmaxnreg.inc" : "setmaxnreg.dec";
  require_hopper(name);
  int& mine = engine().mine().registers;
  const int now = mine == 0 ? launched_registers(*current->block) : mine;
  if (more ? registers < now : registers > now)
    fail("%s: expected at %s the thread's %d registers, got %d", name, more ? "least" : "most", now, registers);
  mine = registers;
}

std::string Engine::check_registers(const Block& block) const {
  if (threads_.empty()) return "";
  const int launched = launched_registers(block), warps = (block.threads() + kLanes - 1) / kLanes;
  int asked = 0;
  for (int warp = 0; warp < warps; ++warp) {
    const int mine = threads_[warp * kLanes].registers, first = threads_[warp / 4 * 4 * kLanes].registers;
    if (mine != first) return "setmaxnreg: warps of a warpgroup ask for different budgets";
    asked += (mine == 0 ? launched : mine) * kLanes;
  }
  const int given = launched * warps * kLanes;
  if (asked <= given) return "";
  return "setmaxnreg: the block's warps ask for " + std::to_string(asked) + " registers, it was launched with " +
         std::to_string(given) + ": the GPU would wait forever";
}

// Waiting --------------------------------------------------------------------------------------------------------

void Engine::wake(const uint64_t* barrier) {
  size_t kept = 0;
  for (const Waiter& waiter : waiters_) {
    if (waiter.barrier == barrier)
      waiter.fiber->block->wake(*waiter.fiber);
    else
      waiters_[kept++] = waiter;
  }
  waiters_.resize(kept);
}

void Engine::poll(const void* address, uint64_t value) {
  Block& block = *current->block;
  Progress& progress = *block.kernel().progress;
  if (progress.cancelled()) fail("stopped polling: another block of the launch failed");
  Thread& thread = mine();
  const bool same = thread.polled == address && thread.seen == value;
  thread.polled = address;
  thread.seen = value;
  Polling& polling = block.cluster().polling;
  if (!same || polling.events != block.cluster().events) {
    polling.events = block.cluster().events;
    polling.fruitless = 0;
    if (polling.voted) progress.moved();
    polling.voted = false;
    if (!same) return;
  }
  if (++polling.fruitless % 64 == 0) {
    sched_yield();
    if (polling.round != progress.round()) {
      polling.round = progress.round();
      polling.fruitless = 0;
      polling.voted = false;
    }
  }
  // So many polls that every other thread of the cluster that could run has run.
  constexpr uint64_t kConvinced = 1 << 15;
  if (polling.fruitless >= kConvinced && !polling.voted) {
    polling.voted = true;
    if (progress.vote(polling.round)) {
      fail("deadlock: every block that runs only polls memory; this thread reads %llu at %s again and again",
           static_cast<unsigned long long>(value), place(address).c_str());
    }
  }
  block.yield();
}

// Blocks ---------------------------------------------------------------------------------------------------------

void Engine::start_block() {
  if (!used_) return;
  used_ = false;
  for (Thread& thread : threads_) {
    thread.copies.clear();
    thread.stores.clear();
    thread.products.clear();
    thread.products_issued = 0;
    thread.fenced = false;
    thread.registers = 0;
    thread.polled = nullptr;
  }
  loads_.clear();
  waiters_.clear();
  barriers_.clear();
}

std::string Engine::end_block(const Block& block) {
  if (!used_) return "";
  if (!loads_.empty()) {
    return describe("the block ended with a bulk copy to %s in flight that nobody waited for",
                    place(loads_[0].to, block));
  }
  for (const auto& [barrier, by, fenced] : barriers_) {
    const long long bytes = outstanding_bytes(barrier);
    if (bytes == 0) continue;
    return "the block ended with the mbarrier at " + place(barrier, block) + (bytes < 0 ? ": more" : ": fewer") +
           " bytes were copied than announced, by " + std::to_string(bytes < 0 ? -bytes : bytes);
  }
  if (const std::string reason = check_registers(block); !reason.empty()) return reason;
  for (Thread& thread : threads_) {
    if (!thread.products.empty()) return "the block ended with a wgmma that nobody waited for";
    for (size_t i = thread.stores.due(0); i-- > 0;) {
      if (!thread.stores[i].read) {
        return describe("the block ended with a bulk store from %s that nobody waited for",
                        place(thread.stores[i].from, block));
      }
    }
    const size_t due = thread.stores.due(0);
    for (size_t i = 0; i < due; ++i) write_store(thread.stores[i]);
    thread.stores.forget(0);
    if (!thread.stores.empty()) return "the block ended with a bulk store in no committed group";
  }
  return "";
}

std::string Engine::describe_waiters() const {
  std::string text;
  std::vector<bool> told(waiters_.size());
  for (size_t i = 0; i < waiters_.size(); ++i) {
    if (told[i]) continue;
    const Waiter& first = waiters_[i];
    size_t threads = 0;
    for (size_t j = i; j < waiters_.size(); ++j) {
      if (waiters_[j].barrier != first.barrier || waiters_[j].parity != first.parity) continue;
      told[j] = true;
      ++threads;
    }
    const uint3 t = first.fiber->thread;
    text += "\n  thread (" + std::to_string(t.x) + ", " + std::to_string(t.y) + ", " + std::to_string(t.z) +
            ") [warp " + std::to_string(first.fiber->warp) + ", lane " + std::to_string(first.fiber->lane) + "]";
    if (threads > 1) text += " and " + std::to_string(threads - 1) + " more";
    text += threads > 1 ? " wait" : " waits";
    text += " for parity " + std::to_string(first.parity) + " of the mbarrier at " +
            place(first.barrier, *first.fiber->block) + ": " + describe_mbarrier(first.barrier);
  }
  return text;
}

}  // namespace simt

extern "C" {
int pydit_sim_set_async(int eager) {
  if (eager != 0 && eager != 1) return 1;
  simt::eager_setting.store(eager);
  return 0;
}
int pydit_sim_set_arch(int arch) {
  if (arch != 80 && arch != 90) return 1;
  simt::arch_setting.store(arch);
  return 0;
}
}
