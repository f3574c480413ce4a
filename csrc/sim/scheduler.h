// One block of a grid: its threads, who can run, who waits for what.
//
// The state is bit masks: per warp, the lanes that have not exited, those that can run, those that wait in a warp
// collective and those that wait at each barrier. A thread that has to wait picks the next one, of this block or of
// another of its cluster (cluster.h), and switches to it; the OS thread's own context gets control back when none can
// run: all have exited, or the cluster is deadlocked.
//
// Threads that have exited are not waited for, by __syncthreads() and by collectives alike, as on the GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "sim/fiber.h"
#include "sim/types.h"

namespace simt {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kLanes;
constexpr int kBarriers = 16;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // with cudaFuncAttributeMaxDynamicSharedMemorySize
constexpr size_t kReportBytes = 4096;

class Progress;  // of the launch's blocks: progress.h

// A launch, as every worker sees it.
struct Kernel {
  const char* name;  // as written in PYDIT_LAUNCH
  void (*invoke)(const void* arguments);
  const void* arguments;
  dim3 grid, block;
  size_t shared_bytes;
  uint64_t seed;
  Progress* progress = nullptr;
  unsigned cluster = 1;  // blocks of a cluster, neighbours along x
};

inline uint64_t mix(uint64_t x) {  // splitmix64: neighbouring seeds give unrelated numbers
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// What a lane brings to a warp collective. It lies on the lane's own stack while the lane waits.
struct Deposit {
  const char* name;                                              // "__shfl_sync"
  uint32_t mask;                                                 // the lanes that must come
  void (*finish)(Deposit* const* lanes, uint32_t participants);  // computes the results of all participants
};

struct Warp {
  uint32_t alive = 0;                   // not exited
  uint32_t ready = 0;                   // can run
  uint32_t collecting = 0;              // waiting in a collective
  bool uniform = true;                  // all of `collecting` wait in the same one
  uint32_t at_barrier[kBarriers] = {};  // waiting at a barrier
  Deposit* deposit[kLanes] = {};        // of the lanes in `collecting`
};

struct Barrier {
  const char* name = nullptr;  // of the call that the threads wait in; null while nobody waits
  int needed = 0;              // threads it waits for; 0: all that have not exited
  int arrived = 0;
  int votes = 0;   // of the arrived threads, those with a true predicate
  int result = 0;  // votes of the last completed round
};

class Block;
class Cluster;  // cluster.h
class Engine;   // what the block has in flight: async.h

// Where a thread is with respect to its cluster's barrier.
enum class ClusterStage : uint8_t { kAway, kArrived, kWaiting, kComplete };

struct Fiber {
  Context context;
  Block* block = nullptr;
  uint3 thread = {};  // threadIdx
  int warp = 0, lane = 0;
  ClusterStage stage = ClusterStage::kAway;
};

class Block {
 public:
  Block(Cluster& cluster, size_t rank);
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  // Called by its cluster. start() makes it block number `linear` of the grid (x fastest); check_end() reports what it
  // did not do before it ended, or that it cannot end.
  void start(const Kernel& kernel, uint64_t linear);
  Fiber& next();  // the thread that runs next, if nobody else does
  bool can_run() const { return ready_warps_ != 0; }
  void check_end();
  void forget_abandoned() { stacks_.forget_abandoned(); }
  const char* report() const { return report_; }
  int alive() const { return alive_; }  // threads that have not exited
  int threads() const { return threads_; }
  Fiber* fibers() const { return fibers_.get(); }

  // The rest is called by the block's own threads.
  Cluster& cluster() const { return cluster_; }
  unsigned rank() const { return rank_; }  // in the cluster
  const Kernel& kernel() const { return *kernel_; }
  uint3 index() const { return index_; }
  void* shared() const { return shared_; }
  // Waits at barrier `id` until `needed` threads (0: all that have not exited) have come; returns how many of them
  // brought a true `vote`.
  int barrier(int id, int needed, const char* name, bool vote);
  // Counts as one of the `needed` threads of barrier `id` and goes on.
  void barrier_arrive(int id, int needed, const char* name);
  // Waits until all lanes in mine.mask have come with a deposit of the same name and mask.
  void collective(Deposit& mine);
  // Lets others run; the caller stays able to run.
  void yield();
  // Now and then the caller, which is to be outside of collectives, falls behind: others of its warp go on without it
  // for as long as they can, as threads may between the points that the kernel brings them together at.
  void fall_behind();
  // Waits until another thread calls wake() with this one's fiber.
  void park() { wait(); }
  void wake(const Fiber& fiber);
  Engine& engine() { return *engine_; }
  // Lanes of the running warp that have not exited.
  uint32_t alive_lanes() const;
  // Of the signal handler (fault.h): what the running thread did, and the end of that thread and its block.
  void describe_fault(int signal, const void* address);
  [[noreturn]] static void fault_exit();
  // Ends the block with a report where an exception cannot: the caller's frames are left as they are.
  [[noreturn]] void abandon(const char* reason);

 private:
  static void thread_main();
  void exit_thread();
  bool finish_if_complete(Warp& warp, Deposit& deposit, int warp_index);
  static bool same_collective(const Deposit& a, const Deposit& b);
  Barrier& come_to_barrier(int id, int needed, const char* name);
  void release(Barrier& barrier, int id);
  void make_ready(int warp_index, uint32_t lanes);
  void wait();
  Fiber& next_here();
  uint64_t random();
  void report_error(const Fiber& fiber, const char* reason);
  void report_deadlock();
  void append_waiters(char (&text)[kReportBytes]) const;

  Cluster& cluster_;
  const unsigned rank_;
  const Kernel* kernel_ = nullptr;
  uint3 index_ = {};
  int threads_ = 0, alive_ = 0;
  uint32_t ready_warps_ = 0;       // warps with a ready lane
  uint32_t pending_barriers_ = 0;  // barriers somebody waits at
  int running_warp_ = 0;
  int first_lane_ = 0;       // where the search for the warp's next lane starts,
  bool descending_ = false;  // and in which direction it goes
  bool leave_warp_ = false;  // choose a warp anew at the next switch
  uint64_t random_ = 1;
  Warp warps_[kMaxWarps];
  Barrier barriers_[kBarriers];
  std::unique_ptr<Fiber[]> fibers_;
  dim3 shape_ = dim3(0, 0, 0);  // the block shape that fibers_ is numbered for
  Stacks stacks_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<unsigned char[]> arena_;
  unsigned char* shared_ = nullptr;  // in arena_, aligned to 1024 bytes
  char report_[kReportBytes] = "";
};

// The running thread; null outside a kernel. (Not initial-exec: a module with large __shared__ arrays could then not be
// loaded, as its whole thread-local storage would have to fit what the C library keeps free.)
extern __thread Fiber* current;

// Stops the kernel with a report: throws, and the launch returns cudaErrorLaunchFailure.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);

inline const uint3& thread_index() { return current->thread; }
inline uint3 block_index() { return current->block->index(); }
inline dim3 block_dim() { return current->block->kernel().block; }
inline dim3 grid_dim() { return current->block->kernel().grid; }
inline void* dynamic_shared() { return current->block->shared(); }

}  // namespace simt

inline void __syncthreads() { simt::current->block->barrier(0, 0, "__syncthreads", false); }
inline int __syncthreads_count(int vote) {
  return simt::current->block->barrier(0, 0, "__syncthreads_count", vote != 0);
}
inline int __syncthreads_or(int vote) {
  return simt::current->block->barrier(0, 0, "__syncthreads_or", vote != 0) != 0;
}
inline int __syncthreads_and(int vote) {
  return simt::current->block->barrier(0, 0, "__syncthreads_and", vote == 0) == 0;
}
// A thread that polls memory must let the others run.
inline void __nanosleep(unsigned) { simt::current->block->yield(); }
[[noreturn]] inline void __trap() { simt::fail("__trap()"); }
