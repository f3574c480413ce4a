"""Blocks of this package under the names by which diffusers' block caches look blocks up."""

from __future__ import annotations

from torch import nn


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
