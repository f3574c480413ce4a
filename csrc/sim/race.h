// The race detector: which accesses of a kernel are ordered, and a report for the first pair that is not.
//
// How accesses are seen. A race build (cmake -DPYDIT_SIM_RACE=on) compiles the kernels, and only them, with
// -fsanitize=thread, and does not link that sanitizer: g++ then puts a call before every load and store, and race.cpp
// supplies those calls. Instructions that are not C++ (copies, products, barriers in memory) call the functions below.
// In an ordinary build nothing calls race.cpp, `enabled` is false and each function here is one untaken branch.
//
// How order is known. Thread t counts its own epochs in clock[t][t]; clock[t][u] is the last epoch of u whose accesses
// t may rely on. A barrier, or a warp collective of CUDA C++ (__syncwarp, shuffles, votes), gives all its participants
// the maximum of their clocks; release(object) adds the caller's clock to the object's, acquire(object) takes it over.
// Each of those begins a new epoch of the caller. Atomics order nothing, and do not race with each other.
//
// What is kept. Every byte of shared memory (dynamic, and static: the thread-local storage of the module) has its last
// write, and its reads since then that no later read of the list is ordered after. An access races with the write, and
// a write also with those reads, when they are of another thread and of an epoch that the accessing thread's clock does
// not reach. A byte never written in this block must not be read.
//
// Asynchronous engines. An access of a copy, a TMA store or a product is named by a token. It is made in the name of
// the issuing thread at its issue, and ordered before a thread only through engine_done(token) of that thread, or of
// one that thread has been synchronised with. The async proxy (bulk copies, products) is ordered behind a plain access
// that it conflicts with only when who made that access, or the issuing thread after it was ordered behind it, has
// called generic_proxy_fence() since: its reads behind plain writes, its writes behind plain reads and writes. cp.async
// is plain in this sense, and who waited for it made the access.
//
// Clusters. The threads of all blocks of a cluster are one set of threads with one set of clocks, and each byte of each
// block's dynamic shared memory has its history, whoever reaches for it. Besides, a block that is reached into (a
// multicast copy, a remote arrival, a load or store through another block's address) must be known to have started, by
// a barrier of the cluster, and must not exit before it is ordered behind that access. An arrival at another block's
// mbarrier orders all that came before it; on the GPU only the reads (ptx_cluster.cuh), a difference not looked for.
//
// Global memory. A launcher that names its tensors with allow() has every plain access to global memory checked against
// them. Races on global memory are not looked for.
//
// What is found ends the block as any fault does: the launch fails, its report names both accesses by file and line.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

struct Kernel;
class Block;
class Cluster;

