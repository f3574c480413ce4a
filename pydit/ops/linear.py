"""Linear layers with what a DiT block does to their output, for one stream or for both in one launch.

Whose product runs is decided in :mod:`pydit.ops._products`: on a GPU the library's (cuBLASLt through torch) unless
``PYDIT_GEMM=pydit``, because this package's kernel has not been timed against it yet. ``pydit.report()`` shows it.

Notation: B batch, S tokens of a stream, K features in, N features out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pydit import backend
from pydit.ops import fallback, reference
from pydit.ops._library import (
    call,
    check_last_dim,
    check_split,
    check_tensor,
    define,
    define_backward,
    modulation_rows,
)
from pydit.ops._products import (
    as_layer,
    check_linear,
    flatten_rows,
    kernel_runs,
    kernels_for,
    launch,
    library_linear,
    library_reason,
    product_grads,
)
from pydit.ops.reference import wide


def linear_gelu(x, weight, bias=None):
    """The first half of a DiT's MLP: ``gelu(x W^T + b)``, GELU by its tanh approximation.

    Parameters
    ----------
    x : torch.Tensor, shape (..., K), any float dtype.
    weight : torch.Tensor, shape (N, K); bias : shape (N,) or None. dtype and device of x.

    Returns
    -------
    torch.Tensor, shape (..., N), dtype of x.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, device or shape; the message names the argument, what was expected, what came.

    Notes
    -----
    This package's kernel keeps the product in float32 and rounds once, after GELU. Its backward recomputes the product,
    a third one there, so that no [..., N] activation is kept (170 MB per block of Qwen-Image). On the library's path
    torch keeps the product; without gradients, cuBLASLt applies bias and GELU in its epilogue.
    """
    check_linear("linear_gelu", x, weight, bias)
    rows = _rows(x)
    return _linear("linear_gelu", rows, weight, bias, None, None, None, True).view(*x.shape[:-1], weight.shape[0])


def linear_gated_residual(x, weight, bias, residual, gate, *, split=None):
    """A projection back to the stream, gated and added: ``residual + gate * (x W^T + b)``.

    Parameters
    ----------
    x : torch.Tensor, shape (B, S, K), any float dtype.
    weight : torch.Tensor, shape (N, K); bias : shape (N,) or None. dtype and device of x.
    residual : torch.Tensor, shape (B, S, N); gate : shape (B, N) or (B, 1, N), or (B, 2, N) with ``split``. dtype and
        device of x.
    split : int, optional. The first token of the gate's second row.

    Returns
    -------
    torch.Tensor, shape (B, S, N), dtype of x.

    Raises
    ------
    TypeError, ValueError
        As in :func:`linear_gelu`.

    Notes
    -----
    This package's kernel rounds once. On the library's path the product is rounded to the dtype of x before
    :func:`gated_residual` adds it in float32. The gradient of the gate needs the product, which is recomputed.
    """
    name = "linear_gated_residual"
    gate = _check_gated(name, "", x, weight, bias, residual, gate, split)
    return _linear(name, x, weight, bias, residual, gate, split, False)


def linear_residual(x, weight, bias=None):
    """A linear map in place of a block's MLP or text stream: ``x + x W^T + b``.

    Parameters
    ----------
    x : torch.Tensor, shape (..., C), any float dtype.
    weight : torch.Tensor, shape (C, C); bias : shape (C,) or None. dtype and device of x.

    Returns
    -------
    torch.Tensor, shape (..., C), dtype of x. On the library's path the product is accumulated onto x + b, which is
    rounded first; this package's kernel rounds once.

    Raises
    ------
    TypeError, ValueError
        As in :func:`linear_gelu`.
    """
    check_linear("linear_residual", x, weight, bias)
    _check_square("linear_residual", weight)
    rows = _rows(x)
    return _linear("linear_residual", rows, weight, bias, rows, None, None, False).view(x.shape)


def in_one_launch(x):
    """Whether the ops for two streams are one launch of this package's kernel for tensors like ``x``.

    Where they are not, anything better than one product per layer is to be preferred: one product for projections that
    are adjacent in memory, one launch for a residual and the next LayerNorm.

    Parameters
    ----------
    x : torch.Tensor; its device and dtype decide, with ``PYDIT_GEMM`` and ``PYDIT_BACKEND``.

    Returns
    -------
    bool

    Raises
    ------
    TypeError
        ``x`` is no tensor.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"in_one_launch: x: expected a torch.Tensor, got {type(x).__name__}")
    return x.dtype in backend.KERNEL_DTYPES and kernel_runs(x.device.type)


