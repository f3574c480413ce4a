"""Queries, keys and values of both streams: products, RMSNorm per head and RoPE in one launch.

Notation: B batch, S tokens of a stream, K features in, H heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pydit import backend
from pydit.ops import reference
from pydit.ops._library import call, check_eps, check_tensor, define, define_backward
from pydit.ops._products import (
    as_layer,
    check_linear,
    kernels_for,
    launch,
    library_linear,
    library_reason,
    product_grads,
)
from pydit.ops.qk_norm_rope import check_freqs, norm_rope_backward
from pydit.ops.reference import wide


def joint_qkv(x_img, x_txt, weights_img, weights_txt, biases_img=None, biases_txt=None, norms_img=None, norms_txt=None,
              freqs_img=None, freqs_txt=None, *, head_dim, eps=1e-6):
    """Queries, keys and values of both streams in one launch: products, bias, RMSNorm per head, RoPE.

    Parameters
    ----------
    x_img, x_txt : as in :func:`pydit.ops.joint_linear`.
    weights_img, weights_txt : three tensors of shape (H D, K), for queries, keys and values, as a model keeps them. The
        text's first may be None: the text then gives keys and values only.
    biases_img, biases_txt : three tensors of shape (H D,) or None, or None as a whole.
    norms_img, norms_txt : the RMSNorm weights of queries and keys, shape (D,) or None for ones; None as a whole: ones.
    freqs_img, freqs_txt : (cos, sin), float32, shape (S, D/2), contiguous, or None for no rotation.
    head_dim : D: 32, 64 or 128 on this package's kernel, any even number to 256 elsewhere.
    eps : float, added to the mean square.

    Returns
    -------
    (q_img, k_img, v_img, q_txt, k_txt, v_txt): contiguous, shape (B, S, H, D); q_txt None without its weight. Values
    are products with bias, neither normalised nor rotated.

    Raises
    ------
    TypeError, ValueError
        As in :func:`pydit.ops.linear_gelu`.

    Notes
    -----
    This package's kernel normalises and rotates in float32 and rounds once. The backward recomputes the products of
    queries and keys.
    """
    name = "joint_qkv"
    if not isinstance(head_dim, int) or head_dim % 2 or not 2 <= head_dim <= 256:
        raise ValueError(f"{name}: head_dim: expected an even number from 2 to 256, got "
                         f"{type(head_dim).__name__ if isinstance(head_dim, torch.Tensor) else repr(head_dim)}")
    check_eps(name, eps)
    streams = []
    for stream, x, weights, biases, norms, freqs in (("img", x_img, weights_img, biases_img, norms_img, freqs_img),
                                                     ("txt", x_txt, weights_txt, biases_txt, norms_txt, freqs_txt)):
        weights = _tuple(name, f"weights_{stream}", weights, 3)
        biases = _tuple(name, f"biases_{stream}", (None,) * 3 if biases is None else biases, 3)
        norms = _tuple(name, f"norms_{stream}", (None,) * 2 if norms is None else norms, 2)
        for part, number in (("k", 1), ("q", 0), ("v", 2)):  # keys first: the others are compared with them
            weight, bias = weights[number], biases[number]
            if weight is None and (stream, part) == ("txt", "q"):
                continue
            check_linear(name, x, weight, bias, f"_{stream}", f"weights_{stream} {part}", f"biases_{stream} {part}",
                          like=x_img)
            if x.ndim != 3 or x.shape[0] != x_img.shape[0]:
                raise ValueError(f"{name}: x_{stream}: expected shape [B, S, K], B the same in both, "
                                 f"got {list(x.shape)}")
            if weight.shape[0] % head_dim or weight.shape[0] != weights[1].shape[0]:
                raise ValueError(f"{name}: weights_{stream} {part}: expected a multiple of head_dim {head_dim} rows, "
                                 f"as many as k, got {weight.shape[0]}")
        for part, norm in zip("qk", norms, strict=True):
            if norm is not None:
                check_tensor(name, f"norms_{stream} {part}", norm, x_img)
                if tuple(norm.shape) != (head_dim,):
                    raise ValueError(f"{name}: norms_{stream} {part}: expected shape [{head_dim}], got "
                                     f"{list(norm.shape)}")
        heads = x.new_empty(1).expand(*x.shape[:2], 1, head_dim)  # whose shape the tables must fit
        tables = check_freqs(freqs, heads, op=name, name=f"freqs_{stream}")
        streams += [x, *weights, *biases, *norms, *tables]
    arguments = (*streams, head_dim, eps)
    reason = library_reason(x_img.device.type)
    if reason is not None:
        backend.record(name, "torch", reason)
        found = _qkv_by_parts(arguments, library_linear)
    else:
        found = call("joint_qkv", *arguments)
    return (*found[:3], None if weights_txt[0] is None else found[3], *found[4:])


def _tuple(op, name, value, length):
    if not isinstance(value, (tuple, list)) or len(value) != length:
        got = len(value) if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"{op}: {name}: expected {length} tensors or None, got {got}")
    return tuple(value)


# Queries, keys and values: per stream x, three weights, three biases, two norms, cos, sin ---------------------------

_OF_STREAM = 11


def _streams(args):
    """Per stream: x, weights, biases, norms (values have none), tables."""
    for first in (0, _OF_STREAM):
        x, *rest = args[first:first + _OF_STREAM]
        yield x, rest[:3], rest[3:6], (*rest[6:8], None), rest[8:]


def _heads_like(x, weight, head_dim):
    if weight is None:
        return x.new_empty(0)
    return x.new_empty(*x.shape[:2], weight.shape[0] // head_dim, head_dim)


def _empty_qkv(*args):
    return tuple(_heads_like(x, weight, args[-2]) for x, weights, *_ in _streams(args) for weight in weights)


def _qkv_by_parts(args, linear):
    """Products by ``linear``, then norm and rotation: the formula, or the library's path."""
    head_dim, eps = args[-2:]
    found = []
    for x, weights, biases, norms, (cos, sin) in _streams(args):
        parts = [None if w is None else linear(x, w, b).unflatten(-1, (-1, head_dim))
                 for w, b in zip(weights, biases, strict=True)]
        freqs = None if cos is None else (cos, sin)
        found += [p if p is None or part == 2 else reference.norm_rope(p, norm, freqs, eps)
                  for part, (p, norm) in enumerate(zip(parts, norms, strict=True))]
    return found


