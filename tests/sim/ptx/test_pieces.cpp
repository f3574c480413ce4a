// Every other group of instructions by itself.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../selftest.h"
#include "device/check.h"
#include "device/vector.cuh"
#include "pieces.cuh"
#include "pieces_90.cuh"

namespace pydit::sim {

char* error_buffer() {
  static char buffer[kErrorBytes];
  return buffer;
}

namespace {

struct Hopper {
  Hopper() { pydit_sim_set_arch(90); }
  ~Hopper() {
    pydit_sim_set_arch(80);
    pydit_sim_set_async(0);
    pydit_sim_set_seed(0);
    pydit_sim_set_threads(0);
  }
};

// Matrices ---------------------------------------------------------------------------------------------------------

template <int kMatrices, bool kTranspose>
void check_matrices() {
  const Hopper hopper;
  std::vector<unsigned short> tile(kMatrices * 64), back(kMatrices * 64);
  for (size_t i = 0; i < tile.size(); ++i) tile[i] = static_cast<unsigned short>(i + 7);
  for (int seed = 0; seed < 3; ++seed) {
    pydit_sim_set_seed(seed);
    std::vector<uint32_t> registers(32 * kMatrices);
    CHECK_EQUAL(PYDIT_LAUNCH((load_matrices<kMatrices, kTranspose>), 1, 32, 0, nullptr, tile.data(), registers.data()),
                cudaSuccess);
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      for (int row = 0; row < 8; ++row) {
        for (int column = 0; column < 8; ++column) {
          // As stored, element (row, column) is in lane 4 row + column / 2; transposed, rows and columns change places.
          const int r = kTranspose ? column : row, c = kTranspose ? row : column;
          const uint32_t pair = registers[(r * 4 + c / 2) * kMatrices + matrix];
          CHECK_EQUAL(c % 2 == 0 ? pair & 0xffff : pair >> 16, tile[matrix * 64 + row * 8 + column]);
        }
      }
    }
    CHECK_EQUAL(PYDIT_LAUNCH((store_matrices<kMatrices, kTranspose>), 1, 32, 0, nullptr, registers.data(), back.data()),
                cudaSuccess);
    CHECK(back == tile);
  }
}

TEST(matrices_in_and_out) {
  check_matrices<1, false>();
  check_matrices<1, true>();
  check_matrices<2, false>();
  check_matrices<2, true>();
  check_matrices<4, false>();
  check_matrices<4, true>();
}

__global__ void misaligned_matrix(const unsigned short* in) {
  uint32_t registers[1];
  ldmatrix(registers, in + 1);
}

TEST(bug_misaligned_matrix_row) {
  alignas(16) unsigned short in[64] = {};
  CHECK_FAILS(PYDIT_LAUNCH(misaligned_matrix, 1, 32, 0, nullptr, +in),
              "ldmatrix: row address: expected a multiple of 16");
}

// cp.async ---------------------------------------------------------------------------------------------------------

template <int kBytes>
void check_copies() {
  const Hopper restore;
  alignas(16) char in[128 * kBytes];
  for (int i = 0; i < 128 * kBytes; ++i) in[i] = static_cast<char>(i % 100 + 1);
  for (int eager = 0; eager < 2; ++eager) {
    pydit_sim_set_async(eager);
    for (int valid = 0; valid <= kBytes; valid += kBytes == 4 ? 1 : 4) {
      std::vector<char> out(128 * kBytes, -1);
      CHECK_EQUAL(PYDIT_LAUNCH(copy_pieces<kBytes>, 1, 128, 0, nullptr, +in, out.data(), valid), cudaSuccess);
      for (int i = 0; i < 128 * kBytes; ++i) CHECK_EQUAL(out[i], i % kBytes < valid ? in[i] : 0);
    }
  }
  char out[128 * kBytes];
  CHECK_FAILS(PYDIT_LAUNCH(copy_pieces<kBytes>, 1, 32, 0, nullptr, in + 2, +out, kBytes), "cp.async: source",
              "multiple");
}

TEST(copies_with_zero_fill) {
  check_copies<4>();
  check_copies<8>();
  check_copies<16>();
}

// Barriers and semaphores ----------------------------------------------------------------------------------------

template <bool kBug>
int wrong_hand_overs() {
  int wrong = 0;
  for (int seed = 0; seed < 8; ++seed) {
    pydit_sim_set_seed(seed);
    std::vector<int> out(5 * 64);
    CHECK_EQUAL(PYDIT_LAUNCH(hand_over<kBug>, 2, 128, 0, nullptr, out.data(), 5), cudaSuccess);
    for (int i = 0; i < 5 * 64; ++i) wrong += out[i] != i / 64 * 1000 + 63 - i % 64;
  }
  pydit_sim_set_seed(0);
  return wrong;
}

TEST(named_barriers) {
  CHECK_EQUAL(wrong_hand_overs<false>(), 0);
  CHECK(wrong_hand_overs<true>() > 0);
}

__global__ void bad_barrier(int id, int threads) { barrier_sync(id, threads); }

TEST(bug_named_barrier_arguments) {
  CHECK_FAILS(PYDIT_LAUNCH(bad_barrier, 1, 64, 0, nullptr, 16, 64), "barrier: expected 1 to 15, got 16");
  CHECK_FAILS(PYDIT_LAUNCH(bad_barrier, 1, 64, 0, nullptr, 1, 40), "multiple of 32 up to the block's 64, got 40");
}

TEST(semaphores_between_64_blocks) {
  const Hopper restore;
  for (int threads = 1; threads <= 2; ++threads) {
    pydit_sim_set_threads(threads);
    for (int seed = 0; seed < 5; ++seed) {
      pydit_sim_set_seed(seed);
      unsigned tickets = 0, done = 0, expected = 5;
      std::vector<unsigned> x(128, 5);
      CHECK_EQUAL(PYDIT_LAUNCH(pass_on, 64, 128, 0, nullptr, &tickets, &done, x.data()), cudaSuccess);
      for (unsigned ticket = 0; ticket < 64; ++ticket) expected = expected * 3 + ticket;
      for (const unsigned value : x) CHECK_EQUAL(value, expected);
      CHECK_EQUAL(done, 64u);
    }
  }
}

TEST(bug_semaphore_that_nobody_sets) {
  const Hopper restore;
  for (int threads = 1; threads <= 2; ++threads) {
    pydit_sim_set_threads(threads);
    unsigned done = 0;
    CHECK_FAILS(PYDIT_LAUNCH(wait_for_ever, 64, 128, 0, nullptr, &done), "deadlock: every block that runs only polls",
                "reads 0 at", "thread (0, 0, 0)");
  }
}

__global__ void fail_while_others_wait(unsigned* tickets, unsigned* done) {
  if (threadIdx.x != 0) return;
  if (atomicAdd(tickets, 1u) == 0) {
    while (*static_cast<volatile unsigned*>(tickets) < 2) __nanosleep(100);
    __trap();
  }
  wait_at_least(done, 1);
}

TEST(a_block_that_fails_ends_those_that_wait_for_it) {
  const Hopper restore;
  pydit_sim_set_threads(2);
  unsigned tickets = 0, done = 0;
  CHECK_FAILS(PYDIT_LAUNCH(fail_while_others_wait, 64, 128, 0, nullptr, &tickets, &done), "__trap()");
}

// Atomics ----------------------------------------------------------------------------------------------------------

TEST(atomics_of_one_value) {
  const int blocks = 40, threads = 128, all = blocks * threads;
  float f = 0;
  double d = 0;
  int i[3] = {};
  unsigned u[3] = {};
  unsigned long long ull = 1;
  CHECK_EQUAL(PYDIT_LAUNCH(scalar_atomics, blocks, threads, 0, nullptr, &f, &d, +i, +u, &ull), cudaSuccess);
  CHECK_EQUAL(f, all * (all + 1) / 2.f);  // below 2^24: exact
  CHECK_EQUAL(d, all * (all + 1) / 4.);
  CHECK_EQUAL(i[0], -all * (all + 1) / 2);
  CHECK_EQUAL(i[1], all);
  CHECK_EQUAL(i[2], -all);
  CHECK_EQUAL(u[0], 2u * all);
  CHECK(u[1] >= 1 && u[1] <= static_cast<unsigned>(all));
  CHECK_EQUAL(u[2], 3u * all);
  CHECK_EQUAL(ull, 1 + (static_cast<unsigned long long>(all) << 33));
}

TEST(atomics_of_pairs_and_quadruples) {
  __nv_bfloat162 b = __floats2bfloat162_rn(0.f, 0.f);
  __half2 h = __floats2half2_rn(0.f, 0.f);
  CHECK_EQUAL(PYDIT_LAUNCH(pair_atomics, 4, 32, 0, nullptr, &b, &h), cudaSuccess);
  CHECK_EQUAL(__bfloat1622float2(b).x, 128.f);
  CHECK_EQUAL(__bfloat1622float2(b).y, -256.f);
  CHECK_EQUAL(__half22float2(h).x, 64.f);
  CHECK_EQUAL(__half22float2(h).y, 128.f);
  float2 pair = {};
  float4 quadruple = {};
  CHECK_FAILS(PYDIT_LAUNCH(vector_atomics, 40, 128, 0, nullptr, &pair, &quadruple), "atomicAdd(float2): needs sm_90a");
  const Hopper hopper;
  pair = {};
  CHECK_EQUAL(PYDIT_LAUNCH(vector_atomics, 40, 128, 0, nullptr, &pair, &quadruple), cudaSuccess);
  CHECK_EQUAL(pair.x, 5120.f);
  CHECK_EQUAL(pair.y, 10240.f);
  CHECK_EQUAL(quadruple.x + 10 * quadruple.y + 100 * quadruple.z + 1000 * quadruple.w, 5120.f * (1 - 10 + 25 + 3000));
}

// TMA --------------------------------------------------------------------------------------------------------------

// A box from somewhere in a tensor to somewhere in another of the same shape, all by plain loops on the host.
template <typename T, int kRank, bool kAdd>
void check_box(const uint64_t (&size)[4], const uint32_t (&box)[4], int swizzle, BoxAt from, BoxAt to) {
  const Hopper hopper;
  uint64_t stride[4], elements = size[0], steps[4] = {1};  // rows are padded to 16 bytes
  const uint64_t pitch = (size[0] * sizeof(T) + 15) / 16 * 16 / sizeof(T);
  uint32_t count = box[0];
  elements = pitch;
  for (int d = 1; d < kRank; ++d) {
    steps[d] = elements;
    stride[d - 1] = elements * sizeof(T);
    elements *= size[d];
    count *= box[d];
  }
  const auto number = [](uint64_t i) { return static_cast<float>(static_cast<int>(i * 37 % 101) - 50); };
  std::vector<T> in_memory(elements + 16), out_memory(elements + 16);
  const auto aligned = [](std::vector<T>& v) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(v.data()) + 15) & ~uintptr_t{15});
  };
  T *in = aligned(in_memory), *out = aligned(out_memory);
  for (int eager = 0; eager < 2; ++eager) {
    pydit_sim_set_async(eager);
    for (uint64_t i = 0; i < elements; ++i) in[i] = from_float<T>(number(i)), out[i] = from_float<T>(1.f);
    std::vector<float> expected_out(elements, 1.f);
    std::vector<char> dump(count * sizeof(T)), expected_dump(dump.size());
    for (uint32_t i = 0; i < count; ++i) {
      uint64_t rest = i, from_index = 0, to_index = 0;
      bool from_inside = true, to_inside = true;
      for (int d = 0; d < kRank; ++d) {
        const int64_t step = rest % box[d];
        rest /= box[d];
        const int64_t f = from.c[d] + step, t = to.c[d] + step;
        from_inside = from_inside && f >= 0 && f < static_cast<int64_t>(size[d]);
        to_inside = to_inside && t >= 0 && t < static_cast<int64_t>(size[d]);
        from_index += f * steps[d];
        to_index += t * steps[d];
      }
      const float value = from_inside ? static_cast<float>(in[from_index]) : 0.f;
      if (to_inside) expected_out[to_index] = value + (kAdd ? 1.f : 0.f);
      // Row r of the box, chunk q of 16 bytes in it: the swizzle puts it at chunk q xor a function of the row.
      const uint32_t byte = i * sizeof(T);
      uint32_t place = byte;
      if (swizzle > 0) {
        const uint32_t row = byte / swizzle, chunk = byte % swizzle / 16;
        const uint32_t turn = swizzle == 128 ? row % 8 : swizzle == 64 ? row / 2 % 4 : row / 4 % 2;
        place = row * swizzle + (chunk ^ turn) * 16 + byte % 16;
      }
      const T element = from_float<T>(value);
      memcpy(&expected_dump[place], &element, sizeof element);
    }
    TensorMap in_map, out_map;
    CHECK(encode_tensor_map(&in_map, in, kRank, size, stride, box, static_cast<Swizzle>(swizzle)) == nullptr);
    CHECK(encode_tensor_map(&out_map, out, kRank, size, stride, box, static_cast<Swizzle>(swizzle)) == nullptr);
    const int bytes = static_cast<int>(dump.size());
    CHECK_EQUAL(PYDIT_LAUNCH((move_box<kRank, kAdd>), 1, 64, (bytes + 127) / 128 * 128 + 8, nullptr, in_map, out_map,
                             dump.data(), bytes, from, to),
                cudaSuccess);
    CHECK(dump == expected_dump);
    int wrong = 0;
    for (uint64_t i = 0; i < elements; ++i) wrong += static_cast<float>(out[i]) != expected_out[i];
    CHECK_EQUAL(wrong, 0);
  }
}

