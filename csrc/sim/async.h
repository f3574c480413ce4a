// What a block has in flight: copies, stores, matrix products, and the threads that wait for them.
//
// The GPU finishes such work at some time between its issue and the wait that guarantees it. The simulator picks one of
// the two ends: lazy (the default) does a copy in the wait, so that data read without waiting is not there yet; eager
// does it at issue, so that a buffer refilled too early is overwritten at once. Kernels are tested both ways. Matrix
// products always run in their wait (wgmma.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "sim/race.h"
#include "sim/scheduler.h"
#include "sim/tma.h"
#include "sim/wgmma.h"

namespace simt {

bool eager();  // pydit_sim_set_async, or PYDIT_SIM_ASYNC
int arch();    // 80 or 90: pydit_sim_set_arch, or PYDIT_SIM_ARCH
// Fails unless the simulated device is a Hopper.
void require_hopper(const char* instruction);

// The operations one thread has in flight: commit() closes a group, waits keep the latest N groups going.
template <typename Operation>
class Groups {
 public:
  Operation& add(const Operation& operation) {
    operations_.push_back(operation);
    return operations_.back();
  }
  void commit() { ends_.push_back(operations_.size()); }
  bool empty() const { return operations_.empty(); }
  // How many operations all but the latest `keep` groups hold.
  size_t due(size_t keep) const { return ends_.size() <= keep ? 0 : ends_[ends_.size() - keep - 1]; }
  Operation& operator[](size_t i) { return operations_[i]; }
  // Forgets those operations.
  void forget(size_t keep) {
    const size_t operations = due(keep);
    if (ends_.size() <= keep) return;
    operations_.erase(operations_.begin(), operations_.begin() + static_cast<ptrdiff_t>(operations));
    ends_.erase(ends_.begin(), ends_.end() - static_cast<ptrdiff_t>(keep));
    for (size_t& end : ends_) end -= operations;
  }
  void clear() {
    operations_.clear();
    ends_.clear();
  }

 private:
  std::vector<Operation> operations_;
  std::vector<size_t> ends_;  // of each closed group, in operations_
};

// One cp.async: `valid` bytes are copied, the rest of `bytes` becomes zero.
struct Copy {
  void* to;
  const void* from;
  uint32_t bytes, valid;
  uint64_t token;  // of the race detector
};

class Engine {
 public:
  struct Thread {
    Groups<Copy> copies;
    Groups<BulkStore> stores;
    Groups<Product> products;
    uint64_t products_issued = 0;
    bool fenced = false;           // by wgmma.fence
    int registers = 0;             // by setmaxnreg; 0: as launched
    const void* polled = nullptr;  // by its last acquiring load, and what it saw
    uint64_t seen = 0;
  };
  struct Initialised {
    const uint64_t* barrier;
    const Fiber* by;
    bool fenced;  // by that thread since: copies and other blocks see it
  };
  struct Waiter {
    Fiber* fiber;
    const uint64_t* barrier;
    uint32_t parity;
  };

  Thread& mine() {
    used_ = true;
    if (threads_.empty()) threads_.resize(kMaxThreads);
    return threads_[current->warp * kLanes + current->lane];
  }
  std::vector<BulkLoad>& loads() {
    used_ = true;
    return loads_;
  }
  std::vector<Waiter>& waiters() {
    used_ = true;
    return waiters_;
  }
  // The mbarriers that the block has initialised and not invalidated.
  std::vector<Initialised>& barriers() {
    used_ = true;
    return barriers_;
  }
  // Makes the threads that wait for `barrier` run again, to look for themselves.
  void wake(const uint64_t* barrier);
  // A polling loop saw the same value once more: lets others run, and in the end reports that nobody can change it.
  void poll(const void* address, uint64_t value);

  // A number for the race detector, used once in the block.
  uint64_t new_token() { return ++token_; }

  void start_block();
  // What the block left unfinished that the GPU would not forgive; empty when nothing. Finishes the rest.
  std::string end_block(const Block& block);
  // One line per mbarrier that threads wait for, for the report of a deadlock.
  std::string describe_waiters() const;

 private:
  std::string check_registers(const Block& block) const;

  bool used_ = false;
  uint64_t token_ = 0;
  std::vector<Thread> threads_;
  std::vector<BulkLoad> loads_;
  std::vector<Waiter> waiters_;
  std::vector<Initialised> barriers_;
};

// cp.async and its groups.
void cp_async(void* shared, const void* global, uint32_t bytes, uint32_t valid);
void cp_async_commit();
void cp_async_wait(size_t keep);

// Barrier `id` for `threads` threads; without `wait` the caller only comes to it.
void named_barrier(int id, int threads, bool wait);
// One lane, drawn from the seed: a kernel must not count on lane 0.
bool elect_one();
// Orders plain accesses before those of copies and products; the simulator runs them in order as it is.
void proxy_fence();
// setmaxnreg.inc (`more`) and .dec. Taken at once; whether the block has so many registers is looked at when it ends.
void set_max_registers(int registers, bool more);

inline Engine& engine() { return current->block->engine(); }
// Of the block in whose shared memory `pointer` lies, which may be another of the cluster.
Engine& engine_of(const void* pointer);
// "byte 1024 of the dynamic shared memory", or the address of something else; as seen from `block`.
std::string place(const void* pointer, const Block& block = *current->block);
// Fails when `bytes` from `pointer` on, in dynamic shared memory, reach beyond what the launch gave.
void require_inside(const char* instruction, const char* what, const void* pointer, size_t bytes);
// Fails unless `pointer` is a multiple of `alignment`.
void require_aligned(const char* instruction, const char* what, const void* pointer, size_t alignment);

}  // namespace simt
