"""LayerNorm + modulate and gated residual: the element-wise part of a block, bound by memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.peers import Peer, compiled, eager_peer, never
from pydit import ops

SHAPES = {  # model, batch, tokens, channels, dtype
    "full": (("qwen-image", 1, 7401, 3072, "bf16"), ("qwen-image", 2, 7401, 3072, "bf16"),
             ("qwen-image-text", 1, 512, 3072, "bf16"), ("flux.1", 1, 4608, 3072, "bf16"),
             ("sd3.5-large", 1, 4096, 2432, "bf16")),
    "small": (("tiny", 2, 72, 96, "fp32"),),
}
SERVERS = never("sglang", "its fused norms run inside the SGLang server only")


def cases(size: str) -> list[Case]:
    return [build(*shape) for shape in SHAPES[size]
            for build in (ada_layer_norm, gated_residual, gated_residual_ada_layer_norm)]


def ada_layer_norm_work(b: int, s: int, c: int, itemsize: int) -> Work:
    """x in, y out, scale and shift per sample. Mean 1, centre 1, square and sum 2, normalise 1, modulate 3 (the 1 +
    scale once per element, as a kernel without a prologue does it)."""
    return Work(bytes=(2 * b * s * c + 2 * b * c) * itemsize, flops=8 * b * s * c)


def gated_residual_work(b: int, s: int, c: int, itemsize: int) -> Work:
    """x and y in, one output, gate per sample; one multiply and one add."""
    return Work(bytes=(3 * b * s * c + b * c) * itemsize, flops=2 * b * s * c)


def gated_residual_ada_layer_norm_work(b: int, s: int, c: int, itemsize: int) -> Work:
    """x and y in, both results out, gate, scale and shift per sample; the arithmetic of the two ops."""
    return Work(bytes=(4 * b * s * c + 3 * b * c) * itemsize, flops=10 * b * s * c)


def ada_layer_norm(model, b, s, c, dtype) -> Case:
    peers = [compiled(_eager_ada_layer_norm), eager_peer(_eager_ada_layer_norm), SERVERS,
             never("quack", "its LayerNorm takes one weight for all samples and no shift")]
    if b == 1:  # one sample: the modulation is an affine LayerNorm
        peers.append(Peer("torch affine", lambda: _affine_layer_norm))
    return _case("ada_layer_norm", model, b, s, c, dtype, ada_layer_norm_work, ops.ada_layer_norm,
                 _eager_ada_layer_norm, "xmm", peers)


def gated_residual(model, b, s, c, dtype) -> Case:
    peers = [compiled(_eager_gated_residual), eager_peer(_eager_gated_residual), SERVERS,
             Peer("torch addcmul", lambda: torch.addcmul)]
    return _case("gated_residual", model, b, s, c, dtype, gated_residual_work, ops.gated_residual,
                 _eager_gated_residual, "xxm", peers)


def gated_residual_ada_layer_norm(model, b, s, c, dtype) -> Case:
    return _case("gated_residual_ada_layer_norm", model, b, s, c, dtype, gated_residual_ada_layer_norm_work,
                 ops.gated_residual_ada_layer_norm, _eager_fused, "xxmmm",
                 [compiled(_eager_fused), eager_peer(_eager_fused), SERVERS])


def _case(op, model, b, s, c, dtype, work, run, eager, kinds, peers) -> Case:
    torch_dtype = DTYPES[dtype]

    def make(device):
        """x: tokens [b, s, c]; m: a view [b, 1, c] of the packed modulation, as chunk(6) gives it."""
        packed = iter(torch.randn(b, 6 * c, device=device, dtype=torch_dtype)[:, None].chunk(6, -1))
        return tuple(torch.randn(b, s, c, device=device, dtype=torch_dtype) if kind == "x" else next(packed)
                     for kind in kinds)

    # every token reads the modulation of its sample
    reread = kinds.count("m") * b * (s - 1) * c * torch_dtype.itemsize
    return Case(op, model, f"{b}x{s}x{c}", dtype, work(b, s, c, torch_dtype.itemsize), make, run,
                lambda *args: eager(*(a.double() for a in args)), eager, tuple(peers), Work(reread, 0))


def _eager_ada_layer_norm(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _eager_gated_residual(x, y, gate):
    return x + gate * y


def _eager_fused(x, y, gate, scale, shift):
    residual = x + gate * y
    return residual, _eager_ada_layer_norm(residual, scale, shift)


def _affine_layer_norm(x, scale, shift):
    return F.layer_norm(x, x.shape[-1:], 1 + scale.flatten(), shift.flatten(), eps=1e-6)
