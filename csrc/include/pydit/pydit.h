/* pydit C API: one plain struct and one entry point per op. C99, no torch, no Python.
 *
 * Every entry point exists once per backend that was built:
 *   pydit_cuda_<op>   launches on params->stream and returns without waiting
 *   pydit_sim_<op>    runs the same kernel on host memory in the SIMT simulator and returns when it is done
 * Both return 0, or a non-zero status with the reason in pydit_<backend>_last_error() (per host thread).
 *
 * Common rules
 *   - B batch, S tokens, H heads, D head dim, C channels. Strides count elements; the last dimension is contiguous.
 *   - Any alignment is accepted. When every pointer and stride is a multiple of 16 bytes and C (or D) a multiple of
 *     the elements in 16 bytes, the 16-byte path runs; otherwise an element-wise path gives the same result.
 *   - An empty problem (B, S or H of 0) returns 0 without a launch; its pointers may be NULL.
 *   - The library never allocates: the caller owns outputs and workspaces. Outputs may alias an input exactly (same
 *     pointer and strides) where an op says so, never partially.
 *   - Arithmetic and sums are fp32, long sums of second_moments and hsic_matrix fp64; a 16-bit output is rounded once,
 *     to nearest even.
 */
#ifndef PYDIT_PYDIT_H_
#define PYDIT_PYDIT_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { PYDIT_FLOAT32 = 0, PYDIT_FLOAT16 = 1, PYDIT_BFLOAT16 = 2 } pydit_dtype;

/* A [B, S, C] activation. */
typedef struct {
  void* data;
  int64_t stride_b, stride_s;
} pydit_tokens;

/* A modulation vector per sample, [B, R, C] with R in {1, 2}: row 0 for tokens < split, row 1 for the rest. */
typedef struct {
  const void* data;
  int64_t stride_b, stride_r;
} pydit_modulation;

/* A [B, S, H, D] projection. */
typedef struct {
  void* data;
  int64_t stride_b, stride_s, stride_h;
} pydit_heads;

/* out = LN(x) * (1 + scale) + shift,   LN(x) = (x - mean(x)) / sqrt(var(x) + eps) over C, biased variance, no affine.
 * x, out [B, S, C]; scale, shift [B, R, C]; all of `dtype`. 1 <= C <= 8192. out may alias x.
 * Bytes moved: 2 B S C elements (+ scale and shift, which stay in cache). */
typedef struct {
  pydit_tokens x;         /* [B, S, C] in  */
  pydit_modulation scale; /* [B, R, C] in  */
  pydit_modulation shift; /* [B, R, C] in  */
  pydit_tokens out;       /* [B, S, C] out */
  int64_t batch, tokens, channels;
  int64_t split; /* first token of row 1; >= tokens (or INT64_MAX) when R is 1 */
  float eps;
  int32_t dtype; /* pydit_dtype */
  void* stream;  /* cudaStream_t; ignored by the simulator */
} pydit_ada_layer_norm_params;

/* out = x + gate * y.   x, y, out [B, S, C]; gate [B, R, C]. 1 <= C <= 8192. out may alias x or y. x may have a token
 * stride of 0. exact: rounds the product to the dtype before the sum, as two separate operations would.
 * Bytes moved: 3 B S C elements. */
typedef struct {
  pydit_tokens x;        /* [B, S, C] in  */
  pydit_tokens y;        /* [B, S, C] in  */
  pydit_modulation gate; /* [B, R, C] in  */
  pydit_tokens out;      /* [B, S, C] out */
  int64_t batch, tokens, channels;
  int64_t split;
  int32_t exact; /* 0 or 1 */
  int32_t dtype;
  void* stream;
} pydit_gated_residual_params;

/* residual = x + gate * y;   out = LN(residual) * (1 + scale) + shift, with LN of the unrounded fp32 sum.
 * x, y, residual, out [B, S, C]; gate, scale, shift [B, R, C]. 1 <= C <= 8192. residual may alias x or y.
 * Bytes moved: 4 B S C elements. */
typedef struct {
  pydit_tokens x;         /* [B, S, C] in  */
  pydit_tokens y;         /* [B, S, C] in  */
  pydit_modulation gate;  /* [B, R, C] in  */
  pydit_modulation scale; /* [B, R, C] in  */
  pydit_modulation shift; /* [B, R, C] in  */
  pydit_tokens residual;  /* [B, S, C] out */
  pydit_tokens out;       /* [B, S, C] out */
  int64_t batch, tokens, channels;
  int64_t split;
  float eps;
  int32_t dtype;
  void* stream;
} pydit_gated_residual_ada_layer_norm_params;

