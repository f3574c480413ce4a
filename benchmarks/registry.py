"""The benchmark cases: inputs, bytes and FLOPs counted beside them, the op, and the peers it is raced against.

Shapes come from real models (sizes in tokens x channels):
  qwen-image 1328x1328: 6889 image + 512 text tokens, 3072 channels, 24 heads x 128
  flux.1 1024x1024: 4096 + 512 tokens, 3072 channels;   sd3.5-large 1024x1024: 4096 tokens, 2432 channels, 38 heads x 64
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from pydit import ops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One benchmark: ``make`` returns inputs, ``run`` and every peer take them, ``exact`` is the float64 answer."""

    op: str
    model: str
    shape: str
    dtype: str
    bytes: int  # least traffic with device memory: every input read once, every output written once
    flops: int
    make: Callable[[str], tuple]
    run: Callable
    exact: Callable
    eager: Callable
    peers: dict[str, Callable] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op}/{self.model}/{self.shape}/{self.dtype}"


def _eager_ada_layer_norm(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _eager_gated_residual(x, y, gate):
    return x + gate * y


def _eager_fused(x, y, gate, scale, shift):
    residual = x + gate * y
    return residual, _eager_ada_layer_norm(residual, scale, shift)


def _eager_norm(x, weight):
    """RMSNorm as diffusers' Qwen-Image runs it: variance in fp32, back to the dtype before the weight."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    normed = x * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.to(x.dtype) * weight


def _eager_qk_norm_rope(q, k, q_weight, k_weight, cos, sin):
    """Eager diffusers: RMSNorm per stream, rotary embedding as a complex product."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rotation = torch.complex(cos.to(wide), sin.to(wide))[:, None]

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2))) * rotation).flatten(-2)

    return rotate(_eager_norm(q, q_weight)).to(q.dtype), rotate(_eager_norm(k, k_weight)).to(k.dtype)


def _real_qk_norm_rope(q, k, q_weight, k_weight, cos, sin):
    """The same with real arithmetic, which a compiler can fuse."""
    c, s = cos[:, None], sin[:, None]

    def rotate(x):
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).to(x.dtype)

    return rotate(_eager_norm(q, q_weight)), rotate(_eager_norm(k, k_weight))


def _compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


def _token_case(op, model, b, s, c, dtype):
    torch_dtype = DTYPES[dtype]
    run, eager, tensors, moved = {
        "ada_layer_norm": (ops.ada_layer_norm, _eager_ada_layer_norm, ("x", "m", "m"), 2),
        "gated_residual": (ops.gated_residual, _eager_gated_residual, ("x", "x", "m"), 3),
        "gated_residual_ada_layer_norm": (ops.gated_residual_ada_layer_norm, _eager_fused,
                                          ("x", "x", "m", "m", "m"), 4),
    }[op]

    def make(device):
        packed = torch.randn(b, 6 * c, device=device, dtype=torch_dtype)[:, None].chunk(6, -1)
        modulation = iter(packed)
        return tuple(torch.randn(b, s, c, device=device, dtype=torch_dtype) if kind == "x" else next(modulation)
                     for kind in tensors)

    return Case(op, model, f"{b}x{s}x{c}", dtype, moved * b * s * c * torch_dtype.itemsize, 8 * b * s * c, make, run,
                lambda *args: eager(*(a.double() for a in args)), eager,
                {"torch.compile": _compiled(eager), "eager": eager})


def _head_case(model, b, s, h, d, dtype):
    torch_dtype = DTYPES[dtype]

    def make(device):
        qkv = torch.randn(b, s, 3, h, d, device=device, dtype=torch_dtype)
        weights = (1 + 0.1 * torch.randn(2, d, device=device)).to(torch_dtype)
        theta = 6.28 * torch.rand(s, d // 2, device=device)
        return qkv[:, :, 0], qkv[:, :, 1], weights[0], weights[1], theta.cos(), theta.sin()

    def run(q, k, q_weight, k_weight, cos, sin):
        return ops.qk_norm_rope(q, k, q_weight, k_weight, (cos, sin))

    return Case("qk_norm_rope", model, f"{b}x{s}x{h}x{d}", dtype,
                4 * b * s * h * d * torch_dtype.itemsize + 4 * s * d, 12 * b * s * h * d, make, run,
                lambda *args: _eager_qk_norm_rope(*(a.double() for a in args)), _eager_qk_norm_rope,
                {"torch.compile": _compiled(_real_qk_norm_rope), "eager": _eager_qk_norm_rope})


def cases(size: str = "full") -> list[Case]:
    """All cases. ``size="small"`` has shapes for a CPU."""
    block = ("ada_layer_norm", "gated_residual", "gated_residual_ada_layer_norm")
    if size == "small":
        return [_token_case(op, "tiny", 2, 72, 96, "fp32") for op in block] + [_head_case("tiny", 2, 72, 3, 32, "fp32")]
    found = []
    for model, b, s, c in (("qwen-image", 1, 7401, 3072), ("qwen-image", 2, 7401, 3072),
                           ("qwen-image-text", 1, 512, 3072), ("flux.1", 1, 4608, 3072),
                           ("sd3.5-large", 1, 4096, 2432)):
        found += [_token_case(op, model, b, s, c, "bf16") for op in block]
    for model, b, s, h, d in (("qwen-image", 1, 7401, 24, 128), ("qwen-image", 2, 7401, 24, 128),
                              ("qwen-image-text", 1, 512, 24, 128), ("flux.1", 1, 4608, 24, 128),
                              ("sd3.5-large", 1, 4096, 38, 64)):
        found.append(_head_case(model, b, s, h, d, "bf16"))
    return found
