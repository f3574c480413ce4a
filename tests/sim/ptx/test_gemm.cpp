// Whole products, portable and Hopper, against float64; and what happens with a bug planted in each.
#include <cmath>
#include <vector>

#include "../selftest.h"
#include "device/vector.cuh"
#include "gemm_mma.cuh"
#include "gemm_wgmma.cuh"

namespace pydit::sim {
namespace {

// Small multiples of 1/8: sums of their products are exact in fp32, so results must be equal.
template <typename T>
std::vector<T> numbers(size_t count, uint32_t random) {
  std::vector<T> values(count);
  for (T& value : values) {
    random = random * 1664525u + 1013904223u;
    value = from_float<T>((static_cast<int>(random >> 27) - 16) * 0.125f);
  }
  return values;
}

// How many of m x n results differ from op(a) op(b); transposed operands are stored [k, m], and b as [n, k] if not.
template <typename T>
int wrong_results(const std::vector<T>& a, const std::vector<T>& b, const std::vector<float>& c, int m, int n, int k,
                  bool a_by_column, bool b_by_column) {
  int wrong = 0;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      double sum = 0;
      for (int l = 0; l < k; ++l) {
        sum += static_cast<double>(static_cast<float>(a_by_column ? a[l * m + i] : a[i * k + l])) *
               static_cast<float>(b_by_column ? b[j * k + l] : b[l * n + j]);
      }
      wrong += !(c[i * n + j] == sum);
    }
  }
  return wrong;
}

struct Settings {
  Settings() { pydit_sim_set_arch(90); }
  ~Settings() {
    pydit_sim_set_arch(80);
    pydit_sim_set_async(0);
    pydit_sim_set_seed(0);
  }
};

// Runs `run` for several seeds, late and early; returns how many of the runs were wrong.
template <typename Run>
int wrong_runs(Run run, int seeds) {
  const Settings settings;
  int wrong = 0;
  for (int eager = 0; eager < 2; ++eager) {
    pydit_sim_set_async(eager);
    for (int seed = 0; seed < seeds; ++seed) {
      pydit_sim_set_seed(seed);
      wrong += run();
    }
  }
  return wrong;
}

template <typename T, MmaBug kBug>
bool mma_is_wrong() {
  const int m = 40, n = 72, k = 136;
  const std::vector<T> a = numbers<T>(m * k, 1), b = numbers<T>(k * n, 2);
  std::vector<float> c(m * n, -1.f);
  const dim3 grid((n + 31) / 32, (m + 31) / 32);
  CHECK_EQUAL(
      PYDIT_LAUNCH((gemm_mma<T, kBug>), grid, kMmaThreads, kMmaShared, nullptr, a.data(), b.data(), c.data(), m, n, k),
      cudaSuccess);
  return wrong_results(a, b, c, m, n, k, false, false) > 0;
}

TEST(gemm_by_mma_sync) {
  CHECK_EQUAL((wrong_runs(mma_is_wrong<__nv_bfloat16, MmaBug::kNone>, 3)), 0);
  CHECK_EQUAL((wrong_runs(mma_is_wrong<__half, MmaBug::kNone>, 3)), 0);
}
TEST(bug_wrong_wait_depth) { CHECK((wrong_runs(mma_is_wrong<__half, MmaBug::kWaitDepth>, 1)) > 0); }
TEST(bug_missing_syncthreads_between_stages) { CHECK((wrong_runs(mma_is_wrong<__half, MmaBug::kNoSync>, 3)) > 0); }

template <typename T>
TensorMap map_of(const std::vector<T>& data, uint64_t width, uint64_t height, uint32_t box0, uint32_t box1,
                 int swizzle) {
  TensorMap map;
  const uint64_t size[2] = {width, height}, stride[1] = {width * sizeof(T)};
  const uint32_t box[2] = {box0, box1};
  const char* reason = encode_tensor_map(&map, data.data(), 2, size, stride, box, static_cast<Swizzle>(swizzle));
  selftest::check(reason == nullptr, reason == nullptr ? "" : reason, __LINE__);
  return map;
}