TEST(boxes_of_two_dimensions) {
  for (const BoxAt from : {BoxAt{{0, 0}}, BoxAt{{3, 5}}, BoxAt{{-9, -2}}, BoxAt{{60, 14}}, BoxAt{{200, 3}}}) {
    check_box<__nv_bfloat16, 2, false>({90, 20, 0, 0}, {64, 12, 0, 0}, 128, from, {{8, 10, 0, 0}});
    check_box<__half, 2, false>({90, 20, 0, 0}, {32, 12, 0, 0}, 64, from, {{-5, 17, 0, 0}});
    check_box<float, 2, true>({90, 20, 0, 0}, {8, 12, 0, 0}, 32, from, {{85, -3, 0, 0}});
    check_box<__nv_bfloat16, 2, true>({90, 20, 0, 0}, {40, 12, 0, 0}, 0, from, {{70, 0, 0, 0}});
  }
}
TEST(boxes_of_three_dimensions) {
  check_box<__half, 3, true>({70, 9, 4, 0}, {64, 3, 2, 0}, 128, {{-1, 7, 3, 0}}, {{10, -1, 1, 0}});
  check_box<float, 3, false>({70, 9, 4, 0}, {16, 5, 3, 0}, 64, {{60, 0, -1, 0}}, {{0, 6, 2, 0}});
}
TEST(boxes_of_four_dimensions) {
  check_box<__nv_bfloat16, 4, false>({40, 5, 3, 4}, {16, 4, 2, 3}, 32, {{30, 3, 1, 2}}, {{-3, -1, 2, -1}});
  check_box<float, 4, true>({40, 5, 3, 4}, {32, 2, 3, 2}, 128, {{1, 1, 1, 1}}, {{20, 4, -1, 3}});
}

