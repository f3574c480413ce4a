"""Sums of products of activations over tokens, for covariance, linear probes and CKA."""

from __future__ import annotations

import torch

from pydit import backend
from pydit.backend import KERNEL_DTYPES
from pydit.ops import reference
from pydit.ops._library import check_last_dim, check_tensor, define

_OP = "second_moments"


def second_moments(x, y=None, *, shift_x=None, shift_y=None):
    """Sums over tokens of u = x - shift_x and v = y - shift_y, and of their products.

    Parameters
    ----------
    x : torch.Tensor, shape (N, d), any float dtype, contiguous last dimension.
    y : torch.Tensor, shape (N, e), dtype and device of x, or None.
    shift_x, shift_y : torch.Tensor, shape (d,) and (e,), on the device of x, any float dtype, or None for 0.

    Returns
    -------
    (n, sum_x, sum_y, xx, xy)
        n = N; sum_x [d] and sum_y [e] the sums of u and v; xx [d, d] = u^T u, xy [d, e] = u^T v; float64. Without y
        e is 0.

    Raises
    ------
    TypeError, ValueError
        A wrong type, dtype, device or shape; the message names the argument, what was expected, what came.

    Notes
    -----
    On a GPU, float16 and bfloat16 go to the tensor cores as they are: products are exact, 256 tokens are summed there,
    32 such sums in float32, these in float64, and the shift is applied to the sums in float64. The error of an element
    of xx is that of 288 float32 additions relative to the sum of |x_i x_j|, however many tokens there are; with a mean
    of r standard deviations that is r^2 times as much relative to the centred moment. float32 is multiplied in float64
    by torch. No gradient.
    """
    _check(x, y, shift_x, shift_y)
    shift_x, shift_y = (None if shift is None else shift.detach() for shift in (shift_x, shift_y))
    sums = zeros(x.shape[1], 0 if y is None else y.shape[1], x.device)
    add_second_moments(x, y, sums)
    xx, xy, sum_x, sum_y, _ = sums
    n = x.shape[0]
    xx = mirror(xx)
    if shift_x is not None:
        shift_x = shift_x.double()
        cross = torch.outer(shift_x, sum_x)
        xx = xx - cross - cross.T + n * torch.outer(shift_x, shift_x)
    if y is not None and (shift_x is not None or shift_y is not None):
        left = sum_x.new_zeros(()) if shift_x is None else shift_x
        right = sum_y.new_zeros(()) if shift_y is None else shift_y.double()
        left, right = left.expand(sum_x.shape), right.expand(sum_y.shape)
        xy = xy - torch.outer(left, sum_y) - torch.outer(sum_x, right) + n * torch.outer(left, right)
    if shift_x is not None:
        sum_x = sum_x - n * shift_x
    if shift_y is not None:
        sum_y = sum_y - n * shift_y.double()
    return n, sum_x, sum_y, xx, xy


def zeros(d: int, e: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Sums to start from: xx [d, d], xy [d, e], sum_x [d], sum_y [e], sum_yy [e], float64."""
    return tuple(torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((d, d), (d, e), (d,), (e,), (e,)))


def add_second_moments(x: torch.Tensor, y: torch.Tensor | None, sums: tuple[torch.Tensor, ...]) -> None:
    """Add x^T x, x^T y and the column sums of x, y and y^2 to ``sums`` (see :func:`zeros`).

    What xx holds below its diagonal is undefined until :func:`mirror`. Arguments are not checked.
    """
    # Without a backward of its own the op would give gradients where torch computes it, none where the kernel does.
    torch.ops.pydit.add_second_moments(x.detach(), None if y is None else y.detach(), *sums)


def mirror(xx: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix of which xx [d, d] holds the diagonal and what is above it."""
    upper = xx.triu()
    return upper + upper.triu(1).T


def _add(x, y, xx, xy, sum_x, sum_y, sum_yy):
    sums = (xx, xy, sum_x, sum_y, sum_yy)
    if x.dtype not in KERNEL_DTYPES:
        backend.record(_OP, "reference", f"{x.dtype}: torch multiplies in float64; the kernel takes 16-bit activations")
    elif not x.shape[1]:
        backend.record(_OP, "reference", "x without columns: the kernel has nothing to go through y with")
    else:
        path = backend.choose(_OP, x)
        if path.kernels is not None:
            with backend.device_of(x):
                taken = path.kernels.second_moments(x, y, sums, lambda size: x.new_empty(size, dtype=torch.uint8),
                                                    backend.cluster(), backend.DTYPE_CODES[x.dtype],
                                                    backend.stream_of(x))
            backend.explain(_OP, backend.KERNEL_PATHS[taken])
            return
    x = x.double()
    y = x[:, :0] if y is None else y.double()
    _, more_x, more_y, more_xx, more_xy = reference.second_moments(x, y)
    for target, more in zip(sums, (more_xx, more_xy, more_x, more_y, y.square().sum(0)), strict=True):
        target.add_(more)


define("add_second_moments(Tensor x, Tensor? y, Tensor(a!) xx, Tensor(b!) xy, Tensor(c!) sum_x, Tensor(d!) sum_y, "
       "Tensor(e!) sum_yy) -> ()", _add, lambda *_: None)


def _check(x, y, shift_x, shift_y):
    for name, rows, shift in (("x", x, shift_x), ("y", y, shift_y)):
        if rows is None and name == "y":
            if shift is not None:
                raise ValueError(f"{_OP}: shift_y: expected None without y, got a {type(shift).__name__}")
            continue
        check_tensor(_OP, name, rows, None if name == "x" else x)
        if rows.ndim != 2:
            raise ValueError(f"{_OP}: {name}: expected shape [N, {'d' if name == 'x' else 'e'}], "
                             f"got {list(rows.shape)}")
        if rows.shape[0] != x.shape[0]:
            raise ValueError(f"{_OP}: y: expected as many rows as x ({x.shape[0]}), got {rows.shape[0]}")
        check_last_dim(_OP, name, rows)
        if shift is None:
            continue
        if not isinstance(shift, torch.Tensor) or not shift.is_floating_point():
            got = shift.dtype if isinstance(shift, torch.Tensor) else type(shift).__name__
            raise TypeError(f"{_OP}: shift_{name}: expected a floating-point tensor or None, got {got}")
        if shift.layout != torch.strided:
            raise ValueError(f"{_OP}: shift_{name}: expected a dense tensor, got one of layout {shift.layout}")
        if shift.device != x.device or tuple(shift.shape) != (rows.shape[1],):
            raise ValueError(f"{_OP}: shift_{name}: expected shape [{rows.shape[1]}] on {x.device}, "
                             f"got {list(shift.shape)} on {shift.device}")