// The launch, on m x n x k of odd size unless given; `c` gets the result.
template <typename T, int kN, int kSwizzle, OperandA kA, bool kTransposeB, WgmmaBug kBug>
cudaError_t launch_wgmma(int m, int n, int k, const std::vector<T>& a, const std::vector<T>& b, std::vector<float>& c) {
  constexpr bool kTransposeA = kA == OperandA::kSharedTransposed;
  const uint32_t span = kSwizzle == 0 ? 8 : kSwizzle / 2;
  const TensorMap a_map =
      kTransposeA ? map_of(a, m, k, span, kWgmmaK, kSwizzle) : map_of(a, k, m, span, kWgmmaM, kSwizzle);
  const TensorMap b_map = kTransposeB ? map_of(b, n, k, span, kWgmmaK, kSwizzle) : map_of(b, k, n, span, kN, kSwizzle);
  constexpr auto kernel = gemm_wgmma<T, kN, kSwizzle, kA, kTransposeB, kBug>;
  const int bytes = wgmma_shared_bytes<kN, kSwizzle, kA, kTransposeB>();
  CHECK_EQUAL(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), cudaSuccess);
  const dim3 grid((n + kN - 1) / kN, (m + kWgmmaM - 1) / kWgmmaM);
  return PYDIT_LAUNCH(kernel, grid, kWgmmaThreads, bytes, nullptr, a_map, b_map, c.data(), m, n, k);
}

template <typename T, int kN, int kSwizzle, OperandA kA, bool kTransposeB, WgmmaBug kBug = WgmmaBug::kNone>
bool wgmma_is_wrong() {
  const int m = 72, n = kN + 8, k = 200;
  const std::vector<T> a = numbers<T>(m * k, 1), b = numbers<T>(k * n, 2);
  std::vector<float> c(m * n, -1.f);
  const cudaError_t error = launch_wgmma<T, kN, kSwizzle, kA, kTransposeB, kBug>(m, n, k, a, b, c);
  if (kBug == WgmmaBug::kNone) selftest::check(error == cudaSuccess, pydit_sim_last_report(), __LINE__);
  return error != cudaSuccess || wrong_results(a, b, c, m, n, k, kA == OperandA::kSharedTransposed, !kTransposeB) > 0;
}

template <typename T, int kN, int kSwizzle, bool kTransposeB>
void check_sources() {
  CHECK_EQUAL((wrong_runs(wgmma_is_wrong<T, kN, kSwizzle, OperandA::kShared, kTransposeB>, 1)), 0);
  CHECK_EQUAL((wrong_runs(wgmma_is_wrong<T, kN, kSwizzle, OperandA::kSharedTransposed, kTransposeB>, 1)), 0);
  CHECK_EQUAL((wrong_runs(wgmma_is_wrong<T, kN, kSwizzle, OperandA::kRegisters, kTransposeB>, 1)), 0);
}

using Bfloat16 = __nv_bfloat16;
TEST(gemm_by_wgmma_swizzle_128) {
  check_sources<Bfloat16, 64, 128, false>();
  check_sources<__half, 64, 128, true>();
}
TEST(gemm_by_wgmma_swizzle_64) {
  check_sources<Bfloat16, 96, 64, true>();
  check_sources<__half, 24, 64, false>();
}
TEST(gemm_by_wgmma_swizzle_32) {
  check_sources<Bfloat16, 80, 32, false>();
  check_sources<__half, 16, 32, true>();
}
TEST(gemm_by_wgmma_without_swizzle) {
  check_sources<Bfloat16, 8, 0, true>();
  check_sources<__half, 40, 0, false>();
}
TEST(gemm_by_wgmma_wide) {
  CHECK_EQUAL((wrong_runs(wgmma_is_wrong<Bfloat16, 256, 128, OperandA::kShared, false>, 1)), 0);
  CHECK_EQUAL((wrong_runs(wgmma_is_wrong<__half, 128, 128, OperandA::kRegisters, true>, 1)), 0);
}
TEST(gemm_by_wgmma_for_several_seeds) {
  CHECK_EQUAL((wrong_runs(wgmma_is_wrong<Bfloat16, 32, 64, OperandA::kShared, false>, 6)), 0);
}