TEST(tensor_maps_that_cannot_be) {
  alignas(16) float data[64];
  TensorMap map;
  const uint64_t size[2] = {8, 8}, stride[1] = {32}, odd_stride[1] = {36};
  const uint32_t box[2] = {8, 8}, narrow[2] = {3, 8}, empty[2] = {8, 0};
  const auto reason = [&](const float* base, const uint64_t* strides, const uint32_t* shape, Swizzle swizzle) {
    const char* text = encode_tensor_map(&map, base, 2, size, strides, shape, swizzle);
    return std::string(text == nullptr ? "none" : text);
  };
  CHECK(reason(data, stride, box, Swizzle::kNone) == "none");
  CHECK(reason(data + 1, stride, box, Swizzle::kNone).find("base: expected a multiple of 16 bytes") !=
        std::string::npos);
  CHECK(reason(data, odd_stride, box, Swizzle::kNone).find("stride") != std::string::npos);
  const uint64_t expanded[1] = {0};
  CHECK(reason(data, expanded, box, Swizzle::kNone).find("stride: expected a multiple of 16 bytes, more than 0") !=
        std::string::npos);
  const uint64_t single[2] = {9, 1};  // whose stride is never used, but shall count the row before it
  CHECK(encode_tensor_map(&map, data, 2, single, odd_stride, box, Swizzle::kNone) == nullptr && map.stride[1] == 48);
  CHECK(reason(data, stride, narrow, Swizzle::kNone).find("a multiple of 16 bytes, got 12") != std::string::npos);
  CHECK(reason(data, stride, empty, Swizzle::kNone).find("box: expected 1 to 256, got 0") != std::string::npos);
  CHECK(reason(data, stride, box, Swizzle::k64).find("the swizzle span, got 32") != std::string::npos);
}

