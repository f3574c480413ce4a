// Self test of the simulator, part 1: bf16 and fp16, vector types, math and atomics.
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "selftest.h"

namespace {

// An independent description of a 16-bit format: its values by arithmetic, and rounding by search for the nearest.
struct Format {
  int exponent_bits, mantissa_bits;

  double value(unsigned bits) const {  // of a finite, positive pattern
    const int exponent = static_cast<int>(bits >> mantissa_bits), bias = (1 << (exponent_bits - 1)) - 1;
    const double mantissa = bits & ((1u << mantissa_bits) - 1);
    const double scale = std::ldexp(1., -mantissa_bits);
    return exponent == 0 ? std::ldexp(mantissa * scale, 1 - bias) : std::ldexp(1 + mantissa * scale, exponent - bias);
  }
  unsigned infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }

  unsigned nearest(float x) const {  // the infinity takes part as the value that would come after the largest
    const unsigned sign = std::signbit(x) ? 0x8000u : 0;
    const double wanted = std::fabs(static_cast<double>(x));
    if (wanted >= value(infinity())) return sign | infinity();
    unsigned low = 0, high = infinity();  // value(low) <= wanted < value(high)
    while (high - low > 1) {
      const unsigned middle = (low + high) / 2;
      (value(middle) <= wanted ? low : high) = middle;
    }
    const double below = wanted - value(low), above = value(high) - wanted;
    return sign | (below < above || (below == above && low % 2 == 0) ? low : high);
  }
};

constexpr Format kBfloat16 = {8, 7}, kHalf = {5, 10};

// Floats around every value of the format and every midpoint between two, and many others.
template <typename Visit>
void for_each_float(const Format& format, Visit visit) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (unsigned bits = 0; bits < format.infinity(); ++bits) {
    const auto value = static_cast<float>(format.value(bits));
    const auto middle = static_cast<float>((format.value(bits) + format.value(bits + 1)) / 2);
    for (const float x : {value, middle}) {
      for (const float y : {x, std::nextafterf(x, infinity), std::nextafterf(x, 0.f)}) {
        visit(y);
        visit(-y);
      }
    }
  }
  uint32_t bits = 12345;
  for (int i = 0; i < 200000; ++i) {
    bits = bits * 1664525u + 1013904223u;
    const float x = __uint_as_float(bits);
    if (!std::isnan(x)) visit(x);
  }
  visit(infinity);
  visit(-infinity);
}

template <typename ToFloat, typename FromFloat>
void check_format(const Format& format, ToFloat to_float, FromFloat from_float) {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const unsigned magnitude = bits & 0x7fff;
    const float x = to_float(static_cast<unsigned short>(bits));
    if (magnitude > format.infinity()) {
      CHECK(std::isnan(x));
      CHECK_EQUAL(from_float(x), 0x7fffu);
      continue;
    }
    const double value = magnitude == format.infinity() ? HUGE_VAL : format.value(magnitude);
    CHECK_EQUAL(static_cast<double>(x), bits & 0x8000 ? -value : value);
    CHECK_EQUAL(std::signbit(x), (bits & 0x8000) != 0);
    CHECK_EQUAL(from_float(x), bits);
  }
  for_each_float(format, [&](float x) { CHECK_EQUAL(from_float(x), format.nearest(x)); });
  for (const uint32_t nan : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffc00000u, 0xffffffffu}) {
    CHECK_EQUAL(from_float(__uint_as_float(nan)), 0x7fffu);
  }
}

}  // namespace

TEST(bfloat16_is_exact) {
  check_format(kBfloat16, [](unsigned short bits) { return __bfloat162float(__ushort_as_bfloat16(bits)); },
               [](float x) -> unsigned { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); });
}

TEST(half_is_exact) {
  check_format(kHalf, [](unsigned short bits) { return __half2float(__ushort_as_half(bits)); },
               [](float x) -> unsigned { return __half_as_ushort(__float2half_rn(x)); });
}

TEST(pairs_of_16_bits) {
  const __nv_bfloat162 b = __floats2bfloat162_rn(1.f, -2.5f);
  CHECK_EQUAL(__bfloat1622float2(b).x, 1.f);
  CHECK_EQUAL(__bfloat1622float2(b).y, -2.5f);
  const __half2 h = __floats2half2_rn(0.5f, 3.f);
  CHECK_EQUAL(__half22float2(h).x, 0.5f);
  CHECK_EQUAL(__half22float2(h).y, 3.f);
  uint32_t bits;
  memcpy(&bits, &b, sizeof bits);
  CHECK_EQUAL(bits, 0xc0203f80u);  // x in the lower half
}

