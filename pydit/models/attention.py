"""Attention processors for diffusers' dual-stream models, on :mod:`pydit.ops`.

    transformer.set_attn_processor(QwenImageAttnProcessor())

QK-RMSNorm and rotary embedding of both streams are one launch, and the streams are not concatenated. Projections stay
the modules they are, so LoRA on them keeps working.
"""

from __future__ import annotations

import torch

from pydit import ops


class QwenImageAttnProcessor:
    """Drop-in for ``QwenDoubleStreamAttnProcessor2_0`` of Qwen-Image (diffusers 0.39 and later).

    Equal to it up to rounding: norm and rotation round once instead of three times. Text tokens that the mask leaves
    out, which need not be at the end, are moved there on the device. Their rows of the text output are 0 before the
    output projection; the stock processor lets them attend, but nothing reads the result.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None,
                 attention_mask=None, image_rotary_emb=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C], mask [B, S_txt] (true or 1 is kept),
        image_rotary_emb (complex [S_img, D/2], complex [S_txt, D/2]) -> (image [B, S_img, C], text [B, S_txt, C]).

        Raises
        ------
        ValueError
            No text stream, an attention_mask (the text's mask is what this model takes), or no QK norm.
        """
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states: expected the text stream, got None")
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, because Qwen-Image masks text by "
                             f"encoder_hidden_states_mask, got a mask of shape {list(attention_mask.shape)}")
        norms = (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
        if any(norm is None for norm in norms):
            raise ValueError("attn: expected RMSNorm on queries and keys of both streams, got a module without")
        dim = attn.inner_dim // attn.heads

        def heads(x):
            return x.unflatten(-1, (-1, dim))

        image = [heads(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v)]
        text = [heads(project(encoder_hidden_states)) for project in (attn.add_q_proj, attn.add_k_proj,
                                                                     attn.add_v_proj)]
        tables = (None, None) if image_rotary_emb is None else [_cosine_and_sine(t) for t in image_rotary_emb]
        q_img, k_img, q_txt, k_txt = ops.joint_qk_norm_rope(*image[:2], *text[:2], [norm.weight for norm in norms],
                                                            *tables, eps=attn.norm_q.eps)
        if encoder_hidden_states_mask is None:
            out_img, out_txt = ops.joint_attention(q_img, k_img, image[2], q_txt, k_txt, text[2])
        else:
            lens, order, *packed = ops.pack_text(encoder_hidden_states_mask.bool(), q_txt, k_txt, text[2])
            out_img, out_txt = ops.joint_attention(q_img, k_img, image[2], *packed, txt_lens=lens)
            out_txt = ops.unpack_text(order, out_txt)
        out_img = attn.to_out[0](out_img.flatten(2))
        if len(attn.to_out) > 1:
            out_img = attn.to_out[1](out_img)  # dropout
        return out_img, attn.to_add_out(out_txt.flatten(2))


def _cosine_and_sine(rotation):
    """(cos, sin) fp32 [S, D/2], contiguous, of unit complex numbers."""
    parts = torch.view_as_real(rotation).float()
    return parts[..., 0].contiguous(), parts[..., 1].contiguous()
