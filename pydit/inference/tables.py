"""What stands in a model whose schedule is baked: modules that look rows up instead of computing them.

:mod:`pydit.inference.schedule` makes them and puts them in their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pydit.errors import UserError

SHARED = ("transformer: expected blocks with their modulation weights, got blocks that it shares with another model, "
          "which pydit.bake_schedule has given tables of its own; pydit.restore that one first")


def refuse(module: nn.Module, *_args: Any, **_options: Any) -> None:
    """A hook before a state dict is made or loaded: UserError, where the modulation weights would be left out."""
    raise UserError("transformer: expected one with its modulation weights, got a baked schedule; pydit.restore it "
                    "before saving or loading weights, or having them offloaded one by one")


class _Table(nn.Module):
    """What stands in for modules with weights: no state dict of a part of the model goes without them either."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_pre_hook(refuse)
        self.register_load_state_dict_pre_hook(refuse)


class BakedTimesteps(_Table):
    """In place of the time embedding: the row of each sample, int64 [B, 1], which flows where the embedding did.

    Rows are ordered by timestep, then guidance, then prompt; one past the last stands for a miss.
    """

    def __init__(self, family: str, keys: torch.Tensor, guidance: torch.Tensor | None, pooled: torch.Tensor | None,
                 conditions: int, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.family, self.conditions, self.autocast = family, conditions, autocast
        self.register_buffer("keys", keys, persistent=False)
        self.register_buffer("guidance", guidance, persistent=False)
        self.register_buffer("pooled", pooled, persistent=False)

    @property
    def count(self) -> int:
        """Rows without that of a miss."""
        return len(self.keys) * self.conditions * (1 if self.guidance is None else len(self.guidance))

    def forward(self, timestep: torch.Tensor, *others: Any) -> torch.Tensor:
        """``others`` as the family's embedding takes them."""
        if (now := autocast_dtype(timestep)) != self.autocast:  # found before a forward, but not by a compiled graph
            raise UserError(f"torch.autocast: expected {self.autocast or 'none'}, under which the schedule was baked, "
                            f"got {now or 'none'}; run it once without torch.compile, or bake it again")
        row, known = find(timestep, self.keys)
        if self.family == "qwen-image":  # hidden states, then the condition of Qwen-Image-Layered
            condition = others[1] if len(others) > 1 else None
            if len(others) > 2 or (condition is None) != (self.conditions == 1):
                raise UserError("transformer: expected the conditions that its schedule was baked for, got others; "
                                "pydit.restore it")
            if condition is not None:
                row, known = self._next(row, known, condition.reshape(-1), 2)
        else:  # guidance if there is any, then the pooled text
            if (len(others) == 2) != (self.guidance is not None):
                raise UserError("guidance: expected as the schedule was baked, "
                                f"{'with' if self.guidance is not None else 'without'} it, got the opposite")
            if self.guidance is not None:
                place, found = find(others[0], self.guidance)
                row, known = row * len(self.guidance) + place, known & found
            same = (others[-1][:, None] == self.pooled.to(others[-1].device)).all(-1)
            row, known = row * len(self.pooled) + same.int().argmax(1), known & same.any(1)
        return torch.where(known, row, self.count)[:, None]

    @staticmethod
    def _next(row: torch.Tensor, known: torch.Tensor, index: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        return row * count + index, known & (index >= 0) & (index < count)


class BakedRows(_Table):
    """In place of a module of the time embedding: its outputs, one row per timestep, and one of NaN for a miss."""

    def __init__(self, rows: list[torch.Tensor]) -> None:
        super().__init__()
        table = torch.cat([*rows, torch.full_like(rows[0], torch.nan)])
        self.dtype = table.dtype
        self.register_buffer("table", table, persistent=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, 1] -> [B, channels]."""
        if rows.is_floating_point():  # an embedding
            raise UserError(SHARED)
        if self.table.dtype != self.dtype:  # found before a forward, but not by a graph that was compiled
            raise UserError(f"transformer: expected {self.dtype}, in which its schedule was baked, got a model cast to "
                            f"{self.table.dtype}; run it once without torch.compile, or bake it again")
        return self.table[rows[:, 0]]


def find(values: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(place in keys, whether it is there at all) of every value, exactly and without waiting for the device."""
    keys = keys.to(values.device)  # of a model that is offloaded, before its forward brings it to the GPU
    same = values.reshape(-1)[:, None] == keys  # in the wider dtype: in a narrower one, two keys may be one
    return same.int().argmax(1), same.any(1)


def as_embedded(family: str, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A timestep as the family's forward hands it to its embedding."""
    if family == "qwen-image":
        return timestep.to(dtype)
    return scaled(timestep, dtype) if family == "flux.1" else timestep.float()


def scaled(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return values.to(dtype) * 1000


def autocast_dtype(values: torch.Tensor) -> torch.dtype | None:
    """What torch.autocast makes of products with ``values``; None where it leaves them as they are."""
    kind = values.device.type
    if kind not in ("cpu", "cuda") or values.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