TEST(vector_types_have_cuda_layout) {
  static_assert(sizeof(float2) == 8 && alignof(float2) == 8);
  static_assert(sizeof(float3) == 12 && alignof(float3) == 4);
  static_assert(sizeof(float4) == 16 && alignof(float4) == 16);
  static_assert(sizeof(uint4) == 16 && alignof(uint4) == 16);
  static_assert(sizeof(uchar4) == 4 && alignof(uchar4) == 4);
  static_assert(sizeof(ushort4) == 8 && alignof(ushort4) == 8);
  static_assert(sizeof(double2) == 16 && alignof(double2) == 16);
  static_assert(sizeof(double4) == 32 && alignof(double4) == 16);
  static_assert(sizeof(__half2) == 4 && alignof(__half2) == 4);
  static_assert(sizeof(__nv_bfloat16) == 2 && std::is_trivially_default_constructible_v<__nv_bfloat16>);
  const int4 v = make_int4(1, 2, 3, 4);
  CHECK_EQUAL(v.x + 10 * v.y + 100 * v.z + 1000 * v.w, 4321);
  CHECK_EQUAL(dim3(5).y, 1u);
}

TEST(arithmetic_is_not_contracted) {
  // (1 + e)^2 - 1 - 2e = e^2, which a separate multiplication loses and a fused one keeps.
  const volatile float e = 0x1p-12f;
  const float a = 1.f + e, c = -1.f - 2.f * e;
  CHECK_EQUAL(a * a + c, 0.f);
  CHECK_EQUAL(__fadd_rn(__fmul_rn(a, a), c), 0.f);
  CHECK_EQUAL(fmaf(a, a, c), e * e);
  CHECK_EQUAL(__fmaf_rn(a, a, c), e * e);
}

TEST(math_functions) {
  for (float x = 1e-30f; x < 1e30f; x *= 3.7f) {
    const double exact = 1. / std::sqrt(static_cast<double>(x));
    CHECK(std::fabs(rsqrtf(x) - exact) <= exact * 0x1p-24);
  }
  CHECK_EQUAL(rsqrtf(0.f), std::numeric_limits<float>::infinity());
  CHECK_EQUAL(max(3, 7u), 7u);
  CHECK_EQUAL(min(2.5f, 1), 1.f);
  CHECK_EQUAL(fmaxf(NAN, 2.f), 2.f);
  CHECK_EQUAL(max(NAN, 2.f), 2.f);
  CHECK(std::fabs(__expf(1.f) - 2.718281828f) < 1e-6f);
  CHECK_EQUAL(exp2f(10.f), 1024.f);
  CHECK_EQUAL(__brev(1u), 0x80000000u);
  CHECK_EQUAL(__clz(1), 31);
  CHECK_EQUAL(__popc(0xf0f0u), 8);
}

__global__ void atomics_kernel(float* f, double* d, int* i, unsigned* u, unsigned* inc, unsigned long long* l) {
  atomicAdd(f, 1.f);
  atomicAdd(d, 0.5);
  atomicAdd(i, -2);
  atomicMax(u, blockIdx.x * blockDim.x + threadIdx.x);
  atomicInc(inc, 9);
  unsigned long long seen = *l, assumed;
  do {
    assumed = seen;
    seen = atomicCAS(l, assumed, assumed + 3);
  } while (seen != assumed);
}

TEST(atomics_over_many_blocks) {
  float f = 0;
  double d = 0;
  int i = 0;
  unsigned u = 0, inc = 0;
  unsigned long long l = 0;
  pydit_sim_set_threads(4);
  CHECK_EQUAL(PYDIT_LAUNCH(atomics_kernel, 256, 128, 0, nullptr, &f, &d, &i, &u, &inc, &l), cudaSuccess);
  const int threads = 256 * 128;
  CHECK_EQUAL(f, static_cast<float>(threads));
  CHECK_EQUAL(d, threads * 0.5);
  CHECK_EQUAL(i, threads * -2);
  CHECK_EQUAL(u, static_cast<unsigned>(threads - 1));
  CHECK_EQUAL(inc, static_cast<unsigned>(threads % 10));
  CHECK_EQUAL(l, threads * 3ull);
}
