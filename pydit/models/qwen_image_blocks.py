"""Qwen-Image blocks that a plan has thinned out: linear text, linear FFN, single stream, text keys and values alone.

Between an anchor and the end of its text region the text stream is two tensors, the anchor's text output and its
modulated text, one after the other along the tokens. Passing both through the model's own forward, rather than beside
it, keeps gradient checkpointing, compilation and offloading hooks working.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock, apply_rotary_emb_qwen
from torch import nn

from pydit.families import BlockSpec
from pydit.models.pruned import residual_map


class PrunedQwenImageTransformerBlock(QwenImageTransformerBlock):
    """A dual-stream block of which a plan has left a part.

    Modules that stay keep their names, so LoRA and quantisation find them. New ones: ``img_ffn``, ``txt_ffn`` (linear
    FFN), ``txt_proj`` (the anchor's modulated text to this layer's), ``txt_out_proj`` (the anchor's text output to
    that of the region's last layer); each is the W and b of ``x + (W x + b)``.

    Parameters
    ----------
    spec : BlockSpec of the form ``"stock"`` or ``"single"``.
    """

    def __init__(self, spec: BlockSpec, dim: int, num_attention_heads: int, attention_head_dim: int,
                 zero_cond_t: bool = False) -> None:
        super().__init__(dim=dim, num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim,
                         zero_cond_t=zero_cond_t)
        self._thin_out(spec)

    @classmethod
    def from_stock(cls, block: QwenImageTransformerBlock, spec: BlockSpec) -> PrunedQwenImageTransformerBlock:
        """Thin out ``block`` in place and return it under this class."""
        block.__class__ = cls
        block._thin_out(spec)
        return block

    def _thin_out(self, spec: BlockSpec) -> None:
        self.spec = spec
        self.hands_on = spec.hands_on
        like = self.img_mod[1].weight
        no_text = spec.form == "single" or spec.text != "full"
        if spec.ffn == "linear":
            self.img_ffn = _map_like(like)
            del self.img_mlp, self.img_norm2
            _keep_rows(self.img_mod[1], 3 * self.dim)
            if not no_text:
                self.txt_ffn = _map_like(like)
                _keep_rows(self.txt_mod[1], 3 * self.dim)
        if spec.ffn == "linear" or no_text:
            del self.txt_mlp, self.txt_norm2  # `= None` would let load_state_dict swallow their weights
        if spec.form == "single":
            for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k"):
                delattr(self.attn, name)
        elif no_text and not (spec.text == "linear" and spec.dead_query):
            for name in ("add_q_proj", "to_add_out", "norm_added_q"):
                delattr(self.attn, name)
        if spec.form == "single" or spec.text == "linear":
            del self.txt_mod, self.txt_norm1
        elif spec.text == "keys":
            _keep_rows(self.txt_mod[1], 2 * self.dim)
        if spec.text == "linear":
            self.txt_proj = _map_like(like)
            if spec.text_output:
                self.txt_out_proj = _map_like(like)
        self.attn.pydit_text = (spec.form, "query" if spec.text == "full" else "keys")
        self.attn.set_processor(PrunedQwenImageAttnProcessor())

    def hand_on(self, wanted: bool) -> None:
        """An anchor hands its modulated text on unless the teacher's layers run its region."""
        self.hands_on = wanted

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
                joint_attention_kwargs=None, modulate_index=None):
        """As the stock block's; the text may be two tensors along the tokens, see the head of this file."""
        image, text = hidden_states, encoder_hidden_states
        spec, width = self.spec, self.dim
        img_mod = self.img_mod(temb)
        if self.zero_cond_t:
            temb = temb.chunk(2, dim=0)[0]
        image_in, image_gate = self._modulate(self.img_norm1(image), img_mod[..., :3 * width], modulate_index)
        txt_mod = None
        if spec.text == "linear":
            text, told = text.chunk(2, dim=1)
            text_in = told + self.txt_proj(told)
        elif spec.form == "single":
            txt_mod = img_mod[:len(temb)]  # two rows an image (zero_cond_t): the first half is the denoised one's
            text_in, text_gate = self._modulate(self.img_norm1(text), txt_mod[..., :3 * width])
        elif spec.text == "keys":
            shift, scale = self.txt_mod(temb)[:, None].chunk(2, dim=-1)
            text_in = self.txt_norm1(text) * (1 + scale) + shift
        else:
            txt_mod = self.txt_mod(temb)
            text_in, text_gate = self._modulate(self.txt_norm1(text), txt_mod[..., :3 * width])

        image_out, text_out = self.attn(
            hidden_states=image_in, encoder_hidden_states=text_in,
            encoder_hidden_states_mask=encoder_hidden_states_mask, image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}))
        image = image + image_gate * image_out
        if spec.ffn == "linear":
            image = image + self.img_ffn(image)
        else:
            normed, gate = self._modulate(self.img_norm2(image), img_mod[..., 3 * width:], modulate_index)
            image = image + gate * self.img_mlp(normed)

        if spec.text == "linear":
            text = text + self.txt_out_proj(text) if spec.text_output else torch.cat((text, told), dim=1)
        elif spec.text == "full":
            text = text + text_gate * text_out
            if spec.ffn == "linear":
                text = text + self.txt_ffn(text)
            elif spec.form == "single":
                normed, gate = self._modulate(self.img_norm2(text), txt_mod[..., 3 * width:])
                text = text + gate * self.img_mlp(normed)
            else:
                normed, gate = self._modulate(self.txt_norm2(text), txt_mod[..., 3 * width:])
                text = text + gate * self.txt_mlp(normed)
        if self.hands_on:
            text = torch.cat((text, text_in), dim=1)
        if image.dtype == torch.float16:
            image, text = image.clip(-65504, 65504), text.clip(-65504, 65504)
        return text, image


