"""What the rest of the package needs to know about a model family: its blocks, how one is called, what flows between.

A transformer has blocks 0..L-1 and boundaries 0..L: boundary k is the input of block k, boundary L the output of the
last block. At each boundary two streams flow, image ``[B, S_img, C]`` and text ``[B, S_txt, C]``.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from pydit.errors import UserError
from pydit.plan import FAMILIES, family_of

STREAMS = ("image", "text")
_ADAPTERS = {"qwen-image": ("pydit.models.qwen_image", "QwenImageAdapter")}


@dataclass(frozen=True)
class BlockIO:
    """How a block is called and what it returns.

    inputs : names of the block's arguments in positional order (gradient checkpointing passes them so).
    image, text : the two of them that carry the streams.
    text_first : the block returns (text, image) rather than (image, text).
    """

    inputs: tuple[str, ...]
    image: str
    text: str
    text_first: bool


class Capture(NamedTuple):
    """What :meth:`ModelAdapter.capture` saw.

    states : boundary -> (image [B, S_img, C], text [B, S_txt, C])
    kwargs : every other argument of a block, the same for all blocks
    """

    states: dict[int, tuple[torch.Tensor, torch.Tensor]]
    kwargs: dict[str, Any]


class _Stop(Exception):
    """Ends a forward once everything asked for has been seen."""


class ModelAdapter(ABC):
    """The block contract of one family. Stateless; get one from :func:`get_adapter`."""

    family: str
    block_io: BlockIO
    last_text_used: bool  # whether the model reads the text output of its last block
    modulation: tuple[str, ...]  # children of a block that turn the time embedding into shifts, scales and gates

    @property
    def block_list(self) -> str:
        """Name of the model's list of blocks."""
        return FAMILIES[self.family].block_list

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The blocks that a forward runs, in depth order."""
        return list(getattr(transformer, self.block_list))

    def num_layers(self, transformer: nn.Module) -> int:
        """How many blocks a forward runs."""
        return len(self.blocks(transformer))

    @abstractmethod
    def width(self, transformer: nn.Module) -> int:
        """Channels C of both streams."""

    @abstractmethod
    def text_mask(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """From the arguments of a block or of the model: which text tokens are real, bool [B, S_txt]; None: all."""

    @abstractmethod
    def last_linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """Per stream, the last linear layer of a block: the one whose output, gated, is added to the stream."""

    def hidden_matrices(self, transformer: nn.Module) -> dict[str, nn.Parameter]:
        """By name, the weight matrices of all blocks that map tokens to tokens: attention and MLP, no modulation."""
        found = {}
        for name, parameter in transformer.named_parameters():
            parts = name.split(".")
            if parts[0] == self.block_list and parameter.ndim == 2 and not set(parts) & set(self.modulation):
                found[name] = parameter
        return found

    @abstractmethod
    def pruned_class(self) -> type[nn.Module]:
        """The class of a pruned model of this family."""

    def call_block(self, block: nn.Module, image: torch.Tensor, text: torch.Tensor,
                   kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one block on image [B, S_img, C] and text [B, S_txt, C]; returns (image, text)."""
        return self._streams(block(**{self.block_io.image: image, self.block_io.text: text}, **kwargs))

    def capture(self, transformer: nn.Module, batch: Mapping[str, Any], boundaries: Iterable[int]) -> Capture:
        """Run ``transformer`` on a batch under no_grad and return its streams at the requested boundaries.

        Parameters
        ----------
        transformer : the model; its weights, mode and hooks are left as they are.
        batch : keyword arguments of ``transformer.forward``.
        boundaries : numbers in 0..L. The forward ends after the last of them.

        Returns
        -------
        Capture
            The streams as the model computes them (no copy), and the arguments needed to run any block.

        Raises
        ------
        UserError
            A boundary outside 0..L, none at all, or a batch that is not a mapping.
        """
        blocks = self.blocks(transformer)
        wanted = sorted({int(k) for k in boundaries})
        if not wanted or wanted[0] < 0 or wanted[-1] > len(blocks):
            raise UserError(f"boundaries: expected numbers in 0..{len(blocks)}, got {wanted}")
        if not isinstance(batch, Mapping):
            raise UserError(f"batch: expected a dict of forward arguments, got {type(batch).__name__}")
        states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        kwargs: dict[str, Any] = {}

        def enter(k: int, args: tuple, given: dict[str, Any]) -> None:
            named = {**dict(zip(self.block_io.inputs, args, strict=False)), **given}
            states[k] = named.pop(self.block_io.image), named.pop(self.block_io.text)
            if not kwargs:
                kwargs.update(named)
            if k == wanted[-1]:
                raise _Stop

        def leave(outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            states[len(blocks)] = self._streams(outputs)
            raise _Stop

        handles = []
        try:
            # Boundary L is seen on leaving the last block, but the arguments only on entering one.
            entered = [k for k in wanted if k < len(blocks)] or [len(blocks) - 1]
            for k in entered:
                handles.append(blocks[k].register_forward_pre_hook(
                    lambda module, args, given, k=k: enter(k, args, given), with_kwargs=True))
            if wanted[-1] == len(blocks):
                handles.append(blocks[-1].register_forward_hook(lambda module, args, outputs: leave(outputs)))
            with torch.no_grad():
                transformer(**batch)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return Capture({k: states[k] for k in wanted}, kwargs)

    def _streams(self, outputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = outputs
        return (second, first) if self.block_io.text_first else (first, second)


def get_adapter(transformer_or_family: nn.Module | str) -> ModelAdapter:
    """The adapter of a model (by its class, subclasses included) or of a family name.

    Raises
    ------
    UserError
        Unknown family or class, or diffusers is not installed.
    """
    if isinstance(transformer_or_family, str):
        family = transformer_or_family
        if family not in _ADAPTERS:
            raise UserError(f"family: expected one of {', '.join(_ADAPTERS)}, got {family!r}")
    else:
        family = family_of(transformer_or_family).name
    module, name = _ADAPTERS[family]
    try:
        return getattr(importlib.import_module(module), name)()
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "diffusers":
            raise UserError(f"{family}: this needs diffusers, which is not installed (pip install diffusers)") from None
        raise
