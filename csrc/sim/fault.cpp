#include "sim/fault.h"

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "sim/scheduler.h"

#if !defined(SIMT_ASAN) && defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#define SIMT_CATCH_FAULTS 1
#endif

namespace simt {

#ifdef SIMT_CATCH_FAULTS
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr int kSignalCount = sizeof kSignals / sizeof *kSignals;
constexpr size_t kHandlerStackBytes = 64 * 1024;

std::mutex mutex;
int guards = 0;
struct sigaction previous_actions[kSignalCount];

void set_program(void* context, void (*function)(), uintptr_t stack_top) {
  mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(function);
  machine.gregs[REG_RSP] = static_cast<greg_t>(stack_top - 8);  // as if called
#else
  machine.pc = reinterpret_cast<uintptr_t>(function);
  machine.sp = stack_top;
#endif
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (current == nullptr) {
    // Not a simulated thread. With the previous handler back in place, returning repeats the fault for it.
    for (int i = 0; i < kSignalCount; ++i) {
      if (kSignals[i] == signal) sigaction(signal, &previous_actions[i], nullptr);
    }
    return;
  }
  Block& block = *current->block;
  block.describe_fault(signal, info->si_addr);
  const Context& fiber = current->context;
  set_program(context, Block::fault_exit,
              (reinterpret_cast<uintptr_t>(fiber.stack_bottom) + fiber.stack_bytes) & ~uintptr_t{15});
}

}  // namespace

FaultGuard::FaultGuard() : stack_(new char[kHandlerStackBytes]) {
  stack_t mine = {};
  mine.ss_sp = stack_.get();
  mine.ss_size = kHandlerStackBytes;
  sigaltstack(&mine, &previous_);
  const std::lock_guard<std::mutex> lock(mutex);
  if (guards++ > 0) return;
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &action, &previous_actions[i]);
}

FaultGuard::~FaultGuard() {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (--guards == 0) {
      for (int i = 0; i < kSignalCount; ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
    }
  }
  sigaltstack(&previous_, nullptr);
}

#else

FaultGuard::FaultGuard() = default;
FaultGuard::~FaultGuard() = default;

#endif

}  // namespace simt
