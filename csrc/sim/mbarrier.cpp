#include "sim/mbarrier.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "sim/async.h"
#include "sim/cluster.h"

namespace simt {
namespace {

constexpr uint32_t kMaxCount = (1 << 20) - 1;
constexpr int32_t kMaxBytes = (1 << 20) - 1;

struct State {
  uint64_t parity : 1, pending : 20, count : 20;
  int64_t bytes : 21;
  uint64_t mark : 2;
};
static_assert(sizeof(State) == sizeof(uint64_t));

State read(const uint64_t* barrier, const char* name) {
  require_hopper(name);
  require_aligned(name, "mbarrier", barrier, 8);
  State state;
  memcpy(&state, barrier, sizeof state);
  if (state.mark != 1) fail("%s: no mbarrier is initialised at %s", name, place(barrier).c_str());
  return state;
}

void write(uint64_t* barrier, State state) {
  if (state.pending == 0 && state.bytes == 0) {
    state.parity ^= 1;
    state.pending = state.count;
    engine_of(barrier).wake(barrier);
  }
  memcpy(barrier, &state, sizeof state);
}

void add_bytes(State& state, int64_t bytes, const uint64_t* barrier, const char* name) {
  const int64_t sum = state.bytes + bytes;
  if (sum > kMaxBytes || sum < -kMaxBytes) {
    fail("%s: mbarrier at %s: %lld bytes outstanding; at most 2^20 - 1 can be", name, place(barrier).c_str(),
         static_cast<long long>(sum));
  }
  state.bytes = sum;
}

// Of another block's mbarrier only arrivals are allowed.
void require_own(const uint64_t* barrier, const char* name) {
  const Block* owner = cluster().owner(barrier);
  if (owner == nullptr || owner == current->block) return;
  fail("%s: expected an mbarrier of the thread's own block, got %s", name, place(barrier).c_str());
}

const Engine::Initialised* find(Engine& engine, const uint64_t* barrier) {
  for (const Engine::Initialised& known : engine.barriers()) {
    if (known.barrier == barrier) return &known;
  }
  return nullptr;
}

// Completes the oldest copy in flight that signals `barrier`.
bool land_one(const uint64_t* barrier) {
  std::vector<BulkLoad>& loads = engine().loads();
  for (size_t i = 0; i < loads.size(); ++i) {
    if (loads[i].barrier != barrier) continue;
    const BulkLoad load = loads[i];
    loads.erase(loads.begin() + static_cast<ptrdiff_t>(i));
    land_load(load);
    return true;
  }
  return false;
}

}  // namespace

void mbarrier_init(uint64_t* barrier, uint32_t count) {
  require_hopper("mbarrier.init");
  require_aligned("mbarrier.init", "mbarrier", barrier, 8);
  require_own(barrier, "mbarrier.init");
  if (count < 1 || count > kMaxCount) fail("mbarrier.init: count: expected 1 to %u, got %u", kMaxCount, count);
  if (find(engine(), barrier) != nullptr)
    fail("mbarrier.init: an mbarrier is initialised at %s already; mbarrier.inval comes first", place(barrier).c_str());
  race::touch_mbarrier(barrier, true);
  State state = {};
  state.pending = state.count = count;
  state.mark = 1;
  memcpy(barrier, &state, sizeof state);
  engine().barriers().push_back({barrier, current, false});
}

void mbarrier_invalidate(uint64_t* barrier) {
  read(barrier, "mbarrier.inval");
  race::touch_mbarrier(barrier, true);
  memset(barrier, 0xFF, sizeof *barrier);
  std::vector<Engine::Initialised>& all = engine().barriers();
  const auto same = [barrier](const Engine::Initialised& other) { return other.barrier == barrier; };
  all.erase(std::remove_if(all.begin(), all.end(), same), all.end());
}

void mbarrier_init_fence() {
  require_hopper("fence.mbarrier_init");
  fence_mbarriers();
}

void fence_mbarriers() {
  for (Engine::Initialised& mine : engine().barriers()) mine.fenced = mine.fenced || mine.by == current;
}

void require_fenced(const uint64_t* barrier, const char* name) {
  const Engine::Initialised* found = find(engine_of(barrier), barrier);
  if (found == nullptr || found->fenced) return;
  fail("%s: mbarrier at %s: its thread called no fence.mbarrier_init after mbarrier.init", name,
       place(barrier).c_str());
}

void mbarrier_arrive(uint64_t* barrier, uint32_t bytes, const char* name) {
  State state = read(barrier, name);
  if (state.pending == 0) {
    fail("%s: mbarrier at %s: one arrival too many, %u are counted and all have come", name, place(barrier).c_str(),
         static_cast<unsigned>(state.count));
  }
  add_bytes(state, bytes, barrier, name);
  race::touch_mbarrier(barrier);
  race::release(barrier);
  state.pending -= 1;
  write(barrier, state);
}

void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  constexpr const char* kName = "mbarrier.arrive.shared::cluster";
  void* there = cluster().map(barrier, rank, kName);
  cluster().reach(rank, kName);
  if (rank != current->block->rank()) require_fenced(static_cast<uint64_t*>(there), kName);
  mbarrier_arrive(static_cast<uint64_t*>(there), 0, kName);
}

void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
  State state = read(barrier, "mbarrier.expect_tx");
  race::touch_mbarrier(barrier);
  add_bytes(state, bytes, barrier, "mbarrier.expect_tx");
  write(barrier, state);
}

void mbarrier_complete(uint64_t* barrier, uint32_t bytes) {
  State state = read(barrier, "cp.async.bulk");
  add_bytes(state, -static_cast<int64_t>(bytes), barrier, "cp.async.bulk");
  write(barrier, state);
}

bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
  require_own(barrier, "mbarrier.try_wait");
  race::touch_mbarrier(barrier);
  do {
    const State state = read(barrier, "mbarrier.try_wait");
    if (state.parity != (parity & 1)) {
      race::acquire(barrier);
      return true;
    }
  } while (land_one(barrier));
  engine().poll(barrier, *barrier);
  if (read(barrier, "mbarrier.try_wait").parity == (parity & 1)) return false;
  race::acquire(barrier);
  return true;
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  require_own(barrier, "mbarrier.try_wait");
  race::touch_mbarrier(barrier);
  current->block->fall_behind();
  for (;;) {
    if (read(barrier, "mbarrier.try_wait").parity != (parity & 1)) return race::acquire(barrier);
    if (land_one(barrier)) continue;
    engine().waiters().push_back({current, barrier, parity & 1});
    current->block->park();
  }
}

long long outstanding_bytes(const uint64_t* barrier) {
  State state;
  memcpy(&state, barrier, sizeof state);
  return state.mark == 1 ? state.bytes : 0;
}

std::string describe_mbarrier(const uint64_t* barrier) {
  State state;
  memcpy(&state, barrier, sizeof state);
  if (state.mark != 1) return "no longer initialised";
  char text[160];
  snprintf(text, sizeof text, "in a phase of parity %u, %u of %u arrivals and %lld bytes outstanding",
           static_cast<unsigned>(state.parity), static_cast<unsigned>(state.pending),
           static_cast<unsigned>(state.count), static_cast<long long>(state.bytes));
  return text;
}

}  // namespace simt
