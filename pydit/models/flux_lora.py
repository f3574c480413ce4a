"""FLUX.1's pipelines compare a LoRA's shapes with the transformer's by block number before they hand it over.

For a pruned transformer the numbers are the teacher's: they would widen narrow layers, stop at them, or put norms on
other layers. Where the transformer is a pruned one, these three steps see no block, or blocks by ``source``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from diffusers.loaders import FluxLoraLoaderMixin

from pydit.errors import UserError
from pydit.models.by_source import warn_of_dropped
from pydit.models.pruned import PrunedModel

_LISTS = ("transformer_blocks", "single_transformer_blocks")


def install() -> None:
    """Once for the process; stock transformers go the stock way."""
    if getattr(FluxLoraLoaderMixin, "_pydit_follows_source", False):
        return
    for name, wrap in (("_maybe_expand_transformer_param_shape_or_error_", _expand_modules),
                       ("_maybe_expand_lora_state_dict", _expand_state), ("_load_norm_into_transformer", _load_norms)):
        stock = getattr(FluxLoraLoaderMixin, name).__func__
        setattr(FluxLoraLoaderMixin, name, classmethod(functools.wraps(stock)(wrap(stock))))
    FluxLoraLoaderMixin._pydit_follows_source = True


def require_config(transformer: Any) -> None:
    """UserError for a FLUX.1 transformer that a Control LoRA has widened: its configuration says so only as long as it
    is loaded, and nothing made from it would fit."""
    embedder = getattr(transformer, "x_embedder", None)
    expected, found = dict(transformer.config).get("in_channels"), getattr(embedder, "in_features", None)
    if found is not None and expected is not None and found != expected:
        raise UserError(f"transformer: expected an x_embedder of the {expected} channels of its configuration, got "
                        f"{found}, as a Control LoRA leaves it; unload_lora_weights(reset_to_overwritten_params=True)")


def _by_source(transformer: Any) -> bool:
    return isinstance(transformer, PrunedModel) and transformer.lora_layers != "student"


def _split(state: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(of blocks, of anything else)."""
    blocks = {key: value for key, value in (state or {}).items() if set(key.split(".")) & set(_LISTS)}
    return blocks, {key: value for key, value in (state or {}).items() if key not in blocks}


def _expand_modules(stock: Any) -> Any:
    def expand(cls, transformer, lora_state_dict=None, norm_state_dict=None, prefix=None):
        if _by_source(transformer):
            lora_state_dict, norm_state_dict = _split(lora_state_dict)[1], _split(norm_state_dict)[1]
        return stock(cls, transformer, lora_state_dict, norm_state_dict, prefix)
    return expand


def _expand_state(stock: Any) -> Any:
    def expand(cls, transformer, lora_state_dict):
        if not _by_source(transformer):
            return stock(cls, transformer=transformer, lora_state_dict=lora_state_dict)
        blocks, others = _split(lora_state_dict)
        return blocks | stock(cls, transformer=transformer, lora_state_dict=others)
    return expand


def _load_norms(stock: Any) -> Any:
    def load(cls, state_dict, transformer, prefix=None, discard_original_layers=False):
        if _by_source(transformer):
            state_dict, dropped = transformer.follow_source(state_dict)
            warn_of_dropped(dropped)
        return stock(cls, state_dict, transformer, prefix, discard_original_layers)
    return load
