// Streams. Work is done as it comes, whatever its stream; or, for a host thread that asked to run ahead
// (pydit_sim_run_ahead), when it synchronizes: the work of each stream in its order, one stream before the other by
// chance. What two streams share without an event between them, a workspace or a counter, then gives wrong results.
#pragma once

#include <functional>
#include <utility>

struct CUstream_st;  // never defined: a stream is only a handle here
using cudaStream_t = CUstream_st*;

namespace simt {

// Notes that this host thread put work on `stream`. Whether the work has to wait: then `keep_work` takes it.
bool use_stream(cudaStream_t stream);
void keep_work(cudaStream_t stream, std::function<void()> work);

template <typename Work>
void on_stream(cudaStream_t stream, Work work) {
  if (use_stream(stream))
    keep_work(stream, std::move(work));
  else
    work();
}

}  // namespace simt
