"""Forwards of a transformer with other blocks than its own; weights are shared, nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pydit.errors import UserError
from pydit.models import ModelAdapter
from pydit.models.adapter import require_batch
from pydit.plan import PruningPlan


def shell_of(adapter: ModelAdapter, transformer: nn.Module) -> nn.Module:
    """A model of its own that shares every module of ``transformer``, so that its list of blocks can be changed."""
    if isinstance(transformer, adapter.pruned_class()):
        raise UserError("transformer: expected an unpruned model, got a pruned one; use its to_stock()")
    layers = adapter.blocks(transformer)
    others = {name: child for name, child in transformer.named_children() if name not in adapter.block_lists}
    return adapter.pruned_class().from_teacher(transformer, PruningPlan(adapter.family, len(layers)), layers, others)


def velocity(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The model's output on a batch, float64, without gradients."""
    if not isinstance(model, nn.Module):
        raise UserError(f"transformer: expected a diffusers transformer, got {type(model).__name__}")
    require_batch(batch)
    with torch.no_grad():
        return model(**{**batch, "return_dict": False})[0].double()


class GivenStates(nn.Module):
    """Takes the place of the blocks up to a boundary whose streams (image, text) are known."""

    def __init__(self, adapter: ModelAdapter, states: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        self.states = states[::-1] if adapter.block_io.text_first else states

    def forward(self, *_args: Any, **_kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.states
