"""The ops by torch's own kernels, for tensors that none of ours takes: on a CPU, or on a GPU without our kernels.

The formulas of :mod:`pydit.ops.reference` in as few passes as torch allows. Arithmetic is fp32 and every output is
rounded once, as in the kernels, except for 16-bit matrix products, which torch rounds before their epilogue (float32
ones would be slower). float64 takes the formulas themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pydit.ops import reference


def ada_layer_norm(x, scale, shift, *, eps=1e-6, split=None):
    """As :func:`pydit.ops.reference.ada_layer_norm`; modulation rows are [B, R, C]."""
    if x.dtype == torch.float64 or not 0 < x.shape[0] <= 8:
        return reference.ada_layer_norm(x, scale, shift, eps=eps, split=split)
    if x.dtype != torch.float32 and not x.is_cpu:  # only on a CPU may a LayerNorm's affine map be wider than its input
        return ada_layer_norm(x.float(), scale, shift, eps=eps, split=split).to(x.dtype)
    weights, biases = 1 + scale.float(), shift.float()
    if split is None and x.shape[0] == 1:
        return torch.layer_norm(x, x.shape[-1:], weights.view(-1), biases.view(-1), eps)
    bounds = [(0, x.shape[1])] if split is None else [(0, min(split, x.shape[1])), (min(split, x.shape[1]), x.shape[1])]
    # torch's LayerNorm takes one affine map for all tokens it is given, which a sample's row of modulation is.
    parts = [[F.layer_norm(sample[start:end], sample.shape[-1:], weight[row], bias[row], eps)
              for row, (start, end) in enumerate(bounds)]
             for sample, weight, bias in zip(x.unbind(0), weights.unbind(0), biases.unbind(0), strict=True)]
    samples = [part[0] if len(part) == 1 else torch.cat(part) for part in parts]
    return samples[0][None] if len(samples) == 1 else torch.stack(samples)


def gated_residual(x, y, gate, *, split=None, exact=False):
    """As :func:`pydit.ops.reference.gated_residual`."""
    if exact or x.dtype == torch.float64:
        return reference.gated_residual(x, y, gate, split=split, exact=exact)
    return torch.addcmul(x, reference.per_token(gate, x, split), y)


def gated_residual_ada_layer_norm(x, y, gate, scale, shift, *, eps=1e-6, split=None):
    """As :func:`pydit.ops.reference.gated_residual_ada_layer_norm`."""
    if x.dtype == torch.float64:
        return reference.gated_residual_ada_layer_norm(x, y, gate, scale, shift, eps=eps, split=split)
    total = gated_residual(x.float(), y.float(), gate.float(), split=split)
    return total.to(x.dtype), ada_layer_norm(total, scale, shift, eps=eps, split=split).to(x.dtype)


def qk_norm_rope(q, k, q_weight, k_weight, rotation, eps):
    """As :func:`pydit.ops.reference.qk_norm_rope`; rotation is complex64 [S, D/2] (cosine and sine) or None."""
    if q.dtype == torch.float64:
        freqs = None if rotation is None else (rotation.real, rotation.imag)
        return reference.qk_norm_rope(q, k, q_weight, k_weight, freqs, eps=eps)
    rotation = None if rotation is None else rotation[:, None]
    found = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        value = torch.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
        if rotation is not None:
            _pairs(value).mul_(rotation)
        found.append(value.to(x.dtype))
    return found


def _pairs(value):
    """float32 [..., D] as complex64 [..., D/2], in place."""
    return torch.view_as_complex(value.view(*value.shape[:-1], value.shape[-1] // 2, 2))


def packed_attention(packed, weights, rotations, eps, scale, keep=None):
    """:func:`pydit.ops.joint_qk_norm_rope` and :func:`pydit.ops.joint_attention` of one stream or two, on a CPU.

    Streams are concatenated once, before the norms, instead of three times after them.

    Parameters
    ----------
    packed : tensors [B, S, 3, H, D], queries, keys and values of each stream. weights : those of the norms of queries
        and keys, (D,), stream by stream. rotations : complex64 [S, D/2] of each stream, or None for no rotation.
    keep : bool [B, S, 1, 1] of the last stream's tokens: the others take no part, whatever they hold, and their rows
        are 0. None keeps all.

    Returns
    -------
    torch.Tensor, shape (B, S, H, D), of all streams.
    """
    mask = None
    if keep is not None:
        packed = [*packed[:-1], torch.where(keep[..., None], packed[-1], 0)]
        mask = torch.zeros(keep.shape[0], 1, 1, sum(x.shape[1] for x in packed), dtype=packed[0].dtype)
        mask[:, 0, 0, -keep.shape[1]:].masked_fill_(~keep[:, :, 0, 0], -torch.inf)
    both = packed[0] if len(packed) == 1 else torch.cat(packed, 1)
    turned = torch.rms_norm(both[:, :, :2].float(), both.shape[-1:], None, eps)
    weights = torch.cat(weights).view(len(packed), 2, 1, -1).unbind(0)
    parts = (turned,) if len(packed) == 1 else turned.split_with_sizes([x.shape[1] for x in packed], 1)
    for part, weight, rotation in zip(parts, weights, rotations or (None,) * len(packed), strict=True):
        part.mul_(weight)
        if rotation is not None:
            _pairs(part).mul_(rotation[:, None, None])
    q, k = turned.to(both.dtype).unbind(2)
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), both[:, :, 2].transpose(1, 2), attn_mask=mask, scale=scale)
    out = out.transpose(1, 2)
    if keep is not None:
        out[:, -keep.shape[1]:].masked_fill_(~keep, 0)
    return out


def linear(x, weight, bias, residual, gate, *, gelu, split):
    """As :func:`pydit.ops.reference.linear`."""
    if x.dtype == torch.float64:
        return reference.linear(x, weight, bias, residual, gate, gelu=gelu, split=split)
    out = F.linear(x, weight, bias)
    if gelu:
        out = F.gelu(out, approximate="tanh")
    if gate is not None:
        return gated_residual(residual, out, gate, split=split)
    return out if residual is None else residual + out


def joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, *, txt_lens=None, scale, lse=True):
    """(out_img, out_txt, lse_img, lse_txt) as :func:`pydit.ops.reference.joint_attention` with ``return_lse``.

    Without ``lse`` nothing reads the two last: torch's attention on a CPU gives them to four digits only.
    """
    if lse or not attends(q_img):
        return reference.joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, txt_lens=txt_lens, scale=scale,
                                         return_lse=True)
    keep = None if txt_lens is None else reference.kept(txt_lens, k_txt.shape[1])[:, :, None, None]
    mask = None
    if keep is not None:  # padding is replaced, not multiplied: it may hold NaN
        q_txt, k_txt, v_txt = (None if x is None else torch.where(keep, x, 0) for x in (q_txt, k_txt, v_txt))
        mask = torch.zeros(keep.shape[0], 1, 1, k_img.shape[1] + keep.shape[1], dtype=q_img.dtype)
        mask[:, 0, 0, k_img.shape[1]:].masked_fill_(~keep[:, :, 0, 0], -torch.inf)
    out, logs = attend(q_img, k_img, v_img, q_txt, k_txt, v_txt, scale, mask)
    if q_txt is None:
        return out, None, logs, None
    tokens = q_img.shape[1]
    out_txt, lse_txt = out[:, tokens:].clone(), logs[..., tokens:].clone()  # results of an op share no memory
    if keep is not None:
        out_txt, lse_txt = torch.where(keep, out_txt, 0), torch.where(keep[:, None, :, 0, 0], lse_txt, -torch.inf)
    return out[:, :tokens], out_txt, logs[..., :tokens], lse_txt


def attends(x):
    """Whether :func:`attend` and :func:`packed_attention` can take tensors like this one."""
    return x.dtype != torch.float64 and x.is_cpu and x.numel() > 0


def attend(q_img, k_img, v_img, q_txt, k_txt, v_txt, scale, mask=None):
    """(out [B, S_img + S_txt, H, D], log-sum-exp [B, H, S_img + S_txt]) of both streams in one tensor each."""
    def joined(image, text):
        both = image if text is None or not text.shape[1] else torch.cat((image, text), 1)
        return both.transpose(1, 2)

    out, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        joined(q_img, q_txt), joined(k_img, k_txt), joined(v_img, v_txt), attn_mask=mask, scale=scale)
    return out.transpose(1, 2), logs