/* n = q / sqrt(mean(q^2) + eps) * q_weight over D, then each interleaved pair (n[2i], n[2i+1]) is rotated by the
 * angle whose cosine and sine are cos[s, i], sin[s, i]; k likewise.
 * q, k and outputs [B, S, H, D]; weights [D] of `dtype` or NULL (ones); cos, sin fp32 [S, D/2] contiguous, or both
 * NULL (no rotation). D even, 2 <= D <= 256. Outputs may alias their inputs.
 * Bytes moved: 4 B S H D elements + 4 S D. */
typedef struct {
  pydit_heads q, k;         /* [B, S, H, D] in  */
  pydit_heads q_out, k_out; /* [B, S, H, D] out */
  const void* q_weight;     /* [D] or NULL */
  const void* k_weight;     /* [D] or NULL */
  const float* cos;         /* [S, D/2] or NULL */
  const float* sin;         /* [S, D/2] or NULL */
  int64_t batch, tokens;
  int32_t heads, head_dim;
  float eps;
  int32_t dtype;
  void* stream;
} pydit_qk_norm_rope_params;

/* qk_norm_rope of both streams in one launch. batch, heads, head_dim, eps, dtype and stream are the same in both;
 * either may have no tokens. */
typedef struct {
  pydit_qk_norm_rope_params img, txt;
} pydit_joint_qk_norm_rope_params;

/* One softmax over the keys of both streams, whose tensors stay apart:
 *   s = scale * q k^T over all keys,  out = softmax(s) v,  lse = ln(sum(exp(s))).
 * Keys of the image stream and, per sample, the first len keys of the text stream take part; len is txt_lens[b] clamped
 * to 0 .. txt_tokens, or txt_tokens when txt_lens is NULL. What keys and values past len hold is never used. Queries of
 * both streams see the same keys; a text query past len gives out 0 and lse -inf, as does any query without a key.
 *   q_img, k_img, v_img, out_img [B, S_img, H, D];  q_txt, k_txt, v_txt, out_txt [B, S_txt, H, D];  all of `dtype`,
 *   float16 or bfloat16; D 32, 64 or 128. q_txt.data NULL: the text gives keys and values only, out_txt is not written.
 *   lse_img [B, H, S_img], lse_txt [B, H, S_txt] fp32 contiguous, or NULL.
 * scale > 0. Outputs alias nothing. FLOPs: 4 B H D (S_img + S_txt)^2. */
typedef struct {
  pydit_heads q_img, k_img, v_img; /* [B, S_img, H, D] in */
  pydit_heads q_txt, k_txt, v_txt; /* [B, S_txt, H, D] in */
  pydit_heads out_img, out_txt;    /* out */
  float *lse_img, *lse_txt;        /* out or NULL */
  const int32_t* txt_lens;         /* [B] on the device, or NULL */
  int64_t batch, img_tokens, txt_tokens;
  int32_t heads, head_dim;
  float scale;
  int32_t dtype;
  void* stream;
} pydit_joint_attention_params;

/* Gradients of joint_attention. out and lse: as it returned them; d_lse: the gradient of lse, or NULL for 0. Gradients
 * of padded text are 0 whatever inputs, out and d_out hold there. q_txt.data NULL: the text gave keys and values only;
 * out_txt, d_out_txt, d_q_txt, lse_txt and d_lse_txt are not used.
 *   out, d_out and the gradients [B, S, H, D] of `dtype`;  lse, d_lse [B, H, S] fp32 contiguous.
 * workspace: joint_attention_backward_workspace() bytes at a multiple of 16, of any content; free again when the stream
 * is past this call. deterministic: not 0 asks for the same bits in every run, which the portable kernel always gives.
 * FLOPs: 10 B H D (S_img + S_txt)^2, 14 in the portable kernel. */
typedef struct {
  pydit_heads q_img, k_img, v_img, q_txt, k_txt, v_txt;             /* in */
  pydit_heads out_img, out_txt, d_out_img, d_out_txt;               /* in */
  pydit_heads d_q_img, d_k_img, d_v_img, d_q_txt, d_k_txt, d_v_txt; /* out */
  const float *lse_img, *lse_txt, *d_lse_img, *d_lse_txt;           /* in */
  const int32_t* txt_lens;
  void* workspace;
  int64_t batch, img_tokens, txt_tokens;
  int32_t heads, head_dim;
  float scale;
  int32_t dtype, deterministic;
  void* stream;
} pydit_joint_attention_backward_params;

