"""SD3's part in :mod:`pydit.models.dual_stream` and :mod:`pydit.models.thinned`.

Blocks have one attention or two, and the last no text output.

The second attention (SD3.5 medium) is the image's alone, so text through the image's weights does not take part in it:

    h = x + gate a + gate3 attention2(n(x) (1 + scale3) + shift3)       in place of h = x + gate a, image only
"""

from __future__ import annotations

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous

from pydit.models.dual_stream import Branch, DualStreamBlock, Modulation, rows_of
from pydit.models.flux_blocks import modulation
from pydit.models.thinned import ThinnedAttnProcessor, ThinnedBlock


class PrunedSD3AttnProcessor(ThinnedAttnProcessor):
    """As ``JointAttnProcessor2_0`` for thinned-out blocks."""

    text_first = False

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C] -> (image [B, S_img, C], text or None)."""
        if attention_mask is not None:
            raise ValueError(f"attention_mask: expected None, got a mask of shape {list(attention_mask.shape)}")
        return self.attend(attn, hidden_states, encoder_hidden_states, None, lambda x: x, lambda x: x)


class JointForward(DualStreamBlock):
    """Mixin of a block of SD3 or SD3.5."""

    image_branch = Branch("norm1.linear", ("norm1",), "norm1.norm", "norm2", "ff")
    text_branch = Branch("norm1_context.linear", ("norm1_context",), "norm1_context.norm", "norm2_context",
                         "ff_context")
    clips = (False, False)

    @property
    def text_ends(self) -> bool:
        return self.context_pre_only

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        """As the stock block's; the text may be two tensors along the tokens, see :mod:`pydit.models.dual_stream`."""
        width = hidden_states.shape[-1]  # a table in the modulation's place does not know it
        image_mod, text_mod = Modulation(rows_of(modulation(self.norm1, temb), width)), None
        if self.spec.form == "single":
            text_mod = image_mod
        elif self.spec.text != "linear":
            rows = rows_of(modulation(self.norm1_context, temb), width)
            # The norm of a block without text output has scale before shift.
            text_mod = Modulation(rows[::-1] if isinstance(self.norm1_context, AdaLayerNormContinuous) else rows)
        return self._run(hidden_states, encoder_hidden_states, image_mod, text_mod, joint_attention_kwargs or {})

    def _after_attention(self, do, streams, outputs, options):
        if self.use_dual_attention:
            image, shift, scale, gate = streams[0], *streams[0].mod.rows[-3:]
            normed = do.modulate(self.norm1.norm, image.x, Modulation((shift, scale)))
            second, = do.attend(self.attn2, normed, None, options)
            image, = do.add([image], outputs[:1], [image.mod.rows[2]])
            rows = (*image.mod.rows[:2], gate, *image.mod.rows[3:])
            streams = [image._replace(mod=Modulation(rows)), *streams[1:]]
            outputs = [second, *outputs[1:]]
        return super()._after_attention(do, streams, outputs, options)


class PrunedJointTransformerBlock(ThinnedBlock, JointForward, JointTransformerBlock):
    """What a plan left of a block of SD3 or SD3.5."""

    processor_class = PrunedSD3AttnProcessor

    @property
    def _beyond_the_mlp(self) -> list[tuple[int, int]]:
        return [(6 * self.width, 9 * self.width)] if self.use_dual_attention else []