template <WgmmaBug kBug>
int runs_with() {
  return wrong_runs(wgmma_is_wrong<Bfloat16, 32, 64, OperandA::kShared, false, kBug>, 4);
}
TEST(bug_wrong_mbarrier_parity) { CHECK(runs_with<WgmmaBug::kParity>() > 0); }
TEST(bug_wrong_arrival_count) {
  CHECK_EQUAL(runs_with<WgmmaBug::kArrivals>(), 8);
  const std::string report = pydit_sim_last_report();
  for (const char* words : {"deadlock", "[warp 4, lane ", "waits for parity 0 of the mbarrier at byte",
                            "in a phase of parity 0, 1 of 129 arrivals and 0 bytes outstanding"}) {
    selftest::check(report.find(words) != std::string::npos, report, __LINE__);
  }
}
TEST(bug_stage_released_early) { CHECK(runs_with<WgmmaBug::kEarlyRelease>() > 0); }
TEST(bug_wrong_descriptor_offset) { CHECK_EQUAL(runs_with<WgmmaBug::kDescriptor>(), 8); }
TEST(bug_missing_expected_bytes) { CHECK_EQUAL(runs_with<WgmmaBug::kMissingBytes>(), 8); }
TEST(bug_misaligned_destination) {
  CHECK_EQUAL(runs_with<WgmmaBug::kMisaligned>(), 8);
  const std::string report = pydit_sim_last_report();
  selftest::check(report.find("destination: expected a multiple of 128 bytes, got byte") != std::string::npos, report,
                  __LINE__);
}

TEST(bug_hopper_instruction_on_an_ampere) {
  const std::vector<__half> a = numbers<__half>(64 * 64, 1);
  std::vector<float> c(64 * 64);
  const auto launch = [&] {
    return launch_wgmma<__half, 64, 128, OperandA::kShared, false, WgmmaBug::kNone>(64, 64, 64, a, a, c);
  };
  CHECK_FAILS(launch(), "mbarrier.init: needs sm_90a; the simulated device is sm_80");
  int major = 0;
  CHECK_EQUAL(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
  CHECK_EQUAL(major, 8);
  const Settings settings;
  CHECK_EQUAL(launch(), cudaSuccess);
  CHECK_EQUAL(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
  CHECK_EQUAL(major, 9);
}

// Not a test of time: the size to measure the simulator with, `sim_ptx large_product` under a stopwatch.
TEST(large_product) {
  const Settings settings;
  const int size = 512;
  const std::vector<Bfloat16> a = numbers<Bfloat16>(size * size, 1), b = numbers<Bfloat16>(size * size, 2);
  std::vector<float> c(size * size);
  CHECK_EQUAL((launch_wgmma<Bfloat16, 128, 128, OperandA::kShared, false, WgmmaBug::kNone>(size, size, size, a, b, c)),
              cudaSuccess);
  double sum = 0, expected = 0;  // of all elements: the product of the column sums of a and of b
  for (int l = 0; l < size; ++l) {
    double left = 0, right = 0;
    for (int i = 0; i < size; ++i)
      left += static_cast<float>(a[i * size + l]), right += static_cast<float>(b[i * size + l]);
    expected += left * right;
  }
  for (const float x : c) sum += x;
  CHECK_EQUAL(sum, expected);
}

}  // namespace
}  // namespace pydit::sim

int main(int count, char** names) { return selftest::run(count, names); }