template <bool kBug>
int wrong_rows() {
  const Hopper hopper;
  alignas(16) float in[64];
  for (int i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  int wrong = 0;
  for (int eager = 0; eager < 2; ++eager) {
    pydit_sim_set_async(eager);
    alignas(16) float out[64] = {}, copy[32] = {};
    TensorMap map;
    const uint64_t size[2] = {32, 2}, stride[1] = {128};
    const uint32_t box[2] = {32, 1};
    CHECK(encode_tensor_map(&map, out, 2, size, stride, box, Swizzle::kNone) == nullptr);
    CHECK_EQUAL(PYDIT_LAUNCH(store_rows<kBug>, 1, 32, 264, nullptr, map, +in, +copy), cudaSuccess);
    for (int i = 0; i < 64; ++i) wrong += out[i] != in[i];
    for (int i = 0; i < 32; ++i) CHECK_EQUAL(copy[i], in[32 + i]);
  }
  return wrong;
}

TEST(stores_and_plain_bulk_loads) { CHECK_EQUAL(wrong_rows<false>(), 0); }
TEST(bug_buffer_reused_before_the_store_has_read_it) { CHECK(wrong_rows<true>() > 0); }

__global__ void forget_to_wait(const float* in, int what) {
  PYDIT_DYNAMIC_SHARED(float, shared);
  auto* full = reinterpret_cast<uint64_t*>(shared + 64);
  if (threadIdx.x == 0 && what == 0) mbarrier_wait(full, 0);
  if (threadIdx.x == 0 && what > 0) {
    mbarrier_init(full, 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(full, 128);
    if (what == 2) mbarrier_arrive(full);
    bulk_load(shared, in, 128, full);
  }
}

TEST(bug_misused_mbarriers) {
  const Hopper hopper;
  alignas(16) float in[32] = {};
  CHECK_FAILS(PYDIT_LAUNCH(forget_to_wait, 1, 32, 264, nullptr, +in, 0), "no mbarrier is initialised at byte 256");
  CHECK_FAILS(PYDIT_LAUNCH(forget_to_wait, 1, 32, 264, nullptr, +in, 1), "bulk copy to byte 0", "nobody waited");
  CHECK_FAILS(PYDIT_LAUNCH(forget_to_wait, 1, 32, 264, nullptr, +in, 2), "one arrival too many, 1 are counted");
}

// Shared memory and settings -------------------------------------------------------------------------------------

__global__ void uses_shared(int* out) {
  PYDIT_DYNAMIC_SHARED(int, shared);
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[threadIdx.x];
}

// A ring that a whole warp fills: all lanes keep count, one issues. Where lanes come together only after the issue, one
// of them can fall behind by a round of the ring, and waits for a phase that is over.
enum class FillBug { kNone, kTogetherTooLate };
constexpr int kFillRounds = 8;
template <FillBug kBug>
__global__ void filled_by_a_warp(const float* in, float* out) {
  PYDIT_DYNAMIC_SHARED(float, values);
  auto* barriers = reinterpret_cast<uint64_t*>(values + 32);  // full, empty
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(&barriers[i], 1);
    fence_barrier_init();
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < 32) {
    for (int round = 0; round < kFillRounds; ++round) {
      mbarrier_wait(&barriers[1], round % 2 ^ 1);
      if (kBug == FillBug::kNone) __syncwarp();
      if (lane == 0) {
        mbarrier_arrive_expect_tx(&barriers[0], 128);
        bulk_load(values, in + round * 32, 128, &barriers[0]);
      }
      if (kBug == FillBug::kTogetherTooLate) __syncwarp();
    }
  } else {
    float sum = 0;
    for (int round = 0; round < kFillRounds; ++round) {
      mbarrier_wait(&barriers[0], round % 2);
      sum += values[lane];
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&barriers[1]);
      __syncwarp();
    }
    out[lane] = sum;
  }
}
template <FillBug kBug>
int deadlocks() {
  pydit_sim_set_arch(90);
  std::vector<float> in(kFillRounds * 32, 1.f), out(32);
  int found = 0;
  for (int seed = 0; seed < 64; ++seed) {
    pydit_sim_set_seed(seed);
    const cudaError_t error = PYDIT_LAUNCH(filled_by_a_warp<kBug>, 1, 64, 160, nullptr, in.data(), out.data());
    if (error == cudaSuccess)
      CHECK_EQUAL(out[7], static_cast<float>(kFillRounds));
    else
      found += strstr(pydit_sim_last_report(), "deadlock") != nullptr;
  }
  pydit_sim_set_seed(0);
  pydit_sim_set_arch(80);
  return found;
}
TEST(bug_lane_behind_by_a_round_of_a_ring) {
  CHECK_EQUAL(deadlocks<FillBug::kNone>(), 0);
  CHECK(deadlocks<FillBug::kTogetherTooLate>() > 0);
}

