"""Per-head RMSNorm and rotary embedding of queries and keys of both streams, in one launch.

Notation: B batch, S tokens of a stream, H heads, D head dim (even, 2 to 256).
"""

from __future__ import annotations

import torch

from pydit import backend
from pydit.ops import fallback
from pydit.ops._library import call, check_eps, check_out, define, define_backward
from pydit.ops.qk_norm_rope import check_freqs, check_heads, check_weight, contiguous_like, norm_rope_backward

_OP = "joint_qk_norm_rope"
_NAMES = ("q_img", "k_img", "q_txt", "k_txt")


def joint_qk_norm_rope(q_img, k_img, q_txt, k_txt, weights, freqs_img, freqs_txt, *, eps=1e-6, out=None):
    """:func:`pydit.ops.qk_norm_rope` of the image and of the text stream, in one pass and one launch.

    Parameters
    ----------
    q_img, k_img : torch.Tensor, shape (B, S_img, H, D). q_txt, k_txt : shape (B, S_txt, H, D). Any strides with a
        contiguous last dimension. float32, float16 or bfloat16 (float64 on the reference backend). Either stream may
        have no tokens.
    weights : four tensors of shape (D,) and the dtype of q_img, or None, for (q_img, k_img, q_txt, k_txt); None as a
        whole: all ones.
    freqs_img, freqs_txt : (cos, sin), float32, shape (S_img, D/2) and (S_txt, D/2), contiguous, or None for no
        rotation.
    eps : float, added to the mean square.
    out : four tensors, optional. Where to write; ``out=(q_img, k_img, q_txt, k_txt)`` works in place. Not
        differentiable. No other memory of the arguments may be written to.

    Returns
    -------
    (q_img, k_img, q_txt, k_txt): new contiguous tensors, or ``out``.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, device, shape or stride; the message names the argument, what was expected, what came.
    """
    tensors = (q_img, k_img, q_txt, k_txt)
    for name, x in zip(_NAMES, tensors, strict=True):
        check_heads(name, x, None if name == "q_img" else q_img, op=_OP, same_tokens=name == "k_img")
    if k_txt.shape != q_txt.shape:
        raise ValueError(f"{_OP}: k_txt: expected shape {list(q_txt.shape)} like q_txt, got {list(k_txt.shape)}")
    check_eps(_OP, eps)
    weights = (None,) * 4 if weights is None else weights
    if not isinstance(weights, (tuple, list)) or len(weights) != 4:
        raise TypeError(f"{_OP}: weights: expected four tensors or None, got {_describe(weights)}")
    for name, weight in zip(_NAMES, weights, strict=True):
        check_weight(f"weights {name}", weight, q_img, op=_OP)
    tables = (*check_freqs(freqs_img, q_img, op=_OP, name="freqs_img"),
              *check_freqs(freqs_txt, q_txt, op=_OP, name="freqs_txt"))
    if out is None:
        return tuple(call("joint_qk_norm_rope", *tensors, *weights, *tables, eps))
    if not isinstance(out, (tuple, list)) or len(out) != 4:
        raise TypeError(f"{_OP}: out: expected four tensors, got {_describe(out)}")
    for name, like, x in zip(_NAMES, tensors, out, strict=True):
        check_heads(f"out {name}", x, like, op=_OP)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, *weights, *out)):
        raise ValueError(f"{_OP}: out: expected tensors that need no gradient (or torch.no_grad()), got one that does")
    names = ("cos_img", "sin_img", "cos_txt", "sin_txt")
    check_out(_OP, {f"out {name}": x for name, x in zip(_NAMES, out, strict=True)},
              dict(zip(_NAMES, tensors, strict=True)) | dict(zip(names, tables, strict=True))
              | {f"weights {name}": x for name, x in zip(_NAMES, weights, strict=True)},
              {f"out {name}": name for name in _NAMES})
    call("joint_qk_norm_rope_out", *tensors, *weights, *tables, eps, *out)
    return tuple(out)


def _describe(value):
    return f"{len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__


def _run(tensors, weights, tables, eps, out):
    path = backend.choose(_OP, tensors[0])
    if path.kernels is None:
        rotations = [None if cos is None else torch.complex(cos, sin) for cos, sin in (tables[:2], tables[2:])]
        found = [*fallback.qk_norm_rope(*tensors[:2], *weights[:2], rotations[0], eps),
                 *fallback.qk_norm_rope(*tensors[2:], *weights[2:], rotations[1], eps)]
        if out is None:
            return tuple(x.contiguous() for x in found)
        for to, x in zip(out, found, strict=True):
            to.copy_(x)
        return out
    if out is None:
        out = tuple(contiguous_like(x) for x in tensors)
    with backend.device_of(tensors[0]):
        path.kernels.joint_qk_norm_rope(*tensors, weights, *tables, out, eps, backend.DTYPE_CODES[tensors[0].dtype],
                                        backend.stream_of(tensors[0]))
    return out


def _new(q_img, k_img, q_txt, k_txt, *rest):
    return _run((q_img, k_img, q_txt, k_txt), rest[:4], rest[4:8], rest[8], None)


def _into(q_img, k_img, q_txt, k_txt, *rest):
    _run((q_img, k_img, q_txt, k_txt), rest[:4], rest[4:8], rest[8], rest[9:])


_ARGUMENTS = ("Tensor q_img, Tensor k_img, Tensor q_txt, Tensor k_txt, Tensor? q_img_weight, Tensor? k_img_weight, "
              "Tensor? q_txt_weight, Tensor? k_txt_weight, Tensor? cos_img, Tensor? sin_img, Tensor? cos_txt, "
              "Tensor? sin_txt, float eps")
define(f"joint_qk_norm_rope({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", _new,
       lambda *args: tuple(contiguous_like(x) for x in args[:4]))
define(f"joint_qk_norm_rope_out({_ARGUMENTS}, Tensor(a!) q_img_out, Tensor(b!) k_img_out, Tensor(c!) q_txt_out, "
       "Tensor(d!) k_txt_out) -> ()", _into, lambda *_: None)


def _setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, *grads):
    saved = ctx.saved_tensors
    found = [norm_rope_backward(x, weight, grad, *table, ctx.eps)
             for x, weight, grad, table in zip(saved[:4], saved[4:8], grads,
                                               (saved[8:10], saved[8:10], saved[10:], saved[10:]), strict=True)]
    return *(dx for dx, _ in found), *(dw for _, dw in found), None, None, None, None, None


define_backward(_OP, _backward, _setup)
