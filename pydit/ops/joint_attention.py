"""Joint attention over an image and a text stream that stay in tensors of their own.

Notation: B batch, S tokens of a stream, H heads, D head dim.
"""

from __future__ import annotations

import math

import torch

from pydit import backend, env
from pydit.ops import fallback, reference
from pydit.ops._library import call, check_last_dim, check_tensor, define, define_backward
from pydit.ops.reference import wide

_OP = "joint_attention"
_TINIEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 2  # kernels multiply by 1.44
_CHUNK = 1 << 25  # scores that the backward holds at once


def joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, *, txt_lens=None, scale=None, return_lse=False):
    """softmax(scale * q k^T) v over the keys of both streams, without concatenating them.

    Parameters
    ----------
    q_img, k_img, v_img : torch.Tensor, shape (B, S_img, H, D). float16 or bfloat16; also float32 and float64 on the
        reference backend. D is 32, 64 or 128. Any strides with a contiguous last dimension (views of packed QKV); where
        an address or stride is not a multiple of 16 bytes, or a stride is 0, the portable kernel runs.
    q_txt, k_txt, v_txt : torch.Tensor, shape (B, S_txt, H, D). S_txt may be 0. ``q_txt=None``: the text gives keys and
        values only, and ``out_txt`` is None.
    txt_lens : torch.Tensor, int32, shape (B,), on the same device, or None. Text tokens from a sample's length on take
        no part whatever they hold (NaN included): their keys are not seen, their outputs and all their gradients are
        0. It is read on the device, without a synchronisation, and clamped to 0 .. S_txt; with ``PYDIT_CHECK=1`` a
        length outside that range raises, at the price of a synchronisation. For a mask with holes see
        :func:`pack_text`.
    scale : float > 0, or None for 1 / sqrt(D). Scaled scores may use all of float32's range; in the millions, where
        float32 no longer tells neighbouring scores apart, gradients are finite but mean little.
    return_lse : also return the log-sum-exp of the scaled scores.

    Returns
    -------
    (out_img, out_txt) or (out_img, out_txt, lse_img, lse_txt)
        Outputs as the queries; lse float32 (float64 for float64), shape (B, H, S), natural logarithm. A query without
        any key gives 0 and -inf.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, device, shape or stride; the message names the argument, what was expected, what came.

    Notes
    -----
    Online softmax: Milakov & Gimelshein 2018; tiling: Dao et al. 2022 (FlashAttention). Differentiable in all six
    tensors, through lse as well; on Hopper the gradients of the queries are sums in no fixed order, unless
    ``torch.use_deterministic_algorithms(True)`` asks for one. Second derivatives raise NotImplementedError. The order
    of the streams is of no consequence.
    """
    _check_stream("img", q_img, k_img, v_img, q_img)
    _check_stream("txt", q_txt, k_txt, v_txt, q_img)
    _check_lens(txt_lens, k_txt)
    if scale is None:
        scale = 1 / math.sqrt(q_img.shape[3])
    elif not isinstance(scale, (int, float)) or isinstance(scale, bool) or not _TINIEST <= scale <= _LARGEST:
        what = type(scale).__name__ if isinstance(scale, torch.Tensor) else repr(scale)  # which would take many lines
        raise ValueError(f"{_OP}: scale: expected a number above 0, of float32's range, or None, got {what}")
    inputs = (q_img, k_img, v_img, q_txt, k_txt, v_txt)  # a backward reads the logarithms too
    lse = return_lse or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs))
    out_img, out_txt, lse_img, lse_txt = call(_OP, *inputs, txt_lens, float(scale), lse)
    if q_txt is None:
        out_txt = lse_txt = None
    return (out_img, out_txt, lse_img, lse_txt) if return_lse else (out_img, out_txt)


