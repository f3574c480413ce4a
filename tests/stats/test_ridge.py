"""Gated ridge regression against one dense float64 solve per channel."""

import pytest
import torch

from pydit.errors import UserError
from pydit.stats.ridge import gated_ridge


def problem(n=300, features=20, channels=5):
    generator = torch.Generator().manual_seed(0)
    inputs, gate, target, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((n, features), (n, channels), (n, channels), (channels, features), (channels,)))
    return inputs, gate, target, weight, bias


def dense(inputs, gate, target, weight, bias, ridge):
    rows = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    columns = []
    for c in range(gate.shape[1]):
        gated = gate[:, c, None] * rows
        normal = gated.T @ gated
        start = torch.cat([weight[c], bias[c, None]])
        shrink = ridge * normal.trace() / len(normal)
        right = gated.T @ (target[:, c] - gated @ start)
        columns.append(start + torch.linalg.solve(normal + shrink * torch.eye(len(normal), dtype=torch.float64), right))
    solution = torch.stack(columns)
    return solution[:, :-1], solution[:, -1]


@pytest.mark.parametrize("n", [300, 8])  # determined, and fewer rows than features
@pytest.mark.parametrize("ridge", [1e-4, 0.1])
def test_equals_dense_solve(n, ridge):
    arguments = problem(n)
    got, expected = gated_ridge(*arguments, ridge=ridge, iterations=1000, tolerance=1e-12), dense(*arguments, ridge)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_few_steps_suffice_when_the_gate_varies_little():
    inputs, gate, target, weight, bias = problem()
    arguments = (inputs * torch.logspace(0, -2, 20), 1 + 0.2 * gate.tanh(), target, weight, bias)
    got, expected = gated_ridge(*arguments, ridge=1e-4, iterations=12), dense(*arguments, 1e-4)
    assert torch.allclose(got[0], expected[0], atol=1e-3)


def test_closed_gate_keeps_the_weights():
    inputs, gate, target, weight, bias = problem()
    gate[:, 2] = 0
    got = gated_ridge(inputs, gate, target, weight, bias, ridge=1e-4)
    assert torch.equal(got[0][2], weight[2]) and torch.equal(got[1][2], bias[2])
    assert not torch.equal(got[0][1], weight[1])


def test_ridge_must_be_positive():
    with pytest.raises(UserError, match="ridge: expected a number > 0, got 0"):
        gated_ridge(*problem(), ridge=0)
