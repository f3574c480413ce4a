"""The ops as formulas in plain torch, for any float dtype; they import nothing from pydit.

float64 is computed in float64; narrower dtypes are computed in float32 and every output is rounded once. Shapes as in
the public ops: modulation vectors are [B, C], [B, 1, C], or [B, 2, C] together with ``split``.
"""

from __future__ import annotations

import torch


def ada_layer_norm(x, scale, shift, *, eps=1e-6, split=None):
    """LN(x) * (1 + scale) + shift over the last dimension of x [B, S, C] (DiT, Peebles & Xie 2023, adaLN)."""
    value = wide(x)
    return (normalize(value, eps) * (1 + per_token(wide(scale), x, split))
            + per_token(wide(shift), x, split)).to(x.dtype)


def gated_residual(x, y, gate, *, split=None):
    """x + gate * y for x, y [B, S, C]."""
    return (wide(x) + per_token(wide(gate), x, split) * wide(y)).to(x.dtype)


def gated_residual_ada_layer_norm(x, y, gate, scale, shift, *, eps=1e-6, split=None):
    """r = x + gate * y and LN(r) * (1 + scale) + shift, the norm taken of r before it is rounded."""
    residual = wide(x) + per_token(wide(gate), x, split) * wide(y)
    out = (normalize(residual, eps) * (1 + per_token(wide(scale), x, split)) + per_token(wide(shift), x, split))
    return residual.to(x.dtype), out.to(x.dtype)


def qk_norm_rope(q, k, q_weight, k_weight, freqs, *, eps=1e-6):
    """RMSNorm of q and k [B, S, H, D] over D, then rotation of interleaved pairs by freqs = (cos, sin) [S, D/2]."""
    return _norm_rope(q, q_weight, freqs, eps), _norm_rope(k, k_weight, freqs, eps)


def _norm_rope(x, weight, freqs, eps):
    value = wide(x)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        value = value * wide(weight)
    if freqs is not None:
        value = rotate(value, *freqs)
    return value.to(x.dtype)


def rotate(value, cos, sin):
    """Rotate interleaved pairs of value [B, S, H, D] by angles with cosine and sine [S, D/2]."""
    cos, sin = cos[:, None, :].to(value.dtype), sin[:, None, :].to(value.dtype)
    even, odd = value.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def normalize(value, eps):
    """(value - mean) / sqrt(variance + eps) over the last dimension, biased variance."""
    centred = value - value.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)  # what rounding left of a mean much larger than the deviation
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def per_token(row, x, split):
    """Modulation rows [B, C] or [B, R, C] as something that broadcasts against x [B, S, C]."""
    if row.ndim == 2:
        row = row[:, None]
    if split is None:
        return row
    tokens = x.shape[1]
    first = min(split, tokens)
    return torch.cat((row[:, :1].expand(-1, first, -1), row[:, 1:].expand(-1, tokens - first, -1)), 1)


def wide(x):
    """x in the dtype that arithmetic runs in: float32, or float64 for float64."""
    return x if x.dtype == torch.float64 else x.float()
