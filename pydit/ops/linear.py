"""Linear layers with what a DiT block does to their output, for one stream or for both in one launch.

Which product runs is decided in one place, :func:`_library_reason`: on a GPU the library's (cuBLASLt through torch)
unless ``PYDIT_GEMM=pydit``, because this package's kernel has not been raced there yet. ``pydit.report()`` shows it.

Notation: B batch, S tokens of a stream, K features in, N features out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from pydit import backend, env
from pydit.ops import fallback, reference
from pydit.ops._library import (
    _check_last_dim,
    _check_tensor,
    call,
    check_split,
    define,
    define_backward,
    modulation_rows,
    without_autocast,
)
from pydit.ops.block import gated_residual
from pydit.ops.reference import wide

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_GELU = 1  # pydit_activation in pydit.h
_CUT = ", tiles of the last wave cut along K"


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
    In this package's kernel the product stays in float32 and is rounded once, as GELU is written. The backward computes
    the product again, which costs a third product there but keeps nothing of N features per token: 170 MB per block of
    Qwen-Image. On the library's path torch keeps it, and without gradients cuBLASLt adds bias and GELU as it writes.
    """
    _check_linear("linear_gelu", x, weight, bias)
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
    :func:`gated_residual` adds it in float32. The gradient of the gate needs the product, which is computed again.
    """
    name = "linear_gated_residual"
    gate = _check_gated(name, "", x, weight, bias, residual, gate, split)
    return _linear(name, x, weight, bias, residual, gate, split, False)


def linear_residual(x, weight, bias=None):
    """A linear map in the place of an MLP or of the text stream of a block: ``x + x W^T + b``.

    Parameters
    ----------
    x : torch.Tensor, shape (..., C), any float dtype.
    weight : torch.Tensor, shape (C, C); bias : shape (C,) or None. dtype and device of x.

    Returns
    -------
    torch.Tensor, shape (..., C), dtype of x. On the library's path the product adds to x + b (rounded) where it is
    accumulated; this package's kernel rounds once.

    Raises
    ------
    TypeError, ValueError
        As in :func:`linear_gelu`.
    """
    _check_linear("linear_residual", x, weight, bias)
    _check_square("linear_residual", weight)
    rows = _rows(x)
    return _linear("linear_residual", rows, weight, bias, rows, None, None, False).view(x.shape)


def in_one_launch(x):
    """Whether the ops for two streams are one launch of this package's kernel for tensors like ``x``.

    Where they are not, whoever has something better than one product per layer (projections that lie next to each
    other, a residual and the next LayerNorm in one launch) is to use that.

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
    return x.dtype in KERNEL_DTYPES and _kernel_runs(x.device.type)


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
    """:func:`linear_gelu` of both streams in one launch.

    Arguments, what is returned and what is raised are as in :func:`joint_linear`.
    """
    _check_streams("joint_linear_gelu", x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt)
    return _joint("joint_linear_gelu", (x_img, weight_img, bias_img, None, None),
                  (x_txt, weight_txt, bias_txt, None, None), None, True)


def joint_linear_gated_residual(x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt, residual_img, residual_txt,
                                gate_img, gate_txt, *, split=None):
    """:func:`linear_gated_residual` of both streams in one launch.

    Arguments as in :func:`joint_linear` and, for each stream, in :func:`linear_gated_residual`; ``split`` is of the
    image stream. Returned and raised is what :func:`joint_linear` does.
    """
    name = "joint_linear_gated_residual"
    gate_img = _check_gated(name, "_img", x_img, weight_img, bias_img, residual_img, gate_img, split)
    _check_tensor(name, "x_txt", x_txt, x_img)
    gate_txt = _check_gated(name, "_txt", x_txt, weight_txt, bias_txt, residual_txt, gate_txt, None)
    _check_streams(name, x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt)
    return _joint(name, (x_img, weight_img, bias_img, residual_img, gate_img),
                  (x_txt, weight_txt, bias_txt, residual_txt, gate_txt), split, False)


def joint_linear_residual(x_img, x_txt, weight_img, weight_txt, bias_img=None, bias_txt=None):
    """:func:`linear_residual` of both streams in one launch.

    Arguments as in :func:`joint_linear`, weights square; what is returned and raised too.
    """
    name = "joint_linear_residual"
    _check_streams(name, x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt)
    _check_square(name, weight_img, "_img")
    _check_square(name, weight_txt, "_txt")
    return _joint(name, (x_img, weight_img, bias_img, x_img, None), (x_txt, weight_txt, bias_txt, x_txt, None), None,
                  False)


