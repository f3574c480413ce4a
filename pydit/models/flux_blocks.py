"""FLUX.1's part in :mod:`pydit.models.dual_stream` and :mod:`pydit.models.thinned`: dual blocks, and single ones with
attention and MLP side by side.

A single block keeps its one set of weights whatever becomes of its text, so linear text and text keys save work there
and no weights. With x both streams, n = LN(x) (1 + scale) + shift, a = attention(n) and proj_out = [W_a | W_m], b:

    y = x + gate (W_a a + W_m GELU(proj_mlp(n)) + b)                    stock
    h = x + gate (W_a a + b),   y = h + (W h + c)                       ffn "linear": img_ffn and txt_ffn

so its linear FFN is PPCL's Eq. 9: the MLP half is replaced by an affine map of the stream after the gated attention.
"""

from __future__ import annotations

import torch
from diffusers.models import normalization
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

from pydit import backend
from pydit.families import BlockSpec
from pydit.models.dual_stream import Branch, DualStreamBlock, Modulation, rows_of
from pydit.models.projections import is_watched
from pydit.models.thinned import ThinnedAttnProcessor, ThinnedBlock

_NORMS = (normalization.AdaLayerNormZero, normalization.AdaLayerNormZeroSingle, normalization.AdaLayerNormContinuous,
          normalization.SD35AdaLayerNormZeroX)

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
            # Without a text token there is nothing to rotate, which diffusers' function does not take.
            return lambda x: apply_rotary_emb(x, table, sequence_dim=1) if x.shape[1] else x

        return self.attend(attn, hidden_states, encoder_hidden_states, None, rotation(slice(tokens, None)),
                           rotation(slice(tokens)))


class FluxForward(DualStreamBlock):
    """Mixin of a dual block."""

    image_branch = Branch("norm1.linear", ("norm1",), "norm1.norm", "norm2", "ff")
    text_branch = Branch("norm1_context.linear", ("norm1_context",), "norm1_context.norm", "norm2_context",
                         "ff_context")
    clips = (True, False)

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        """As the stock block's; the text may be two tensors along the tokens, see :mod:`pydit.models.dual_stream`."""
        width = hidden_states.shape[-1]  # a table in the modulation's place does not know it
        image_mod, text_mod = Modulation(rows_of(modulation(self.norm1, temb), width)), None
        if self.spec.form == "single":
            text_mod = image_mod
        elif self.spec.text != "linear":
            text_mod = Modulation(rows_of(modulation(self.norm1_context, temb), width))
        options = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
        return self._run(hidden_states, encoder_hidden_states, image_mod, text_mod, options)


class PrunedFluxTransformerBlock(ThinnedBlock, FluxForward, FluxTransformerBlock):
    """What a plan left of a dual block."""

    processor_class = PrunedFluxAttnProcessor


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
        """As the stock block's; the text may be two tensors along the tokens, see :mod:`pydit.models.dual_stream`."""
        both = Modulation(rows_of(modulation(self.norm, temb), hidden_states.shape[-1]))
        options = {"image_rotary_emb": image_rotary_emb, **(joint_attention_kwargs or {})}
        return self._run(hidden_states, encoder_hidden_states, both, both, options)

    def _after_attention(self, do, streams, outputs, options):
        gates = [stream.mod.rows[2] for stream in streams]
        attended = [out.x for out in outputs]
        if self.spec.ffn == "linear":
            streams = do.add(streams, [do.project(self.proj_out, x) for x in attended], gates)
            return do.linear_residual([getattr(self, stream.linear) for stream in streams],
                                      [stream.x for stream in streams])
        hidden = do.linear_gelu(self.proj_mlp, self.act_mlp, [stream.normed for stream in streams])
        outputs = [do.project(self.proj_out, torch.cat(pair, dim=-1)) for pair in zip(attended, hidden, strict=True)]
        return [stream.x for stream in do.add(streams, outputs, gates)]


def modulation(norm: nn.Module, temb: torch.Tensor) -> torch.Tensor:
    """The shifts, scales and gates of an AdaLayerNorm, [B, n C]."""
    return norm.linear(norm.silu(temb))


def listened(*norms: nn.Module) -> bool:
    """Whether something listens to an AdaLayerNorm, or has replaced it: fused blocks do not call that."""
    found = any(is_watched(norm) or type(norm) not in _NORMS for norm in norms)
    if found:
        backend.record("ada_layer_norm", "torch", "something listens to an AdaLayerNorm, or has replaced it: "
                                                  "the stock block runs")
    return found
