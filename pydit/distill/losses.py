"""Distances between what a student block returned and what the teacher's layers returned.

Notation: s and t are one token's features (C values) of student and teacher. A loss maps student and target
[B, S, C] of any float dtype to one fp32 value per token [B, S]; :func:`token_mean` reduces it. ``LOSSES`` is the
table a configuration chooses from: adding a loss is adding a function to it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pydit.errors import UserError

#: Added to squared norms, so that a zero token has a finite loss and gradient. 1e-12 of a unit norm.
_TINY = 1e-24

TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def direction(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``| s/|s| - t/|t| |^2 = 2 - 2 cos(s, t)``: the angle only; the magnitude is free.

    Source: PPCL (arXiv 2511.16156), Eq. 6-7, L_depth. Written as the squared difference, which keeps its precision
    where the cosine is close to 1.
    """
    student, target = student.float(), target.float()
    student = student * (student.square().sum(-1, keepdim=True) + _TINY).rsqrt()
    target = target * (target.square().sum(-1, keepdim=True) + _TINY).rsqrt()
    return (student - target).square().sum(-1)


def normalized_mse(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``|s - t|^2 / |t|^2``: relative squared error, which fixes direction and magnitude at once.

    Source: the usual relative error; every token weighs the same however large the teacher's activation is.
    """
    student, target = student.float(), target.float()
    return (student - target).square().sum(-1) / (target.square().sum(-1) + _TINY)


def mse(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``|s - t|^2 / C``: plain squared error. Tokens with massive activations dominate it."""
    return (student.float() - target.float()).square().mean(-1)


def masked_mse(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``|m_s s - m_t t|^2 / C``: squared error without massive activations.

    m keeps the entries of a token within two standard deviations of the token's mean, student and target each by their
    own. Source: TinyFusion (arXiv 2412.01199), masked knowledge distillation, which takes mean and deviation over the
    whole sample; by token, padding has no part in them, and a token of massive activations does not hide the others.
    """
    return (_within(student.float()) - _within(target.float())).square().mean(-1)


def _within(x: torch.Tensor) -> torch.Tensor:
    """x [..., C] with entries further than two standard deviations from their token's mean set to 0."""
    with torch.no_grad():
        deviation, mean = torch.std_mean(x, dim=-1, keepdim=True, correction=0)
        keep = (x - mean).abs() <= 2 * deviation
    return x.where(keep, x.new_zeros(()))


def log_norm(student: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``(log|s| - log|t|)^2``: the magnitude term that ``direction`` leaves out.

    A ratio of norms of 1 + x costs x^2 for small x, on the scale of ``direction``, where an angle of x costs x^2.
    """
    squared_student = student.float().square().sum(-1) + _TINY
    squared_target = target.float().square().sum(-1) + _TINY
    return (0.5 * (squared_student.log() - squared_target.log())).square()


LOSSES: dict[str, TokenLoss] = {"direction": direction, "normalized_mse": normalized_mse, "mse": mse,
                                "masked_mse": masked_mse}


def token_mean(loss: TokenLoss, student: torch.Tensor, target: torch.Tensor,
               mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of ``loss`` over the tokens that count -> fp32 scalar.

    Parameters
    ----------
    loss
        A function such as those of :data:`LOSSES`.
    student, target : torch.Tensor, shape [B, S, C]
    mask : torch.Tensor, shape [B, S], bool or 0/1, optional
        True where a token counts. Whatever the others hold, NaN included, reaches neither value nor gradient. With no
        token left the mean is 0.

    Raises
    ------
    UserError
        Shapes differ.
    """
    if student.shape != target.shape:
        raise UserError(f"student: expected the teacher's shape {list(target.shape)}, got {list(student.shape)}")
    if mask is None:
        per_token = loss(student, target)
        return per_token.mean() if per_token.numel() else per_token.sum()
    if mask.shape != student.shape[:2]:
        raise UserError(f"mask: expected shape {list(student.shape[:2])}, got {list(mask.shape)}")
    mask = mask.to(torch.bool)
    # Both tensors are replaced before the loss, not the loss after it: the gradient of 0 * NaN is NaN.
    keep = mask.unsqueeze(-1)
    per_token = loss(student.where(keep, student.new_ones(())), target.where(keep, target.new_ones(())))
    return per_token.where(mask, per_token.new_zeros(())).sum() / mask.sum().clamp(min=1)
