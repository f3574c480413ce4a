"""Blocks of diffusers models on :mod:`pydit.ops`: the same modules and weights, another forward.

A block takes such a class in place of its own (``block.__class__ = ...``), so hooks, adapters, checkpointing and
whatever looks a block up by name or type keep working.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers import transformer_qwenimage

from pydit import ops


class QwenImageTransformerBlock(transformer_qwenimage.QwenImageTransformerBlock):
    """Qwen-Image's dual-stream block: LayerNorm and modulation, and gated residuals with the next LayerNorm, fused.

    Keeps the name of its parent, by which diffusers finds repeated blocks.
    """

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
                joint_attention_kwargs=None, modulate_index=None):
        """As the parent's. Two modulation rows per image (``modulate_index``) take the parent's path."""
        if modulate_index is not None or self.zero_cond_t:
            return super().forward(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb,
                                   image_rotary_emb, joint_attention_kwargs, modulate_index)
        image, text = hidden_states, encoder_hidden_states
        shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2 = self.img_mod(temb).chunk(6, dim=-1)
        shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = self.txt_mod(temb).chunk(6, dim=-1)
        out_image, out_text = self.attn(
            hidden_states=ops.ada_layer_norm(image, scale_i, shift_i, eps=self.img_norm1.eps),
            encoder_hidden_states=ops.ada_layer_norm(text, scale_t, shift_t, eps=self.txt_norm1.eps),
            encoder_hidden_states_mask=encoder_hidden_states_mask, image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}))
        image, normed = ops.gated_residual_ada_layer_norm(image, out_image, gate_i, scale_i2, shift_i2,
                                                          eps=self.img_norm2.eps)
        image = ops.gated_residual(image, self.img_mlp(normed), gate_i2)
        text, normed = ops.gated_residual_ada_layer_norm(text, out_text, gate_t, scale_t2, shift_t2,
                                                         eps=self.txt_norm2.eps)
        text = ops.gated_residual(text, self.txt_mlp(normed), gate_t2)
        return _finite(text), _finite(image)


def _finite(x):
    """float16 clipped to its range, as the stock block does."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
