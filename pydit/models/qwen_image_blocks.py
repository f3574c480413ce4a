"""Qwen-Image's part in :mod:`pydit.models.thinned`: where its blocks keep what, and how they are called."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock, apply_rotary_emb_qwen

from pydit.models.thinned import Branch, Modulation, ThinnedAttnProcessor, ThinnedBlock, rows_of


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


class PrunedQwenImageTransformerBlock(ThinnedBlock, QwenImageTransformerBlock):
    """What a plan left of a Qwen-Image block."""

    image_branch = Branch("img_mod.1", ("img_mod", "img_norm1"), "img_norm1", "img_norm2", "img_mlp")
    text_branch = Branch("txt_mod.1", ("txt_mod", "txt_norm1"), "txt_norm1", "txt_norm2", "txt_mlp")
    processor_class = PrunedQwenImageAttnProcessor

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
                joint_attention_kwargs=None, modulate_index=None):
        """As the stock block's; the text may be two tensors along the tokens, see :mod:`pydit.models.thinned`."""
        image_mod = self.img_mod(temb)
        if self.zero_cond_t:
            temb = temb.chunk(2, dim=0)[0]
        rows, text_mod = rows_of(image_mod, self.dim), None
        if self.spec.form == "single":
            # Two rows an image (zero_cond_t): the first half is the denoised one's.
            text_mod = Modulation(rows_of(image_mod[:len(temb)], self.dim))
        elif self.spec.text != "linear":
            text_mod = Modulation(rows_of(self.txt_mod(temb), self.dim))
        if modulate_index is not None:
            first = modulate_index[..., None] == 0
            rows = tuple(torch.where(first, *row.chunk(2)) for row in rows)
        return self._run(hidden_states, encoder_hidden_states, Modulation(rows), text_mod,
                         encoder_hidden_states_mask=encoder_hidden_states_mask, image_rotary_emb=image_rotary_emb,
                         **(joint_attention_kwargs or {}))
