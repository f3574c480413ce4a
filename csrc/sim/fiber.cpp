// Stacks, and the two ways of switching between them.
#include "sim/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#if !defined(__x86_64__) && !defined(PYDIT_SIM_UCONTEXT)
#define PYDIT_SIM_UCONTEXT
#endif
#ifdef PYDIT_SIM_UCONTEXT
#include <ucontext.h>
#endif

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

#ifdef SIMT_ASAN
constexpr size_t kStackBytes = 256 * 1024;  // instrumented frames are several times as large
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
constexpr size_t kGuardBytes = 4096;  // where pages are larger, mprotect refuses and there is no guard
constexpr size_t kStride = kGuardBytes + kStackBytes;

// Stacks that all start at the same offset in a page would compete for the same cache sets. Each starts a few lines
// from its neighbour instead.
constexpr size_t stack_colour(size_t index) { return index * 17 % 64 * 64; }

}  // namespace

#ifdef PYDIT_SIM_UCONTEXT
extern "C" void pydit_sim_exchange_stacks(void** save, void* load) {
  ucontext_t registers;  // on the stack that is left, which nobody touches until it is taken up again
  *save = &registers;
  swapcontext(&registers, static_cast<ucontext_t*>(load));
}
#else
// Outside any C++ function, so that no coverage or sanitizer build puts instructions of its own in between.
asm(R"(
  .pushsection .text
  .globl pydit_sim_exchange_stacks
  .hidden pydit_sim_exchange_stacks
  .type pydit_sim_exchange_stacks, @function
pydit_sim_exchange_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size pydit_sim_exchange_stacks, . - pydit_sim_exchange_stacks
  .popsection
)");
#endif

Stacks::~Stacks() {
  for (char* slab : slabs_) {
    if (slab != nullptr) munmap(slab, kPerSlab * kStride);
  }
}

void Stacks::reserve(size_t count) {
  while (count_ < count) {
    void* memory =
        mmap(nullptr, kPerSlab * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    char* slab = static_cast<char*>(memory);
    for (size_t i = 0; i < kPerSlab; ++i) mprotect(slab + i * kStride, kGuardBytes, PROT_NONE);
    slabs_[count_ / kPerSlab] = slab;
    count_ += kPerSlab;
  }
}

void Stacks::prepare(Context& context, size_t index, void (*entry)()) {
  char* bottom = slabs_[index / kPerSlab] + index % kPerSlab * kStride + kGuardBytes;
  const size_t bytes = kStackBytes - stack_colour(index);  // a multiple of 64
  context.stack_bottom = bottom;
  context.stack_bytes = bytes;
  context.fake_stack = nullptr;
#ifdef PYDIT_SIM_UCONTEXT
  constexpr size_t kRegisters = (sizeof(ucontext_t) + 63) / 64 * 64;  // above the stack
  auto* registers = reinterpret_cast<ucontext_t*>(bottom + bytes - kRegisters);
  getcontext(registers);
  registers->uc_stack.ss_sp = bottom;
  registers->uc_stack.ss_size = bytes - kRegisters;
  registers->uc_link = nullptr;
  makecontext(registers, entry, 0);
  context.stack_pointer = registers;
#else
  // What pydit_sim_exchange_stacks pops: six registers and the address to return to. One more word puts the stack
  // pointer where it stands after a call (8 bytes off a multiple of 16); being null, it also ends stack traces.
  void** top = reinterpret_cast<void**>(bottom + bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  top -= 6;
  memset(top, 0, 6 * sizeof(void*));
  context.stack_pointer = top;
#endif
}

void Stacks::forget_abandoned() {
#ifdef SIMT_ASAN
  for (size_t i = 0; i < count_; ++i) {
    __asan_unpoison_memory_region(slabs_[i / kPerSlab] + i % kPerSlab * kStride + kGuardBytes, kStackBytes);
  }
#endif
}

bool Stacks::is_guard(const void* address) const {
  const auto wanted = reinterpret_cast<uintptr_t>(address);
  for (size_t i = 0; i < count_; ++i) {
    const auto guard = reinterpret_cast<uintptr_t>(slabs_[i / kPerSlab] + i % kPerSlab * kStride);
    if (wanted >= guard && wanted < guard + kGuardBytes) return true;
  }
  return false;
}

#ifdef SIMT_ASAN
void switch_context(Context& from, Context& to) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
  pydit_sim_exchange_stacks(&from.stack_pointer, to.stack_pointer);
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}
#endif

void enter([[maybe_unused]] Context& home) {
#ifdef SIMT_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  // The OS thread's own stack is known only from here, by the first fiber that it enters. Later ones are entered from
  // other fibers.
  if (home.stack_bottom != nullptr) return;
  home.stack_bottom = bottom;
  home.stack_bytes = bytes;
#endif
}

}  // namespace simt
