"""Mean and centred second moments of streamed rows, in float64, mergeable in any order.

State and merge follow Chan, Golub and LeVeque (1979): with counts n_a, n_b and means a, b,

    M = M_a + M_b + (n_a n_b / n) (b - a)(b' - a')^T        mean = a + (b - a) n_b / n

While float16 or bfloat16 rows go through a kernel, the same tensors hold plain sums, not centred, to which it adds in
place; whoever reads the state has it centred first, by a correction of rank one in float64.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from pydit import backend
from pydit.arguments import integer
from pydit.errors import UserError
from pydit.ops.second_moments import KERNEL_DTYPES, add_second_moments, mirror
from pydit.stats import checks

_LARGEST = 1e150  # of a sum that is loaded: its square is a number still


def _second_moments(x: torch.Tensor, y: torch.Tensor, shift_x: torch.Tensor,
                    shift_y: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
                                                    torch.Tensor]:
    """Sums over rows of the shifted values u = x - shift_x, v = y - shift_y: n, sum u, sum v, u^T u, u^T v, sum v^2."""
    u, v = x.double() - shift_x, y.double() - shift_y
    return len(u), u.sum(0), v.sum(0), u.T @ u, u.T @ v, v.square().sum(0)


def _centred(name):
    """The property ``name`` of Moments, which turns sums into moments when it is read."""

    def get(self):
        self._centre()
        return getattr(self, f"_{name}")

    return property(get, lambda self, value: setattr(self, f"_{name}", value))


class Moments:
    """Count, means and centred second moments of rows x (and y), accumulated in float64.

    Rows are shifted by the mean of the first batch before products are formed, so a large common offset, as the
    massive activations of diffusion transformers have, costs no digits. float16 and bfloat16 rows that a kernel takes
    (:func:`pydit.ops.second_moments`) are not shifted: with a mean of r standard deviations the error of a variance is
    1.8e-5 (1 + r^2) relative at most.

    Parameters
    ----------
    dim_x : int
        Channels d of x.
    dim_y : int, optional
        Channels e of y; None accumulates x alone.
    device : optional
        Where the state lives. Batches are moved there.

    Attributes
    ----------
    count : int, rows seen
    mean_x, mean_y : float64 [d], [e]
    m_xx, m_xy : float64 [d, d], [d, e], centred sums sum (x - mean_x)(y - mean_y)^T, not divided by anything
    s_yy : float64 [e], centred sum of squares of every channel of y
    rounded : int, how many of the rows a kernel summed in float32
    """

    _COUNTS = ("count", "rounded")
    _FIELDS = ("mean_x", "mean_y", "m_xx", "m_xy", "s_yy", "shift_x", "shift_y")
    mean_x, mean_y, m_xx, m_xy, s_yy = (_centred(name) for name in ("mean_x", "mean_y", "m_xx", "m_xy", "s_yy"))

    @torch.inference_mode(False)  # the state stays fit to be added to outside
    def __init__(self, dim_x: int, dim_y: int | None = None, *, device: torch.device | str | None = None) -> None:
        self.dim_x = integer("dim_x", dim_x)
        self.dim_y = None if dim_y is None else integer("dim_y", dim_y)
        device = checks.device("device", device)
        d, e = self.dim_x, self.dim_y or 0
        self.count = self.rounded = 0
        self._sums = False  # whether the tensors hold sums: mean_x that of x, m_xx that of x x^T, and so on
        self.mean_x, self.mean_y, self.m_xx, self.m_xy, self.s_yy, self.shift_x, self.shift_y = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((d,), (e,), (d, d), (d, e), (e,), (d,), (e,)))

    @torch.inference_mode(False)  # the state stays fit to be added to outside
    def update(self, x: torch.Tensor, y: torch.Tensor | None = None) -> Moments:
        """Add rows x [n, d] and y [n, e], any float dtype; n may be 0. Returns self.

        Raises
        ------
        UserError
            Wrong shape or dtype, a y that is missing or unexpected, or values that are not finite. For rows that a
            kernel takes the last is found when the state is read, as a look at every batch would wait for the GPU;
            the state is lost then.
        """
        self._check("x", x, self.dim_x)
        if (y is None) != (self.dim_y is None):
            raise UserError(f"y: expected {'no y' if self.dim_y is None else f'[n, {self.dim_y}]'}, "
                            f"got {'none' if y is None else list(y.shape)}")
        if y is None:
            y = x.new_zeros(len(x), 0)
        else:
            self._check("y", y, self.dim_y)
        if len(x) != len(y):
            raise UserError(f"y: expected as many rows as x ({len(x)}), got {len(y)}")
        if len(x) == 0:
            return self
        x, y = x.detach().to(self._m_xx.device), y.detach().to(self._m_xx.device)
        if x.dtype == y.dtype and x.dtype in KERNEL_DTYPES and backend.choose("second_moments", x).kernels is not None:
            return self._add(x, y)
        self._centre()
        if self.count == 0:
            self.shift_x, self.shift_y = x.double().mean(0), y.double().mean(0)
        n, sum_x, sum_y, xx, xy, yy = _second_moments(x, y, self.shift_x, self.shift_y)
        if not bool(torch.isfinite(sum_x.sum() + sum_y.sum() + xx.diagonal().sum() + yy.sum())):
            raise UserError("x, y: expected finite values, got NaN or infinity")
        self._merge(n, self.shift_x + sum_x / n, self.shift_y + sum_y / n, xx - torch.outer(sum_x, sum_x) / n,
                    xy - torch.outer(sum_x, sum_y) / n, yy - sum_y.square() / n)
        return self

    @torch.inference_mode(False)  # the state stays fit to be added to outside
    def merge(self, other: Moments) -> Moments:
        """Add the rows that ``other`` has seen; ``other`` is unchanged. Returns self."""
        if not isinstance(other, Moments):
            raise UserError(f"other: expected Moments, got {type(other).__name__}")
        if (self.dim_x, self.dim_y) != (other.dim_x, other.dim_y):
            raise UserError(f"other: expected dimensions {(self.dim_x, self.dim_y)}, got {(other.dim_x, other.dim_y)}")
        if other.count:
            if self.count == 0:
                self.shift_x, self.shift_y = other.shift_x.to(self.shift_x), other.shift_y.to(self.shift_y)
            self._merge(other.count, *(getattr(other, name).to(self.m_xx)
                                       for name in ("mean_x", "mean_y", "m_xx", "m_xy", "s_yy")))
            self.rounded += other.rounded
        return self

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> Moments:
        """Replace the state on every rank by that of all ranks' rows together. Call once. Returns self."""
        count = torch.tensor([self.count, self.rounded], dtype=torch.float64, device=self.m_xx.device)
        sum_x, sum_y = self.mean_x * self.count, self.mean_y * self.count
        for tensor in (count, sum_x, sum_y):
            dist.all_reduce(tensor, group=group)
        total, rounded = map(int, count.tolist())
        if total == 0:
            return self
        # Move every rank's moments to the common mean; they then add up.
        mean_x, mean_y = sum_x / total, sum_y / total
        dx, dy = self.mean_x - mean_x, self.mean_y - mean_y
        self.m_xx = self.m_xx + self.count * torch.outer(dx, dx)
        self.m_xy = self.m_xy + self.count * torch.outer(dx, dy)
        self.s_yy = self.s_yy + self.count * dy.square()
        for tensor in (self.m_xx, self.m_xy, self.s_yy):
            dist.all_reduce(tensor, group=group)
        if self.count == 0:
            self.shift_x, self.shift_y = mean_x.clone(), mean_y.clone()
        self.count, self.rounded, self.mean_x, self.mean_y = total, rounded, mean_x, mean_y
        return self

    def rounding(self) -> torch.Tensor:
        """What float32 sums of a kernel ask of a ridge, float64 [d]: added to its diagonal it makes m_xx positive.

        0 with more rows than channels, where the rows themselves make it positive and such a ridge would take more
        from channels with large means than rounding does; and where all rows were summed in float64. Else the elements
        of m_xx are off by e sqrt(a_i a_j), with a the sums of squares and e some 1e-7, much of it at random, so that
        eigenvalues of m_xx / sqrt(a_i a_j) move by 2 e sqrt(d); this is about five times as much.
        """
        if self.count > self.dim_x:
            return torch.zeros_like(self.mean_x)
        squares = self.m_xx.diagonal() + self.count * self.mean_x.square()
        return squares * (self.rounded / max(self.count, 1) * self.dim_x ** 0.5 * 2.0 ** -20)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name -> tensor, for saving; continue with :meth:`load_state_dict`."""
        return {**{name: torch.tensor(getattr(self, name)) for name in self._COUNTS},
                **{name: getattr(self, name).clone() for name in self._FIELDS}}

    @torch.inference_mode(False)  # the state stays fit to be added to outside
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state saved by :meth:`state_dict`. UserError when it is of another kind."""
        state = checks.state(state)
        names = (*self._COUNTS, *self._FIELDS)
        missing = {*names} ^ set(state)
        if missing:
            raise UserError(f"state: expected {', '.join(names)}; {', '.join(sorted(missing))} is missing or unknown")
        for name in self._FIELDS:
            if state[name].shape != getattr(self, name).shape:
                raise UserError(f"state: expected {name} {list(getattr(self, name).shape)}, "
                                f"got {list(state[name].shape)}")
            if state[name].dtype != torch.float64 or not bool((state[name].abs() <= _LARGEST).all()):
                raise UserError(f"state: expected {name} in float64 and finite, got {state[name].dtype}")
        squares, most = state["m_xx"].diagonal(), 2**53 - 1
        for name in self._COUNTS:
            rows = state[name]
            if rows.dtype != torch.int64 or rows.numel() != 1 or not 0 <= int(rows) <= most:
                raise UserError(f"state: expected {name} to be a number of rows up to {most}, "
                                f"got {rows.dtype} {rows.flatten()[:2].tolist()}")
            most = int(rows)
        if bool((squares < 0).any() or (state["s_yy"] < 0).any()) or bool(
                state["m_xx"].abs().amax() > (1 + 1e-9) * squares.amax()):
            raise UserError("state: expected m_xx and s_yy to be sums of squares, got some below 0, or products above "
                            "their squares")
        self.count, self.rounded, self._sums = int(state["count"]), int(state["rounded"]), False
        for name in self._FIELDS:
            setattr(self, name, state[name].detach().to(getattr(self, name)).clone())

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> Moments:
        """Let the kernel add rows to the sums."""
        if not self._sums:
            self._shift_centre(1)
        x, y = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, y))
        add_second_moments(x, y if self.dim_y else None, (self._m_xx, self._m_xy, self._mean_x, self._mean_y,
                                                          self._s_yy))
        self.count += len(x)
        self.rounded += len(x)
        return self

    @torch.inference_mode(False)  # the state stays fit to be added to outside
    def _centre(self) -> None:
        if self._sums:
            self._shift_centre(-1)

    def _shift_centre(self, sign: int) -> None:
        """Moments about the mean to plain sums (sign 1), or back (-1), in place."""
        n = max(self.count, 1)
        if sign < 0:
            if not bool(torch.isfinite(self._m_xx.diagonal().sum() + self._s_yy.sum() + self._mean_x.sum()
                                       + self._mean_y.sum())):
                raise UserError("x, y: expected finite values, got NaN or infinity in a batch since the state was last "
                                "read")
            self._mean_x, self._mean_y = self._mean_x / n, self._mean_y / n
        self._m_xx.addr_(self._mean_x, self._mean_x, alpha=sign * n)
        self._m_xy.addr_(self._mean_x, self._mean_y, alpha=sign * n)
        self._s_yy.add_(self._mean_y.square(), alpha=sign * n)
        if sign > 0:
            self._mean_x, self._mean_y = self._mean_x * n, self._mean_y * n
        else:
            self.shift_x, self.shift_y = self._mean_x, self._mean_y
            self._m_xx.copy_(mirror(self._m_xx))
            for squares in (self._m_xx.diagonal(), self._s_yy):  # of a constant channel: rounding, of either sign
                squares.clamp_(min=0)
        self._sums = sign > 0

    def _merge(self, n: int, mean_x: torch.Tensor, mean_y: torch.Tensor, m_xx: torch.Tensor, m_xy: torch.Tensor,
               s_yy: torch.Tensor) -> None:
        total = self.count + n
        dx, dy = mean_x - self.mean_x, mean_y - self.mean_y
        weight = self.count * n / total
        self.m_xx = self.m_xx + m_xx + weight * torch.outer(dx, dx)
        self.m_xy = self.m_xy + m_xy + weight * torch.outer(dx, dy)
        self.s_yy = self.s_yy + s_yy + weight * dy.square()
        self.mean_x = self.mean_x + dx * (n / total)
        self.mean_y = self.mean_y + dy * (n / total)
        self.count = total

    @staticmethod
    def _check(name: str, tensor: torch.Tensor, dim: int) -> None:
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UserError(f"{name}: expected a float tensor, got {got}")
        if tensor.ndim != 2 or tensor.shape[1] != dim:
            raise UserError(f"{name}: expected [n, {dim}], got {list(tensor.shape)}")
