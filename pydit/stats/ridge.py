"""Ridge regression behind a gate: the linear layer whose gated output comes closest to a target."""

from __future__ import annotations

import torch


def gated_ridge(inputs: torch.Tensor, gate: torch.Tensor, target: torch.Tensor, weight: torch.Tensor,
                bias: torch.Tensor, *, ridge: float, iterations: int = 300,
                tolerance: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise sum (gate * (inputs W^T + b) - target)^2 + lambda |W - weight|^2 + lambda |b - bias|^2.

    Every output channel c is a problem of its own with normal matrix sum_i gate_ic^2 a_i a_i^T; they are too many to
    form, so all channels run conjugate gradients side by side, from the given weights. The error never rises above
    that of the given weights, also when stopped early.

    Parameters
    ----------
    inputs : [n, F], gate and target : [n, C], weight : [C, F], bias : [C]; any float dtype.
    ridge : lambda is ``ridge`` times the mean diagonal of the channel's normal matrix.
    iterations, tolerance : stop after so many steps or when every residual has shrunk by ``tolerance``.

    Returns
    -------
    (weight [C, F], bias [C]), float64.
    """
    inputs, gate, target = inputs.detach().double(), gate.detach().double(), target.detach().double()
    rows = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
    start = torch.cat([weight.detach().double().T, bias.detach().double()[None]], 0)  # [F + 1, C]
    square = gate.square()
    shrink = ridge * (rows.square().sum(1) @ square) / rows.shape[1]

    residual = rows.T @ (gate * (target - gate * (rows @ start)))
    first = norm = residual.square().sum(0)
    step, direction = torch.zeros_like(start), residual.clone()
    for _ in range(iterations):
        if not bool((norm > tolerance**2 * first).any()):
            break
        product = rows.T @ (square * (rows @ direction)) + shrink * direction
        curvature = (direction * product).sum(0)
        length = torch.where(curvature > 0, norm / torch.where(curvature > 0, curvature, 1.0), 0.0)
        step = step + length * direction
        residual = residual - length * product
        before, norm = norm, residual.square().sum(0)
        direction = residual + torch.where(before > 0, norm / torch.where(before > 0, before, 1.0), 0.0) * direction
    solution = start + step
    return solution[:-1].T, solution[-1]
