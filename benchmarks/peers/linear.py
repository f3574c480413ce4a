"""Peers of the linear layers of two streams: cuBLASLt through torch, with the epilogues that torch exposes, and
torch.compile, also where it may search for a kernel.

A formula takes x [B, S, K], weight [N, K] and bias [N]; residual [B, S, N] and gate [B, 1, N] follow, or for
:func:`qkv` (weight and bias of three layers, [3 H D, K] and [3 H D]) the norms of queries and keys [D] and cos and sin
[S, D/2]. Peers take pairs of them, the image's first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.peers import Peer, compiled, eager_peer, needs_gpu, never


def gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def gated_residual(x, weight, bias, residual, gate):
    return residual + gate * F.linear(x, weight, bias)


def residual(x, weight, bias):
    return x + F.linear(x, weight, bias)


def qkv(x, weight, bias, norm_q, norm_k, cos, sin):
    """(q, k, v) [B, S, H, D], as eager diffusers rounds: norm and rotation in float32, each rounded."""
    dim = norm_q.shape[0]
    q, k, v = (part.unflatten(-1, (-1, dim)) for part in F.linear(x, weight, bias).chunk(3, -1))
    return _turned(q, norm_q, cos, sin), _turned(k, norm_k, cos, sin), v


def addmm_gelu(x, weight, bias):
    """One cuBLASLt call with bias and tanh-GELU in its epilogue. On a CPU the same call is the erf GELU instead."""
    out = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])


def addcmul_residual(x, weight, bias, residual, gate):
    """Two kernels, of which the second reads the product once."""
    return torch.addcmul(residual, gate, F.linear(x, weight, bias))


def addmm_residual(x, weight, bias):
    """x is the matrix that addmm adds; the bias comes after."""
    flat = x.flatten(0, -2)
    return torch.addmm(flat, flat, weight.t()).add_(bias).unflatten(0, x.shape[:-1])


FORMULAS: dict[str, Callable] = {"joint_linear": F.linear, "joint_linear_gelu": gelu,
                                 "joint_linear_gated_residual": gated_residual, "joint_linear_residual": residual,
                                 "joint_qkv": qkv}


def linear_peers(op: str) -> tuple[Peer, ...]:
    """Of an op of :data:`FORMULAS`."""
    both = of_both(FORMULAS[op])
    searched = compiled(both, "torch.compile max-autotune", mode="max-autotune-no-cudagraphs")
    found = [eager_peer(both), compiled(both), replace(searched, available=needs_gpu())]
    if op == "joint_linear_gelu":
        found.append(Peer("cublaslt gelu", lambda: of_both(addmm_gelu), needs_gpu()))
    if op == "joint_linear_residual":
        found.append(Peer("cublaslt addmm", lambda: of_both(addmm_residual)))
    if op == "joint_linear_gated_residual":
        found.append(Peer("cublaslt then addcmul", lambda: of_both(addcmul_residual)))
    if op in QUACK:
        found.append(Peer("quack", lambda: of_both(_quack(op)), needs_gpu("quack.gemm_interface", capability=(9, 0))))
    else:
        found.append(never("quack", "its products have no such epilogue"))
    return tuple(found)


QUACK: dict[str, Callable] = {  # its module, x, the transposed weight and the bias
    "joint_linear": lambda quack, a, b, bias: quack.gemm(a, b, bias=bias),
    "joint_linear_gelu": lambda quack, a, b, bias: quack.gemm_act(a, b, bias=bias, activation="gelu_tanh_approx",
                                                                  store_preact=False)[1],
    "joint_linear_residual": lambda quack, a, b, bias: quack.gemm_add(a, b, a, bias=bias)}


def _quack(op: str) -> Callable:
    """It searches for the fastest of its kernels at the first call with a shape."""
    module = importlib.import_module("quack.gemm_interface")

    def run(x, weight, bias):
        return QUACK[op](module, x.flatten(0, -2), weight.t(), bias).unflatten(0, x.shape[:-1])

    return run


def of_both(function: Callable) -> Callable:
    """``function`` of the image's and of the text's inputs, which alternate; all outputs in one tuple."""
    def run(*args):
        found = function(*args[::2]), function(*args[1::2])
        return tuple(x for part in found for x in (part if isinstance(part, tuple) else (part,)))
    return run


def _turned(x, weight, cos, sin):
    wide = x if x.dtype == torch.float64 else x.float()
    wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight
    wide = wide if x.dtype == torch.float64 else wide.float()
    even, odd, cos, sin = wide[..., ::2], wide[..., 1::2], cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