def _run_qkv(*args):
    op, (head_dim, eps) = "joint_qkv", args[-2:]
    x = args[0]
    widths = [n for _, weights, *_ in _streams(args) for w in weights if w is not None for n in w.shape]
    if x.dtype in backend.KERNEL_DTYPES and head_dim not in backend.KERNEL_HEAD_DIMS:
        backend.record(op, "torch", f"head_dim {head_dim}: the kernel takes 32, 64 and 128")
        kernels = None
    else:
        kernels = kernels_for(op, x, *widths)
    if kernels is None:
        wide_args = [wide(a) if isinstance(a, torch.Tensor) else a for a in args]
        found = _qkv_by_parts(wide_args, F.linear)
        return tuple(x.new_empty(0) if f is None else f.to(x.dtype).contiguous() for f in found)
    outs = _empty_qkv(*args)
    layers, remaining = [], iter(outs)
    for stream, weights, biases, norms, (cos, sin) in _streams(args):
        for part, (weight, bias, norm) in enumerate(zip(weights, biases, norms, strict=True)):
            out = next(remaining)
            if weight is None:
                continue
            tail = (None, None, None, 0) if part == 2 else (norm, cos, sin, head_dim)
            layers.append((*as_layer(stream, weight, bias, None, None, -1, None)[:6], *tail, out.flatten(2)))
    launch(op, kernels, layers, False, eps)
    return outs


def _setup_qkv(ctx, inputs, output):
    *tensors, ctx.head_dim, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward_qkv(ctx, *grads):
    needs, found, remaining = ctx.needs_input_grad, [], iter(grads)
    for first, (x, weights, biases, norms, tables) in zip((0, _OF_STREAM), _streams(ctx.saved_tensors), strict=True):
        d_x, d_weights, d_biases, d_norms = None, [], [], []
        for part, (weight, bias, norm) in enumerate(zip(weights, biases, norms, strict=True)):
            d_out, d_norm = next(remaining), None
            if weight is None:
                d_weights.append(None), d_biases.append(None), d_norms.append(None)
                continue
            if part < 2:
                product = F.linear(x, weight, bias).unflatten(-1, (-1, ctx.head_dim))
                d_out, d_norm = norm_rope_backward(product, norm, d_out, *tables, ctx.eps)
            wanted = (needs[first], needs[first + 1 + part], needs[first + 4 + part])
            more, d_weight, d_bias = product_grads(x, weight, bias, d_out.flatten(2), wanted)
            d_x = more if d_x is None else d_x if more is None else d_x + more
            d_weights.append(d_weight), d_biases.append(d_bias), d_norms.append(d_norm)
        found += [d_x, *d_weights, *d_biases, *d_norms[:2], None, None]
    return *found, None, None


_QKV = ("Tensor x_{0}, Tensor{1} wq_{0}, Tensor wk_{0}, Tensor wv_{0}, Tensor? bq_{0}, Tensor? bk_{0}, Tensor? bv_{0}, "
        "Tensor? nq_{0}, Tensor? nk_{0}, Tensor? cos_{0}, Tensor? sin_{0}")
define(f"joint_qkv({_QKV.format('img', '')}, {_QKV.format('txt', '?')}, int head_dim, float eps) "
       "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _run_qkv, _empty_qkv)
define_backward("joint_qkv", _backward_qkv, _setup_qkv)
