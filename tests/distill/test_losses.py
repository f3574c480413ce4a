"""Losses against the formulas in float64, masks, and degenerate tokens."""

import math

import pytest
import torch

from pydit import UserError
from pydit.distill.losses import LOSSES, direction, log_norm, masked_mse, mse, normalized_mse, token_mean


def loop_reference(name, student, target):
    """The formula of one token, written out in Python floats."""
    s, t = student.double().tolist(), target.double().tolist()
    norm_s, norm_t = math.sqrt(sum(x * x for x in s)), math.sqrt(sum(x * x for x in t))
    if name == "direction":
        return 2 - 2 * sum(x * y for x, y in zip(s, t, strict=True)) / (norm_s * norm_t)
    squared = sum((x - y) ** 2 for x, y in zip(s, t, strict=True))
    return {"normalized_mse": squared / norm_t**2, "mse": squared / len(s),
            "log_norm": (math.log(norm_s) - math.log(norm_t)) ** 2}[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", [direction, normalized_mse, mse, log_norm])
def test_a_loss_equals_its_formula_in_float64(loss, dtype):
    generator = torch.Generator().manual_seed(1)
    student = (3 * torch.randn(2, 4, 7, generator=generator)).to(dtype)
    target = torch.randn(2, 4, 7, generator=generator).to(dtype)
    result = loss(student, target)
    assert result.dtype == torch.float32
    expected = torch.tensor([[loop_reference(loss.__name__, student[b, s], target[b, s]) for s in range(4)]
                             for b in range(2)], dtype=torch.float64)
    torch.testing.assert_close(result.double(), expected, rtol=2e-6, atol=1e-7)


def test_masked_mse_leaves_massive_activations_out():
    """By hand in Python floats; one massive channel would otherwise be all of the loss."""
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.randn(2, 5, 40, generator=generator) for _ in range(2))
    student[:, 2, 7], target[:, 2, 7] = 3000.0, 2000.0

    def kept(token):
        values = token.double().tolist()
        mean = sum(values) / len(values)
        sigma = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        return [v if abs(v - mean) <= 2 * sigma else 0.0 for v in values]

    expected = [[sum((a - b) ** 2 for a, b in zip(kept(student[i, j]), kept(target[i, j]), strict=True)) / 40
                 for j in range(5)] for i in range(2)]
    torch.testing.assert_close(masked_mse(student, target).double(), torch.tensor(expected, dtype=torch.float64),
                               rtol=1e-5, atol=1e-7)
    assert mse(student, target)[0, 2] > 1000 * masked_mse(student, target)[0, 2]
    student.requires_grad_(True)
    masked_mse(student, target).sum().backward()
    assert student.grad[0, 2, 7] == 0 and (student.grad[0, 1] != 0).sum() > 30


def test_direction_is_exact_where_the_angle_is_small():
    target = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    across = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    across -= target * (across * target).sum() / target.square().sum()
    angle = 1e-4
    student = 5 * (target * math.cos(angle) + across * math.sin(angle) * target.norm() / across.norm())
    value = direction(student.float(), target.float()).item()
    assert value == pytest.approx(2 - 2 * math.cos(angle), rel=1e-2)  # 2 - 2 cos in float32 would be off by 1e-7


def test_direction_ignores_magnitude_and_log_norm_ignores_direction():
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    assert direction(4 * x, x).max().item() < 1e-12
    assert log_norm(x.flip(-1), x).max().item() < 1e-12
    assert log_norm(math.e * x, x).mean().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("loss", [*LOSSES.values(), log_norm])
def test_a_zero_token_has_a_finite_loss_and_gradient(loss):
    student = torch.zeros(1, 2, 4, requires_grad=True)
    target = torch.tensor([[[0.0, 0, 0, 0], [1, 0, 0, 0]]])
    value = token_mean(loss, student, target)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", [*LOSSES.values(), log_norm])
def test_masked_tokens_reach_neither_value_nor_gradient(loss):
    generator = torch.Generator().manual_seed(3)
    student, target = torch.randn(2, 4, 6, generator=generator), torch.randn(2, 4, 6, generator=generator)
    mask = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0]])
    expected = loss(student, target)[mask.bool()].mean()
    student[~mask.bool()], target[~mask.bool()] = float("nan"), float("inf")
    student.requires_grad_(True)
    value = token_mean(loss, student, target, mask)
    value.backward()
    torch.testing.assert_close(value, expected)
    assert torch.isfinite(student.grad).all()
    assert (student.grad[~mask.bool()] == 0).all() and (student.grad[mask.bool()] != 0).any()


def test_no_token_at_all_gives_zero():
    x = torch.ones(2, 3, 4)
    assert token_mean(direction, x, -x, torch.zeros(2, 3)).item() == 0
    assert token_mean(direction, x[:, :0], x[:, :0]).item() == 0


def test_wrong_shapes_are_named():
    x = torch.ones(2, 3, 4)
    with pytest.raises(UserError, match=r"student: expected the teacher's shape \[2, 3, 4\], got \[2, 2, 4\]"):
        token_mean(direction, x[:, :2], x)
    with pytest.raises(UserError, match=r"mask: expected shape \[2, 3\], got \[2, 4\]"):
        token_mean(direction, x, x, torch.ones(2, 4))