class PrunedQwenImageAttnProcessor:
    """Stock attention for what a plan leaves of a block's text: keys and values alone, or the image's projections.

    Everything else as ``QwenDoubleStreamAttnProcessor2_0``: order of the streams, masking, the backend chosen with
    ``set_attention_backend``. ``attn.pydit_text`` says which; see :func:`text_modules`.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None,
                 attention_mask=None, image_rotary_emb=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C] -> (image [B, S_img, C], text or None)."""
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, because Qwen-Image masks text by "
                             f"encoder_hidden_states_mask, got a mask of shape {list(attention_mask.shape)}")
        names = text_modules(attn)
        image = project(attn, hidden_states, ("to_q", "to_k", "to_v"))
        text = project(attn, encoder_hidden_states, names.projections)
        tables = image_rotary_emb or (None, None)
        image = _norm_and_rotate(image, (attn.norm_q, attn.norm_k), tables[0])
        text = _norm_and_rotate(text, names.norms, tables[1])
        mask = None
        if encoder_hidden_states_mask is not None:
            ones = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            mask = torch.cat((encoder_hidden_states_mask.bool(), ones), dim=1)[:, None, None]
        queries = image[0] if text[0] is None else torch.cat((text[0], image[0]), dim=1)
        joined = [torch.cat(pair, dim=1) for pair in zip(text[1:], image[1:], strict=True)]
        out = dispatch_attention_fn(queries, *joined, attn_mask=mask, dropout_p=0.0, is_causal=False,
                                    backend=self._attention_backend, parallel_config=self._parallel_config)
        out = out.flatten(2, 3).to(queries.dtype)
        tokens = 0 if text[0] is None else encoder_hidden_states.shape[1]
        image_out = out[:, tokens:].contiguous()
        for module in attn.to_out:
            image_out = module(image_out)
        if text[0] is None:
            return image_out, None
        text_out = out[:, :tokens].contiguous()
        for module in names.output:
            text_out = module(text_out)
        return image_out, text_out


class TextModules(NamedTuple):
    """Where a block's attention takes its text from.

    projections : names of query (None: there is none), key and value.
    norms : of query and key. output : modules after attention, in order.
    """

    projections: tuple[str | None, str, str]
    norms: tuple[nn.Module | None, nn.Module | None]
    output: tuple[nn.Module, ...]


def text_modules(attn: nn.Module) -> TextModules:
    """Of any Qwen-Image attention module, stock or thinned out."""
    form, kind = getattr(attn, "pydit_text", ("stock", "query"))
    if form == "single":
        names, norms, output = ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k), tuple(attn.to_out)
    elif kind == "keys":
        names, norms, output = (None, "add_k_proj", "add_v_proj"), (None, attn.norm_added_k), ()
    else:
        names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), (attn.norm_added_q, attn.norm_added_k)
        output = (attn.to_add_out,)
    return TextModules((None, *names[1:]) if kind == "keys" else names, norms, output)


def project(attn: nn.Module, x: torch.Tensor, names: tuple[str | None, ...]) -> list[torch.Tensor | None]:
    """Query, key and value [B, S, H, D]; None for a projection without a name."""
    dim = attn.inner_dim // attn.heads
    return [None if name is None else getattr(attn, name)(x).unflatten(-1, (-1, dim)) for name in names]


def _norm_and_rotate(parts, norms, table):
    q, k, v = parts
    turned = [x if x is None or norm is None else norm(x) for x, norm in zip((q, k), norms, strict=True)]
    if table is not None:
        turned = [x if x is None else apply_rotary_emb_qwen(x, table, use_real=False) for x in turned]
    return [*turned, v]


def _map_like(weight: torch.Tensor) -> nn.Linear:
    with torch.device(weight.device):
        return residual_map(weight.shape[1]).to(weight.dtype)


def _keep_rows(linear: nn.Linear, rows: int) -> None:
    """Keep the first outputs of a linear layer."""
    linear.weight = nn.Parameter(linear.weight.detach()[:rows].clone())
    linear.bias = nn.Parameter(linear.bias.detach()[:rows].clone())
    linear.out_features = rows
