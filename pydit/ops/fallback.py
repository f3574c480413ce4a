"""The ops by torch's own kernels, for tensors that none of ours takes: what a CPU runs.

The formulas of :mod:`pydit.ops.reference`, in as few passes as torch has for them; arithmetic is fp32 and every output
is rounded once, as in the kernels. float64 takes the formulas themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pydit.ops import reference


def ada_layer_norm(x, scale, shift, *, eps=1e-6, split=None):
    """As :func:`pydit.ops.reference.ada_layer_norm`; modulation rows are [B, R, C]."""
    if x.dtype == torch.float64 or not 0 < x.shape[0] <= 8:
        return reference.ada_layer_norm(x, scale, shift, eps=eps, split=split)
    weights, biases = 1 + scale.float(), shift.float()
    if split is None and x.shape[0] == 1:
        return F.layer_norm(x, x.shape[-1:], weights.view(-1), biases.view(-1), eps)
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


def norm_rope(x, weight, freqs, eps):
    """RMSNorm and rotation of x [B, S, H, D], as :func:`pydit.ops.reference.qk_norm_rope` of one of its two."""
    if x.dtype == torch.float64:
        return reference.norm_rope(x, weight, freqs, eps)
    value = F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
    if freqs is not None:
        pairs = torch.view_as_complex(value.unflatten(-1, (x.shape[-1] // 2, 2)))
        pairs.mul_(torch.complex(*freqs)[:, None])
    return value.to(x.dtype)


def joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, *, txt_lens=None, scale, lse=True):
    """(out_img, out_txt, lse_img, lse_txt) as :func:`pydit.ops.reference.joint_attention` with ``return_lse``.

    Without ``lse`` nothing reads the two last: torch's attention on a CPU gives them to four digits only.
    """
    if lse or q_img.dtype == torch.float64 or q_img.is_cuda or not q_img.numel():
        return reference.joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, txt_lens=txt_lens, scale=scale,
                                         return_lse=True)
    keep = None if txt_lens is None else reference.kept(txt_lens, k_txt.shape[1])

    def text(x):  # replaced, not multiplied: padding may hold NaN
        return x if keep is None else torch.where(keep[:, :, None, None], x, 0)

    def joined(image, text_part):
        both = image if text_part is None or not text_part.shape[1] else torch.cat((image, text(text_part)), 1)
        return both.transpose(1, 2)

    mask = None
    if keep is not None:
        mask = torch.zeros(keep.shape[0], 1, 1, k_img.shape[1] + keep.shape[1], dtype=q_img.dtype)
        mask[:, 0, 0, k_img.shape[1]:].masked_fill_(~keep, -torch.inf)
    out, logs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        joined(q_img, q_txt), joined(k_img, k_txt), joined(v_img, v_txt), attn_mask=mask, scale=scale)
    out, tokens = out.transpose(1, 2), q_img.shape[1]
    if q_txt is None:
        return out, None, logs, None
    out_txt, lse_txt = out[:, tokens:].clone(), logs[..., tokens:].clone()  # results of an op share no memory
    if keep is not None:
        out_txt, lse_txt = text(out_txt), torch.where(keep[:, None], lse_txt, -torch.inf)
    return out[:, :tokens], out_txt, logs[..., :tokens], lse_txt
