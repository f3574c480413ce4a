"""What a DiT block does between its matrix products: LayerNorm + modulation and gated residuals.

Notation: B batch, S tokens, C channels (1 to 8192). Activations may have any strides with a contiguous last
dimension; modulation vectors may be views such as ``chunk(6)`` returns. float32, float16 and bfloat16 on every
backend, float64 on the reference. Arithmetic is fp32 and each output is rounded once. S = 0 and B = 0 are allowed.
"""

from __future__ import annotations

import torch

from pydit import backend
from pydit.ops import fallback, reference
from pydit.ops._library import call, check_eps, check_split, check_tokens, define, define_backward, modulation_rows
from pydit.ops.reference import wide


def ada_layer_norm(x, scale, shift, *, eps=1e-6, split=None):
    """LayerNorm without affine, then adaptive modulation: ``LN(x) * (1 + scale) + shift``.

    Parameters
    ----------
    x : torch.Tensor, shape (B, S, C); float32, float16 or bfloat16, and float64 where torch computes (on a CPU).
    scale, shift : torch.Tensor, shape (B, C) or (B, 1, C); with ``split``: (B, 2, C). dtype and device of x.
    eps : float, added to the (biased) variance.
    split : int, optional. Tokens < split take row 0 of scale and shift, the others row 1 (Qwen-Image-Edit-2511).

    Returns
    -------
    torch.Tensor, shape (B, S, C), contiguous, dtype of x.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, device, shape or stride; the message names the argument, what was expected, what came.

    Notes
    -----
    adaLN of DiT (Peebles & Xie, 2023). Differentiable in x, scale and shift.
    """
    check_tokens("ada_layer_norm", "x", x)
    check_split("ada_layer_norm", split)
    check_eps("ada_layer_norm", eps)
    scale = modulation_rows("ada_layer_norm", "scale", scale, x, split)
    shift = modulation_rows("ada_layer_norm", "shift", shift, x, split)
    return call("ada_layer_norm", x, scale, shift, eps, split)


def gated_residual(x, y, gate, *, split=None, exact=False):
    """Residual connection behind a gate: ``x + gate * y``.

    Parameters
    ----------
    x, y : torch.Tensor, shape (B, S, C), same dtype (as in :func:`ada_layer_norm`) and device.
    gate : torch.Tensor, shape (B, C) or (B, 1, C); with ``split``: (B, 2, C). dtype and device of x.
    split : int, optional. As in :func:`ada_layer_norm`.
    exact : round the product to the dtype before the sum: what ``x + gate * y`` in torch computes, bit for bit.

    Returns
    -------
    torch.Tensor, shape (B, S, C), contiguous, dtype of x.

    Raises
    ------
    TypeError, ValueError
        As in :func:`ada_layer_norm`.
    """
    check_tokens("gated_residual", "x", x)
    check_tokens("gated_residual", "y", y, x)
    check_split("gated_residual", split)
    gate = modulation_rows("gated_residual", "gate", gate, x, split)
    return call("gated_residual", x, y, gate, split, exact)


def gated_residual_ada_layer_norm(x, y, gate, scale, shift, *, eps=1e-6, split=None):
    """A gated residual and the modulated LayerNorm of its result, in one pass over memory.

    ``r = x + gate * y``; returns ``(r, LN(r) * (1 + scale) + shift)``. The norm is taken of the fp32 sum before it is
    rounded to the dtype of x.

    Parameters
    ----------
    x, y : torch.Tensor, shape (B, S, C), same dtype (as in :func:`ada_layer_norm`) and device.
    gate, scale, shift : torch.Tensor, shape (B, C) or (B, 1, C); with ``split``: (B, 2, C). dtype and device of x.
    eps, split : as in :func:`ada_layer_norm`.

    Returns
    -------
    (torch.Tensor, torch.Tensor), each of shape (B, S, C), contiguous, dtype of x.

    Raises
    ------
    TypeError, ValueError
        As in :func:`ada_layer_norm`.
    """
    op = "gated_residual_ada_layer_norm"
    check_tokens(op, "x", x)
    check_tokens(op, "y", y, x)
    check_split(op, split)
    check_eps(op, eps)
    gate = modulation_rows(op, "gate", gate, x, split)
    scale = modulation_rows(op, "scale", scale, x, split)
    shift = modulation_rows(op, "shift", shift, x, split)
    return call("gated_residual_ada_layer_norm", x, y, gate, scale, shift, eps, split)


# Implementations: arguments are checked, modulation rows are [B, R, C]. -------------------------------------------


def _row_split(split):
    return -1 if split is None else split


def _ada_layer_norm(x, scale, shift, eps, split=None):
    path = backend.choose("ada_layer_norm", x)
    if path.kernels is None:
        return fallback.ada_layer_norm(x, scale, shift, eps=eps, split=split).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with backend.device_of(x):
        path.kernels.ada_layer_norm(x, scale, shift, out, eps, _row_split(split), backend.DTYPE_CODES[x.dtype],
                                    backend.stream_of(x))
    return out


