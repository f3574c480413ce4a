"""Linear probes: the affine map that best predicts one set of activations from another, from moments alone."""

from __future__ import annotations

import torch

from pydit.errors import UserError
from pydit.stats.moments import Moments


class LinearProbe:
    """The affine map y = W x + b. Build one with :meth:`fit`.

    Attributes
    ----------
    weight : float64 [e, d], the full map
    bias : float64 [e]
    r2 : float, share of the variance of y that the map explains on the data it was fitted to
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, r2: float) -> None:
        self.weight, self.bias, self.r2 = weight, bias, r2

    @classmethod
    def fit(cls, moments: Moments, *, ridge: float = 1e-6, residual: bool = False) -> LinearProbe:
        """Ridge regression in closed form: W = (M_xx + lambda I)^-1 M_xy, lambda = ridge * trace(M_xx) / d.

        Parameters
        ----------
        moments : Moments
            Of x and y, at least two rows.
        ridge : float
            Relative to the mean variance of x. The bias is not shrunk. 0 takes the minimum-norm solution where
            M_xx is singular.
        residual : bool
            Fit y - x (needs d == e), as PPCL Eq. 1 does: the ridge then pulls W to the identity instead of 0.
            ``weight`` is the full map either way.

        Raises
        ------
        UserError
            Moments without y, fewer than two rows, a negative ridge, or residual with d != e.
        """
        if moments.dim_y is None:
            raise UserError("moments: expected moments of x and y, got x alone")
        if moments.count < 2:
            raise UserError(f"moments: expected at least 2 rows, got {moments.count}")
        if not ridge >= 0:
            raise UserError(f"ridge: expected a number >= 0, got {ridge!r}")
        if residual and moments.dim_x != moments.dim_y:
            raise UserError(f"residual: expected x and y of one width, got {moments.dim_x} and {moments.dim_y}")
        m_xx, m_xy = moments.m_xx, moments.m_xy
        target = m_xy - m_xx if residual else m_xy
        weight = _solve(m_xx, target, ridge * float(m_xx.trace()) / moments.dim_x).T
        if residual:
            weight = weight + torch.eye(moments.dim_x, dtype=weight.dtype, device=weight.device)
        bias = moments.mean_y - weight @ moments.mean_x
        total = float(moments.s_yy.sum())
        error = total - 2 * float((weight.T * m_xy).sum()) + float(((weight @ m_xx) * weight).sum())
        return cls(weight, bias, 1.0 - error / total if total > 0 else 1.0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """y_hat [..., e] for x [..., d], computed and returned in float64 for float64 x and in float32 otherwise."""
        if not x.is_floating_point() or x.shape[-1:] != self.weight.shape[1:]:
            raise UserError(f"x: expected floats [..., {self.weight.shape[1]}], got {x.dtype} {list(x.shape)}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.nn.functional.linear(x.to(dtype), self.weight.to(x.device, dtype), self.bias.to(x.device, dtype))


def _solve(matrix: torch.Tensor, target: torch.Tensor, shrink: float) -> torch.Tensor:
    """(matrix + shrink I)^-1 target for a positive semi-definite matrix; least norm where it is singular."""
    shifted = matrix.clone()
    shifted.diagonal().add_(shrink)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    # A tiny pivot means that Cholesky got through a singular matrix on rounding errors.
    pivots = factor.diagonal().square()
    if not bool(failed) and float(pivots.min()) > 1e-13 * float(pivots.max()):
        return torch.cholesky_solve(target, factor)
    return torch.linalg.pinv(shifted, hermitian=True, rtol=1e-12) @ target
