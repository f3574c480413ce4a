// A very small test frame for the simulator's self test: TEST(name) { CHECK(...); }
#pragma once

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "sim/control.h"
#include "sim/cuda.h"

namespace selftest {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

struct Register {
  Register(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline int failures = 0;

template <typename A, typename B>
void check_equal(const A& got, const B& expected, const char* what, int line) {
  if (got == expected) return;
  if (++failures <= 5) {
    fprintf(stderr, "line %d: %s: expected %.17g, got %.17g\n", line, what, static_cast<double>(expected),
            static_cast<double>(got));
  }
}

inline void check(bool good, const std::string& what, int line) {
  if (!good && ++failures <= 5) fprintf(stderr, "line %d: %s\n", line, what.c_str());
}

// That a launch failed, and that its report names what is expected.
inline void check_report(cudaError_t error, cudaError_t expected, const std::vector<std::string>& words, int line) {
  const std::string report = pydit_sim_last_report();
  check(error == expected, "expected cudaError " + std::to_string(expected) + ", got " + std::to_string(error), line);
  for (const std::string& word : words) {
    check(report.find(word) != std::string::npos, "\"" + word + "\" is not in the report: " + report, line);
  }
}

// Runs the tests named, or all, and returns what main() should.
inline int run(int count, char** names) {
  int failed = 0, ran = 0;
  for (const Test& test : tests()) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted = wanted || strcmp(names[i], test.name) == 0;
    if (!wanted) continue;
    failures = 0;
    test.run();
    ++ran;
    if (failures == 0) continue;
    fprintf(stderr, "%s: %d checks failed\n", test.name, failures);
    ++failed;
  }
  printf("%d tests, %d failed\n", ran, failed);
  return failed > 0 || ran == 0;
}

}  // namespace selftest

#define TEST(name)                                                        \
  static void name();                                                     \
  static const selftest::Register register_##name(#name, name);           \
  static void name()
#define CHECK(condition) selftest::check(condition, #condition, __LINE__)
#define CHECK_EQUAL(got, expected) selftest::check_equal(got, expected, #got, __LINE__)
// CHECK_FAILS(PYDIT_LAUNCH(...), "words", "of the report")
#define CHECK_FAILS(launch, ...) \
  selftest::check_report(launch, cudaErrorLaunchFailure, std::vector<std::string>{__VA_ARGS__}, __LINE__)
#define CHECK_REFUSED(launch, ...) \
  selftest::check_report(launch, cudaErrorInvalidConfiguration, std::vector<std::string>{__VA_ARGS__}, __LINE__)
