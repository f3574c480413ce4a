// What the implementations of joint attention's backward share: their arguments and the workspace.
#pragma once

#include "device/check.h"
#include "kernels/attention/joint_attention.h"
#include "pydit/pydit.h"

namespace pydit::PYDIT_BACKEND {

constexpr const char* kBackward = "joint_attention_backward";
constexpr int kQueriesOfBackwardTile = 64;  // of the Hopper kernel
constexpr int kSumColumns = 128;            // of its fp32 buffer, as TMA sees it

// The arguments, and what lies in the workspace, in this order. The first three belong to the Hopper kernel.
struct BackwardParams : pydit_joint_attention_backward_params {
  float* sums;                   // of d_q: kM * D per query tile, in the order of the kernel's registers; cleared first
  unsigned* semaphores;          // per query tile: key tiles that have been added; cleared first
  unsigned* ticket;              // cleared first
  float *delta_img, *delta_txt;  // [B, H, S]: sum over D of d_out * out, minus d_lse
};

// Query tiles of a head and sample in the fp32 buffer, those of the image first.
__host__ __device__ inline int query_tiles(const pydit_joint_attention_backward_params& p) {
  return count_query_tiles<kQueriesOfBackwardTile>(p);
}

inline int64_t count_sums(const pydit_joint_attention_backward_params& p) {
  return p.batch * p.heads * query_tiles(p) * kQueriesOfBackwardTile * p.head_dim;
}

// Bytes of sums, semaphores and ticket.
inline int64_t bytes_to_clear(const pydit_joint_attention_backward_params& p) {
  const int64_t counters = p.batch * p.heads * query_tiles(p) + 1;
  return count_sums(p) * 4 + (counters + 3) / 4 * 16;
}

// The Hopper kernels, for arguments that the entry point has checked and tensors that TMA can address.
int launch_joint_attention_backward_sm90(const BackwardParams& p);

// Names the launch's tensors for the simulator's race detector.
template <typename T>
void name_backward_tensors(const BackwardParams& p) {
  const auto heads = [&](const char* name, const pydit_heads& t, int64_t tokens, bool writable) {
    if (t.data != nullptr && tokens > 0)
      name_tensor(name, t.data, writable, sizeof(T), p.head_dim, {p.batch, tokens, p.heads},
                  {t.stride_b, t.stride_s, t.stride_h});
  };
  const auto rows = [&](const char* name, const float* t, int64_t tokens, bool writable) {
    if (t != nullptr && tokens > 0)
      name_tensor(name, t, writable, sizeof(float), tokens, {p.batch * p.heads}, {tokens});
  };
  heads("q_img", p.q_img, p.img_tokens, false), heads("q_txt", p.q_txt, p.txt_tokens, false);
  heads("k_img", p.k_img, p.img_tokens, false), heads("k_txt", p.k_txt, p.txt_tokens, false);
  heads("v_img", p.v_img, p.img_tokens, false), heads("v_txt", p.v_txt, p.txt_tokens, false);
  heads("out_img", p.out_img, p.img_tokens, false), heads("out_txt", p.out_txt, p.txt_tokens, false);
  heads("d_out_img", p.d_out_img, p.img_tokens, false), heads("d_out_txt", p.d_out_txt, p.txt_tokens, false);
  heads("d_q_img", p.d_q_img, p.img_tokens, true), heads("d_q_txt", p.d_q_txt, p.txt_tokens, true);
  heads("d_k_img", p.d_k_img, p.img_tokens, true), heads("d_k_txt", p.d_k_txt, p.txt_tokens, true);
  heads("d_v_img", p.d_v_img, p.img_tokens, true), heads("d_v_txt", p.d_v_txt, p.txt_tokens, true);
  rows("lse_img", p.lse_img, p.img_tokens, false), rows("lse_txt", p.lse_txt, p.txt_tokens, false);
  rows("d_lse_img", p.d_lse_img, p.img_tokens, false), rows("d_lse_txt", p.d_lse_txt, p.txt_tokens, false);
  rows("delta_img", p.delta_img, p.img_tokens, true), rows("delta_txt", p.delta_txt, p.txt_tokens, true);
  if (p.sums != nullptr) name_tensor("workspace", p.sums, true, 1, bytes_to_clear(p), {1}, {0});
  if (p.txt_lens != nullptr) name_tensor("txt_lens", p.txt_lens, false, sizeof(int32_t), p.batch, {1}, {0});
}

}  // namespace pydit::PYDIT_BACKEND