# Which product ---------------------------------------------------------------------------------------------------


def _constant(function):
    """As ``torch.compiler.assume_constant_result``, which imports all of torch's compiler along with this module."""
    function._dynamo_marked_constant = True
    return function


@_constant
def _library_reason(device_type: str) -> str | None:
    """Why the library's product runs, which stays open to autograd and torch.compile; None: an op of this package."""
    choice = env.get("PYDIT_GEMM")
    if choice == "library":
        return "the product is the library's: PYDIT_GEMM=library"
    if device_type == "cuda" and choice == "auto":
        return ("the product is the library's (cuBLASLt): this package's kernel has not been raced against it yet; "
                "PYDIT_GEMM=pydit takes the kernel")
    return None


@_constant
def _kernel_runs(device_type: str) -> bool:
    if _library_reason(device_type) is not None:
        return False  # every block asks several times, and this is the usual answer on a GPU
    return backend.default(device_type) != "reference"


def _linear(op, x, weight, bias, residual, gate, split, gelu):
    """x [B, S, K]; gate [B, R, N]."""
    reason = _library_reason(x.device.type)
    if reason is None:
        return call("linear", x, weight, bias, residual, gate, -1 if split is None else split, gelu, op)
    _record(op, reason)
    return _library_linear(x, weight, bias, residual, gate, split, gelu)


def _joint(op, img, txt, split, gelu):
    reason = _library_reason(img[0].device.type)
    if reason is None:
        return tuple(call("joint_linear", *img, *txt, -1 if split is None else split, gelu, op))
    _record(op, reason)
    return (_library_linear(*img, split, gelu), _library_linear(*txt, None, gelu))


def _library_linear(x, weight, bias, residual=None, gate=None, split=None, gelu=False):
    """The same by torch's products, with the epilogues that cuBLASLt offers."""
    if torch.is_autocast_enabled(x.device.type):
        with without_autocast():
            return _library_linear(x, weight, bias, residual, gate, split, gelu)
    if gelu:
        if x.is_cuda and bias is not None and x.dtype != torch.float64 and not _needs_gradient(x, weight, bias):
            flat = torch._addmm_activation(bias, _flat(x), weight.T, use_gelu=True)
            return flat.view(*x.shape[:-1], weight.shape[0])
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    if gate is not None:
        return gated_residual(residual, F.linear(x, weight, bias), gate, split=split)
    if residual is not None:
        rows = _flat(residual)
        start = rows if bias is None else rows + bias
        return torch.addmm(start, _flat(x), weight.T).view(residual.shape)
    return F.linear(x, weight, bias)


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _record(op, reason):
    if not torch.compiler.is_compiling():
        backend.record(op, "torch", reason)


# The ops ---------------------------------------------------------------------------------------------------------


def _kernels(op, x, *features):
    """The kernel module, or None where plain torch is to compute the formula; recorded."""
    if x.dtype not in KERNEL_DTYPES and env.get("PYDIT_BACKEND") != "reference" and (
            x.is_cuda or env.get("PYDIT_BACKEND") == "sim"):
        backend.record(op, "torch", f"{x.dtype}: torch multiplies; the kernel takes float16 and bfloat16")
        return None
    if not all(features):
        backend.record(op, "torch", "a layer without features in or out has no product")
        return None
    return backend.choose(op, x).kernels


def _launch(op, kernels, layers, gelu, eps):
    x, sums = layers[0][0], []

    def allocate(size):  # called where tiles are cut, for the sums of their parts
        sums.append(x.new_empty(size, dtype=torch.uint8))
        return sums[0]

    with backend.device_of(x):
        taken = kernels.grouped_linear(layers, _GELU if gelu else 0, eps, allocate, backend.cluster(), backend.parts(),
                                       backend.DTYPE_CODES[x.dtype], backend.stream_of(x))
    backend.explain(op, backend.KERNEL_PATHS[taken] + (_CUT if sums else ""))


def _empty(x, weight):
    return x.new_empty(*x.shape[:2], weight.shape[0])


def _layer(x, weight, bias, residual, gate, split, out):
    dense = [None if t is None or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()
             for t in (x, weight, residual, gate)]
    x, weight, residual, gate = (t if d is None else d for t, d in zip((x, weight, residual, gate), dense, strict=True))
    return (x, weight, None if bias is None else bias.contiguous(), residual, gate, split, None, None, None, 0, out)


