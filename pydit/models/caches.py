"""What diffusers' hooks on blocks know of this package's blocks, and the one that does not work on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pydit.errors import UserError


def know_as(form: type[nn.Module], stock: type[nn.Module]) -> None:
    """Let diffusers' block caches know a form of a block as they know the stock one, where they know that."""
    try:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

        known = TransformerBlockRegistry.get(stock)
    except (ImportError, ValueError):  # a diffusers without them, or a block that they do not take
        return
    TransformerBlockRegistry.register(form, TransformerBlockMetadata(
        return_hidden_states_index=known.return_hidden_states_index,
        return_encoder_hidden_states_index=known.return_encoder_hidden_states_index))


def refuse_layer_skip(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: UserError where a block of two streams would be skipped with its streams swapped."""
    if torch.compiler.is_compiling():
        return
    for name in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(model, name, ())):
            registry = block.__dict__.get("_diffusers_hook")
            if registry is not None and any(type(hook).__name__ == "TransformerBlockSkipHook"
                                            for hook in registry.hooks.values()):
                raise UserError(f"apply_layer_skip: expected blocks that return the image first, got {name}.{index}, "
                                "which returns the text first: diffusers would swap the two streams. Leave blocks out "
                                "with pydit.PruningPlan and pydit.prune, or with skip_layers where the model's forward "
                                "has it")
