"""Linear probes: the affine map that best predicts one set of activations from another, from moments alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from pydit.errors import UserError
from pydit.stats import checks
from pydit.stats.moments import Moments

_BATCH = 8  # matrices factorised at a time: three copies of 8 x 3072^2 float64 are 1.8 GB
_ITERATIONS = 30


class LinearProbe:
    """The affine map y = W x + b. Build one with :meth:`fit`.

    Attributes
    ----------
    weight : float64 [e, d], the full map
    bias : float64 [e]
    r2 : float, share of the variance of y that the map explains on the data it was fitted to
    condition : float, ratio of the largest to the smallest eigenvalue of the matrix that was inverted, estimated by
        power iteration (rather too small than too large); inf where it is singular, nan if unknown
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, r2: float, condition: float = math.nan) -> None:
        self.weight, self.bias, self.r2, self.condition = weight, bias, r2, condition

    @classmethod
    def fit(cls, moments: Moments, *, ridge: float = 1e-6, residual: bool = False) -> LinearProbe:
        """Ridge regression in closed form: W = (M_xx + lambda I)^-1 M_xy, lambda = ridge * trace(M_xx) / d.

        Parameters
        ----------
        moments : Moments
            Of x and y, at least two rows.
        ridge : float
            Relative to the mean variance of x. The bias is not shrunk. 0 takes the minimum-norm solution where
            M_xx is singular. Moments from a kernel of no more rows than channels get :meth:`Moments.rounding` on top,
            channel by channel: the rounding of float32 sums is larger there than a small ridge.
        residual : bool
            Fit y - x (needs d == e), as PPCL Eq. 1 does: the ridge then pulls W to the identity instead of 0.
            ``weight`` is the full map either way.

        Raises
        ------
        UserError
            Moments without y, fewer than two rows, a negative ridge, or residual with d != e.
        """
        return cls.fit_all([moments], ridge=ridge, residual=residual)[0]

    @classmethod
    def fit_all(cls, moments: Sequence[Moments], *, ridge: float = 1e-6, residual: bool = False) -> list[LinearProbe]:
        """:meth:`fit` for many moments of one shape, such as all blocks of a stream: Cholesky in batches."""
        ridge = checks.number("ridge", ridge, "a number >= 0", lambda x: x >= 0)
        checks.flag("residual", residual)
        if not isinstance(moments, Sequence):
            raise UserError(f"moments: expected a list of Moments, got {type(moments).__name__}")
        for one in moments:
            if not isinstance(one, Moments):
                raise UserError(f"moments: expected Moments, got {type(one).__name__}")
            if one.dim_y is None:
                raise UserError("moments: expected moments of x and y, got x alone")
            if one.count < 2:
                raise UserError(f"moments: expected at least 2 rows, got {one.count}")
            if residual and one.dim_x != one.dim_y:
                raise UserError(f"residual: expected x and y of one width, got {one.dim_x} and {one.dim_y}")
            if (one.dim_x, one.dim_y) != (moments[0].dim_x, moments[0].dim_y):
                raise UserError(f"moments: expected one shape, got {(moments[0].dim_x, moments[0].dim_y)} and "
                                f"{(one.dim_x, one.dim_y)}")
        probes: list[LinearProbe] = []
        for start in range(0, len(moments), _BATCH):
            probes.extend(cls._fit_batch(moments[start:start + _BATCH], ridge, residual))
        return probes

    @classmethod
    def _fit_batch(cls, moments: Sequence[Moments], ridge: float, residual: bool) -> Iterator[LinearProbe]:
        m_xx, m_xy = torch.stack([one.m_xx for one in moments]), torch.stack([one.m_xy for one in moments])
        shrink = ridge * m_xx.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
        shrink = shrink + torch.stack([one.rounding() for one in moments])
        solved, conditions = _solve(m_xx, m_xy - m_xx if residual else m_xy, shrink)
        for one, xx, xy, transposed, condition in zip(moments, m_xx, m_xy, solved, conditions, strict=True):
            weight = transposed.T
            if residual:
                weight = weight + torch.eye(one.dim_x, dtype=weight.dtype, device=weight.device)
            total = float(one.s_yy.sum())
            error = max(total - 2 * float((weight.T * xy).sum()) + float(((weight @ xx) * weight).sum()), 0.0)
            yield cls(weight, one.mean_y - weight @ one.mean_x, 1.0 - error / total if total > 0 else 1.0, condition)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """y_hat [..., e] for x [..., d], computed and returned in float64 for float64 x and in float32 otherwise."""
        if not checks.tensor("x", x).is_floating_point() or x.shape[-1:] != self.weight.shape[1:]:
            raise UserError(f"x: expected floats [..., {self.weight.shape[1]}], got {x.dtype} {list(x.shape)}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return torch.nn.functional.linear(x.to(dtype), self.weight.to(x.device, dtype), self.bias.to(x.device, dtype))


def _solve(matrices: torch.Tensor, targets: torch.Tensor, shrink: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """(matrix + diag(shrink))^-1 target of semi-definite matrices [B, d, d] and shrink [B, d], least norm where
    singular; conditions."""
    shifted = matrices.clone()
    shifted.diagonal(dim1=1, dim2=2).add_(shrink)
    factors, failed = torch.linalg.cholesky_ex(shifted)
    # A tiny pivot means that Cholesky got through a singular matrix on rounding errors.
    pivots = factors.diagonal(dim1=1, dim2=2).square()
    singular = (failed != 0) | ~(pivots.amin(1) > 1e-13 * pivots.amax(1))
    factors[singular] = torch.eye(shifted.shape[1], dtype=shifted.dtype, device=shifted.device)
    solved = torch.cholesky_solve(targets, factors)
    for index in singular.nonzero().flatten().tolist():
        values, vectors = torch.linalg.eigh(shifted[index])
        inverse = torch.where(values > 1e-12 * values[-1], 1 / values, 0.0)  # those below 0 are rounding too
        solved[index] = vectors @ (inverse[:, None] * (vectors.T @ targets[index]))
    largest = _largest_eigenvalue(lambda v: shifted @ v, shifted)
    smallest = 1 / _largest_eigenvalue(lambda v: torch.cholesky_solve(v, factors), shifted)
    conditions = torch.where(singular, torch.inf, largest / smallest)
    return solved, conditions.tolist()


def _largest_eigenvalue(apply: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Of symmetric positive maps of [B, d, 1], float64 [B], by power iteration."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(like.shape[1], 1, generator=generator, dtype=like.dtype).to(like.device)
    vector = vector.expand(len(like), -1, 1)
    for _ in range(_ITERATIONS):
        length = torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp_min(1e-300)
        vector = apply(vector / length)
    return torch.linalg.vector_norm(vector, dim=(1, 2))
