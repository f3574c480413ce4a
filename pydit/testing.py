"""The tolerance policy, in one place, and the comparison that explains a failure.

A result is right when its largest error against a float64 reference is at most twice that of plain torch in the same
dtype, plus one unit in the last place of the dtype at the largest reference value. NaN never passes. The policy is
never loosened for one test.
"""

from __future__ import annotations

import math

import torch


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """The spacing of ``dtype`` at ``magnitude`` (for 0: the smallest normal number's spacing)."""
    info = torch.finfo(dtype)
    if magnitude < info.tiny:
        return info.tiny * info.eps
    return info.eps * 2.0 ** math.floor(math.log2(magnitude))


def assert_accurate(actual: torch.Tensor, reference: torch.Tensor, same_dtype: torch.Tensor, *,
                    name: str = "result") -> None:
    """Check ``actual`` against the tolerance policy.

    Parameters
    ----------
    actual : what the kernel computed, any float dtype and shape.
    reference : float64, same shape: the right answer.
    same_dtype : what plain torch computes in the dtype of ``actual``, same shape.
    name : named in the message.

    Raises
    ------
    AssertionError
        With the worst element, its coordinate, both values, the bound and how many elements exceed it.
    """
    if reference.dtype != torch.float64:
        raise TypeError(f"reference: expected float64, got {reference.dtype}")
    if same_dtype.dtype != actual.dtype:
        raise TypeError(f"same_dtype: expected {actual.dtype} like actual, got {same_dtype.dtype}")
    if not actual.shape == reference.shape == same_dtype.shape:
        raise AssertionError(f"{name}: expected shape {list(reference.shape)}, got {list(actual.shape)} "
                             f"(same-dtype torch: {list(same_dtype.shape)})")
    if actual.numel() == 0:
        return
    # Where all three lie, if that is one place: a GPU compares the outputs of a real model sooner than it copies them.
    place = actual.device if actual.device == reference.device == same_dtype.device else torch.device("cpu")
    reference, same_dtype_wide = reference.detach().to(place), same_dtype.detach().to(place).double()
    wide = actual.detach().to(place).double()
    bad = ~torch.isfinite(wide) & (wide != reference)
    if bad.any():
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise AssertionError(f"{name}: {int(bad.sum())} of {bad.numel()} elements are not finite, first at {where}: "
                             f"{wide[where].item()}, expected {reference[where].item()}")
    error = (wide - reference).abs()
    torch_error = (same_dtype_wide - reference).abs().max().item()
    bound = 2 * torch_error + ulp(actual.dtype, reference.abs().max().item())
    if not error.max().item() <= bound:
        flat = int(error.argmax())
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), error.shape))
        raise AssertionError(
            f"{name}: worst error {error.max().item():.3e} at {where} exceeds {bound:.3e} "
            f"(torch in {actual.dtype}: {torch_error:.3e}): got {wide[where].item():.9g}, expected "
            f"{reference[where].item():.9g}; {int((error > bound).sum())} of {error.numel()} elements exceed the bound")
