#include "sim/race_launch.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>

#include "sim/race.h"

namespace simt::race {
namespace {

std::mutex mutex;
std::map<const Kernel*, std::unique_ptr<Launch>> launches;
uint64_t last_counts[PYDIT_SIM_COUNTERS] = {};
thread_local std::vector<Span> named;  // by allow(), for the next launch of this host thread

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
  std::copy(std::begin(simt::race::last_counts), std::end(simt::race::last_counts), counts);
}
