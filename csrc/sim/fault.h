// Faults of a kernel (a wild pointer, a stack overflow, an integer division by zero) as launch errors.
//
// While a launch runs, a signal handler catches what a simulated thread did wrong, moves that thread to
// Block::fault_exit() on its own, now empty, stack and so ends the block with a report. Faults of other code go to the
// handler that was there before. AddressSanitizer builds leave faults to the sanitizer, whose reports say more.
#pragma once

#include <csignal>
#include <memory>

namespace simt {

// Lives in each worker while it runs blocks.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;

 private:
  std::unique_ptr<char[]> stack_;  // the handler's: a thread that overflowed its own has none left
  stack_t previous_ = {};
};

}  // namespace simt