TEST(register_budgets_and_shared_addresses) {
  uint32_t addresses[384];
  CHECK_FAILS(PYDIT_LAUNCH(budgets, 1, 384, 2048, nullptr, +addresses), "setmaxnreg");
  const Hopper hopper;
  CHECK_EQUAL(PYDIT_LAUNCH(budgets, 1, 384, 2048, nullptr, +addresses), cudaSuccess);
  for (uint32_t i = 0; i < 384; ++i) CHECK_EQUAL(addresses[i], addresses[0] + 4 * i);
}

TEST(shared_memory_beyond_48_kb_must_be_asked_for) {
  int out[32], most = 0;
  CHECK_REFUSED(PYDIT_LAUNCH(uses_shared, 1, 32, 48 * 1024 + 1, nullptr, +out), "expected at most 49152 bytes");
  CHECK_EQUAL(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaSuccess);
  CHECK_EQUAL(most, 163 * 1024);
  CHECK_EQUAL(cudaFuncSetAttribute(uses_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, most + 1),
              cudaErrorInvalidValue);
  CHECK_EQUAL(launch_status("uses_shared", cudaErrorInvalidValue), kLaunchFailed);
  CHECK_EQUAL(cudaGetLastError(), cudaSuccess);  // or the next launch would be said to have failed
  CHECK_EQUAL(cudaFuncSetAttribute(uses_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, most), cudaSuccess);
  CHECK_EQUAL(PYDIT_LAUNCH(uses_shared, 1, 32, most, nullptr, +out), cudaSuccess);
  const Hopper hopper;
  CHECK_EQUAL(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), cudaSuccess);
  CHECK_EQUAL(most, 227 * 1024);
}

// Run by test_ptx.py, which sets the variable and says what it expects.
bool expected(const char* value) {
  const char* text = getenv("EXPECTED");
  return text == nullptr ? strcmp(value, "lazy") == 0 || strcmp(value, "80") == 0 : strcmp(text, value) == 0;
}
TEST(environment_pydit_sim_async) { CHECK(expected(simt::eager() ? "eager" : "lazy")); }
TEST(environment_pydit_sim_arch) { CHECK(expected(simt::arch() == 90 ? "90a" : "80")); }

TEST(settings_that_do_not_exist) {
  CHECK_EQUAL(pydit_sim_set_arch(86), 1);
  CHECK_EQUAL(pydit_sim_set_async(2), 1);
  CHECK_EQUAL(simt::arch(), 80);
}

}  // namespace
}  // namespace pydit::sim
