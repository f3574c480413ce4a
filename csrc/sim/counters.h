// Counters of a race build for an op of several launches, which has more than those of its latest (control.h).
#pragma once

#include <cstdint>

#include "sim/control.h"

// As pydit_sim_counters, of the latest launch of a kernel that has `kernel` in its name, as written in PYDIT_LAUNCH; of
// several such kernels, of the last by name. Zeros if none was launched.
extern "C" void pydit_sim_counters_of(const char* kernel, uint64_t counts[PYDIT_SIM_COUNTERS]);
// The sums over all launches since the process started.
extern "C" void pydit_sim_counters_total(uint64_t counts[PYDIT_SIM_COUNTERS]);
