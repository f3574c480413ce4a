"""Unbiased HSIC between every pair of feature matrices: what CKA of L layers is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pydit import backend
from pydit.backend import KERNEL_DTYPES
from pydit.ops import reference
from pydit.ops._library import check_list, check_tensor, define

_OP = "hsic_matrix"
_MAX_KERNEL_LAYERS, _MAX_KERNEL_ROWS = 128, 1 << 20
_MIN_KERNEL_ROWS = 16  # of fewer, the rounding of a float32 Gram matrix does not average out to 1e-4
_GRAM_BYTES = 570 << 20  # of Gram tiles kept at a time; 60 layers of 2048 rows fit


def hsic_matrix(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Unbiased HSIC_1 of every pair of L feature matrices of the same n rows.

    Parameters
    ----------
    features : L tensors, each of shape (n, d_l), n >= 4, one float dtype and device.

    Returns
    -------
    torch.Tensor, shape (L, L), float64
        <U(K_a), U(K_b)> / (n (n - 3)) with K = x x^T and U the U-centred form (Szekely and Rizzo 2014), which is the
        unbiased HSIC of Song et al. (2012). Symmetric; the diagonal is never negative; rows and columns of features
        whose rows are all alike, or all but one, are 0.

    Raises
    ------
    TypeError, ValueError
        No features, fewer than 4 rows, or a wrong type, dtype, device or shape; the message names the argument, what
        was expected, what came.

    Notes
    -----
    On a GPU, float16 and bfloat16 go to the tensor cores and sums are in float32 and float64; other dtypes, and fewer
    than 16 rows, are multiplied in float64 by torch. Against float64 the error is below 1e-4 of sqrt(HSIC_aa HSIC_bb).
    Channels with a large common offset are shifted first, in 16 bits: exactly for values between half and twice the
    offset. Other values are rounded once more; if such a row dominates, HSIC is off by up to twice that rounding (8e-3
    in bfloat16), CKA by less, since the row is off in both of its factors. No gradient.
    """
    features = check_list(_OP, "features", features)
    if not features:
        raise ValueError(f"{_OP}: features: expected at least one matrix, got none")
    for index, x in enumerate(features):
        name = f"features[{index}]"
        check_tensor(_OP, name, x, features[0] if index else None)
        if x.ndim != 2 or x.shape[1] < 1 or x.shape[0] != features[0].shape[0]:
            rows = "n" if index == 0 else features[0].shape[0]
            raise ValueError(f"{_OP}: {name}: expected shape [{rows}, d], got {list(x.shape)}")
    if features[0].shape[0] < 4:
        raise ValueError(f"{_OP}: features: expected at least 4 rows for the unbiased HSIC, got {features[0].shape[0]}")
    return torch.ops.pydit.hsic_matrix([x.detach() for x in features])  # a graph would promise a gradient


def _hsic_matrix(features):
    first, layers = features[0], len(features)
    if first.dtype not in KERNEL_DTYPES:
        backend.record(_OP, "reference", f"{first.dtype}: torch multiplies in float64; the kernel takes 16 bits")
    elif len(first) < _MIN_KERNEL_ROWS:
        backend.record(_OP, "reference", f"{len(first)} rows: torch multiplies in float64; below {_MIN_KERNEL_ROWS} "
                                         "the rounding of a kernel's float32 Gram matrices does not average out")
    elif layers > _MAX_KERNEL_LAYERS or len(first) > _MAX_KERNEL_ROWS:
        backend.record(_OP, "reference", f"{layers} matrices of {len(first)} rows: the kernel takes "
                                         f"{_MAX_KERNEL_LAYERS} of 2^20")
    else:
        path = backend.choose(_OP, first)
        if path.kernels is not None:
            features = [x if x.stride(-1) == 1 else x.contiguous() for x in features]
            hsic = first.new_empty((layers, layers), dtype=torch.float64)
            with backend.device_of(first):
                taken = path.kernels.hsic_matrix(features, hsic, lambda size: first.new_empty(size, dtype=torch.uint8),
                                                 _GRAM_BYTES, backend.DTYPE_CODES[first.dtype],
                                                 backend.stream_of(first))
            backend.explain(_OP, backend.KERNEL_PATHS[taken])
            return hsic
    return reference.hsic_matrix(features)


define("hsic_matrix(Tensor[] features) -> Tensor", _hsic_matrix,
       lambda features: features[0].new_empty((len(features), len(features)), dtype=torch.float64))
