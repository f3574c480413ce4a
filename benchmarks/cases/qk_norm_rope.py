"""Per-head RMSNorm and rotary embedding of queries and keys, bound by memory."""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.peers import Peer, compiled, eager_peer, never
from pydit import ops

SHAPES = {  # model, batch, tokens, heads, head dimension, dtype
    "full": (("qwen-image", 1, 7401, 24, 128, "bf16"), ("qwen-image", 2, 7401, 24, 128, "bf16"),
             ("qwen-image-text", 1, 512, 24, 128, "bf16"), ("flux.1", 1, 4608, 24, 128, "bf16"),
             ("sd3.5-large", 1, 4096, 38, 64, "bf16")),
    "small": (("tiny", 2, 72, 3, 32, "fp32"),),
}


JOINT = {  # model, batch, image tokens, text tokens, heads, head dim, dtype
    "full": (("qwen-image", 1, 6889, 512, 24, 128, "bf16"), ("qwen-image", 2, 6889, 512, 24, 128, "bf16"),
             ("flux.1", 1, 4096, 512, 24, 128, "bf16")),
    "small": (("tiny", 2, 72, 9, 3, 32, "fp32"),),
}


def cases(size: str) -> list[Case]:
    return [*(qk_norm_rope(*shape) for shape in SHAPES[size]), *(joint_qk_norm_rope(*shape) for shape in JOINT[size])]


def qk_norm_rope_work(b: int, s: int, h: int, d: int, itemsize: int) -> Work:
    """q and k in and out, two weights [d], fp32 cos and sin [s, d/2]. Per element: square and sum 2, normalise 1,
    weight 1, rotation 3."""
    return Work(bytes=(4 * b * s * h * d + 2 * d) * itemsize + 2 * s * (d // 2) * 4, flops=2 * 7 * b * s * h * d)


def walks(h: int, d: int, itemsize: int) -> tuple[int, int]:
    """How often a token's weights and its angles are read: by each walk over its heads when it enters q or k, and when
    it begins."""
    walking = 256 // (d * itemsize // 16) // 2  # 256 threads, 16 bytes each, two tokens
    steps = -(-2 * h // walking)
    begun = min(walking, 2 * h)
    into_k = sum(first < h <= first + (steps - 1) * walking for first in range(begun))
    return begun + into_k, begun


def qk_norm_rope(model, b, s, h, d, dtype) -> Case:
    torch_dtype = DTYPES[dtype]

    def make(device):
        """Queries and keys as views of packed QKV, as a fused projection gives them."""
        qkv = torch.randn(b, s, 3, h, d, device=device, dtype=torch_dtype)
        weights = (1 + 0.1 * torch.randn(2, d, device=device)).to(torch_dtype)
        theta = 6.28 * torch.rand(s, d // 2, device=device)
        return qkv[:, :, 0], qkv[:, :, 1], weights[0], weights[1], theta.cos(), theta.sin()

    peers = (compiled(_real), eager_peer(_eager),
             never("sglang", "fused_inplace_qknorm_rope runs inside the SGLang server only"),
             never("quack", "its RMSNorm and its rotary embedding are separate kernels without this layout"))
    weights, angles = walks(h, d, torch_dtype.itemsize)
    reread = d * torch_dtype.itemsize * (b * s * weights - 2) + 2 * (d // 2) * 4 * s * (b * angles - 1)
    return Case("qk_norm_rope", model, f"{b}x{s}x{h}x{d}", dtype, qk_norm_rope_work(b, s, h, d, torch_dtype.itemsize),
                make, _run, lambda *args: _eager(*(a.double() for a in args)), _eager, peers,
                Work(reread, 0))


def joint_qk_norm_rope(model, b, s_img, s_txt, h, d, dtype) -> Case:
    streams = [qk_norm_rope(model, b, s, h, d, dtype) for s in (s_img, s_txt)]

    def both(function):
        return lambda *args: (*function(*args[:6]), *function(*args[6:]))

    peers = (compiled(both(_real)), eager_peer(both(_eager)), Peer("two launches", lambda: both(_run), rival=False),
             never("sglang", "fused_inplace_qknorm_rope runs inside the SGLang server only"))
    return Case("joint_qk_norm_rope", model, f"{b}x{s_img}+{s_txt}x{h}x{d}", dtype,
                Work(*(sum(parts) for parts in zip(*((c.work.bytes, c.work.flops) for c in streams), strict=True))),
                lambda device: (*streams[0].make(device), *streams[1].make(device)), _run_joint,
                lambda *args: both(_eager)(*(a.double() for a in args)), both(_eager), peers,
                Work(sum(c.beyond.bytes for c in streams), 0))


def _run_joint(*args):
    (q_img, k_img, *w_img, cos_img, sin_img), (q_txt, k_txt, *w_txt, cos_txt, sin_txt) = args[:6], args[6:]
    return ops.joint_qk_norm_rope(q_img, k_img, q_txt, k_txt, (*w_img, *w_txt), (cos_img, sin_img), (cos_txt, sin_txt))


def _run(q, k, q_weight, k_weight, cos, sin):
    return ops.qk_norm_rope(q, k, q_weight, k_weight, (cos, sin))


def _norm(x, weight):
    """RMSNorm as diffusers' Qwen-Image runs it: variance in fp32, back to the dtype before the weight."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = x * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(x.dtype) * weight


def _eager(q, k, q_weight, k_weight, cos, sin):
    """Eager diffusers: RMSNorm per stream, rotary embedding as a complex product."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rotation = torch.complex(cos.to(wide), sin.to(wide))[:, None]

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2))) * rotation).flatten(-2)

    return rotate(_norm(q, q_weight)).to(q.dtype), rotate(_norm(k, k_weight)).to(k.dtype)


def _real(q, k, q_weight, k_weight, cos, sin):
    """The same with real arithmetic, which a compiler can fuse."""
    c, s = cos[:, None], sin[:, None]

    def rotate(x):
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).to(x.dtype)

    return rotate(_norm(q, q_weight)), rotate(_norm(k, k_weight))