def pack_text(mask, *tensors):
    """Move the text tokens that a mask keeps to the front, without a synchronisation.

    Parameters
    ----------
    mask : torch.Tensor, bool, shape (B, S): True is kept. It may have holes.
    tensors : torch.Tensor, shape (B, S, ...) each.

    Returns
    -------
    (txt_lens, order, *packed)
        txt_lens int32 (B,); order int64 (B, S), the index each place was filled from; the tensors in that order, kept
        tokens first and in their sequence. ``torch.empty_like(x).scatter_(1, index, x)`` with ``order`` expanded to the
        shape of x undoes it, as :func:`unpack_text` does.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, device or shape; the message names the argument, what was expected, what came.
    """
    if not _is_dense(mask) or mask.dtype != torch.bool or mask.ndim != 2:
        raise TypeError(f"pack_text: mask: expected a bool tensor [B, S], got {_described(mask)}")
    for x in tensors:
        if not _is_dense(x):
            raise TypeError(f"pack_text: expected tensors behind mask, got {_described(x)}")
        if x.device != mask.device:
            raise ValueError(f"pack_text: expected tensors on {mask.device} like mask, got {x.device}")
        if x.shape[:2] != mask.shape:
            raise ValueError(f"pack_text: expected tensors [{mask.shape[0]}, {mask.shape[1]}, ...] like mask, "
                             f"got {list(x.shape)}")
    order = torch.argsort(~mask, dim=1, stable=True)
    return (mask.sum(1, dtype=torch.int32), order, *(x.gather(1, _expand(order, x)) for x in tensors))


def unpack_text(order, x):
    """Put the tokens of x [B, S, ...], packed by :func:`pack_text` with this ``order``, back to their places.

    Raises TypeError and ValueError as it does.
    """
    if not _is_dense(order) or order.dtype != torch.int64 or order.ndim != 2:
        raise TypeError(f"unpack_text: order: expected an int64 tensor [B, S], got {_described(order)}")
    if not _is_dense(x):
        raise TypeError(f"unpack_text: x: expected a torch.Tensor, got {_described(x)}")
    if x.device != order.device or x.shape[:2] != order.shape:
        raise ValueError(f"unpack_text: x: expected a tensor [{order.shape[0]}, {order.shape[1]}, ...] on "
                         f"{order.device} like order, got {list(x.shape)} on {x.device}")
    return torch.empty_like(x).scatter(1, _expand(order, x), x)


def _is_dense(x):
    return isinstance(x, torch.Tensor) and x.layout == torch.strided


def _described(x):
    if not isinstance(x, torch.Tensor):
        return type(x).__name__
    return f"{x.dtype} {list(x.shape)}" if _is_dense(x) else f"one of layout {x.layout}"


def _expand(order, x):
    return order.view(*order.shape, *[1] * (x.ndim - 2)).expand_as(x)


def _check_stream(stream, q, k, v, like):
    given = [(f"{letter}_{stream}", x) for letter, x in (("q", q), ("k", k), ("v", v))]
    if q is None and stream == "txt":
        del given[0]
    for name, x in given:
        check_tensor(_OP, name, x, None if x is like else like)
        if x.ndim != 4:
            raise ValueError(f"{_OP}: {name}: expected shape [B, S, H, D], got {list(x.shape)}")
    for name, x in given:
        if x.shape[3] not in backend.KERNEL_HEAD_DIMS:
            raise ValueError(f"{_OP}: {name}: expected a head dim of 32, 64 or 128, got {x.shape[3]}")
        expected = [like.shape[0], k.shape[1], like.shape[2], like.shape[3]]
        if list(x.shape) != expected:
            raise ValueError(f"{_OP}: {name}: expected shape {expected}, got {list(x.shape)}")
        check_last_dim(_OP, name, x)


def _check_lens(lens, k_txt):
    if lens is None:
        return
    if not isinstance(lens, torch.Tensor):
        raise TypeError(f"{_OP}: txt_lens: expected a torch.Tensor or None, got {type(lens).__name__}")
    if lens.dtype != torch.int32:
        raise TypeError(f"{_OP}: txt_lens: expected torch.int32, got {lens.dtype}")
    if lens.device != k_txt.device:
        raise ValueError(f"{_OP}: txt_lens: expected device {k_txt.device} like k_txt, got {lens.device}")
    if tuple(lens.shape) != (k_txt.shape[0],):
        raise ValueError(f"{_OP}: txt_lens: expected shape [{k_txt.shape[0]}], got {list(lens.shape)}")
    if not lens.is_contiguous():
        raise ValueError(f"{_OP}: txt_lens: expected a contiguous tensor, got strides {list(lens.stride())}")
    if torch.compiler.is_compiling() or env.get("PYDIT_CHECK") == "0":
        return
    if bool(((lens < 0) | (lens > k_txt.shape[1])).any()):
        raise ValueError(f"{_OP}: txt_lens: expected lengths from 0 to {k_txt.shape[1]}, got {lens.tolist()}")


