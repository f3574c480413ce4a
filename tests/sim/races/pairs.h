// A planted bug and its clean twin: a kernel template whose argument plants the bug. The clean one must pass, the other
// must be reported, for several seeds.
#pragma once

#include <string>
#include <vector>

#include "../selftest.h"

using Words = std::vector<std::string>;

// Runs both twins for several seeds: `clean` must pass; `bug` must fail with all of `words` in its report.
template <typename Clean, typename Bug>
void check_pair(int line, Clean clean, Bug bug, const Words& words) {
  constexpr int kSeeds = 4;
  for (int seed = 0; seed < kSeeds; ++seed) {
    pydit_sim_set_seed(seed);
    const cudaError_t error = clean();
    selftest::check(error == cudaSuccess,
                    error == cudaSuccess ? "" : std::string("a false report: ") + pydit_sim_last_report(), line);
    selftest::check_report(bug(), cudaErrorLaunchFailure, words, line);
  }
  pydit_sim_set_seed(0);
}
// PAIR(kernel<?>, threads, dynamic bytes, {words}, arguments...)
#define PAIR(kernel, threads, bytes, words, ...)                                                      \
  check_pair(                                                                                         \
      __LINE__, [&] { return PYDIT_LAUNCH(kernel<false>, 2, threads, bytes, nullptr, __VA_ARGS__); }, \
      [&] { return PYDIT_LAUNCH(kernel<true>, 2, threads, bytes, nullptr, __VA_ARGS__); }, words)
