// The SIMT simulator: what a kernel file sees of CUDA when g++ compiles it with -DPYDIT_SIM.
//
// The same .cu files that nvcc builds run here on the CPU, unchanged, so that every kernel can be tested on a machine
// with a C++ compiler and nothing else. How a launch runs, and where to read about each part:
//
//   launch.h     PYDIT_LAUNCH checks the configuration and deals the blocks of the grid out to OS threads, in an order
//                drawn from the seed. One OS thread runs one block at a time, or one cluster, to its end.
//   fiber.h      Every CUDA thread of a block is a fiber: a stack of its own and a ten-instruction context switch.
//   scheduler.h  A fiber runs until it has to wait (a barrier, a warp collective) and then switches straight to another
//                that can run: warps and lanes in seeded random order, so that code that is right only in one order
//                fails for some seed. When none can run and some are left, the block is deadlocked: the launch ends
//                with a report of who waits where.
//   cluster.h    Blocks that run together on one OS thread, their barrier, and one's memory seen by another.
//   warp.h       Warp collectives: each lane deposits its operand, the last to arrive computes for all.
//   streams.h    Streams: work runs in the order in which it comes, or for a host that runs ahead, streams in any
//   order. async.h      What is in flight: cp.async groups here; copies land late or at once, as a switch says.
//   matrix.h     ldmatrix, stmatrix and mma.sync, who holds which element.
//   mbarrier.h, tma.h, wgmma.h    Hopper: barriers that count bytes, bulk copies of boxes, products of a warpgroup.
//   atomics.h, progress.h         Semaphores between blocks: a block that only polls gives its OS thread away, and a
//                launch in which everybody only polls is reported.
//   race.h       In a race build: unordered accesses, unwritten memory, accesses outside tensors; counters. shadow.h:
//                what is remembered of a byte; banks.h: bank conflicts; race_observe.cpp: where plain accesses come
//                from; race_map.h: which memory an address is of; race_launch.h: the tensors and counts of a launch;
//                accumulators.h: registers of products; race.cpp: the detector itself.
//   fault.h      A wild pointer or a stack overflow of a kernel ends the launch, not the process.
//   symbols.h    From an address to a file and line, for reports; report.cpp writes the scheduler's.
//   types.h, half.h, intrinsics.h, runtime.h    vector types, bf16/fp16, math and atomics, the few runtime calls.
//   control.h    C functions of the host side: seed, OS threads, late or early copies, device, last report, launches.
//
// To read it in an hour: this comment; launch.cpp for how blocks are dealt out; scheduler.h and .cpp for what a thread
// is and how it waits; warp.h for a collective; async.h and mbarrier.cpp for work in flight; wgmma.h and tma.h for the
// layouts; and the comment at the top of race.h. The rest can wait until it is needed. tests/sim has a small kernel for
// every part.
//
// Shared memory: a static __shared__ variable is thread-local to the OS thread, hence one per running block; dynamic
// shared memory is an arena filled with 0xFF (NaN) before every block. Neither is zero for a block to rely on.
//
// A kernel that throws, traps, touches memory that it must not, deadlocks or misuses a collective makes the launch
// return cudaErrorLaunchFailure; the reason is in pydit_sim_last_report(), and the next launch works.
//
// Not modelled: timing, memory ordering weaker than the host's, caches, programmatic dependent launch (no kernel uses
// it). What depends on ptxas (spills, products it serialises) is the static gates' (build_tools/gates.py). Compile with
// -ffp-contract=off (a multiply and an add fuse only where the kernel says fmaf) and -fno-strict-aliasing (as nvcc
// does).
#pragma once

// Qualifiers. All code is host code here; __shared__ works at block scope, where CUDA allows it too.
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#include "sim/atomics.h"
#include "sim/half.h"
#include "sim/intrinsics.h"
#include "sim/launch.h"
#include "sim/runtime.h"
#include "sim/scheduler.h"
#include "sim/types.h"
#include "sim/warp.h"

// Built-in variables of the running thread.
#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())
constexpr int warpSize = 32;

// The pieces of CUDA syntax that are not C++; their CUDA versions are in device/platform.cuh.
// PYDIT_LAUNCH(kernel, grid, block, smem_bytes, stream, arguments...) is a cudaError_t; a template instantiation with
// commas goes in parentheses: PYDIT_LAUNCH((scale_kernel<float, 4>), ...). The stream opens `...` here because a macro
// of C++17 cannot drop the comma before an empty argument list.
#define PYDIT_LAUNCH(kernel, grid, block, smem_bytes, ...) \
  PYDIT_LAUNCH_CLUSTER(kernel, 1, grid, block, smem_bytes, __VA_ARGS__)
#define PYDIT_LAUNCH_CLUSTER(kernel, cluster, grid, block, smem_bytes, ...) \
  (::simt::launch(#kernel, kernel, cluster, grid, block, smem_bytes, __VA_ARGS__), cudaGetLastError())
#define PYDIT_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::simt::dynamic_shared())
