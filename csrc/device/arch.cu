// The process-wide setting of the C API: how many multiprocessors launches leave free.
#include <atomic>

#include "device/arch.h"

namespace pydit::PYDIT_BACKEND {
namespace {

std::atomic<int> reserved{0};

}  // namespace

int reserved_multiprocessors() { return reserved; }

}  // namespace pydit::PYDIT_BACKEND

extern "C" void PYDIT_ENTRY(reserve_multiprocessors)(int count) { pydit::PYDIT_BACKEND::reserved = count; }
