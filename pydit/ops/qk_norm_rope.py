"""Per-head RMSNorm of queries and keys with rotary position embedding.

Notation: B batch, S tokens, H heads, D head dim (even, 2 to 256).
"""

from __future__ import annotations

import torch

from pydit import backend
from pydit.ops import fallback, reference
from pydit.ops._library import call, check_eps, check_last_dim, check_out, check_tensor, define, define_backward
from pydit.ops.reference import wide

_OP = "qk_norm_rope"


def qk_norm_rope(q, k, q_weight, k_weight, freqs, *, eps=1e-6, out=None):
    """RMSNorm over D of q and k, then rotation of interleaved pairs, in one pass over memory.

    Parameters
    ----------
    q, k : torch.Tensor, shape (B, S, H, D). Any strides with a contiguous last dimension (views of packed QKV).
        float32, float16 or bfloat16 (float64 on the reference backend).
    q_weight, k_weight : torch.Tensor of shape (D,) and dtype of q, or None for weights of one.
    freqs : (cos, sin), float32 tensors of shape (S, D/2), contiguous, or None for no rotation. Pair i of a head is
        elements 2i and 2i + 1, as in Qwen-Image and FLUX.1.
    eps : float, added to the mean square.
    out : (torch.Tensor, torch.Tensor), optional. Where to write, shaped like q and k; ``out=(q, k)`` works in place.
        Not differentiable. No other memory of the arguments may be written to.

    Returns
    -------
    (torch.Tensor, torch.Tensor), each (B, S, H, D): new contiguous tensors, or ``out``.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, device, shape or stride; the message names the argument, what was expected, what came.

    Notes
    -----
    RMSNorm: Zhang & Sennrich 2019; RoPE: Su et al. 2021. Differentiable in q, k and the weights; tables
    that want a gradient are refused.
    """
    check_heads("q", q, None)
    check_heads("k", k, q)
    check_eps(_OP, eps)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check_weight(name, weight, q)
    cos, sin = check_freqs(freqs, q)
    if out is None:
        return call("qk_norm_rope", q, k, q_weight, k_weight, cos, sin, eps)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise TypeError(f"{_OP}: out: expected a pair of tensors, got {type(out).__name__}")
    check_heads("out[0]", out[0], q)
    check_heads("out[1]", out[1], q)
    needs_grad = [t for t in (q, k, q_weight, k_weight, *out) if t is not None and t.requires_grad]
    if needs_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: out: expected tensors that need no gradient (or torch.no_grad()), got one that does")
    check_out(_OP, {"out[0]": out[0], "out[1]": out[1]},
              {"q": q, "k": k, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin},
              {"out[0]": "q", "out[1]": "k"})
    call("qk_norm_rope_out", q, k, q_weight, k_weight, cos, sin, eps, out[0], out[1])
    return out[0], out[1]


def check_heads(name, x, like, *, op=_OP, same_tokens=True):
    """x [B, S, H, D] of even D, with a contiguous last dimension; shape (S too, if ``same_tokens``), dtype, device of
    ``like``."""
    check_tensor(op, name, x, like)
    if x.ndim != 4:
        raise ValueError(f"{op}: {name}: expected shape [B, S, H, D], got {list(x.shape)}")
    if x.shape[3] % 2 or not 2 <= x.shape[3] <= 256:
        raise ValueError(f"{op}: {name}: expected an even head dim from 2 to 256, got {x.shape[3]}")
    if like is not None:
        expected = [like.shape[0], like.shape[1] if same_tokens else x.shape[1], *like.shape[2:]]
        if list(x.shape) != expected:
            raise ValueError(f"{op}: {name}: expected shape {expected} like the first argument, got {list(x.shape)}")
    check_last_dim(op, name, x)


def check_weight(name, weight, q, *, op=_OP):
    """weight [D] of q's dtype and device, or None."""
    if weight is None:
        return
    check_tensor(op, name, weight, q)
    if tuple(weight.shape) != (q.shape[3],):
        raise ValueError(f"{op}: {name}: expected shape [{q.shape[3]}], got {list(weight.shape)}")
    check_last_dim(op, name, weight)


