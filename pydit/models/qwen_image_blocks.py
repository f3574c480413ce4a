"""Qwen-Image's part in :mod:`pydit.models.thinned`: where its blocks keep what, and how they are called."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock, apply_rotary_emb_qwen
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from pydit.models import context_parallel
from pydit.models.attention import known_to_layer_skip
from pydit.models.dual_stream import Branch, DualStreamBlock, Modulation, Stock, rows_of
from pydit.models.thinned import ThinnedAttnProcessor, ThinnedBlock


class PrunedQwenImageAttnProcessor(ThinnedAttnProcessor):
    """As ``QwenDoubleStreamAttnProcessor2_0`` for thinned-out blocks."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None,
                 attention_mask=None, image_rotary_emb=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C] -> (image [B, S_img, C], text or None)."""
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, because Qwen-Image masks text by "
                             f"encoder_hidden_states_mask, got a mask of shape {list(attention_mask.shape)}")

        def rotation(table):
            return lambda x: x if table is None else apply_rotary_emb_qwen(x, table, use_real=False)

        tables = image_rotary_emb or (None, None)
        return self.attend(attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask,
                           rotation(tables[0]), rotation(tables[1]))


known_to_layer_skip(PrunedQwenImageAttnProcessor)


class QwenImageForward(DualStreamBlock):
    """Mixin of Qwen-Image's block, with one modulation row per image or two (``zero_cond_t``)."""

    image_branch = Branch("img_mod.1", ("img_mod", "img_norm1"), "img_norm1", "img_norm2", "img_mlp")
    text_branch = Branch("txt_mod.1", ("txt_mod", "txt_norm1"), "txt_norm1", "txt_norm2", "txt_mlp")

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
                joint_attention_kwargs=None, modulate_index=None):
        """As the stock block's; the text may be two tensors along the tokens, see :mod:`pydit.models.dual_stream`.

        Fused operations take two modulation rows where the target images of the batch have one size; where they differ
        (``modulate_index``), stock ones run.
        """
        do, image_mod, text_mod = self._operations_on(hidden_states), self.img_mod(temb), None
        if self.zero_cond_t:
            temb = temb.chunk(2, dim=0)[0]
        if self.spec.form == "single":
            # Two rows an image (zero_cond_t): the first half is the denoised one's.
            text_mod = Modulation(rows_of(image_mod[:len(temb)], self.dim))
        elif self.spec.text != "linear":
            text_mod = Modulation(rows_of(self.txt_mod(temb), self.dim))
        split = None if do is Stock or modulate_index is None else target_tokens(self, modulate_index)
        if modulate_index is None:
            rows = rows_of(image_mod, self.dim)
        elif split is None:
            do, first = Stock, modulate_index[..., None] == 0
            rows = tuple(torch.where(first, *row.chunk(2)) for row in rows_of(image_mod, self.dim))
        else:
            rows = image_mod.unflatten(0, (2, -1)).transpose(0, 1).split(self.dim, dim=-1)
        options = {"encoder_hidden_states_mask": encoder_hidden_states_mask, "image_rotary_emb": image_rotary_emb,
                   **(joint_attention_kwargs or {})}
        return self._run(hidden_states, encoder_hidden_states, Modulation(rows, split), text_mod, options, do)


class PrunedQwenImageTransformerBlock(ThinnedBlock, QwenImageForward, QwenImageTransformerBlock):
    """What a plan left of a Qwen-Image block."""

    processor_class = PrunedQwenImageAttnProcessor


class TargetTokens:
    """A forward pre-hook of a model with two modulation rows: how many tokens the target image has.

    ``tokens`` is the same number for every sample of the batch at hand, or None where it is not, or is not known.
    Blocks find it under ``_pydit_target``; reading it from ``modulate_index`` would wait for the device. The model
    makes one such tensor per forward, and the first block that sees a new one takes the number of its thread's forward
    for it: a block that runs in another model, or again for a gradient, finds that of its own forward, or none.
    """

    def __init__(self) -> None:
        self.tokens: int | None = None
        self._of_thread: dict[int, int | None] = {}
        self._of_index = WeakTensorKeyDictionary()

    def of(self, index: torch.Tensor) -> int | None:
        """The number for a forward's ``modulate_index``."""
        if index not in self._of_index:
            self._of_index[index] = self._of_thread.get(threading.get_ident())
        return self._of_index[index]

    def forget(self, *_args: Any) -> None:
        """A forward hook of the model: what runs its blocks from now on is another forward."""
        if not torch.compiler.is_compiling():
            self._of_thread.pop(threading.get_ident(), None)

    def __reduce__(self) -> tuple:
        return TargetTokens, ()  # a copy has seen no forward

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Context parallelism gives this process a part of the tokens, wherever the target image ends.
        local = context_parallel.config_of(getattr(module, "_parallel_config", None)) is not None
        shapes = () if local else kwargs.get("img_shapes") or ()
        found = {math.prod(sample[0]) for sample in shapes}
        self.tokens = found.pop() if len(found) == 1 else None
        if not torch.compiler.is_compiling():
            self._of_thread[threading.get_ident()] = self.tokens


def target_tokens(block: nn.Module, index: torch.Tensor) -> int | None:
    """Tokens of the target image, where a block has two modulation rows and the number is known."""
    target = block.__dict__.get("_pydit_target")
    if target is None or torch.compiler.is_compiling():  # a graph is keyed on the number
        return None if target is None else target.tokens
    return target.of(index)
