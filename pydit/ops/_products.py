"""What the linear ops share: whose matrix product runs, the kernel's launch, gradients of a product, checks.

:func:`library_reason` alone decides between this package's kernel and the library (cuBLASLt through torch).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from pydit import backend, env
from pydit.backend import KERNEL_DTYPES
from pydit.ops._library import check_tensor, without_autocast
from pydit.ops.block import gated_residual
from pydit.ops.reference import wide

_GELU = 1  # pydit_activation in pydit.h
_CUT = ", tiles of the last wave cut along K"


def _constant(function):
    """As ``torch.compiler.assume_constant_result``, which imports all of torch's compiler along with this module."""
    function._dynamo_marked_constant = True
    return function


@_constant
def library_reason(device_type: str) -> str | None:
    """Why the library multiplies on this type of device, in code that autograd and torch.compile see through; None
    where an op of this package does."""
    choice = env.get("PYDIT_GEMM")
    if choice == "library":
        return "the product is the library's: PYDIT_GEMM=library"
    if device_type == "cuda" and choice == "auto":
        return ("the product is the library's (cuBLASLt): this package's kernel has not been raced against it yet; "
                "PYDIT_GEMM=pydit takes the kernel")
    return None


@_constant
def kernel_runs(device_type: str) -> bool:
    """Whether a linear op on this type of device launches this package's kernel."""
    if library_reason(device_type) is not None:
        return False  # every block asks several times, and this is the usual answer on a GPU
    return backend.default(device_type) != "reference"


def library_linear(x, weight, bias, residual=None, gate=None, split=None, gelu=False):
    """``residual + gate * act(x W^T + b)`` by torch's product, with cuBLASLt's epilogues where it has them."""
    if torch.is_autocast_enabled(x.device.type):
        with without_autocast():
            return library_linear(x, weight, bias, residual, gate, split, gelu)
    if gelu:
        if x.is_cuda and bias is not None and x.dtype != torch.float64 and not _needs_gradient(x, weight, bias):
            rows = torch._addmm_activation(bias, flatten_rows(x), weight.T, use_gelu=True)
            return rows.view(*x.shape[:-1], weight.shape[0])
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    if gate is not None:
        return gated_residual(residual, F.linear(x, weight, bias), gate, split=split)
    if residual is not None:
        rows = flatten_rows(residual)
        start = rows if bias is None else rows + bias
        return torch.addmm(start, flatten_rows(x), weight.T).view(residual.shape)
    return F.linear(x, weight, bias)


def _needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


# The kernel ------------------------------------------------------------------------------------------------------


def kernels_for(op, x, *features):
    """The kernel module for ``op``, or None where torch computes the formula; the choice is recorded.

    features : sizes of all weights of the call; a product needs every one of them to be above 0.
    """
    if x.dtype not in KERNEL_DTYPES and env.get("PYDIT_BACKEND") != "reference" and (
            x.is_cuda or env.get("PYDIT_BACKEND") == "sim"):
        backend.record(op, "torch", f"{x.dtype}: torch multiplies; the kernel takes float16 and bfloat16")
        return None
    if not all(features):
        backend.record(op, "torch", "a layer without features in or out has no product")
        return None
    return backend.choose(op, x).kernels


def launch(op, kernels, layers, gelu, eps):
    """One launch of grouped_linear for ``layers`` (see :func:`as_layer`)."""
    x, sums = layers[0][0], []

    def allocate(size):  # called only if tiles are cut, for their partial sums
        sums.append(x.new_empty(size, dtype=torch.uint8))
        return sums[0]

    with backend.device_of(x):
        taken = kernels.grouped_linear(layers, _GELU if gelu else 0, eps, allocate, backend.cluster(), backend.parts(),
                                       backend.DTYPE_CODES[x.dtype], backend.stream_of(x))
    backend.explain(op, backend.KERNEL_PATHS[taken] + (_CUT if sums else ""))


def as_layer(x, weight, bias, residual, gate, split, out):
    """A layer as ``pydit._C`` takes it, without heads; operands get a contiguous last dimension."""
    dense = [None if t is None or t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()
             for t in (x, weight, residual, gate)]
    x, weight, residual, gate = (t if d is None else d for t, d in zip((x, weight, residual, gate), dense, strict=True))
    return (x, weight, None if bias is None else bias.contiguous(), residual, gate, split, None, None, None, 0, out)


# Gradients and checks ---------------------------------------------------------------------------------------------


def product_grads(x, weight, bias, d_out, needs):
    """Gradients of x [B, S, K], weight [N, K] and bias [N] from d_out [B, S, N], that of ``x W^T + b``; None where
    ``needs`` has False."""
    flat = flatten_rows(d_out)
    return (d_out @ weight if needs[0] else None,
            flat.T @ flatten_rows(x) if needs[1] else None,
            wide(flat).sum(0).to(bias.dtype) if bias is not None and needs[2] else None)


def flatten_rows(x):
    """x [..., K] as [S, K]; reshape(-1, K) could not infer S where K is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_linear(op, x, weight, bias, suffix="", weight_name=None, bias_name=None, like=None):
    """x [..., K], weight [N, K] and bias [N] or None, of one float dtype and device (those of ``like``)."""
    weight_name, bias_name = weight_name or f"weight{suffix}", bias_name or f"bias{suffix}"
    check_tensor(op, f"x{suffix}", x, like)
    check_tensor(op, weight_name, weight, x)
    if x.ndim < 1:
        raise ValueError(f"{op}: x{suffix}: expected shape [..., K], got []")
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: {weight_name}: expected shape [N, {x.shape[-1]}], got {list(weight.shape)}")
    if bias is not None:
        check_tensor(op, bias_name, bias, x)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"{op}: {bias_name}: expected shape [{weight.shape[0]}], got {list(bias.shape)}")
