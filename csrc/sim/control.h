// What the host side can set and ask. Plain C; every function may be called from any thread.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Seed of the order in which blocks, warps and lanes run; the same seed gives the same order. Default 0.
void pydit_sim_set_seed(uint64_t seed);
// OS threads that run the blocks of a launch; 0 (the default) means one per core. With 1 a launch is deterministic
// even where blocks meet in atomics.
void pydit_sim_set_threads(int threads);
// When asynchronous copies land: 0 in the wait for them, 1 at once. Until it is called, PYDIT_SIM_ASYNC=lazy|eager says
// (lazy when unset). Returns 1 on another value.
int pydit_sim_set_async(int eager);
// The simulated device 0: 80 or 90. Until it is called, PYDIT_SIM_ARCH=80|90a says (80 when unset). Returns 1 on
// another.
int pydit_sim_set_arch(int arch);
// The current device of this host thread, as cudaSetDevice: 0 (the default), or 1, which is of compute capability 8.0
// whatever pydit_sim_set_arch says, as in a machine of unlike GPUs. Returns 1 on another.
int pydit_sim_set_device(int device);
// Streams on which this host thread launched a kernel or cleared memory since it last asked: how many, their handles in
// the first `capacity` of `handles`.
int pydit_sim_streams(uint64_t* handles, int capacity);
// From here on what this host thread puts on streams waits until it calls pydit_sim_synchronize; memory that it is to
// read or write must live until then. Returns 1 in a race build. pydit_sim_synchronize does what waits, each stream in
// its order; which is next is drawn from `seed`. Returns the cudaError_t of the first that fails; what would come after
// it is dropped.
int pydit_sim_run_ahead(void);
int pydit_sim_synchronize(uint64_t seed);
// The race detector (race.h): on or off, from the next launch. It sees the accesses of kernels only in a race build
// (cmake -DPYDIT_SIM_RACE=on), where it is on from the start; pydit_sim_race_build says whether this is one.
void pydit_sim_set_race(int on);
int pydit_sim_race_build(void);
// Of the latest launch in a race build: bytes of global memory loaded and stored, bytes of shared memory loaded and
// stored, multiply-adds of matrix instructions, load and store instructions of warps on shared memory, the cycles those
// lost to bank conflicts (banks.h), and warpgroups that multiplied (wgmma). Every access counts, also one that a cache
// would serve.
enum { PYDIT_SIM_COUNTERS = 8 };
void pydit_sim_counters(uint64_t counts[PYDIT_SIM_COUNTERS]);
// Why this host thread's last failed launch failed: kernel, block, thread, reason. "" when none has.
const char* pydit_sim_last_report(void);
// Launches since the process started, failed ones included.
uint64_t pydit_sim_launch_count(void);

#ifdef __cplusplus
}
#endif
