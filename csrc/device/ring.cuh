// A ring of stages in shared memory between who fills it and who empties it.
#pragma once

#include "device/platform.cuh"

namespace pydit::PYDIT_BACKEND {

// Slot and parity of the n-th use of a ring of kSlots slots. Its "full" barrier has `parity` once the slot is filled;
// who fills waits for "empty" with parity ^ 1, which the first time round is there at once.
template <int kSlots>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

}  // namespace pydit::PYDIT_BACKEND
