// qk_norm_rope: RMSNorm over the head dimension of q and k, then rotary embedding of interleaved pairs, in one launch.
//
//   n = x * rsqrt(mean(x^2) + eps) * weight
//   out[2i]     = n[2i] * cos[s, i] - n[2i + 1] * sin[s, i]
//   out[2i + 1] = n[2i] * sin[s, i] + n[2i + 1] * cos[s, i]
//
// Bound by memory: q and k are read and written once. A head vector is held by a group of kLanes lanes (D = 128 in
// bf16: 16 lanes of 16 bytes), so its sum of squares takes a few shuffles. The groups of a token walk over its 2H head
// vectors (q heads, then k heads), so that each thread reads the token's cos and sin once. All threads take part in the
// shuffles, even without a vector of their own.
//
// Arithmetic is not free here. At 4.8 TB/s the 7401 tokens of Qwen-Image in bf16 take 39 us, 68,000 to 77,000 cycles. A
// step of a walk is about 120 instructions, its set-up 190: 52,000 cycles if every scheduler issues in each.
//
// joint_qk_norm_rope does both streams in one launch: the first blocks take the image's tokens, the rest the text's,
// which alone would not fill the GPU.
//
// Floor: 4 B S H D accesses of sizeof(T) + the cos/sin table.

#include "device/check.h"
#include "device/dispatch.h"
#include "device/reduce.cuh"
#include "device/tiling.cuh"
#include "device/vector.cuh"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 2;  // of a block: few and long walks, as a thread's set-up costs as much as two vectors
constexpr int kMaxHeadDim = 256;
constexpr int64_t kMaxGridY = 65535;

template <typename T>
__device__ __forceinline__ T* head_vector(const pydit_heads& t, int64_t b, int64_t s, int64_t h) {
  return static_cast<T*>(t.data) + b * t.stride_b + s * t.stride_s + h * t.stride_h;
}

// One or two streams that share all but tensors and tokens; the first has `first_blocks` blocks.
template <int kStreams>
struct Streams {
  pydit_qk_norm_rope_params stream[kStreams];
  unsigned first_blocks;
};

// The elements at `source` if `inside`, otherwise all `other`.
template <bool kWide, typename T, int kWidth>
__device__ __forceinline__ void load_part(Words<T, kWidth>& to, const T* source, bool inside, float other) {
  to = Words<T, kWidth>::all(other);
  if (!inside) return;
  if constexpr (kWide) {
    to = Words<T, kWidth>::load(source);
  } else {
    Pack<T, kWidth> part;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) part.value[j] = source[j];
    memcpy(&to, &part, sizeof part);
  }
}