def joint_linear(x_img, x_txt, weight_img, weight_txt, bias_img=None, bias_txt=None):
    """``x W^T + b`` of the image and of the text stream, in one launch.

    Parameters
    ----------
    x_img : torch.Tensor, shape (B, S_img, K_img); x_txt : shape (B, S_txt, K_txt). Any float dtype, the same in all.
        Either stream may have no tokens.
    weight_img, weight_txt : torch.Tensor, shape (N_img, K_img) and (N_txt, K_txt).
    bias_img, bias_txt : torch.Tensor, shape (N_img,) and (N_txt,), or None.

    Returns
    -------
    (out_img, out_txt): shape (B, S_img, N_img) and (B, S_txt, N_txt), dtype of x_img.

    Raises
    ------
    TypeError, ValueError
        As in :func:`linear_gelu`.
    """
    _check_streams("joint_linear", x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt)
    return _joint("joint_linear", (x_img, weight_img, bias_img, None, None),
                  (x_txt, weight_txt, bias_txt, None, None), None, False)


def joint_linear_gelu(x_img, x_txt, weight_img, weight_txt, bias_img=None, bias_txt=None):
    """:func:`linear_gelu` of both streams in one launch; arguments, results and errors as in :func:`joint_linear`."""
    _check_streams("joint_linear_gelu", x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt)
    return _joint("joint_linear_gelu", (x_img, weight_img, bias_img, None, None),
                  (x_txt, weight_txt, bias_txt, None, None), None, True)


def joint_linear_gated_residual(x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt, residual_img, residual_txt,
                                gate_img, gate_txt, *, split=None):
    """:func:`linear_gated_residual` of both streams in one launch.

    Arguments as in :func:`joint_linear` and, per stream, as in :func:`linear_gated_residual`; ``split`` is that of the
    image stream. Results and errors as in :func:`joint_linear`.
    """
    name = "joint_linear_gated_residual"
    gate_img = _check_gated(name, "_img", x_img, weight_img, bias_img, residual_img, gate_img, split)
    check_tensor(name, "x_txt", x_txt, x_img)
    gate_txt = _check_gated(name, "_txt", x_txt, weight_txt, bias_txt, residual_txt, gate_txt, None)
    _check_streams(name, x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt)
    return _joint(name, (x_img, weight_img, bias_img, residual_img, gate_img),
                  (x_txt, weight_txt, bias_txt, residual_txt, gate_txt), split, False)


def joint_linear_residual(x_img, x_txt, weight_img, weight_txt, bias_img=None, bias_txt=None):
    """:func:`linear_residual` of both streams in one launch.

    Arguments, results and errors as in :func:`joint_linear`; the weights are square.
    """
    name = "joint_linear_residual"
    _check_streams(name, x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt)
    _check_square(name, weight_img, "_img")
    _check_square(name, weight_txt, "_txt")
    return _joint(name, (x_img, weight_img, bias_img, x_img, None), (x_txt, weight_txt, bias_txt, x_txt, None), None,
                  False)


def _linear(op, x, weight, bias, residual, gate, split, gelu):
    """x [B, S, K]; gate [B, R, N]."""
    reason = library_reason(x.device.type)
    if reason is None:
        return call("linear", x, weight, bias, residual, gate, -1 if split is None else split, gelu, op)
    backend.record(op, "torch", reason)
    return library_linear(x, weight, bias, residual, gate, split, gelu)


def _joint(op, img, txt, split, gelu):
    reason = library_reason(img[0].device.type)
    if reason is None:
        return tuple(call("joint_linear", *img, *txt, -1 if split is None else split, gelu, op))
    backend.record(op, "torch", reason)
    return (library_linear(*img, split, gelu), library_linear(*txt, None, gelu))


# The ops ---------------------------------------------------------------------------------------------------------


def _empty(x, weight):
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _run_linear(x, weight, bias, residual, gate, split, gelu, op):
    kernels = kernels_for(op, x, *weight.shape)
    if kernels is None:
        out = fallback.linear(x, weight, bias, residual, gate, gelu=gelu, split=None if split < 0 else split)
        return out.contiguous()  # sums keep a residual's strides
    out = _empty(x, weight)
    launch(op, kernels, [as_layer(x, weight, bias, residual, gate, split, out)], gelu, 0.0)
    return out


