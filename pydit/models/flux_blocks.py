"""FLUX.1's part in :mod:`pydit.models.thinned`: dual blocks, and single ones with attention and MLP side by side.

A single block keeps its one set of weights whatever becomes of its text, so linear text and text keys save work there
and no weights. With x both streams, n = LN(x) (1 + scale) + shift, a = attention(n) and proj_out = [W_a | W_m], b:

    y = x + gate (W_a a + W_m GELU(proj_mlp(n)) + b)                    stock
    h = x + gate (W_a a + b),   y = h + (W h + c)                       ffn "linear": img_ffn and txt_ffn

so its linear FFN is PPCL's Eq. 9: the MLP half is replaced by an affine map of the stream after the gated attention.
"""

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

from pydit.families import BlockSpec
from pydit.models.thinned import Branch, Modulation, ThinnedAttnProcessor, ThinnedBlock, rows_of


class PrunedFluxAttnProcessor(ThinnedAttnProcessor):
    """As diffusers' ``FluxAttnProcessor`` for thinned-out blocks."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C], image_rotary_emb (cos, sin) [S, D], text
        first -> (image [B, S_img, C], text or None)."""
        if attention_mask is not None:
            raise ValueError(f"attention_mask: expected None, got a mask of shape {list(attention_mask.shape)}")
        tokens = encoder_hidden_states.shape[1]

        def rotation(where):
            if image_rotary_emb is None:
                return lambda x: x
            table = tuple(part[where] for part in image_rotary_emb)
            return lambda x: apply_rotary_emb(x, table, sequence_dim=1)

        return self.attend(attn, hidden_states, encoder_hidden_states, None, rotation(slice(tokens, None)),
                           rotation(slice(tokens)))


class PrunedFluxTransformerBlock(ThinnedBlock, FluxTransformerBlock):
    """What a plan left of a dual block."""

    image_branch = Branch("norm1.linear", ("norm1",), "norm1.norm", "norm2", "ff")
    text_branch = Branch("norm1_context.linear", ("norm1_context",), "norm1_context.norm", "norm2_context",
                         "ff_context")
    processor_class = PrunedFluxAttnProcessor

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        """As the stock block's; the text may be two tensors along the tokens, see :mod:`pydit.models.thinned`."""
        image_mod, text_mod = Modulation(rows_of(modulation(self.norm1, temb), self.width)), None
        if self.spec.form == "single":
            text_mod = image_mod
        elif self.spec.text != "linear":
            text_mod = Modulation(rows_of(modulation(self.norm1_context, temb), self.width))
        return self._run(hidden_states, encoder_hidden_states, image_mod, text_mod, image_rotary_emb=image_rotary_emb,
                         **(joint_attention_kwargs or {}))


class PrunedFluxSingleTransformerBlock(ThinnedBlock, FluxSingleTransformerBlock):
    """What a plan left of a single block; both streams run through the same weights, as they do in the stock block."""

    image_branch = text_branch = Branch("norm.linear", (), "norm.norm", "", "")
    processor_class = PrunedFluxAttnProcessor

    def _thin_out(self, spec: BlockSpec) -> None:
        self.spec, self.hands_on = spec, spec.hands_on
        if spec.ffn == "linear":
            width = self.width
            self.img_ffn = self._map()
            if spec.text == "full":
                self.txt_ffn = self._map()
            self._remove(("proj_mlp", "act_mlp"))
            self.proj_out.weight = nn.Parameter(self.proj_out.weight.detach()[:, :width].clone())
            self.proj_out.in_features = width
            self.proj_out.pydit_kept = {"columns": [(0, width)]}
            self.proj_out._tp_packed_row_blocks = [width]
        self._add_text_maps()
        self._choose_processor("query" if spec.text == "full" else "keys", "single")

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        """As the stock block's; the text may be two tensors along the tokens, see :mod:`pydit.models.thinned`."""
        both = Modulation(rows_of(modulation(self.norm, temb), self.width))
        return self._run(hidden_states, encoder_hidden_states, both, both, image_rotary_emb=image_rotary_emb,
                         **(joint_attention_kwargs or {}))

    def _after_attention(self, x, normed, out, mod, branch, linear):
        do = self.operations
        if self.spec.ffn == "linear":
            return do.linear_residual(getattr(self, linear), do.residual(x, self.proj_out(out), mod.rows[2]))
        hidden = do.linear_gelu(self.proj_mlp, self.act_mlp, normed)
        return do.residual(x, self.proj_out(torch.cat((out, hidden), dim=-1)), mod.rows[2])


def modulation(norm: nn.Module, temb: torch.Tensor) -> torch.Tensor:
    """The shifts, scales and gates of an AdaLayerNorm, [B, n C]."""
    return norm.linear(norm.silu(temb))
