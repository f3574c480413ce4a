// What the implementations of joint attention share.
#pragma once

#include "device/arch.h"
#include "device/check.h"
#include "device/tensor_map.h"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

// The Hopper kernel, for arguments that the entry point has checked and tensors that TMA can address: bases and strides
// are multiples of 16 bytes, no stride is 0.
int launch_joint_attention_sm90(const pydit_joint_attention_params& p);

// Query tiles of kRows tokens of one head and sample: those of the image, then those of the text, if it has queries.
// Params: those of the forward or of the backward.
template <int kRows, typename Params>
__host__ __device__ inline int count_query_tiles(const Params& p) {
  const auto tiles = [](int64_t tokens) { return (static_cast<int>(tokens) + kRows - 1) / kRows; };
  return tiles(p.img_tokens) + (p.q_txt.data == nullptr ? 0 : tiles(p.txt_tokens));
}

// Refuses what no kernel takes; kOk otherwise. Params: those of the forward or of the backward.
template <typename Params>
int check_arguments(const char* op, const Params& p) {
  if (p.dtype != PYDIT_FLOAT16 && p.dtype != PYDIT_BFLOAT16)
    return bad_argument("%s: dtype: expected float16 (1) or bfloat16 (2), got %d", op, p.dtype);
  if (p.head_dim != 32 && p.head_dim != 64 && p.head_dim != 128)
    return bad_argument("%s: head_dim: expected 32, 64 or 128, got %d", op, p.head_dim);
  if (!(p.scale > 0)) return bad_argument("%s: scale: expected more than 0, got %g", op, p.scale);
  const int64_t both[] = {p.img_tokens, p.txt_tokens};
  for (const int64_t tokens : both) {
    if (tokens < 0 || tokens > INT32_MAX / 2)
      return bad_argument("%s: tokens: expected 0 to 2^30, got %lld", op, static_cast<long long>(tokens));
  }
  if (p.batch < 0 || p.batch > INT32_MAX || p.heads < 0)
    return bad_argument("%s: batch, heads: expected 0 or more, got %lld, %d", op, static_cast<long long>(p.batch),
                        p.heads);
  return kOk;
}

// Whether 16-byte accesses to a tensor are legal.
inline bool is_aligned(const pydit_heads& t, int64_t batch, int64_t tokens, int64_t heads) {
  return aligned16(t.data) && (batch <= 1 || t.stride_b % 8 == 0) && (tokens <= 1 || t.stride_s % 8 == 0) &&
         (heads <= 1 || t.stride_h % 8 == 0);
}

// Whether a dimension is expanded: its elements share memory through a stride of 0.
inline bool is_expanded(const pydit_heads& t, int64_t batch, int64_t tokens, int64_t heads) {
  return t.data != nullptr && tokens > 0 &&
         ((batch > 1 && t.stride_b == 0) || (tokens > 1 && t.stride_s == 0) || (heads > 1 && t.stride_h == 0));
}

// How TMA sees a stream's tensor: boxes of `rows` tokens by `span` bytes of a head, swizzled over `span`.
// Params: those of the forward or of the backward. Returns null or what is wrong; an absent tensor gets no map.
template <typename T, typename Params>
const char* encode_heads(TensorMap* map, const pydit_heads& t, int64_t tokens, const Params& p, int rows, int span) {
  if (t.data == nullptr || tokens == 0) return nullptr;
  const uint64_t size[4] = {static_cast<uint64_t>(p.head_dim), static_cast<uint64_t>(tokens),
                            static_cast<uint64_t>(p.heads), static_cast<uint64_t>(p.batch)};
  const auto bytes = [](int64_t elements) { return static_cast<uint64_t>(elements) * sizeof(T); };
  const uint64_t stride[3] = {bytes(t.stride_s), bytes(t.stride_h), bytes(t.stride_b)};
  const uint32_t box[4] = {static_cast<uint32_t>(span / sizeof(T)), static_cast<uint32_t>(rows), 1, 1};
  return encode_tensor_map(map, static_cast<const T*>(t.data), 4, size, stride, box, static_cast<Swizzle>(span));
}

// Names the launch's tensors for the simulator's race detector.
template <typename T>
void name_joint_attention_tensors(const pydit_joint_attention_params& p) {
  const auto heads = [&](const char* name, const pydit_heads& t, int64_t tokens, bool writable) {
    if (t.data != nullptr && tokens > 0)
      name_tensor(name, t.data, writable, sizeof(T), p.head_dim, {p.batch, tokens, p.heads},
                  {t.stride_b, t.stride_s, t.stride_h});
  };
  heads("q_img", p.q_img, p.img_tokens, false), heads("k_img", p.k_img, p.img_tokens, false);
  heads("v_img", p.v_img, p.img_tokens, false), heads("q_txt", p.q_txt, p.txt_tokens, false);
  heads("k_txt", p.k_txt, p.txt_tokens, false), heads("v_txt", p.v_txt, p.txt_tokens, false);
  heads("out_img", p.out_img, p.img_tokens, true), heads("out_txt", p.out_txt, p.txt_tokens, true);
  const auto rows = [&](const char* name, float* lse, int64_t tokens) {
    if (lse != nullptr && tokens > 0)
      name_tensor(name, lse, true, sizeof(float), tokens, {p.batch * p.heads}, {tokens});
  };
  rows("lse_img", p.lse_img, p.img_tokens), rows("lse_txt", p.lse_txt, p.txt_tokens);
  if (p.txt_lens != nullptr) name_tensor("txt_lens", p.txt_lens, false, sizeof(int32_t), p.batch, {1}, {0});
}

}  // namespace pydit::PYDIT_BACKEND
