"""One attention out of several over parts of the keys, as ring attention and split keys leave them.

Notation: B batch, S queries, H heads, D head dim.
"""

from __future__ import annotations

import torch

from pydit.ops._library import check_list, check_tensor
from pydit.ops.reference import wide

_OP = "merge_attention"


def merge_attention(outs, lses):
    """The attention over the keys of all parts, from what each part gave by itself.

    Parameters
    ----------
    outs : sequence of torch.Tensor, shape (B, S, H, D) each, any floating dtype: softmax(s_i) v_i over the keys of
        part i.
    lses : sequence of torch.Tensor, shape (B, H, S) each, float32 (float64 for float64 outputs): log sum exp(s_i),
        natural logarithm; -inf where a part has no key for a query, whatever its output holds there, NaN included.

    Returns
    -------
    (out, lse)
        out (B, S, H, D) in the dtype of the parts; lse (B, H, S) in that of ``lses``. A query without a key in any part
        gives 0 and -inf, as in :func:`joint_attention`.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, device or shape, or no part at all.

    Notes
    -----
    lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i (Milakov & Gimelshein 2018; Liu et al. 2023, Ring
    Attention). Arithmetic is fp32 (float64 for float64) and rounds once, however many parts there are: merge all parts
    by one call rather than one after the other. Plain torch, so differentiable in all tensors; the gradients of parts
    without a key are 0.
    """
    outs, lses = check_list(_OP, "outs", outs), check_list(_OP, "lses", lses)
    _check(outs, lses)
    parts = torch.stack(lses)
    top = parts.detach().amax(0)
    top = torch.where(top == -torch.inf, 0, top)
    weights = torch.exp(parts - top)
    total = weights.sum(0)
    none = total == 0
    total = torch.where(none, 1, total)
    lse = torch.where(none, -torch.inf, torch.log(total) + top)
    weights = (weights / total).transpose(2, 3)[..., None]  # [parts, B, S, H, 1]
    out = 0
    for part, weight in zip(outs, weights.unbind(0), strict=True):
        out = out + torch.where(weight == 0, 0, wide(part)) * weight
    return out.to(outs[0].dtype), lse


def _check(outs, lses):
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{_OP}: expected as many lses as outs, and one at least, got {len(outs)} outs and "
                         f"{len(lses)} lses")
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_tensor(_OP, f"outs[{index}]", out, outs[0])
        if out.ndim != 4 or out.shape != outs[0].shape:
            expected = "[B, S, H, D]" if index == 0 else f"{list(outs[0].shape)} like the first"
            raise ValueError(f"{_OP}: outs[{index}]: expected shape {expected}, got {list(out.shape)}")
        check_tensor(_OP, f"lses[{index}]", lse, None)
        dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
        if lse.dtype != dtype or lse.device != out.device:
            raise TypeError(f"{_OP}: lses[{index}]: expected {dtype} on {out.device} for outputs of {out.dtype}, got "
                            f"{lse.dtype} on {lse.device}")
        expected = [out.shape[0], out.shape[2], out.shape[1]]
        if list(lse.shape) != expected:
            raise ValueError(f"{_OP}: lses[{index}]: expected shape {expected}, got {list(lse.shape)}")
