"""The ops as formulas in plain torch, for any float dtype; they import nothing from pydit.

float64 is computed in float64; narrower dtypes are computed in float32 and every output is rounded once. Shapes as in
the public ops: modulation vectors are [B, C], [B, 1, C], or [B, 2, C] together with ``split``.
"""

from __future__ import annotations

import math

import torch


def ada_layer_norm(x, scale, shift, *, eps=1e-6, split=None):
    """LN(x) * (1 + scale) + shift over the last dimension of x [B, S, C] (DiT, Peebles & Xie 2023, adaLN)."""
    value = wide(x)
    return (normalize(value, eps) * (1 + per_token(wide(scale), x, split))
            + per_token(wide(shift), x, split)).to(x.dtype)


def gated_residual(x, y, gate, *, split=None, exact=False):
    """x + gate * y for x, y [B, S, C]; exact: the product is rounded to the dtype before the sum."""
    if exact:
        return x + per_token(gate, x, split) * y
    return (wide(x) + per_token(wide(gate), x, split) * wide(y)).to(x.dtype)


def gated_residual_ada_layer_norm(x, y, gate, scale, shift, *, eps=1e-6, split=None):
    """r = x + gate * y and LN(r) * (1 + scale) + shift, the norm taken of r before it is rounded."""
    residual = wide(x) + per_token(wide(gate), x, split) * wide(y)
    out = (normalize(residual, eps) * (1 + per_token(wide(scale), x, split)) + per_token(wide(shift), x, split))
    return residual.to(x.dtype), out.to(x.dtype)


def qk_norm_rope(q, k, q_weight, k_weight, freqs, *, eps=1e-6):
    """RMSNorm of q and k [B, S, H, D] over D, then rotation of interleaved pairs by freqs = (cos, sin) [S, D/2]."""
    return norm_rope(q, q_weight, freqs, eps), norm_rope(k, k_weight, freqs, eps)


def joint_qk_norm_rope(q_img, k_img, q_txt, k_txt, weights, freqs_img, freqs_txt, *, eps=1e-6):
    """qk_norm_rope of both streams; weights are those of q_img, k_img, q_txt and k_txt."""
    weights = (None,) * 4 if weights is None else weights
    return (*qk_norm_rope(q_img, k_img, *weights[:2], freqs_img, eps=eps),
            *qk_norm_rope(q_txt, k_txt, *weights[2:], freqs_txt, eps=eps))


def linear(x, weight, bias=None, residual=None, gate=None, *, gelu=False, split=None):
    """residual + gate * act(x W^T + b) for x [..., K] and weight [N, K]; a gate asks for x [B, S, K]."""
    out = torch.nn.functional.linear(wide(x), wide(weight), None if bias is None else wide(bias))
    if gelu:
        out = torch.nn.functional.gelu(out, approximate="tanh")
    if gate is not None:
        out = per_token(wide(gate), out, split) * out
    if residual is not None:
        out = wide(residual) + out
    return out.to(x.dtype)


def linear_gelu(x, weight, bias=None):
    """gelu(x W^T + b), tanh approximation."""
    return linear(x, weight, bias, gelu=True)


def linear_gated_residual(x, weight, bias, residual, gate, *, split=None):
    """residual + gate * (x W^T + b) for x [B, S, K], residual [B, S, N]."""
    return linear(x, weight, bias, residual, gate, split=split)


def linear_residual(x, weight, bias=None):
    """x + x W^T + b for x [..., C]."""
    return linear(x, weight, bias, x)


def second_moments(x, y=None, *, shift_x=None, shift_y=None):
    """N, then sums over the rows of u = x - shift_x [N, d], v = y - shift_y [N, e], u^T u and u^T v, in float64."""
    u = x.double() if shift_x is None else x.double() - shift_x.double()
    v = u[:, :0] if y is None else y.double() if shift_y is None else y.double() - shift_y.double()
    return len(u), u.sum(0), v.sum(0), u.T @ u, u.T @ v


def hsic_matrix(features):
    """Unbiased HSIC_1 [L, L], float64, of every pair of L features [n, d_l], n >= 4."""
    n = len(features[0])
    grams = torch.stack([u_centred_gram(x).flatten() for x in features])
    hsic = grams @ grams.T / (2 * n * (n - 3))
    return hsic + hsic.T  # a matrix product need not be symmetric to the last bit