// Lane l of a group holds the kWidth elements from (i * kLanes + l) * kWidth for i < kVectors; kWidth is even, so a
// pair never crosses lanes. kWide: whole 16-byte accesses and all lanes in use; otherwise element by element.
//
// A group loads the next head vector while it works on one: with a single load in flight per thread, memory would wait
// for arithmetic.
template <typename T, int kWidth, int kLanes, int kVectors, bool kWide, int kStreams>
__global__ void __launch_bounds__(kThreads, kWide ? 4 : 1)
    qk_norm_rope_kernel(const __grid_constant__ Streams<kStreams> streams) {
  const bool second = kStreams == 2 && blockIdx.x >= streams.first_blocks;
  const pydit_qk_norm_rope_params& p = streams.stream[second ? kStreams - 1 : 0];
  using Vec = Pack<T, kWidth>;
  constexpr int kGroups = kThreads / kLanes / kTokens;  // of a token
  const int head_dim = kWide ? kLanes * kWidth * kVectors : p.head_dim;
  const int lane = threadIdx.x % kLanes;
  const int group = threadIdx.x / kLanes;
  const int vectors_per_token = 2 * p.heads;
  const unsigned block = second ? blockIdx.x - streams.first_blocks : blockIdx.x;
  const int64_t s = static_cast<int64_t>(block) * kTokens + group / kGroups;
  const int64_t b = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  static_assert(kGroups * kLanes % 32 == 0, "a warp has one token");
  if (s >= p.tokens || b >= p.batch) return;

  Words<float, kWidth / 2> cosine[kVectors], sine[kVectors];
  bool exists[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int d = (i * kLanes + lane) * kWidth;
    exists[i] = group % kGroups < vectors_per_token && (kWide || d < head_dim);
    const bool rotate = p.cos != nullptr && exists[i];
    const int64_t angle = s * (head_dim / 2) + d / 2;
    load_part<kWide>(cosine[i], p.cos + angle, rotate, 1.f);
    load_part<kWide>(sine[i], p.sin + angle, rotate, 0.f);
  }

  int vector = group % kGroups;  // heads of q, then heads of k
  const T* source;
  T* out;
  int64_t in_step, out_step;
  Words<T, kWidth> next[kVectors], weight[kVectors];
  const auto enter = [&](bool is_q) {
    const pydit_heads &in = is_q ? p.q : p.k, &to = is_q ? p.q_out : p.k_out;
    const int head = is_q ? vector : vector - p.heads;
    source = head_vector<T>(in, b, s, head) + lane * kWidth, in_step = kGroups * in.stride_h;
    out = head_vector<T>(to, b, s, head) + lane * kWidth, out_step = kGroups * to.stride_h;
    const T* of_side = static_cast<const T*>(is_q ? p.q_weight : p.k_weight) + lane * kWidth;
    const bool given = (is_q ? p.q_weight : p.k_weight) != nullptr;
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      load_part<kWide>(weight[i], of_side + i * kLanes * kWidth, exists[i] && given, 1.f);
  };
  const auto fetch = [&] {
#pragma unroll
    for (int i = 0; i < kVectors; ++i)
      load_part<kWide>(next[i], source + i * kLanes * kWidth, exists[i] && vector < vectors_per_token, 0.f);
  };

  enter(vector < p.heads);
  fetch();
  // The trip count is the same for all threads, so that all meet in the shuffles.
  for (int first = 0; first < vectors_per_token; first += kGroups) {
    float value[kVectors][kWidth], factor[kVectors][kWidth];
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        value[i][j] = next[i][j], factor[i][j] = weight[i][j];
        squares = fmaf(value[i][j], value[i][j], squares);
      }
    }
    T* const place = out;
    const bool active = vector < vectors_per_token;
    if (first + kGroups < vectors_per_token) {
      const bool leaves_q = vector < p.heads && vector + kGroups >= p.heads;
      vector += kGroups;
      if (leaves_q)
        enter(false);
      else
        source += in_step, out += out_step;
      fetch();
    }
    const float mean_square = lane_group_sum<kLanes>(squares) / static_cast<float>(head_dim);
    const float rrms = rsqrtf(mean_square + p.eps);
    if (!active) continue;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!exists[i]) continue;
      const auto &c = cosine[i], &s = sine[i];
      Vec rotated;
#pragma unroll
      for (int j = 0; j < kWidth; j += 2) {
        const float even = value[i][j] * rrms * factor[i][j], odd = value[i][j + 1] * rrms * factor[i][j + 1];
        rotated.set(j, even * c[j / 2] - odd * s[j / 2]);
        rotated.set(j + 1, even * s[j / 2] + odd * c[j / 2]);
      }
      if constexpr (kWide) {
        rotated.store(place + i * kLanes * kWidth);
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) place[i * kLanes * kWidth + j] = rotated.value[j];
      }
    }
  }
}

template <typename T>
void name_tensors(const pydit_qk_norm_rope_params& p) {
  const auto heads = [&](const char* name, const pydit_heads& t, bool writable) {
    name_tensor(name, t.data, writable, sizeof(T), p.head_dim, {p.batch, p.tokens, p.heads},
                {t.stride_b, t.stride_s, t.stride_h});
  };
  heads("q", p.q, false), heads("k", p.k, false), heads("q_out", p.q_out, true), heads("k_out", p.k_out, true);
  name_tensor("q_weight", p.q_weight, false, sizeof(T), p.head_dim, {1}, {0});
  name_tensor("k_weight", p.k_weight, false, sizeof(T), p.head_dim, {1}, {0});
  name_tensor("cos", p.cos, false, sizeof(float), p.head_dim / 2, {p.tokens}, {p.head_dim / 2});
  name_tensor("sin", p.sin, false, sizeof(float), p.head_dim / 2, {p.tokens}, {p.head_dim / 2});
}

template <typename T, int kWidth, int kLanes, int kVectors, bool kWide, int kStreams>
int launch_groups(const char* op, Streams<kStreams> streams) {
  const pydit_qk_norm_rope_params& first = streams.stream[0];
  unsigned blocks = 0;
  for (const pydit_qk_norm_rope_params& p : streams.stream) {
    if (&p == &first + 1) streams.first_blocks = blocks;
    blocks += static_cast<unsigned>(ceil_div(p.tokens, kTokens));
    if (p.tokens > 0) name_tensors<T>(p);
  }
  const int64_t depth = ceil_div(first.batch, kMaxGridY);
  const dim3 grid(blocks, static_cast<unsigned>(ceil_div(first.batch, depth)), static_cast<unsigned>(depth));
  return launch_status(op, PYDIT_LAUNCH((qk_norm_rope_kernel<T, kWidth, kLanes, kVectors, kWide, kStreams>), grid,
                                        dim3(kThreads), 0, static_cast<cudaStream_t>(first.stream), streams));
}

