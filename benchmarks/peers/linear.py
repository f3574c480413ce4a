"""Peers of the fused linears: cuBLASLt through torch, with the epilogues that torch exposes, and torch.compile.

x [B, S, C_in], weight [C_out, C_in], bias [C_out]; residual [B, S, C_out]; gate [B, 1, C_out].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.peers import Peer, compiled, eager_peer, needs_gpu


def linear_gelu_peers() -> tuple[Peer, ...]:
    """Of gelu_tanh(x W^T + b)."""
    return (Peer("cublaslt gelu", lambda: addmm_gelu, needs_gpu()), compiled(_eager_gelu), eager_peer(_eager_gelu))


def linear_gated_residual_peers() -> tuple[Peer, ...]:
    """Of residual + gate * (x W^T + b): the bias is cuBLASLt's epilogue, gate and residual are kernels of their own."""
    return compiled(_eager_gated), eager_peer(_eager_gated)


def linear_residual_peers() -> tuple[Peer, ...]:
    """Of x + x W^T + b: x is the matrix that addmm adds, the bias comes after."""
    return (Peer("cublaslt addmm", lambda: addmm_residual), compiled(_eager_residual), eager_peer(_eager_residual))


def addmm_gelu(x, weight, bias):
    """One cuBLASLt call with bias and tanh-GELU in its epilogue. On a CPU the same call is the erf GELU instead."""
    out = torch.ops.aten._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])


def addmm_residual(x, weight, bias):
    flat = x.flatten(0, -2)
    return torch.addmm(flat, flat, weight.t()).add_(bias).unflatten(0, x.shape[:-1])


def _eager_gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _eager_gated(x, weight, bias, residual, gate):
    return residual + gate * F.linear(x, weight, bias)


def _eager_residual(x, weight, bias):
    return x + F.linear(x, weight, bias)
