// What an address is: a line of source, or a part of this module's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt {

struct Range {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t first, size_t bytes) const { return first >= begin && first + bytes <= end; }
};

// The memory of the module that holds the simulator: its image, with constants and code, and the thread-local storage
// of the calling OS thread, where static __shared__ variables are.
struct Module {
  Range image, thread_local_storage;
};
Module this_module();

// "file:line" of a return address (of the innermost inlined call, and of the outermost), or where in its module it is.
std::string source_line(const void* pc);

}  // namespace simt