def _outputs(q_img, q_txt, k_txt):
    """Empty outputs. A text stream without queries has outputs of no tokens."""
    batch, _, heads, dim = q_img.shape
    lse = torch.float64 if q_img.dtype == torch.float64 else torch.float32
    tokens = 0 if q_txt is None else k_txt.shape[1]
    return (q_img.new_empty(q_img.shape), q_img.new_empty(batch, tokens, heads, dim),
            q_img.new_empty(batch, heads, q_img.shape[1], dtype=lse),
            q_img.new_empty(batch, heads, tokens, dtype=lse))


def _forward(q_img, k_img, v_img, q_txt, k_txt, v_txt, txt_lens, scale, lse=True):
    path = backend.choose(_OP, q_img)
    if path.kernels is None:
        found = fallback.joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, txt_lens=txt_lens, scale=scale,
                                         lse=lse)
        if q_txt is None:
            empty = _outputs(q_img, None, k_txt)
            found = (found[0], empty[1], found[2], empty[3])
        return tuple(value.contiguous() for value in found)
    outputs = _outputs(q_img, q_txt, k_txt)
    if q_img.dtype not in backend.KERNEL_DTYPES:
        raise TypeError(f"{_OP}: expected float16 or bfloat16 on the {path.name} backend, got {q_img.dtype}")
    out_img, out_txt, lse_img, lse_txt = outputs
    text = (None, None) if q_txt is None else (out_txt, lse_txt)
    with backend.device_of(q_img):
        taken = path.kernels.joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, txt_lens, out_img, text[0],
                                             lse_img, text[1], scale, backend.DTYPE_CODES[q_img.dtype],
                                             backend.stream_of(q_img))
    backend.explain(_OP, backend.KERNEL_PATHS[taken])
    return outputs


define("joint_attention(Tensor q_img, Tensor k_img, Tensor v_img, Tensor? q_txt, Tensor k_txt, Tensor v_txt, "
       "Tensor? txt_lens, float scale, bool lse=True) -> (Tensor, Tensor, Tensor, Tensor)", _forward,
       lambda q_img, k_img, v_img, q_txt, k_txt, *_: _outputs(q_img, q_txt, k_txt))


# Backward: an op of its own, so that it can be traced. --------------------------------------------------------------


def _setup(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, *grads):
    saved = ctx.saved_tensors  # read once: under gradient checkpointing a second read is an error
    grads = torch.ops.pydit.joint_attention_backward(*saved, *grads, ctx.scale)
    if saved[3] is None:
        grads[3] = None
    return *grads, None, None, None


def _gradients_like(q_img, k_img, v_img, q_txt, k_txt, v_txt, *_):
    return [x.new_empty(x.shape) for x in (q_img, k_img, v_img, k_txt.new_empty(0) if q_txt is None else q_txt, k_txt,
                                           v_txt)]


def _gradients(*arguments):
    *tensors, txt_lens, out_img, out_txt, lse_img, lse_txt, d_img, d_txt, d_lse_img, d_lse_txt, scale = arguments
    path = backend.choose(f"{_OP}_backward", tensors[0])
    if path.kernels is None:
        return _formula(tensors, txt_lens, (out_img, out_txt), (lse_img, lse_txt), (d_img, d_txt),
                        (d_lse_img, d_lse_txt), scale)
    found = _gradients_like(*tensors)
    outs, lses, d_inputs = [out_img, out_txt], [lse_img, lse_txt], list(found)
    d_outs, d_lses = [d_img.contiguous(), d_txt.contiguous()], [d_lse_img.contiguous(), d_lse_txt.contiguous()]
    if tensors[3] is None:
        outs[1] = lses[1] = d_outs[1] = d_lses[1] = d_inputs[3] = None
    deterministic = torch.are_deterministic_algorithms_enabled()
    with backend.device_of(tensors[0]):
        taken = path.kernels.joint_attention_backward(
            tuple(tensors), txt_lens, tuple(outs), tuple(d_outs), tuple(lses), tuple(d_lses), tuple(d_inputs), scale,
            deterministic, lambda size: tensors[0].new_empty(size, dtype=torch.uint8),
            backend.DTYPE_CODES[tensors[0].dtype], backend.stream_of(tensors[0]))
    order = "" if taken or not deterministic else ", additions in a fixed order (torch.use_deterministic_algorithms)"
    backend.explain(f"{_OP}_backward", backend.KERNEL_PATHS[taken] + order)
    return found


