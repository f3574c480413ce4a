// Of a launch in a race build: the tensors it may touch, and what its blocks counted.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "sim/control.h"
#include "sim/symbols.h"

namespace simt {

struct Kernel;

namespace race {

struct Span {
  Range range;
  bool writable;
  std::string name;
};

struct Launch {
  std::vector<Span> spans;
  std::atomic<uint64_t> counts[PYDIT_SIM_COUNTERS] = {};  // in the order of pydit_sim_counters
};
enum Counter {
  kGlobalLoaded,
  kGlobalStored,
  kSharedLoaded,
  kSharedStored,
  kTensorOps,
  kSharedRequests,
  kConflicts,
  kWarpgroups
};

// Between the two ends of its LaunchScope; null: the detector was off when the launch began.
Launch* launch_of(const Kernel& kernel);

}  // namespace race
}  // namespace simt