def _run_linear(x, weight, bias, residual, gate, split, gelu, op):
    kernels = _kernels(op, x, *weight.shape)
    if kernels is None:
        return fallback.linear(x, weight, bias, residual, gate, gelu=gelu, split=None if split < 0 else split)
    out = _empty(x, weight)
    _launch(op, kernels, [_layer(x, weight, bias, residual, gate, split, out)], gelu, 0.0)
    return out


def _run_joint(*args):
    img, txt, (split, gelu, op) = args[:5], args[5:10], args[10:]
    kernels = _kernels(op, img[0], *img[1].shape, *txt[1].shape)
    if kernels is None:
        return tuple(fallback.linear(*stream, gelu=gelu, split=None if s < 0 else s)
                     for stream, s in ((img, split), (txt, -1)))
    outs = _empty(*img[:2]), _empty(*txt[:2])
    _launch(op, kernels, [_layer(*img, split, outs[0]), _layer(*txt, -1, outs[1])], gelu, 0.0)
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
    above = wide(grad)
    if residual is not None and needs[3]:
        d_residual = grad
    if gate is not None:
        if needs[4]:
            product = F.linear(x, weight, bias)
            rows = above * wide(product)
            first = rows.shape[1] if split < 0 else min(split, rows.shape[1])
            d_gate = rows[:, :first].sum(1, keepdim=True)
            if gate.shape[1] == 2:
                d_gate = torch.cat((d_gate, rows[:, first:].sum(1, keepdim=True)), 1)
            d_gate = d_gate.to(gate.dtype)
        above = above * reference.per_token(wide(gate), grad, None if split < 0 else split)
    if gelu:
        product = wide(F.linear(x, weight, bias))
        above = torch.ops.aten.gelu_backward(above, product, approximate="tanh")
    return (*_product_grads(x, weight, bias, above.to(x.dtype), needs), d_residual, d_gate)


def _product_grads(x, weight, bias, above, needs):
    """Gradients of x, weight and bias from that of the product."""
    flat = _flat(above)
    return (above @ weight if needs[0] else None,
            flat.T @ _flat(x) if needs[1] else None,
            wide(flat).sum(0).to(bias.dtype) if bias is not None and needs[2] else None)


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
    return x if x.ndim == 3 and x.shape[0] == 1 else _flat(x)[None]


def _flat(x):
    """x [..., K] as [S, K]; K may be 0, of which reshape(-1, K) could not tell S."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _check_streams(op, x_img, x_txt, weight_img, weight_txt, bias_img, bias_txt):
    _check_linear(op, x_img, weight_img, bias_img, "_img")
    _check_linear(op, x_txt, weight_txt, bias_txt, "_txt", like=x_img)
    for name, x in (("x_img", x_img), ("x_txt", x_txt)):
        if x.ndim != 3 or x.shape[0] != x_img.shape[0]:
            raise ValueError(f"{op}: {name}: expected shape [B, S, K], B the same in both, got {list(x.shape)}")


def _check_square(op, weight, suffix=""):
    if weight.shape[0] != weight.shape[1]:
        raise ValueError(f"{op}: weight{suffix}: expected a square matrix, got {list(weight.shape)}")


def _check_gated(op, suffix, x, weight, bias, residual, gate, split):
    """Returns the gate as [B, R, N]."""
    check_split(op, split)
    _check_linear(op, x, weight, bias, suffix)
    if x.ndim != 3:
        raise ValueError(f"{op}: x{suffix}: expected shape [B, S, K], got {list(x.shape)}")
    _check_tensor(op, f"residual{suffix}", residual, x)
    if tuple(residual.shape) != (*x.shape[:2], weight.shape[0]):
        raise ValueError(f"{op}: residual{suffix}: expected shape {[*x.shape[:2], weight.shape[0]]}, "
                         f"got {list(residual.shape)}")
    _check_last_dim(op, f"residual{suffix}", residual)
    return modulation_rows(op, f"gate{suffix}", gate, residual, split)


def _check_linear(op, x, weight, bias, suffix="", weight_name=None, bias_name=None, like=None):
    weight_name, bias_name = weight_name or f"weight{suffix}", bias_name or f"bias{suffix}"
    _check_tensor(op, f"x{suffix}", x, like)
    _check_tensor(op, weight_name, weight, x)
    if x.ndim < 1:
        raise ValueError(f"{op}: x{suffix}: expected shape [..., K], got []")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: {weight_name}: expected shape [N, {x.shape[-1]}], got {list(weight.shape)}")
    if bias is not None:
        _check_tensor(op, bias_name, bias, x)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"{op}: {bias_name}: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
