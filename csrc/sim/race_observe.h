// From the instrumented kernels (race_observe.cpp) to the race detector (race.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {
struct Fiber;

namespace race {

enum Kind : uint8_t { kPlain, kAtomic };  // kAtomic for what does not race with its like
void observe(const Fiber& fiber, const void* pointer, size_t bytes, bool write, Kind kind, size_t alignment,
             const void* pc);

}  // namespace race
}  // namespace simt