def _formula(tensors, txt_lens, outs, lses, d_outs, d_lses, scale):
    """FlashAttention-2's backward (Dao 2023, algorithm 2) in torch, for a part of the queries at a time."""
    q_img, k_img, v_img, q_txt, k_txt, v_txt = tensors
    keep = None if txt_lens is None else reference.kept(txt_lens, k_txt.shape[1])

    def text(x):
        return x if keep is None else torch.where(keep[:, :, None, None], x, 0)

    split = k_img.shape[1]
    keys = torch.cat((wide(k_img), wide(text(k_txt))), 1)
    values = torch.cat((wide(v_img), wide(text(v_txt))), 1)
    d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
    seen = None if keep is None else torch.cat((keep.new_ones(len(keep), split), keep), 1)[:, None, None]

    def stream(q, out, lse, d_out, d_lse, rows):
        """d q, with d k and d v added up. Rows that take no part have a gradient of 0, whatever came in."""
        d_q = torch.empty(q.shape, dtype=keys.dtype, device=q.device)
        step = max(1, _CHUNK // max(1, q.shape[0] * q.shape[2] * keys.shape[1]))
        for first in range(0, q.shape[1], step):
            part = slice(first, first + step)

            def rows_of(x, part=part):
                x = wide(x[:, part])
                return x if rows is None else torch.where(rows[:, part, None, None], x, 0)

            query, grad, bottom = rows_of(q), rows_of(d_out), lse[:, :, part, None].to(keys.dtype)
            none = bottom.isinf()  # queries without a key
            scores = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
            if seen is not None:
                scores = scores.masked_fill(~seen, -math.inf)
            weights = torch.where(none, 0, torch.exp((scores - torch.where(none, 0, bottom)).clamp(max=0)))
            inner = torch.einsum("bqhd,bkhd->bhqk", grad, values)
            delta = (grad * rows_of(out)).sum(-1).transpose(1, 2)[..., None]
            delta = delta - torch.where(none, 0, d_lse[:, :, part, None].to(keys.dtype))
            d_scores = weights * (inner - delta) * scale
            d_values.add_(torch.einsum("bhqk,bqhd->bkhd", weights, grad))
            d_keys.add_(torch.einsum("bhqk,bqhd->bkhd", d_scores, query))
            d_q[:, part] = torch.einsum("bhqk,bkhd->bqhd", d_scores, keys)
        return d_q.to(q.dtype)

    d_q_img = stream(q_img, outs[0], lses[0], d_outs[0], d_lses[0], None)
    d_q_txt = k_txt.new_empty(0) if q_txt is None else stream(q_txt, outs[1], lses[1], d_outs[1], d_lses[1], keep)
    d_keys, d_values = d_keys.to(k_img.dtype), d_values.to(v_img.dtype)
    # Results of an op share no memory, as two slices of one sample would.
    return [x.contiguous() for x in (d_q_img, d_keys[:, :split], d_values[:, :split], d_q_txt,
                                     d_keys[:, split:].clone(), d_values[:, split:].clone())]


define("joint_attention_backward(Tensor q_img, Tensor k_img, Tensor v_img, Tensor? q_txt, Tensor k_txt, Tensor v_txt, "
       "Tensor? txt_lens, Tensor out_img, Tensor out_txt, Tensor lse_img, Tensor lse_txt, Tensor d_out_img, "
       "Tensor d_out_txt, Tensor d_lse_img, Tensor d_lse_txt, float scale) -> Tensor[]", _gradients, _gradients_like)
define_backward(_OP, _backward, _setup)


def _no_second_derivative(*_):
    # Without this torch warns and goes on with zeros.
    raise NotImplementedError(f"{_OP}: expected first derivatives only, got a second one, which is not implemented")


define_backward(f"{_OP}_backward", _no_second_derivative, lambda ctx, inputs, output: None)
