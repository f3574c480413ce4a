// Fibers: several stacks on one OS thread, and a switch between them.
//
// On x86-64 a switch saves the six callee-saved registers on the old stack, exchanges the stack pointers and restores
// them from the new one (about 3 ns). Elsewhere, or with fiber.cpp compiled for PYDIT_SIM_UCONTEXT, POSIX ucontext does
// it (slower: a system call per switch).
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

// Saves the callee-saved registers on the stack and in *save where they are, takes over the stack of `load`, a place
// that was saved so, and the registers found there.
extern "C" void pydit_sim_exchange_stacks(void** save, void* load);

namespace simt {

// A point of execution that can be resumed.
struct Context {
  void* stack_pointer = nullptr;       // of one that does not run: where its registers lie
  const void* stack_bottom = nullptr;  // for AddressSanitizer, which wants to know of every switch
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// Fiber stacks of one worker, allocated as needed and kept. A guard page below each turns an overflow into a fault.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  // Makes at least `count` stacks; throws std::bad_alloc when the system gives no memory.
  void reserve(size_t count);
  // Points `context` at the start of `entry` on stack `index`. `entry` must call enter() first and never return.
  void prepare(Context& context, size_t index, void (*entry)());
  // After fibers were abandoned half-way: lets AddressSanitizer forget what it knew of their stacks.
  void forget_abandoned();
  // Whether `address` lies in the guard page of a stack.
  bool is_guard(const void* address) const;

 private:
  static constexpr size_t kPerSlab = 32;
  static constexpr size_t kMaxSlabs = 32;  // 1024 threads per block
  char* slabs_[kMaxSlabs] = {};
  size_t count_ = 0;
};

#ifdef SIMT_ASAN
void switch_context(Context& from, Context& to);
#else
// Suspends the running context into `from` and resumes `to`. Returns when something switches back to `from`.
inline void switch_context(Context& from, Context& to) {
  pydit_sim_exchange_stacks(&from.stack_pointer, to.stack_pointer);
}
#endif
// First statement of a fiber's entry function. `home` is the OS thread's own context, from which the first fiber of all
// is entered: there its stack_bottom is null, and becomes known.
void enter(Context& home);

}  // namespace simt
