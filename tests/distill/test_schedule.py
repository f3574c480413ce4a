"""Budgets, learning rate and the averaging window against independent arithmetic."""

import math
from itertools import pairwise

import pytest
import torch

from pydit.distill.config import DistillConfig
from pydit.distill.optimizer import Optimizer
from pydit.distill.schedule import Budget, ema_decay, ema_exponent, lr_factor


def test_the_larger_fraction_counts():
    budget = Budget(steps=100, seconds=50.0)
    assert budget.fraction(10, 1.0) == pytest.approx(0.105)
    assert budget.fraction(10, 25.0) == pytest.approx((25 + 1.25) / 50)
    assert not budget.spent(99, 49.9) and budget.spent(100, 0.0) and budget.spent(0, 50.0)
    assert Budget(100, None).fraction(99, 1e9) == pytest.approx(0.995)
    assert Budget(None, 10.0).fraction(0, 0.0) == 0
    assert Budget(None, 0.0).spent(0, 0.0)


def test_warm_up_then_cosine():
    def factor(x):
        return lr_factor(x, warmup=0.2, final=0.1)

    assert factor(0.0) == 0.01 and factor(0.1) == pytest.approx(0.5) and factor(0.2) == pytest.approx(1)
    assert factor(0.6) == pytest.approx(0.55) and factor(1.0) == pytest.approx(0.1)
    values = [lr_factor((k + 0.5) / 50, warmup=0.0, final=0.0) for k in range(50)]
    assert all(a > b for a, b in pairwise(values)) and 0 < values[-1] < 1e-3


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25])
def test_the_average_has_the_promised_relative_width(width):
    """Weights of the steps in the average, computed by running it on unit vectors' indices."""
    exponent, steps = ema_exponent(width), 4000
    mean = square = 0.0
    for step in range(1, steps + 1):
        decay = ema_decay(step, exponent)
        mean, square = decay * mean + (1 - decay) * step, decay * square + (1 - decay) * step**2
    assert math.sqrt(square - mean**2) / steps == pytest.approx(width, rel=0.01)


def test_the_first_step_replaces_the_untrained_weights():
    assert ema_decay(1, ema_exponent(0.05)) == 0


def make_optimizer(parameter, **fields):
    return Optimizer({"g": {"w": parameter}}, DistillConfig(**fields))


def test_fp32_steps_are_adamw_and_the_average_follows():
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone().double())
    optimizer = make_optimizer(ours, ema=0.1, clip=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    average = None
    for step in range(1, 8):
        gradient = 3 * torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.double()
        norms = optimizer.gradient_norms()
        assert norms.tolist() == pytest.approx([gradient.norm().item()], rel=1e-6)
        optimizer.step(1e-2, norms)
        theirs.grad /= max(1.0, gradient.double().norm().item())
        reference.step()
        decay = ema_decay(step, ema_exponent(0.1))
        average = theirs.detach().clone() if average is None else decay * average + (1 - decay) * theirs.detach()
    torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=1e-5, atol=1e-6)
    optimizer.finish()
    torch.testing.assert_close(ours.detach().double(), average, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("betas", [(0, 0.95), (0, 0)])
def test_whole_numbers_are_betas(betas):
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = make_optimizer(parameter, betas=betas, weight_decay=0, ema=0, clip=0)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step(0.1, optimizer.gradient_norms())
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), 0.9))


def test_bf16_parameters_learn_from_steps_below_their_resolution():
    parameter = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = make_optimizer(parameter, ema=0, clip=0, weight_decay=0)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-3, optimizer.gradient_norms())  # bf16 spacing just below 1 is 4e-3
    assert parameter.dtype == torch.bfloat16
    assert parameter.detach().float().mean().item() == pytest.approx(0.9, abs=4e-3)


def test_vectors_are_not_decayed():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer({"g": {"m": matrix, "v": vector}}, DistillConfig(weight_decay=0.5, ema=0))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step(0.1, optimizer.gradient_norms())
    assert torch.allclose(matrix, torch.full((2, 2), 0.95)) and torch.equal(vector, torch.ones(2))


def test_muon_steps_the_named_matrices_along_the_polar_factor_of_their_momentum():
    """Against a double-precision momentum; its direction must be near the polar factor U V^T of an SVD."""
    generator = torch.Generator().manual_seed(0)
    tall, wide, other = (torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((8, 4), (4, 8), (4, 4)))
    named = {"tall": tall, "wide": wide, "other": other}
    optimizer = Optimizer({"g": named}, DistillConfig(muon_lr=0.1, ema=0, clip=0, weight_decay=0), ["tall", "wide", "x"])
    momentum = {name: torch.zeros_like(p).double() for name, p in named.items()}
    for _ in range(3):
        before = {name: p.detach().clone().double() for name, p in named.items()}
        for name, p in named.items():
            p.grad = torch.randn(p.shape, generator=generator)
            momentum[name] = 0.95 * momentum[name] + 0.05 * p.grad.double()
        nesterov = {name: 0.05 * p.grad.double() + 0.95 * momentum[name] for name, p in named.items()}
        optimizer.step(1e-3, optimizer.gradient_norms(), factor=0.5)
        for name, scale in (("tall", 2**0.5), ("wide", 1.0)):
            moved = (before[name] - named[name].detach().double()) / (0.5 * 0.1 * scale)
            u, _, v = torch.linalg.svd(nesterov[name], full_matrices=False)
            core = u.mT @ moved @ v.mT  # diagonal, and near the identity
            assert (core - torch.diag_embed(core.diagonal())).abs().max() < 1e-3
            assert ((core.diagonal() - 1).abs() < 0.4).all()
        assert (before["other"] - other.detach()).abs().max() < 1.1e-3  # AdamW