namespace race {

extern bool enabled;  // pydit_sim_set_race; true from the start in a race build

namespace detail {
void access(const void* pointer, size_t bytes, bool write, const void* pc);
void engine_access(const void* pointer, size_t bytes, uint64_t token, bool write, bool async_proxy, const void* pc);
void release(const void* object);
void acquire(const void* object);
void engine_done(uint64_t token);
void engine_signals(uint64_t token, const void* object);
void accumulates(const void* pointer, size_t bytes, uint64_t token);
void register_fence();
void touch_mbarrier(const void* barrier, bool anew, const void* pc);
void forget(const void* object);
void generic_proxy_fence();
void pass_on(const void* from, const void* to);
void visit(unsigned rank, const void* pc);
void block_exits(unsigned rank);
void join_warp(const Block& block, int warp, uint32_t lanes);
void acquire_lanes(const void* object, const Block& block, int warp, uint32_t lanes);
void start_cluster(const Kernel& kernel, const Cluster& cluster);
void end_cluster();
void allow(const void* pointer, size_t bytes, bool writable, const char* name);
}  // namespace detail

// Plain accesses of the running thread that no compiler sees (ldmatrix, stmatrix).
inline void read(const void* pointer, size_t bytes) {
  if (__builtin_expect(enabled, false)) detail::access(pointer, bytes, false, __builtin_return_address(0));
}
inline void write(const void* pointer, size_t bytes) {
  if (__builtin_expect(enabled, false)) detail::access(pointer, bytes, true, __builtin_return_address(0));
}

// The running thread's past is ordered before whoever acquires `object` (an mbarrier arrive), and the reverse (a wait).
inline void release(const void* object) {
  if (__builtin_expect(enabled, false)) detail::release(object);
}
inline void acquire(const void* object) {
  if (__builtin_expect(enabled, false)) detail::acquire(object);
}

// Accesses of an asynchronous instruction, called at its issue by the issuing thread. A token is any number that the
// block does not use twice, whatever others of its cluster use; several accesses may share one.
inline void engine_read(const void* pointer, size_t bytes, uint64_t token) {
  if (__builtin_expect(enabled, false))
    detail::engine_access(pointer, bytes, token, false, true, __builtin_return_address(0));
}
// async_proxy: not of cp.async, which is asynchronous but in the proxy of plain accesses.
inline void engine_write(const void* pointer, size_t bytes, uint64_t token, bool async_proxy = true) {
  if (__builtin_expect(enabled, false))
    detail::engine_access(pointer, bytes, token, true, async_proxy, __builtin_return_address(0));
}
// The running thread has waited for `token`.
inline void engine_done(uint64_t token) {
  if (__builtin_expect(enabled, false)) detail::engine_done(token);
}
// Completion of `token` counts as an arrival: whoever acquires `object` has waited for it (a TMA load's mbarrier).
inline void engine_signals(uint64_t token, const void* object) {
  if (__builtin_expect(enabled, false)) detail::engine_signals(token, object);
}
// Until the running thread has waited for `token`, these registers of it (a local array) are the engine's. Registers
// that an earlier product used and the thread has accessed since then must have a register_fence() behind that access.
inline void accumulates(const void* pointer, size_t bytes, uint64_t token) {
  if (__builtin_expect(enabled, false)) detail::accumulates(pointer, bytes, token);
}
// wgmma.fence by the running thread.
inline void register_fence() {
  if (__builtin_expect(enabled, false)) detail::register_fence();
}
// The memory of an mbarrier, which threads may use at once; what makes it one, or no longer one (`anew`), must be
// ordered with every use.
inline void touch_mbarrier(const void* barrier, bool anew = false) {
  if (__builtin_expect(enabled, false)) detail::touch_mbarrier(barrier, anew, __builtin_return_address(0));
}
// fence.proxy.async by the running thread.
inline void generic_proxy_fence() {
  if (__builtin_expect(enabled, false)) detail::generic_proxy_fence();
}

// Of launchers, before PYDIT_LAUNCH: a tensor that the next launch of this host thread may touch.
inline void allow(const void* pointer, size_t bytes, bool writable, const char* name) {
  if (__builtin_expect(enabled, false)) detail::allow(pointer, bytes, writable, name);
}

// Of the scheduler. Barriers: who comes releases; when it completes, its waiters acquire and it is forgotten.
inline void join_warp(const Block& block, int warp, uint32_t lanes) {
  if (__builtin_expect(enabled, false)) detail::join_warp(block, warp, lanes);
}
inline void acquire_lanes(const void* object, const Block& block, int warp, uint32_t lanes) {
  if (__builtin_expect(enabled, false)) detail::acquire_lanes(object, block, warp, lanes);
}
// What was released to `from` is there to acquire from `to`, and `from` begins anew.
inline void pass_on(const void* from, const void* to) {
  if (__builtin_expect(enabled, false)) detail::pass_on(from, to);
}
inline void forget(const void* object) {
  if (__builtin_expect(enabled, false)) detail::forget(object);
}
// The running thread reaches into block `rank` of its cluster, another than its own.
inline void visit(unsigned rank) {
  if (__builtin_expect(enabled, false)) detail::visit(rank, __builtin_return_address(0));
}
// The running thread is the last of block `rank` to exit.
inline void block_exits(unsigned rank) {
  if (__builtin_expect(enabled, false)) detail::block_exits(rank);
}
inline void start_cluster(const Kernel& kernel, const Cluster& cluster) {
  if (__builtin_expect(enabled, false)) detail::start_cluster(kernel, cluster);
}
inline void end_cluster() {
  if (__builtin_expect(enabled, false)) detail::end_cluster();
}

// Lives in run_grid: takes over what allow() named, and keeps the launch's counts.
class LaunchScope {
 public:
  explicit LaunchScope(const Kernel& kernel);
  ~LaunchScope();
  LaunchScope(const LaunchScope&) = delete;
  LaunchScope& operator=(const LaunchScope&) = delete;

 private:
  const Kernel& kernel_;
};

}  // namespace race

namespace count {
namespace detail {
void tensor_ops(uint64_t n);
void warpgroup();
}  // namespace detail
// Multiply-adds of a matrix instruction, for the launch's counters.
inline void tensor_ops(uint64_t n) {
  if (__builtin_expect(race::enabled, false)) detail::tensor_ops(n);
}
// A warpgroup's first product.
inline void warpgroup() {
  if (__builtin_expect(race::enabled, false)) detail::warpgroup();
}
}  // namespace count

}  // namespace simt
