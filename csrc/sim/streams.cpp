#include "sim/streams.h"

#include <deque>
#include <iterator>
#include <map>
#include <set>

#include "sim/control.h"
#include "sim/runtime.h"
#include "sim/scheduler.h"

namespace {

thread_local std::set<uint64_t> used;  // handles, since this host thread was last asked
thread_local bool ahead = false;
thread_local std::map<uint64_t, std::deque<std::function<void()>>> waiting;

uint64_t handle_of(cudaStream_t stream) { return reinterpret_cast<uint64_t>(stream); }

}  // namespace

namespace simt {

bool use_stream(cudaStream_t stream) {
  used.insert(handle_of(stream));
  return ahead;
}

void keep_work(cudaStream_t stream, std::function<void()> work) {
  waiting[handle_of(stream)].push_back(std::move(work));
}

}  // namespace simt

extern "C" int pydit_sim_streams(uint64_t* handles, int capacity) {
  const int count = static_cast<int>(used.size());
  for (const uint64_t handle : used) {
    if (capacity-- <= 0) break;
    *handles++ = handle;
  }
  used.clear();
  return count;
}

extern "C" int pydit_sim_run_ahead(void) {
  if (pydit_sim_race_build()) return 1;  // the tensors of a launch are named just before it
  ahead = true;
  return 0;
}

extern "C" int pydit_sim_synchronize(uint64_t seed) {
  ahead = false;
  cudaError_t error = cudaSuccess;
  for (uint64_t step = 0; !waiting.empty() && error == cudaSuccess; ++step) {
    const auto stream = std::next(waiting.begin(), static_cast<int64_t>(simt::mix(seed + step) % waiting.size()));
    stream->second.front()();
    error = cudaPeekAtLastError();
    stream->second.pop_front();
    if (stream->second.empty()) waiting.erase(stream);
  }
  waiting.clear();
  return cudaGetLastError();
}