def _gated_residual(x, y, gate, split=None, exact=False):
    path = backend.choose("gated_residual", x)
    if path.kernels is None:
        return fallback.gated_residual(x, y, gate, split=split, exact=exact).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with backend.device_of(x):
        path.kernels.gated_residual(x, y, gate, out, _row_split(split), exact, backend.DTYPE_CODES[x.dtype],
                                    backend.stream_of(x))
    return out


def _gated_residual_ada_layer_norm(x, y, gate, scale, shift, eps, split=None):
    path = backend.choose("gated_residual_ada_layer_norm", x)
    if path.kernels is None:
        residual, out = fallback.gated_residual_ada_layer_norm(x, y, gate, scale, shift, eps=eps, split=split)
        return residual.contiguous(), out.contiguous()
    residual = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty_like(residual)
    with backend.device_of(x):
        path.kernels.gated_residual_ada_layer_norm(x, y, gate, scale, shift, residual, out, eps, _row_split(split),
                                                   backend.DTYPE_CODES[x.dtype], backend.stream_of(x))
    return residual, out


def _like_x(x, *_):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


define("ada_layer_norm(Tensor x, Tensor scale, Tensor shift, float eps, SymInt? split=None) -> Tensor",
       _ada_layer_norm, _like_x)
define("gated_residual(Tensor x, Tensor y, Tensor gate, SymInt? split=None, bool exact=False) -> Tensor",
       _gated_residual, _like_x)
define("gated_residual_ada_layer_norm(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float eps, "
       "SymInt? split=None) -> (Tensor, Tensor)", _gated_residual_ada_layer_norm,
       lambda x, *_: (_like_x(x), _like_x(x)))


# Backward: the formulas in torch, fp32 inside (float64 for float64). ----------------------------------------------


def _sum_rows(grad, split, dtype):
    """Sum a [B, S, C] gradient over the tokens of each modulation row -> [B, R, C]."""
    if split is None:
        return grad.sum(1, keepdim=True).to(dtype)
    return torch.stack((grad[:, :split].sum(1), grad[:, split:].sum(1)), 1).to(dtype)


def _norm_backward(value, grad, scale, eps, split):
    """Gradient of LN(value) * (1 + scale) + shift -> (d value, d scale and d shift per token)."""
    centred = value - value.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normed = centred * rstd
    inner = grad * (1 + reference.per_token(scale, value, split))
    d_value = rstd * (inner - inner.mean(-1, keepdim=True) - normed * (inner * normed).mean(-1, keepdim=True))
    return d_value, grad * normed, grad


def _ada_layer_norm_setup(ctx, inputs, output):
    x, scale, _, ctx.eps, ctx.split = inputs
    ctx.save_for_backward(x, scale)


def _ada_layer_norm_backward(ctx, grad):
    x, scale = ctx.saved_tensors
    d_x, d_scale, d_shift = _norm_backward(wide(x), wide(grad), wide(scale), ctx.eps, ctx.split)
    return d_x.to(x.dtype), _sum_rows(d_scale, ctx.split, x.dtype), _sum_rows(d_shift, ctx.split, x.dtype), None, None


def _gated_residual_setup(ctx, inputs, output):
    _, y, gate, ctx.split, _ = inputs
    ctx.save_for_backward(y, gate)


def _gated_residual_backward(ctx, grad):
    y, gate = ctx.saved_tensors
    wide_grad = wide(grad)
    d_y = wide_grad * reference.per_token(wide(gate), y, ctx.split)
    return grad, d_y.to(y.dtype), _sum_rows(wide_grad * wide(y), ctx.split, y.dtype), None, None


def _gated_residual_ada_layer_norm_setup(ctx, inputs, output):
    x, y, gate, scale, _, ctx.eps, ctx.split = inputs
    ctx.save_for_backward(x, y, gate, scale)


def _gated_residual_ada_layer_norm_backward(ctx, grad_residual, grad_out):
    x, y, gate, scale = ctx.saved_tensors
    split, dtype = ctx.split, x.dtype
    gates = reference.per_token(wide(gate), x, split)
    d_sum, d_scale, d_shift = _norm_backward(wide(x) + gates * wide(y), wide(grad_out), wide(scale), ctx.eps, split)
    d_sum = d_sum + wide(grad_residual)
    return (d_sum.to(dtype), (d_sum * gates).to(dtype), _sum_rows(d_sum * wide(y), split, dtype),
            _sum_rows(d_scale, split, dtype), _sum_rows(d_shift, split, dtype), None, None)


define_backward("ada_layer_norm", _ada_layer_norm_backward, _ada_layer_norm_setup)
define_backward("gated_residual", _gated_residual_backward, _gated_residual_setup)
define_backward("gated_residual_ada_layer_norm", _gated_residual_ada_layer_norm_backward,
                _gated_residual_ada_layer_norm_setup)