def check_freqs(freqs, q, *, op=_OP, name="freqs"):
    """freqs = (cos, sin) [S, D/2] for q, or None; returns (cos, sin), both None without."""
    if freqs is None:
        return None, None
    if not isinstance(freqs, (tuple, list)) or len(freqs) != 2:
        raise TypeError(f"{op}: {name}: expected a pair (cos, sin) or None, got {type(freqs).__name__}")
    for part, table in zip(("cos", "sin"), freqs, strict=True):
        if not isinstance(table, torch.Tensor):
            raise TypeError(f"{op}: {name} {part}: expected a torch.Tensor, got {type(table).__name__}")
        if table.dtype != torch.float32 and not (table.dtype == q.dtype == torch.float64):
            raise TypeError(f"{op}: {name} {part}: expected torch.float32, got {table.dtype}")
        if table.device != q.device:
            raise ValueError(f"{op}: {name} {part}: expected device {q.device} like q, got {table.device}")
        if tuple(table.shape) != (q.shape[1], q.shape[3] // 2):
            raise ValueError(f"{op}: {name} {part}: expected shape [{q.shape[1]}, {q.shape[3] // 2}], "
                             f"got {list(table.shape)}")
        if not table.is_contiguous():
            raise ValueError(f"{op}: {name} {part}: expected a contiguous tensor, got strides {list(table.stride())}")
        if table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: {name} {part}: expected a table that needs no gradient, got one that does; "
                             "pydit.ops.reference has one")
    return freqs[0], freqs[1]


def _run(q, k, q_weight, k_weight, cos, sin, eps, q_out, k_out):
    path = backend.choose(_OP, q)
    if path.kernels is None:
        rotation = None if cos is None else torch.complex(cos, sin)
        q_new, k_new = fallback.qk_norm_rope(q, k, q_weight, k_weight, rotation, eps)
        if q_out is None:
            return q_new.contiguous(), k_new.contiguous()
        q_out.copy_(q_new)
        k_out.copy_(k_new)
        return q_out, k_out
    if q_out is None:
        q_out, k_out = contiguous_like(q), contiguous_like(k)
    with backend.device_of(q):
        path.kernels.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, q_out, k_out, eps, backend.DTYPE_CODES[q.dtype],
                                  backend.stream_of(q))
    return q_out, k_out


def _qk_norm_rope(q, k, q_weight, k_weight, cos, sin, eps):
    return _run(q, k, q_weight, k_weight, cos, sin, eps, None, None)


def _qk_norm_rope_out(q, k, q_weight, k_weight, cos, sin, eps, q_out, k_out):
    _run(q, k, q_weight, k_weight, cos, sin, eps, q_out, k_out)


def contiguous_like(x):
    """An empty contiguous tensor like x, whose own strides torch.empty_like would keep."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


define("qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps) "
       "-> (Tensor, Tensor)", _qk_norm_rope, lambda q, k, *_: (contiguous_like(q), contiguous_like(k)))
define("qk_norm_rope_out(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, "
       "Tensor(a!) q_out, Tensor(b!) k_out) -> ()", _qk_norm_rope_out, lambda *_: None)


# Backward: rotate the gradient back, then the RMSNorm formula; fp32 inside (float64 for float64). -----------------


def norm_rope_backward(x, weight, grad, cos, sin, eps):
    """Gradients of x [B, S, H, D] and weight [D] (None without one) from that of the normed and rotated x."""
    value, grad = wide(x), wide(grad)
    if cos is not None:
        grad = reference.rotate(grad, cos, -sin)
    rrms = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    normed = value * rrms
    d_weight = None
    if weight is not None:
        d_weight = (grad * normed).sum((0, 1, 2)).to(weight.dtype)
        grad = grad * wide(weight)
    d_x = rrms * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return d_x.to(x.dtype), d_weight


def _setup(ctx, inputs, output):
    q, k, q_weight, k_weight, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)


def _backward(ctx, grad_q, grad_k):
    q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
    d_q, d_q_weight = norm_rope_backward(q, q_weight, grad_q, cos, sin, ctx.eps)
    d_k, d_k_weight = norm_rope_backward(k, k_weight, grad_k, cos, sin, ctx.eps)
    return d_q, d_k, d_q_weight, d_k_weight, None, None, None


define_backward(_OP, _backward, _setup)
