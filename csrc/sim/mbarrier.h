// mbarrier: a barrier in 8 bytes of shared memory that counts arrivals of threads and bytes of asynchronous copies.
//
// A phase completes when all `count` arrivals have come and no announced byte is outstanding; then the next begins with
// the arrivals counted anew and its parity flipped. A wait names the parity of a phase and passes once that phase is
// complete, that is, while the current phase has the other parity: on a fresh barrier (current parity 0) a wait for
// parity 1 passes at once.
//
// The 64 bits: parity 1, pending arrivals 20, count 20, outstanding bytes 21 (signed: a copy may complete before it is
// announced), and 01 on top, which neither zeroed nor fresh shared memory has.
#pragma once

#include <cstdint>
#include <string>

namespace simt {

void mbarrier_init(uint64_t* barrier, uint32_t count);
void mbarrier_invalidate(uint64_t* barrier);
void mbarrier_init_fence();  // fence.mbarrier_init
void fence_mbarriers();      // what that and fence.proxy.async do to those that the running thread initialised
void require_fenced(const uint64_t* barrier, const char* name);             // for who is not a thread of its block
void mbarrier_arrive(uint64_t* barrier, uint32_t bytes, const char* name);  // announces `bytes`, then arrives
void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank);  // at the same place in block `rank` of the cluster
void mbarrier_expect(uint64_t* barrier, uint32_t bytes);
void mbarrier_complete(uint64_t* barrier, uint32_t bytes);  // by a copy
bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
long long outstanding_bytes(const uint64_t* barrier);  // 0 when it is none any more
std::string describe_mbarrier(const uint64_t* barrier);

}  // namespace simt
