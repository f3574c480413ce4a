// Atomics of pairs and quadruples, and the acquire and release accesses that order blocks. The scalar atomics are in
// intrinsics.h.
#pragma once

#include <cstdint>

#include "sim/async.h"
#include "sim/half.h"
#include "sim/intrinsics.h"
#include "sim/types.h"

namespace simt {

// Reading the same value twice in a row is polling: others run before this thread looks again.
inline unsigned load_acquire(const unsigned* pointer) {
  const unsigned value = __atomic_load_n(pointer, __ATOMIC_ACQUIRE);
  engine().poll(pointer, value);
  return value;
}
inline void store_release(unsigned* pointer, unsigned value) { __atomic_store_n(pointer, value, __ATOMIC_RELEASE); }
inline unsigned add_release(unsigned* pointer, unsigned value) {
  return __atomic_fetch_add(pointer, value, __ATOMIC_RELEASE);
}

// Two 16-bit sums as one step of 32 bits; each is rounded once, by `round`.
template <typename Pair, typename Round>
Pair atomic_add_pair(Pair* pointer, Pair term, Round round) {
  require_aligned("atomicAdd", "address", pointer, sizeof(Pair));
  const auto add = [&](auto a, auto b) { return round(static_cast<float>(a) + static_cast<float>(b)); };
  return atomic_update(pointer, [&](Pair old) { return Pair{add(old.x, term.x), add(old.y, term.y)}; });
}

}  // namespace simt

// Each element is added atomically, not the vector as a whole.
inline float2 atomicAdd(float2* p, float2 x) {
  simt::require_hopper("atomicAdd(float2)");
  simt::require_aligned("atomicAdd", "address", p, sizeof *p);
  return {atomicAdd(&p->x, x.x), atomicAdd(&p->y, x.y)};
}
inline float4 atomicAdd(float4* p, float4 x) {
  simt::require_hopper("atomicAdd(float4)");
  simt::require_aligned("atomicAdd", "address", p, sizeof *p);
  return {atomicAdd(&p->x, x.x), atomicAdd(&p->y, x.y), atomicAdd(&p->z, x.z), atomicAdd(&p->w, x.w)};
}
inline __nv_bfloat162 atomicAdd(__nv_bfloat162* p, __nv_bfloat162 x) {
  return simt::atomic_add_pair(p, x, __float2bfloat16_rn);
}
inline __half2 atomicAdd(__half2* p, __half2 x) { return simt::atomic_add_pair(p, x, __float2half_rn); }
