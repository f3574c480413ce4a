"""Linear layers with what a DiT block does to their output.

The matrix products are torch's (cuBLASLt on a GPU); the gated residual runs in this package's kernel. There is no GEMM
of our own yet, and ``pydit.report()`` says so.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pydit import backend
from pydit.ops._library import _check_tensor
from pydit.ops.block import gated_residual

_REASON = "the matrix product is torch's; no kernel of our own yet"


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
    On CUDA tensors that need no gradient, cuBLASLt adds bias and GELU as it writes the product (one launch, one
    rounding); otherwise GELU is a second pass over the rounded product. Differentiable.
    """
    _check_linear("linear_gelu", x, weight, bias)
    if x.is_cuda and bias is not None and not _needs_gradient(x, weight, bias) and x.dtype != torch.float64:
        _record("linear_gelu", f"{_REASON}, with its GELU")
        return torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.T, use_gelu=True).view(
            *x.shape[:-1], -1)
    _record("linear_gelu", _REASON)
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def linear_gated_residual(x, weight, bias, residual, gate):
    """A projection back to the stream, gated and added: ``residual + gate * (x W^T + b)``.

    Parameters
    ----------
    x : torch.Tensor, shape (B, S, K), any float dtype.
    weight : torch.Tensor, shape (N, K); bias : shape (N,) or None. dtype and device of x.
    residual : torch.Tensor, shape (B, S, N); gate : shape (B, N) or (B, 1, N). dtype and device of x.

    Returns
    -------
    torch.Tensor, shape (B, S, N), dtype of x.

    Raises
    ------
    TypeError, ValueError
        As in :func:`linear_gelu`.

    Notes
    -----
    The product is rounded to the dtype of x before :func:`gated_residual` adds it in float32. Differentiable.
    """
    name = "linear_gated_residual"
    _check_linear(name, x, weight, bias)
    if x.ndim != 3:
        raise ValueError(f"{name}: x: expected shape [B, S, K], got {list(x.shape)}")
    _check_tensor(name, "residual", residual, x)
    if tuple(residual.shape) != (*x.shape[:2], weight.shape[0]):
        raise ValueError(f"{name}: residual: expected shape {[*x.shape[:2], weight.shape[0]]}, "
                         f"got {list(residual.shape)}")
    _record(name, _REASON)
    return gated_residual(residual, F.linear(x, weight, bias), gate)


def linear_residual(x, weight, bias=None):
    """A linear map in the place of an MLP or of the text stream of a block: ``x + x W^T + b``.

    Parameters
    ----------
    x : torch.Tensor, shape (..., C), any float dtype.
    weight : torch.Tensor, shape (C, C); bias : shape (C,) or None. dtype and device of x.

    Returns
    -------
    torch.Tensor, shape (..., C), dtype of x. The product adds to x + b (rounded) where it is accumulated.

    Raises
    ------
    TypeError, ValueError
        As in :func:`linear_gelu`.
    """
    _check_linear("linear_residual", x, weight, bias)
    if weight.shape[0] != weight.shape[1]:
        raise ValueError(f"linear_residual: weight: expected a square matrix, got {list(weight.shape)}")
    _record("linear_residual", _REASON)
    rows = x.reshape(-1, x.shape[-1])
    start = rows if bias is None else rows + bias
    return torch.addmm(start, rows, weight.T).view(x.shape)


def _check_linear(op, x, weight, bias):
    _check_tensor(op, "x", x, None)
    _check_tensor(op, "weight", weight, x)
    if x.ndim < 1 or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        width = x.shape[-1] if x.ndim else "K"
        raise ValueError(f"{op}: weight: expected shape [N, {width}], got {list(weight.shape)}")
    if bias is not None:
        _check_tensor(op, "bias", bias, x)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"{op}: bias: expected shape [{weight.shape[0]}], got {list(bias.shape)}")


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _record(op, reason):
    if not torch.compiler.is_compiling():
        backend.record(op, "torch", reason)
