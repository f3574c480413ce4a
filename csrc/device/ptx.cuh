// Every PTX instruction the kernels use, as functions of the same name and meaning on the GPU and in the simulator.
// This header and those it includes are the only places with inline assembly.
//
//   ptx_async.cuh   cp.async groups, named barriers, mbarriers, proxy fences, register budgets, elect_one
//   ptx_cluster.cuh clusters: rank, barrier, addresses and mbarriers of other blocks
//   ptx_mma.cuh     ldmatrix, stmatrix, mma.sync
//   ptx_tma.cuh     bulk copies between global and shared memory through a tensor map (tensor_map.h makes one)
//   ptx_wgmma.cuh   wgmma and its shared-memory descriptors
//   ptx_math.cuh    exponentials of the special function units
//   ptx_global.cuh  wide stores to global memory
//   ptx_atomic.cuh  acquire and release accesses for semaphores between blocks, vector atomics
//
// sm_80 has cp.async, named barriers, ldmatrix, mma.sync and the scalar accesses of ptx_atomic.cuh; the rest needs
// sm_90a. Mbarriers and shared memory are the block's own unless ptx_cluster.cuh or the multicast load says otherwise.
#pragma once

#include "device/ptx_async.cuh"
#include "device/ptx_atomic.cuh"
#include "device/ptx_cluster.cuh"
#include "device/ptx_global.cuh"
#include "device/ptx_math.cuh"
#include "device/ptx_mma.cuh"
#include "device/ptx_tma.cuh"
#include "device/ptx_wgmma.cuh"