/* Sums over tokens, added to what the outputs hold:
 *   xx += x^T x,  xy += x^T y,  sum_x += sum of x,  sum_y += sum of y,  sum_yy += sum of y^2, per column.
 * Only the triangle of xx on and above the diagonal is defined.
 *   x [N, dim_x], y [N, dim_y] of `dtype`, float16 or bfloat16, rows `stride` elements apart;  dim_y 0: no y.
 *   xx [dim_x, dim_x], xy [dim_x, dim_y], sums [dim_x] or [dim_y], fp64 contiguous. Outputs alias nothing.
 * workspace: second_moments_workspace() bytes of any content; free again when the stream is past this call.
 * cluster: blocks of the Hopper kernel that share what they load: 1, 2, or 0 for whichever it expects to be faster.
 * The bits are the same from run to run on one device. FLOPs: N dim_x (dim_x + 1) + 2 N dim_x dim_y. */
typedef struct {
  const void *x, *y;
  int64_t stride_x, stride_y;
  double *xx, *xy, *sum_x, *sum_y, *sum_yy;
  void* workspace;
  int64_t tokens, dim_x, dim_y;
  int32_t dtype, cluster;
  void* stream;
} pydit_second_moments_params;

/* hsic[i, j] = unbiased HSIC_1 (Song et al. 2012) of features i and j, <U_i, U_j> / (n (n - 3)), where U is the Gram
 * matrix x x^T with its diagonal set to 0, U-centred (Szekely and Rizzo 2014).
 *   features[l]: [n, dim[l]] of `dtype`, float16 or bfloat16, rows `stride` elements apart;  n = rows >= 4
 *   hsic: [layers, layers] fp64 contiguous. A layer whose rows are all alike, or all but one, has HSIC 0 exactly.
 * workspace: hsic_matrix_workspace() bytes at a multiple of 16, of any content; free again when the stream is past
 * this call. Gram matrices take at most `gram_bytes` of it, but at least 256 x 256 elements each, and sums of their
 * rows a 16th more; the rest grows with n and the widest layer, not with n^2. If they do not all fit, they are computed
 * twice. The bits are the same from run to run on one device. FLOPs: n (n + 1) sum(dim) + n^2 layers (layers + 1) / 2.
 */
#define PYDIT_MAX_LAYERS 128
typedef struct {
  const void* features[PYDIT_MAX_LAYERS];
  int64_t stride[PYDIT_MAX_LAYERS];
  int32_t dim[PYDIT_MAX_LAYERS];
  double* hsic;
  void* workspace;
  int64_t rows, gram_bytes;
  int32_t layers, dtype;
  void* stream;
} pydit_hsic_matrix_params;

/* Up to PYDIT_MAX_LINEARS linear layers in one launch, each
 *   out = residual + gate * act(x W^T + bias),  or, with head_dim not 0,  out = rotate(norm(x W^T + bias)):
 * RMSNorm over every head_dim columns, times norm_weight [head_dim] (NULL: ones), then each interleaved pair rotated by
 * the angle whose cosine and sine are cos[s, i], sin[s, i], as in qk_norm_rope.
 *   x [B, S, K], residual and out [B, S, N], gate [B, R, N], weight [N, K], bias [N], all of `dtype`, float16 or
 *   bfloat16; cos, sin fp32 [S, head_dim / 2] contiguous. NULL data leaves out bias, residual, gate, norm_weight or
 *   (both or neither) cos and sin. K, N >= 1; S may be 0. head_dim: 0, or 32, 64 or 128, N a multiple of it; then no
 *   layer of the call has residual, gate or activation. `activation` applies to all layers. out may alias residual and
 *   nothing else. Layers may share x. cluster: as in pydit_second_moments_params.
 *   parts: into how many parts along K the Hopper kernel cuts the tiles that would not fill a wave of multiprocessors:
 *   1 (none is cut) to PYDIT_MAX_PARTS, or 0 for what it expects to be fastest; never more than the steps of 64 along K
 *   of the shallowest layer. Parts are summed in fp32, in the same order from run to run on one device.
 *   workspace: grouped_linear_workspace() bytes, 0 where nothing is cut, at a multiple of 16, of any content; free
 *   again when the stream is past this call. NULL: nothing is cut.
 *   FLOPs: the sum of 2 B S N K. Bytes: x, weight, residual and out of each layer once. */
