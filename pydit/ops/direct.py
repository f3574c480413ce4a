"""The ops as a model on a CPU calls them: straight to torch's own kernels, by :mod:`pydit.ops.fallback`.

For small tensors, what a public op does around its arithmetic (checks with messages, the dispatcher, the choice of a
backend) takes longer than the arithmetic. A block whose streams have passed :func:`ops_for` needs none of it: its
shapes fit by construction, no kernel of this package runs, and nothing traces the ops or wants a gradient.

Signatures and results are those of :mod:`pydit.ops`, except that ``freqs`` is one complex table [S, D/2], and that
intermediate results are rounded as in eager models where rounding once would be slower: a sum before it is normalised,
several samples' LayerNorm before it is modulated. ``pydit.report()`` counts calls in the same way.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType

import torch

from pydit import backend, env, ops
from pydit.ops import fallback
from pydit.ops._library import runs_straight
from pydit.ops.fallback import attends


def ops_for(*streams) -> ModuleType:
    """This module where ops on tensors like these would only run torch's kernels; else :mod:`pydit.ops`.

    Parameters
    ----------
    streams : torch.Tensor, or None for a stream that is not there. The first's device and dtype stand for all.
    """
    first = streams[0]
    if (runs_straight(streams) and not torch.is_grad_enabled() and first.is_cpu
            and all(stream is None or stream.dtype == first.dtype for stream in streams)
            and env.get("PYDIT_BACKEND") != "sim" and env.get("PYDIT_GEMM") != "library"):
        return sys.modules[__name__]
    return ops


def _count(op: str) -> None:
    backend.record(op, backend.ON_CPU.name, backend.ON_CPU.reason)


def in_one_launch(x) -> bool:
    return False


def ada_layer_norm(x, scale, shift, *, eps=1e-6, split=None):
    _count("ada_layer_norm")
    return _modulated(x, _rows(scale), _rows(shift), eps, split)


def _modulated(x, scale, shift, eps, split):
    if x.shape[0] == 1 or split is not None:
        return fallback.ada_layer_norm(x, scale, shift, eps=eps, split=split)
    return torch.addcmul(shift, torch.layer_norm(x, x.shape[-1:], None, None, eps), 1 + scale)


def gated_residual(x, y, gate, *, split=None):
    _count("gated_residual")
    return fallback.gated_residual(x, y, _rows(gate), split=split)


def gated_residual_ada_layer_norm(x, y, gate, scale, shift, *, eps=1e-6, split=None):
    _count("gated_residual_ada_layer_norm")
    total = fallback.gated_residual(x, y, _rows(gate), split=split)
    return total, _modulated(total, _rows(scale), _rows(shift), eps, split)


def linear_gelu(x, weight, bias=None):
    _count("linear_gelu")
    return fallback.linear(x, weight, bias, None, None, gelu=True, split=None)


def linear_residual(x, weight, bias=None):
    _count("linear_residual")
    return fallback.linear(x, weight, bias, x, None, gelu=False, split=None)


def qk_norm_rope(q, k, q_weight, k_weight, freqs, *, eps=1e-6):
    _count("qk_norm_rope")
    return fallback.qk_norm_rope(q, k, q_weight, k_weight, freqs, eps)


def joint_qk_norm_rope(q_img, k_img, q_txt, k_txt, weights, freqs_img, freqs_txt, *, eps=1e-6):
    _count("joint_qk_norm_rope")
    return (*fallback.qk_norm_rope(q_img, k_img, *weights[:2], freqs_img, eps),
            *fallback.qk_norm_rope(q_txt, k_txt, *weights[2:], freqs_txt, eps))


def joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt):
    if not attends(q_img):
        return ops.joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt)
    _count("joint_attention")
    out, _ = fallback.attend(q_img, k_img, v_img, q_txt, k_txt, v_txt, 1 / math.sqrt(q_img.shape[3]))
    if q_txt is None:
        return out, None
    return out[:, :q_img.shape[1]], out[:, q_img.shape[1]:]


def packed_attention(packed, weights, rotations, *, eps=1e-6, keep=None):
    """:func:`pydit.ops.fallback.packed_attention`, which is two ops at once."""
    _count("qk_norm_rope" if len(packed) == 1 else "joint_qk_norm_rope")
    _count("joint_attention")
    return fallback.packed_attention(packed, weights, rotations, eps, 1 / math.sqrt(packed[0].shape[-1]), keep)


def _rows(row):
    return row[:, None] if row.ndim == 2 else row
