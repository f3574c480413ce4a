"""Attention processors for diffusers' dual-stream models, on :mod:`pydit.ops`.

    transformer.set_attn_processor(QwenImageAttnProcessor())      # FluxAttnProcessor(), SD3AttnProcessor()

QK-RMSNorm and rotary embedding of both streams are one launch, and the streams are not concatenated. Projections stay
the modules they are, so LoRA on them keeps working. Results equal the stock processors' up to rounding: norm and
rotation round once instead of two or three times.
"""

from __future__ import annotations

import torch

from pydit import ops
from pydit.models.qwen_image_blocks import text_modules


class QwenImageAttnProcessor:
    """Drop-in for ``QwenDoubleStreamAttnProcessor2_0`` of Qwen-Image (diffusers 0.39 and later).

    Text tokens that the mask leaves out, which need not be at the end, are moved there on the device. Their rows of the
    text output are 0 before the output projection; the stock processor lets them attend, but nothing reads the result.
    Blocks that a plan has thinned out (see :mod:`pydit.models.qwen_image_blocks`) are served too: without a text query
    the text output is None, and a single stream's text goes through the image's projections.
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
        modules = text_modules(attn)
        image = _project(attn, hidden_states, "to_q", "to_k", "to_v")
        q_txt, k_txt, v_txt = _project(attn, encoder_hidden_states, *modules.projections)
        norms = (attn.norm_q, attn.norm_k, *modules.norms)
        tables = (None, None) if image_rotary_emb is None else [_cosine_and_sine(t) for t in image_rotary_emb]
        asks = q_txt is not None
        if not asks:  # the keys stand in for the queries too: one launch, and what it makes of them is not used
            q_txt, norms = k_txt, (*norms[:2], norms[3], norms[3])
        q_img, k_img, q_txt, k_txt = _norm_and_rotate(norms, image, (q_txt, k_txt), tables)
        if encoder_hidden_states_mask is None:
            out_img, out_txt = ops.joint_attention(q_img, k_img, image[2], q_txt if asks else None, k_txt, v_txt)
        else:
            lens, order, q_txt, *packed = ops.pack_text(encoder_hidden_states_mask.bool(), q_txt, k_txt, v_txt)
            out_img, out_txt = ops.joint_attention(q_img, k_img, image[2], q_txt if asks else None, *packed,
                                                   txt_lens=lens)
            out_txt = ops.unpack_text(order, out_txt) if asks else None
        if not asks:
            return _output(attn, out_img), None
        text = out_txt.flatten(2)
        for module in modules.output:
            text = module(text)
        return _output(attn, out_img), text


class FluxAttnProcessor:
    """Drop-in for diffusers' ``FluxAttnProcessor``, in dual and in single blocks.

    A single block's sequence is one stream already, text first; it is attended as an image stream without text.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        """hidden_states [B, S, C], encoder_hidden_states [B, S_txt, C] or None, image_rotary_emb (cos, sin) fp32
        [S_txt + S_img, D] with every angle twice -> (image, text) or the one stream.

        Raises
        ------
        ValueError
            An attention_mask: FLUX.1 has none.
        """
        if attention_mask is not None:
            raise ValueError(f"attention_mask: expected None, got a mask of shape {list(attention_mask.shape)}")
        fused = attn.fused_projections
        image = _project(attn, hidden_states, *(["to_qkv"] if fused else ["to_q", "to_k", "to_v"]))
        table = None if image_rotary_emb is None else [t[:, ::2].float().contiguous() for t in image_rotary_emb]
        if encoder_hidden_states is None:
            q, k = ops.qk_norm_rope(*image[:2], attn.norm_q.weight, attn.norm_k.weight, table, eps=attn.norm_q.eps)
            return _output(attn, _alone(q, k, image[2]))
        text = _project(attn, encoder_hidden_states,
                        *(["to_added_qkv"] if fused else ["add_q_proj", "add_k_proj", "add_v_proj"]))
        tokens = encoder_hidden_states.shape[1]
        tables = (None, None) if table is None else ([t[tokens:] for t in table], [t[:tokens] for t in table])
        q_img, k_img, q_txt, k_txt = _norm_and_rotate(_norms(attn), image, text, tables)
        out_img, out_txt = ops.joint_attention(q_img, k_img, image[2], q_txt, k_txt, text[2])
        return _output(attn, out_img), attn.to_add_out(out_txt.flatten(2))


class SD3AttnProcessor:
    """Drop-in for ``JointAttnProcessor2_0`` of SD3 and SD3.5, the image-only second attention of SD3.5 included.

    In the last block, whose text output nothing reads, the text gives keys and values only, and None is returned for
    it. Models without QK norm (SD3 medium) are attended as they are.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C] or None -> (image, text) or the image alone.

        Raises
        ------
        ValueError
            An attention_mask, which these models do not have, or QK norm in some streams only.
        """
        if attention_mask is not None:
            raise ValueError(f"attention_mask: expected None, got a mask of shape {list(attention_mask.shape)}")
        q_img, k_img, v_img = _project(attn, hidden_states, "to_q", "to_k", "to_v")
        if encoder_hidden_states is None:
            if attn.norm_q is not None:
                q_img, k_img = ops.qk_norm_rope(q_img, k_img, attn.norm_q.weight, attn.norm_k.weight, None,
                                                eps=attn.norm_q.eps)
            return _output(attn, _alone(q_img, k_img, v_img))
        q_txt, k_txt, v_txt = _project(attn, encoder_hidden_states, "add_q_proj", "add_k_proj", "add_v_proj")
        if attn.norm_q is not None:
            q_img, k_img, q_txt, k_txt = _norm_and_rotate(_norms(attn), (q_img, k_img), (q_txt, k_txt),
                                                          (None, None))
        q_txt = None if attn.context_pre_only else q_txt
        out_img, out_txt = ops.joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt)
        return _output(attn, out_img), None if out_txt is None else attn.to_add_out(out_txt.flatten(2))


def _project(attn, x, *names):
    """Query, key and value [B, S, H, D] from one projection each or from one for all."""
    projected = [None if name is None else getattr(attn, name)(x) for name in names]
    if len(projected) == 1:
        projected = projected[0].chunk(3, -1)
    dim = attn.inner_dim // attn.heads
    return [None if part is None else part.unflatten(-1, (-1, dim)) for part in projected]


def _norms(attn):
    """The norms of a stock module: query and key of the image, query and key of the text."""
    return attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k


def _norm_and_rotate(norms, image, text, tables):
    """q_img, k_img, q_txt, k_txt after RMSNorm and rotation by the tables of (image, text)."""
    if any(norm is None for norm in norms):
        raise ValueError("attn: expected RMSNorm on queries and keys of both streams, got a module without")
    return ops.joint_qk_norm_rope(*image[:2], *text[:2], [norm.weight for norm in norms], *tables, eps=norms[0].eps)


def _alone(q, k, v):
    """Attention of one stream."""
    return ops.joint_attention(q, k, v, None, k[:, :0], v[:, :0])[0]


def _output(attn, x):
    """The output projection and, where there is one, its dropout; a single block of FLUX.1 projects by itself."""
    x = x.flatten(2)
    for module in getattr(attn, "to_out", ()):
        x = module(x)
    return x


def _cosine_and_sine(rotation):
    """(cos, sin) fp32 [S, D/2], contiguous, of unit complex numbers."""
    parts = torch.view_as_real(rotation).float()
    return parts[..., 0].contiguous(), parts[..., 1].contiguous()