def _run_joint(*args):
    img, txt, (split, gelu, op) = args[:5], args[5:10], args[10:]
    kernels = kernels_for(op, img[0], *img[1].shape, *txt[1].shape)
    if kernels is None:
        return tuple(fallback.linear(*stream, gelu=gelu, split=None if s < 0 else s).contiguous()
                     for stream, s in ((img, split), (txt, -1)))
    outs = _empty(*img[:2]), _empty(*txt[:2])
    launch(op, kernels, [as_layer(*img, split, outs[0]), as_layer(*txt, -1, outs[1])], gelu, 0.0)
    return outs


def _setup_linear(ctx, inputs, output):
    *tensors, ctx.split, ctx.gelu, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward_linear(ctx, grad):
    return *_linear_grads(ctx.saved_tensors, grad, ctx.split, ctx.gelu, ctx.needs_input_grad), None, None, None


def _backward_joint(ctx, grad_img, grad_txt):
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    return (*_linear_grads(saved[:5], grad_img, ctx.split, ctx.gelu, needs[:5]),
            *_linear_grads(saved[5:], grad_txt, -1, ctx.gelu, needs[5:10]), None, None, None)


def _linear_grads(saved, grad, split, gelu, needs):
    """Gradients of x, weight, bias, residual and gate; products by torch, the rest in float32."""
    x, weight, bias, residual, gate = saved
    d_residual = d_gate = None
    d_out = wide(grad)
    if residual is not None and needs[3]:
        d_residual = grad
    if gate is not None:
        if needs[4]:
            product = F.linear(x, weight, bias)
            rows = d_out * wide(product)
            first = rows.shape[1] if split < 0 else min(split, rows.shape[1])
            d_gate = rows[:, :first].sum(1, keepdim=True)
            if gate.shape[1] == 2:
                d_gate = torch.cat((d_gate, rows[:, first:].sum(1, keepdim=True)), 1)
            d_gate = d_gate.to(gate.dtype)
        d_out = d_out * reference.per_token(wide(gate), grad, None if split < 0 else split)
    if gelu:
        product = wide(F.linear(x, weight, bias))
        d_out = torch.ops.aten.gelu_backward(d_out, product, approximate="tanh")
    return (*product_grads(x, weight, bias, d_out.to(x.dtype), needs), d_residual, d_gate)


_STREAM = "Tensor x{0}, Tensor weight{0}, Tensor? bias{0}, Tensor? residual{0}, Tensor? gate{0}"
define(f"linear({_STREAM.format('')}, SymInt split, bool gelu, str op) -> Tensor", _run_linear,
       lambda x, weight, *_: _empty(x, weight))
define_backward("linear", _backward_linear, _setup_linear)
define(f"joint_linear({_STREAM.format('_img')}, {_STREAM.format('_txt')}, SymInt split, bool gelu, str op) "
       "-> (Tensor, Tensor)", _run_joint, lambda *args: (_empty(*args[:2]), _empty(*args[5:7])))
define_backward("joint_linear", _backward_joint, _setup_linear)


# Checks ----------------------------------------------------------------------------------------------------------


def _rows(x):
    """x [..., K] as [1, S, K]."""
    return x if x.ndim == 3 and x.shape[0] == 1 else flatten_rows(x)[None]


def _check_streams(op, x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt):
    check_linear(op, x_img, weight_img, bias_img, "_img")
    check_linear(op, x_txt, weight_txt, bias_txt, "_txt", like=x_img)
    for name, x in (("x_img", x_img), ("x_txt", x_txt)):
        if x.ndim != 3 or x.shape[0] != x_img.shape[0]:
            raise ValueError(f"{op}: {name}: expected shape [B, S, K], B the same in both, got {list(x.shape)}")


def _check_square(op, weight, suffix=""):
    if weight.shape[0] != weight.shape[1]:
        raise ValueError(f"{op}: weight{suffix}: expected a square matrix, got {list(weight.shape)}")


def _check_gated(op, suffix, x, weight, bias, residual, gate, split):
    """Returns the gate as [B, R, N]."""
    check_split(op, split)
    check_linear(op, x, weight, bias, suffix)
    if x.ndim != 3:
        raise ValueError(f"{op}: x{suffix}: expected shape [B, S, K], got {list(x.shape)}")
    check_tensor(op, f"residual{suffix}", residual, x)
    if tuple(residual.shape) != (*x.shape[:2], weight.shape[0]):
        raise ValueError(f"{op}: residual{suffix}: expected shape {[*x.shape[:2], weight.shape[0]]}, "
                         f"got {list(residual.shape)}")
    check_last_dim(op, f"residual{suffix}", residual)
    return modulation_rows(op, f"gate{suffix}", gate, residual, split)