template <typename T>
bool vectorizable(const pydit_heads& t) {
  constexpr int kWidth = kElementsIn16Bytes<T>;
  return aligned16(t.data) && t.stride_b % kWidth == 0 && t.stride_s % kWidth == 0 && t.stride_h % kWidth == 0;
}

template <typename T, int kStreams>
int launch(const char* op, const Streams<kStreams>& streams) {
  constexpr int kWidth = kElementsIn16Bytes<T>;
  bool wide = true;
  for (const pydit_qk_norm_rope_params& p : streams.stream) {
    wide = wide && vectorizable<T>(p.q) && vectorizable<T>(p.k) && vectorizable<T>(p.q_out) &&
           vectorizable<T>(p.k_out) && aligned16(p.q_weight) && aligned16(p.k_weight) && aligned16(p.cos) &&
           aligned16(p.sin);
  }
  const int head_dim = streams.stream[0].head_dim;
  if (wide && head_dim == 32) return launch_groups<T, kWidth, 32 / kWidth, 1, true>(op, streams);
  if (wide && head_dim == 64) return launch_groups<T, kWidth, 64 / kWidth, 1, true>(op, streams);
  if (wide && head_dim == 128) return launch_groups<T, kWidth, 128 / kWidth, 1, true>(op, streams);
  return launch_groups<T, 2, 32, kMaxHeadDim / 64, false>(op, streams);
}

int check(const char* op, const pydit_qk_norm_rope_params& p) {
  if (p.head_dim < 2 || p.head_dim > kMaxHeadDim || p.head_dim % 2 != 0)
    return bad_argument("%s: head_dim: expected an even number from 2 to %d, got %d", op, kMaxHeadDim, p.head_dim);
  if (p.batch < 0 || p.batch > INT32_MAX)
    return bad_argument("%s: batch: expected 0 to 2^31 - 1, got %lld", op, static_cast<long long>(p.batch));
  if (p.tokens < 0 || p.tokens > INT32_MAX)
    return bad_argument("%s: tokens: expected 0 to 2^31 - 1, got %lld", op, static_cast<long long>(p.tokens));
  if ((p.cos == nullptr) != (p.sin == nullptr))
    return bad_argument("%s: cos, sin: expected both or neither, got one", op);
  return kOk;
}

}  // namespace
}  // namespace pydit::PYDIT_BACKEND

using namespace pydit::PYDIT_BACKEND;

extern "C" int PYDIT_ENTRY(qk_norm_rope)(const pydit_qk_norm_rope_params* p) {
  const char* op = "qk_norm_rope";
  if (const int status = check(op, *p)) return status;
  if (p->batch == 0 || p->tokens == 0 || p->heads == 0) return kOk;
  return dispatch_dtype(op, p->dtype,
                        [&](auto tag) { return launch<typename decltype(tag)::type>(op, Streams<1>{{*p}, 0}); });
}

extern "C" int PYDIT_ENTRY(joint_qk_norm_rope)(const pydit_joint_qk_norm_rope_params* p) {
  const char* op = "joint_qk_norm_rope";
  const pydit_qk_norm_rope_params &image = p->img, &text = p->txt;
  if (const int status = check(op, image)) return status;
  if (const int status = check(op, text)) return status;
  if (image.batch != text.batch || image.heads != text.heads || image.head_dim != text.head_dim ||
      image.dtype != text.dtype || image.stream != text.stream)
    return bad_argument("%s: expected the same batch, heads, head_dim, dtype and stream for both streams", op);
  if (image.tokens + text.tokens > INT32_MAX)
    return bad_argument("%s: tokens: expected at most 2^31 - 1 in both streams together, got %lld", op,
                        static_cast<long long>(image.tokens + text.tokens));
  if (image.batch == 0 || image.heads == 0 || image.tokens + text.tokens == 0) return kOk;
  return dispatch_dtype(op, image.dtype, [&](auto tag) {
    return launch<typename decltype(tag)::type>(op, Streams<2>{{image, text}, 0});
  });
}
