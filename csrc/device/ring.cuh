// A ring of stages in shared memory between a producer and its consumers.
#pragma once

#include "device/platform.cuh"

namespace pydit::PYDIT_BACKEND {

// Slot and parity of the n-th use of a ring of kSlots slots. A consumer waits for the slot's "full" barrier with
// `parity`, the producer for its "empty" barrier with parity ^ 1, which passes at once the first time round.
template <int kSlots>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

}  // namespace pydit::PYDIT_BACKEND