#define PYDIT_MAX_LINEARS 6
#define PYDIT_MAX_PARTS 8
typedef enum { PYDIT_NO_ACTIVATION = 0, PYDIT_GELU_TANH = 1 } pydit_activation;
typedef struct {
  pydit_tokens x;          /* [B, S, K] in */
  const void* weight;      /* [N, K] in */
  const void* bias;        /* [N] in or NULL */
  pydit_tokens residual;   /* [B, S, N] in or NULL */
  pydit_modulation gate;   /* [B, R, N] in or NULL */
  pydit_tokens out;        /* [B, S, N] out */
  const void* norm_weight; /* [head_dim] in or NULL */
  const float *cos, *sin;  /* [S, head_dim / 2] in or NULL */
  int64_t weight_stride;   /* between rows of weight */
  int64_t tokens, in_features, out_features;
  int64_t split; /* first token of gate's row 1 */
  int32_t head_dim;
} pydit_linear;
typedef struct {
  pydit_linear linear[PYDIT_MAX_LINEARS];
  int64_t batch;
  int32_t count, activation; /* layers in `linear`; pydit_activation */
  float eps;                 /* of the RMSNorm */
  int32_t dtype, cluster, parts;
  void* workspace; /* or NULL */
  void* stream;
} pydit_grouped_linear_params;

/* Which kernel an op takes for these arguments on the current device: joint_attention_path(),
 * joint_attention_backward_path(), second_moments_path(), hsic_matrix_path(), grouped_linear_path(). */
enum {
  PYDIT_PATH_HOPPER = 0,       /* TMA and wgmma */
  PYDIT_PATH_NOT_HOPPER = 1,   /* portable: the device is not of compute capability 9.x */
  PYDIT_PATH_UNALIGNED = 2,    /* portable: a pointer or stride is not a multiple of 16 bytes, or a stride is 0 */
  PYDIT_PATH_NOT_BUILT = 3,    /* portable: built without sm_90a */
  PYDIT_PATH_HOPPER_PAIRS = 4, /* TMA and wgmma; blocks in clusters of two share what they load */
  PYDIT_PATH_SHAPE = 5,        /* portable: the Hopper kernel is not for this shape */
  PYDIT_PATH_OLD_CUDA = 6      /* portable: the toolkit or the driver is older than CUDA 12.1 */
};

/* reserve_multiprocessors: how many multiprocessors of a device persistent kernels leave free for what runs beside
 * them, such as a collective; 0 at first. Persistent are attention, second_moments, hsic_matrix and the linear layers
 * on Hopper, and second_moments everywhere; each uses at least one multiprocessor. Do not call it between asking for
 * the size of a workspace and the call that gets the workspace. */
#define PYDIT_DECLARE_BACKEND(backend)                                                                        \
  const char* pydit_##backend##_last_error(void);                                                             \
  void pydit_##backend##_reserve_multiprocessors(int count);                                                  \
  int pydit_##backend##_ada_layer_norm(const pydit_ada_layer_norm_params*);                                   \
  int pydit_##backend##_gated_residual(const pydit_gated_residual_params*);                                   \
  int pydit_##backend##_gated_residual_ada_layer_norm(const pydit_gated_residual_ada_layer_norm_params*);     \
  int pydit_##backend##_qk_norm_rope(const pydit_qk_norm_rope_params*);                                       \
  int pydit_##backend##_joint_qk_norm_rope(const pydit_joint_qk_norm_rope_params*);                           \
  int pydit_##backend##_joint_attention(const pydit_joint_attention_params*);                                 \
  int pydit_##backend##_joint_attention_backward(const pydit_joint_attention_backward_params*);               \
  int pydit_##backend##_joint_attention_path(const pydit_joint_attention_params*);                            \
  int pydit_##backend##_joint_attention_backward_path(const pydit_joint_attention_backward_params*);          \
  int64_t pydit_##backend##_joint_attention_backward_workspace(const pydit_joint_attention_backward_params*); \
  int pydit_##backend##_second_moments(const pydit_second_moments_params*);                                   \
  int pydit_##backend##_second_moments_path(const pydit_second_moments_params*);                              \
  int64_t pydit_##backend##_second_moments_workspace(const pydit_second_moments_params*);                     \
  int pydit_##backend##_hsic_matrix(const pydit_hsic_matrix_params*);                                         \
  int pydit_##backend##_hsic_matrix_path(const pydit_hsic_matrix_params*);                                    \
  int64_t pydit_##backend##_hsic_matrix_workspace(const pydit_hsic_matrix_params*);                           \
  int pydit_##backend##_grouped_linear(const pydit_grouped_linear_params*);                                   \
  int pydit_##backend##_grouped_linear_path(const pydit_grouped_linear_params*);                              \
  int64_t pydit_##backend##_grouped_linear_workspace(const pydit_grouped_linear_params*);

PYDIT_DECLARE_BACKEND(cuda)
PYDIT_DECLARE_BACKEND(sim)

#ifdef __cplusplus
}
#endif

#endif /* PYDIT_PYDIT_H_ */
