"""What the statistics ask of an argument; each raises UserError with its name, what was expected and what came."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pydit.arguments import shown
from pydit.errors import UserError


def number(name: str, value: Any, what: str, fits: Callable[[float], bool]) -> float:
    """A finite number, no bool, that ``fits``; ``what`` says in a message what it should be."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not (abs(value) <= 1e300 and fits(value)):
        raise UserError(f"{name}: expected {what}, got {shown(value)}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise UserError(f"{name}: expected True or False, got {shown(value)}")
    return value


def tensor(name: str, value: Any) -> torch.Tensor:
    """A tensor of any kind."""
    if not isinstance(value, torch.Tensor):
        raise UserError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def device(name: str, value: Any) -> torch.device | None:
    """A device by itself or by name; None stays None."""
    if value is None or isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError):
        raise UserError(f"{name}: expected a device such as cpu or cuda:0, got {shown(value)}") from None


def state(value: Any) -> Mapping[str, torch.Tensor]:
    """What a ``state_dict()`` gave: tensors by name."""
    if not isinstance(value, Mapping):
        raise UserError(f"state: expected tensors by name, got {type(value).__name__}")
    for name, one in value.items():
        if not isinstance(name, str):
            raise UserError(f"state: expected tensors by name, got a name that is {shown(name)}")
        tensor(f"state: {name}", one)
    return value
