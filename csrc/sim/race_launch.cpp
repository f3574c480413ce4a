#include "sim/race_launch.h"

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "sim/counters.h"
#include "sim/race.h"
#include "sim/scheduler.h"

namespace simt::race {
namespace {

std::mutex mutex;
std::map<const Kernel*, std::unique_ptr<Launch>> launches;
using Counts = std::array<uint64_t, PYDIT_SIM_COUNTERS>;
Counts last_counts = {}, total_counts = {};
std::map<std::string, Counts> counts_of;  // by kernel
thread_local std::vector<Span> named;     // by allow(), for the next launch of this host thread

}  // namespace

Launch* launch_of(const Kernel& kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = launches.find(&kernel);
  return found == launches.end() ? nullptr : found->second.get();
}

LaunchScope::LaunchScope(const Kernel& kernel) : kernel_(kernel) {
  if (!enabled) return;
  auto launch = std::make_unique<Launch>();
  launch->spans.swap(named);
  const std::lock_guard<std::mutex> lock(mutex);
  launches[&kernel] = std::move(launch);
}

LaunchScope::~LaunchScope() {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = launches.find(&kernel_);
  if (found == launches.end()) return;
  for (int i = 0; i < PYDIT_SIM_COUNTERS; ++i) last_counts[i] = found->second->counts[i];
  for (int i = 0; i < PYDIT_SIM_COUNTERS; ++i) total_counts[i] += last_counts[i];
  counts_of[kernel_.name] = last_counts;
  launches.erase(found);
}

void detail::allow(const void* pointer, size_t bytes, bool writable, const char* name) {
  if (pointer == nullptr) return;
  const auto begin = reinterpret_cast<uintptr_t>(pointer);
  named.push_back({{begin, begin + bytes}, writable, name});
}

}  // namespace simt::race

void pydit_sim_counters(uint64_t counts[PYDIT_SIM_COUNTERS]) {
  const std::lock_guard<std::mutex> lock(simt::race::mutex);
  std::copy(simt::race::last_counts.begin(), simt::race::last_counts.end(), counts);
}

void pydit_sim_counters_total(uint64_t counts[PYDIT_SIM_COUNTERS]) {
  const std::lock_guard<std::mutex> lock(simt::race::mutex);
  std::copy(simt::race::total_counts.begin(), simt::race::total_counts.end(), counts);
}

void pydit_sim_counters_of(const char* kernel, uint64_t counts[PYDIT_SIM_COUNTERS]) {
  const std::lock_guard<std::mutex> lock(simt::race::mutex);
  std::fill_n(counts, PYDIT_SIM_COUNTERS, 0);
  for (const auto& [name, found] : simt::race::counts_of) {
    if (name.find(kernel) != std::string::npos) std::copy(found.begin(), found.end(), counts);
  }
}
