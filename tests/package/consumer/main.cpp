// LN(x) * (1 + scale) + shift of a small batch, by the simulated kernel, against the formula in double precision.
// With CUDA: that the library links and checks its arguments, which needs no GPU.
#include <pydit/pydit.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#ifdef WITH_CUDA
#define CALL(op) pydit_cuda_##op
#else
#define CALL(op) pydit_sim_##op
#endif

namespace {

constexpr int64_t kBatch = 2, kTokens = 5, kChannels = 300;
constexpr float kEps = 1e-6f;

using Values = std::vector<float>;

Values random_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Values values(count);
  std::generate(values.begin(), values.end(), [&] { return normal(generator); });
  return values;
}

template <typename T>
std::vector<double> formula(const Values& x, const Values& scale, const Values& shift) {
  std::vector<double> out;
  for (int64_t token = 0; token < kBatch * kTokens; ++token) {
    const float* row = &x[token * kChannels];
    const int64_t modulation = token / kTokens * kChannels;
    T mean = 0, variance = 0;
    for (int64_t c = 0; c < kChannels; ++c) mean += row[c];
    mean /= kChannels;
    for (int64_t c = 0; c < kChannels; ++c) variance += (row[c] - mean) * (row[c] - mean);
    const T inverse = 1 / std::sqrt(variance / kChannels + T(kEps));
    for (int64_t c = 0; c < kChannels; ++c)
      out.push_back(T((row[c] - mean) * inverse * (1 + T(scale[modulation + c])) + T(shift[modulation + c])));
  }
  return out;
}

double worst(const std::vector<double>& a, const std::vector<double>& b) {
  double error = 0;
  for (size_t i = 0; i < a.size(); ++i) error = std::isnan(a[i]) ? INFINITY : std::max(error, std::fabs(a[i] - b[i]));
  return error;
}

}  // namespace

int main() {
  Values x = random_values(kBatch * kTokens * kChannels, 1), out(x.size(), NAN);
  const Values scale = random_values(kBatch * kChannels, 2), shift = random_values(kBatch * kChannels, 3);

  pydit_ada_layer_norm_params params{};
  params.x = {x.data(), kTokens * kChannels, kChannels};
  params.out = {out.data(), kTokens * kChannels, kChannels};
  params.scale = {scale.data(), kChannels, kChannels};
  params.shift = {shift.data(), kChannels, kChannels};
  params.batch = kBatch;
  params.tokens = kTokens;
  params.channels = kChannels;
  params.split = INT64_MAX;
  params.eps = kEps;
  params.dtype = 9;
  if (CALL(ada_layer_norm)(&params) == 0 || std::strstr(CALL(last_error)(), "dtype: expected") == nullptr) {
    std::printf("a dtype that there is not was taken, or the reason is missing: \"%s\"\n", CALL(last_error)());
    return 1;
  }
  params.dtype = PYDIT_FLOAT32;
#ifdef WITH_CUDA
  params.tokens = 0;
  const int status = CALL(ada_layer_norm)(&params);
  std::printf("linked; status of an empty problem: %d\n", status);
  return status;
#else
  if (CALL(ada_layer_norm)(&params) != 0) {
    std::printf("%s\n", CALL(last_error)());
    return 1;
  }
  const std::vector<double> exact = formula<double>(x, scale, shift), plain = formula<float>(x, scale, shift);
  const double error = worst({out.begin(), out.end()}, exact);
  double largest = 0;
  for (double value : exact) largest = std::max(largest, std::fabs(value));
  // The bound of pydit/testing.py: twice the error of the plain loop in float, and one unit in the last place.
  const double bound = 2 * worst(plain, exact) + std::ldexp(std::numeric_limits<float>::epsilon(), std::ilogb(largest));
  std::printf("largest error %.3g, bound %.3g\n", error, bound);
  return error <= bound ? 0 : 1;
#endif
}