def u_centred_gram(x):
    """U-centred Gram matrices (Szekely and Rizzo 2014), float64 [..., n, n], of features [..., n, d], n >= 4."""
    n = x.shape[-2]
    # HSIC_1 does not change under translation; removing the mean first saves the digits an offset would cost.
    x = centred(x)
    gram = x @ x.mT
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    largest = gram.abs().amax((-2, -1), keepdim=True)
    rows = gram.sum(-1) / (n - 2)
    rows = rows - rows.sum(-1, keepdim=True) / (2 * (n - 1))
    gram = gram - rows.unsqueeze(-1) - rows.unsqueeze(-2)
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    # Rounding alone, of rows that are alike but for one: CKA would make a number between -1 and 1 of it.
    left = gram.abs().amax((-2, -1), keepdim=True)
    return gram.masked_fill_(left <= 1e-12 * largest, 0.0)


def centred(x):
    """Features [..., n, d] minus their column means, float64; exactly 0 where they are constant up to rounding."""
    x = x.double()
    out = x - x.mean(-2, keepdim=True)
    scale = x.abs().amax((-2, -1), keepdim=True)
    return torch.where(out.abs().amax((-2, -1), keepdim=True) <= 1e-13 * scale, 0.0, out)


def norm_rope(x, weight, freqs, eps):
    """RMSNorm of x [B, S, H, D] over D, weight [D] or None, then rotation by freqs = (cos, sin) or None."""
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


def joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, *, txt_lens=None, scale=None, return_lse=False):
    """softmax(scale * q k^T) v over the keys [B, S, H, D] of both streams; text from txt_lens [B] on takes no part."""
    scale = q_img.shape[3] ** -0.5 if scale is None else scale
    keep = None if txt_lens is None else kept(txt_lens, k_txt.shape[1])

    def text(x):  # replaced, not multiplied: padding may hold NaN
        return x if keep is None else torch.where(keep[:, :, None, None], x, 0)

    keys = torch.cat((wide(k_img), wide(text(k_txt))), 1)
    values = torch.cat((wide(v_img), wide(text(v_txt))), 1)
    seen = None if keep is None else torch.cat((keep.new_ones(keep.shape[0], k_img.shape[1]), keep), 1)
    out_img, lse_img = _attend(wide(q_img), keys, values, seen, scale)
    out_txt = lse_txt = None
    if q_txt is not None:
        out_txt, lse_txt = _attend(wide(text(q_txt)), keys, values, seen, scale)
        if keep is not None:
            lse_txt = torch.where(keep[:, None], lse_txt, -math.inf)
        out_txt = text(out_txt).to(q_txt.dtype)
    out_img = out_img.to(q_img.dtype)
    return (out_img, out_txt, lse_img, lse_txt) if return_lse else (out_img, out_txt)


def kept(txt_lens, tokens):
    """[B, tokens] bool: which text tokens are below their sample's length."""
    return torch.arange(tokens, device=txt_lens.device) < txt_lens[:, None]


def _attend(query, keys, values, seen, scale):
    """(out [B, S, H, D], lse [B, H, S]) in the dtype of query, for a part of the queries at a time."""
    batch, tokens, heads, _ = query.shape
    step = max(1, (1 << 26) // max(1, batch * heads * keys.shape[1]))
    outs, sums = [query[:, :0]], [query.new_empty(batch, heads, 0)]
    for first in range(0, tokens, step):
        scores = torch.einsum("bqhd,bkhd->bhqk", query[:, first:first + step], keys) * scale
        if seen is not None:
            scores = scores.masked_fill(~seen[:, None, None], -math.inf)
        lse = torch.logsumexp(scores, -1)
        none = (lse == -math.inf)[..., None]  # the softmax of nothing is NaN
        weights = torch.softmax(scores.masked_fill(none, 0), -1).masked_fill(none, 0)
        outs.append(torch.einsum("bhqk,bkhd->bqhd", weights, values))
        sums.append(lse)
    return torch.cat(outs, 1), torch.cat(sums, 2)


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
