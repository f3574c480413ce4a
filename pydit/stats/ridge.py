"""Ridge regression behind a gate: the linear layer whose gated output comes closest to a target."""

from __future__ import annotations

import torch

from pydit.stats import checks


def gated_ridge(inputs: torch.Tensor, gate: torch.Tensor, target: torch.Tensor, weight: torch.Tensor,
                bias: torch.Tensor, *, ridge: float, iterations: int = 100,
                tolerance: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise sum (gate * (inputs W^T + b) - target)^2 + lambda |W - weight|^2 + lambda |b - bias|^2.

    Every output channel c is a problem of its own with normal matrix sum_i gate_ic^2 a_i a_i^T; they are too many to
    form, so all channels run conjugate gradients side by side, from the given weights. The matrix for a constant gate,
    which all channels share, preconditions them. The objective never rises above that of the given weights, also when
    stopped early.

    Parameters
    ----------
    inputs : [n, F], gate and target : [n, C], weight : [C, F], bias : [C]; any float dtype.
    ridge : lambda is ``ridge`` times the mean diagonal of the channel's normal matrix; > 0.
    iterations, tolerance : stop after so many steps or when every residual has shrunk by ``tolerance``.

    Returns
    -------
    (weight [C, F], bias [C]), float64.

    Raises
    ------
    UserError
        ``ridge`` is not positive.
    """
    ridge = checks.number("ridge", ridge, "a number > 0", lambda x: x > 0)
    inputs, gate, target = inputs.detach().double(), gate.detach().double(), target.detach().double()
    rows = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    start = torch.cat([weight.detach().double().T, bias.detach().double()[None]], 0)  # [F + 1, C]
    square, features = gate.square(), rows.shape[1]
    shrink = ridge * (rows.square().sum(1) @ square) / features
    shared = rows.T @ rows
    shared.diagonal().add_(ridge * float(shared.trace()) / features)
    factor = torch.linalg.cholesky(shared)

    residual = rows.T @ (gate * (target - gate * (rows @ start)))
    first = residual.square().sum(0)
    step, direction = torch.zeros_like(start), torch.cholesky_solve(residual, factor)
    norm = (residual * direction).sum(0)
    for _ in range(iterations):
        if not bool((residual.square().sum(0) > tolerance**2 * first).any()):
            break
        product = rows.T @ (square * (rows @ direction)) + shrink * direction
        length = _ratio(norm, (direction * product).sum(0))
        step = step + length * direction
        residual = residual - length * product
        solved = torch.cholesky_solve(residual, factor)
        before, norm = norm, (residual * solved).sum(0)
        direction = solved + _ratio(norm, before) * direction
    solution = start + step
    return solution[:-1].T, solution[-1]


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """numerator / denominator, 0 where the denominator is not positive (a channel that has converged)."""
    return torch.where(denominator > 0, numerator / torch.where(denominator > 0, denominator, 1.0), 0.0)
