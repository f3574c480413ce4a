"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised by a Newton-Schulz iteration."""

from __future__ import annotations

import torch

from pydit.distill import distributed

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # the quintic of the Muon reference, tuned for a steep slope at zero


class Muon(torch.optim.Optimizer):
    """For two-dimensional hidden weights. Parameters of one shape are stepped as one batched matrix product.

    The iteration needs whole matrices: sharded ones are gathered, orthogonalised by every process, and cut again.

    Parameters
    ----------
    params : iterable of [out, in] parameters. lr : step in spectral norm. momentum : of the (Nesterov) average.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                directions = []
                for p in parameters:
                    average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    directions.append(distributed.whole(p.grad.lerp(average, group["momentum"])))
                update = orthogonalize(torch.stack(directions))
                step = -group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, u in zip(parameters, update, strict=True):
                    p.add_(distributed.spread(u, p), alpha=step)


def orthogonalize(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Push the singular values of matrices [N, a, b] towards 1 (to within about 0.7 to 1.2)."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
