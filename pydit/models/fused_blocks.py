"""Blocks of diffusers models on :mod:`pydit.ops`: the same modules and weights, another forward.

A block takes such a class in place of its own (``block.__class__ = ...``), so hooks, adapters, checkpointing and
whatever looks a block up by name or type keep working. Each class keeps the name of its parent, by which diffusers
finds repeated blocks. LayerNorm and modulation are one launch, a gated residual and the next LayerNorm another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models import activations as diffusers_activations
from diffusers.models import attention as diffusers_attention
from diffusers.models.transformers import transformer_flux, transformer_qwenimage
from torch import nn

from pydit import ops
from pydit.models import context_parallel, flux_blocks, pruned, qwen_image_blocks, sd3_blocks


class QwenImageTransformerBlock(transformer_qwenimage.QwenImageTransformerBlock):
    """Qwen-Image's dual-stream block, with one modulation row per image or two (``zero_cond_t``)."""

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
                joint_attention_kwargs=None, modulate_index=None):
        """As the parent's. A batch whose target images differ in size (``modulate_index``) takes the parent's path."""
        split = split_of(self, modulate_index)
        if modulate_index is not None and split is None:
            return super().forward(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb,
                                   image_rotary_emb, joint_attention_kwargs, modulate_index)
        image, text = hidden_states, encoder_hidden_states
        shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2 = _rows(self.img_mod(temb), split).chunk(6, dim=-1)
        temb = temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb
        shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = self.txt_mod(temb).chunk(6, dim=-1)
        out_image, out_text = self.attn(
            hidden_states=ops.ada_layer_norm(image, scale_i, shift_i, eps=self.img_norm1.eps, split=split),
            encoder_hidden_states=ops.ada_layer_norm(text, scale_t, shift_t, eps=self.txt_norm1.eps),
            encoder_hidden_states_mask=encoder_hidden_states_mask, image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}))
        image, normed = ops.gated_residual_ada_layer_norm(image, out_image, gate_i, scale_i2, shift_i2,
                                                          eps=self.img_norm2.eps, split=split)
        image = ops.gated_residual(image, _feed_forward(self.img_mlp, normed), gate_i2, split=split)
        text, normed = ops.gated_residual_ada_layer_norm(text, out_text, gate_t, scale_t2, shift_t2,
                                                         eps=self.txt_norm2.eps)
        text = ops.gated_residual(text, _feed_forward(self.txt_mlp, normed), gate_t2)
        return _finite(text), _finite(image)


class PrunedQwenImageTransformerBlock(qwen_image_blocks.PrunedQwenImageTransformerBlock):
    """What a plan left of such a block."""

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
                joint_attention_kwargs=None, modulate_index=None):
        """As the parent's; see :meth:`QwenImageTransformerBlock.forward`."""
        split = split_of(self, modulate_index)
        if modulate_index is not None and split is None:
            return super().forward(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb,
                                   image_rotary_emb, joint_attention_kwargs, modulate_index)
        image, text, spec = hidden_states, encoder_hidden_states, self.spec
        img_mod = self.img_mod(temb)
        shift_i, scale_i, gate_i, *second_i = _rows(img_mod, split).split(self.dim, dim=-1)
        temb = temb.chunk(2, dim=0)[0] if self.zero_cond_t else temb
        if spec.text == "linear":
            text, told = text.chunk(2, dim=1)
            text_in = _linear_residual(self.txt_proj, told)
        else:
            mod = img_mod[:len(temb)] if spec.form == "single" else self.txt_mod(temb)
            norm = self.img_norm1 if spec.form == "single" else self.txt_norm1
            shift_t, scale_t, *rest_t = mod.split(self.dim, dim=-1)
            text_in = ops.ada_layer_norm(text, scale_t, shift_t, eps=norm.eps)
        out_image, out_text = self.attn(
            hidden_states=ops.ada_layer_norm(image, scale_i, shift_i, eps=self.img_norm1.eps, split=split),
            encoder_hidden_states=text_in, encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        if spec.ffn == "linear":
            image = _linear_residual(self.img_ffn, ops.gated_residual(image, out_image, gate_i, split=split))
        else:
            shift, scale, gate = second_i
            image, normed = ops.gated_residual_ada_layer_norm(image, out_image, gate_i, scale, shift,
                                                              eps=self.img_norm2.eps, split=split)
            image = ops.gated_residual(image, _feed_forward(self.img_mlp, normed), gate, split=split)
        if spec.text == "linear":
            text = _linear_residual(self.txt_out_proj, text) if spec.text_output else torch.cat((text, told), dim=1)
        elif spec.text == "full" and spec.ffn == "linear":
            text = _linear_residual(self.txt_ffn, ops.gated_residual(text, out_text, rest_t[0]))
        elif spec.text == "full":
            norm, mlp = ((self.img_norm2, self.img_mlp) if spec.form == "single" else (self.txt_norm2, self.txt_mlp))
            gate_t, shift, scale, gate = rest_t
            text, normed = ops.gated_residual_ada_layer_norm(text, out_text, gate_t, scale, shift, eps=norm.eps)
            text = ops.gated_residual(text, _feed_forward(mlp, normed), gate)
        if self.hands_on:
            text = torch.cat((text, text_in), dim=1)
        return _finite(text), _finite(image)


class AffineBlock(pruned.AffineBlock):
    """One affine map per stream: a product with its residual."""

    def forward(self, hidden_states, encoder_hidden_states, *_args: Any, **_kwargs: Any):
        """As the parent's."""
        image, text = _linear_residual(self.img_map, hidden_states), encoder_hidden_states
        if self.txt_map is not None:
            text = _linear_residual(self.txt_map, text)
        return (text, image) if self.text_first else (image, text)


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    """FLUX.1's dual-stream block."""

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        """As the parent's."""
        image, text = hidden_states, encoder_hidden_states
        shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2 = _modulation(self.norm1, temb).chunk(6, dim=-1)
        shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = _modulation(self.norm1_context, temb).chunk(6, dim=-1)
        out_image, out_text, *adapted = self.attn(
            hidden_states=ops.ada_layer_norm(image, scale_i, shift_i, eps=self.norm1.norm.eps),
            encoder_hidden_states=ops.ada_layer_norm(text, scale_t, shift_t, eps=self.norm1_context.norm.eps),
            image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        image, normed = ops.gated_residual_ada_layer_norm(image, out_image, gate_i, scale_i2, shift_i2,
                                                          eps=self.norm2.eps)
        image = ops.gated_residual(image, _feed_forward(self.ff, normed), gate_i2)
        if adapted:  # an IP-adapter's third output
            image = image + adapted[0]
        text, normed = ops.gated_residual_ada_layer_norm(text, out_text, gate_t, scale_t2, shift_t2,
                                                         eps=self.norm2_context.eps)
        return _finite(ops.gated_residual(text, _feed_forward(self.ff_context, normed), gate_t2)), image


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """FLUX.1's single-stream block: attention and MLP side by side, one output projection."""

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        """As the parent's."""
        tokens = encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = _modulation(self.norm, temb).chunk(3, dim=-1)
        normed = ops.ada_layer_norm(both, scale, shift, eps=self.norm.norm.eps)
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        hidden = _linear_gelu(self.proj_mlp, self.act_mlp, normed)
        out = self.proj_out(torch.cat([attended, hidden], dim=2))
        both = _finite(ops.gated_residual(both, out, gate))
        return both[:, :tokens], both[:, tokens:]


class JointTransformerBlock(diffusers_attention.JointTransformerBlock):
    """The block of SD3 and SD3.5, with or without the second, image-only attention; the last one has no text output."""

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        """As the parent's; chunked feed-forward takes the parent's path."""
        if self._chunk_size is not None:
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        image = hidden_states.contiguous()  # a ControlNet's patches come with tokens innermost
        text, options = encoder_hidden_states, joint_attention_kwargs or {}
        shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2, *twice = _modulation(self.norm1, temb).chunk(
            9 if self.use_dual_attention else 6, dim=-1)
        eps = self.norm1.norm.eps
        if self.context_pre_only:  # this norm has scale before shift
            scale_t, shift_t = _modulation(self.norm1_context, temb).chunk(2, dim=-1)
        else:
            mod = _modulation(self.norm1_context, temb)
            shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = mod.chunk(6, dim=-1)
        out_image, out_text = self.attn(
            hidden_states=ops.ada_layer_norm(image, scale_i, shift_i, eps=eps),
            encoder_hidden_states=ops.ada_layer_norm(text, scale_t, shift_t, eps=self.norm1_context.norm.eps),
            **options)
        if twice:
            shift, scale, gate = twice
            second = self.attn2(hidden_states=ops.ada_layer_norm(image, scale, shift, eps=eps), **options)
            image, out_image, gate_i = ops.gated_residual(image, out_image, gate_i), second, gate
        image, normed = ops.gated_residual_ada_layer_norm(image, out_image, gate_i, scale_i2, shift_i2,
                                                          eps=self.norm2.eps)
        image = ops.gated_residual(image, _feed_forward(self.ff, normed), gate_i2)
        if self.context_pre_only:
            return None, image
        text, normed = ops.gated_residual_ada_layer_norm(text, out_text, gate_t, scale_t2, shift_t2,
                                                         eps=self.norm2_context.eps)
        return ops.gated_residual(text, _feed_forward(self.ff_context, normed), gate_t2), image


class Fused:
    """:class:`pydit.models.thinned.Stock`'s operations on this package's kernels."""

    @staticmethod
    def modulate(norm, x, shift, scale, split=None):
        return ops.ada_layer_norm(x, scale, shift, eps=norm.eps, split=split)

    @staticmethod
    def residual(x, y, gate, split=None):
        return ops.gated_residual(x, y, gate, split=split)

    @staticmethod
    def residual_modulate(norm, x, y, gate, shift, scale, split=None):
        return ops.gated_residual_ada_layer_norm(x, y, gate, scale, shift, eps=norm.eps, split=split)

    @staticmethod
    def linear_residual(linear, x):
        return _linear_residual(linear, x)

    @staticmethod
    def feed_forward(mlp, x):
        return _feed_forward(mlp, x)

    @staticmethod
    def linear_gelu(linear, gelu, x):
        return _linear_gelu(linear, gelu, x)


class PrunedFluxTransformerBlock(flux_blocks.PrunedFluxTransformerBlock):
    """What a plan left of a dual block of FLUX.1."""

    operations = Fused


class PrunedFluxSingleTransformerBlock(flux_blocks.PrunedFluxSingleTransformerBlock):
    """What a plan left of a single one."""

    operations = Fused


class PrunedJointTransformerBlock(sd3_blocks.PrunedJointTransformerBlock):
    """What a plan left of a block of SD3 or SD3.5."""

    operations = Fused


FUSED: dict[type[nn.Module], type[nn.Module]] = {fused.__mro__[1]: fused for fused in (
    QwenImageTransformerBlock, PrunedQwenImageTransformerBlock, AffineBlock, FluxTransformerBlock,
    FluxSingleTransformerBlock, JointTransformerBlock, PrunedFluxTransformerBlock, PrunedFluxSingleTransformerBlock,
    PrunedJointTransformerBlock)}


class TargetTokens:
    """A forward pre-hook of a model with two modulation rows: how many tokens the target image has.

    ``tokens`` is the same number for every sample of the batch at hand, or None where it is not, or is not known.
    Blocks find it under ``_pydit_target``; reading it from ``modulate_index`` would wait for the device.
    """

    def __init__(self) -> None:
        self.tokens: int | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # Context parallelism gives this process a part of the tokens, wherever the target image ends.
        local = context_parallel.config_of(getattr(module, "_parallel_config", None)) is not None
        shapes = () if local else kwargs.get("img_shapes") or ()
        found = {math.prod(sample[0]) for sample in shapes}
        self.tokens = found.pop() if len(found) == 1 else None


def split_of(block: nn.Module, modulate_index: torch.Tensor | None) -> int | None:
    """Tokens of the target image, where a block has two modulation rows and the number is known."""
    target = block.__dict__.get("_pydit_target")
    return None if modulate_index is None or target is None else target.tokens


def _rows(modulation: torch.Tensor, split: int | None) -> torch.Tensor:
    """[B, n C], or with two rows per image [2 B, n C] -> [B, 2, n C]."""
    return modulation if split is None else modulation.unflatten(0, (2, -1)).transpose(0, 1)


def _modulation(norm: nn.Module, temb: torch.Tensor) -> torch.Tensor:
    """The shifts, scales and gates of an AdaLayerNorm, [B, n C]."""
    return norm.linear(norm.silu(temb))


def _feed_forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A diffusers FeedForward, with its first product and GELU as one op where it is as it was made."""
    first, *rest = mlp.net if _plain(mlp, type(mlp)) else (None,)
    if not _plain(first, diffusers_activations.GELU):
        return mlp(x)
    x = _linear_gelu(first.proj, first, x)
    for module in rest:
        x = module(x)
    return x


def _linear_gelu(linear: nn.Module, gelu: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``gelu(linear(x))``; ``gelu`` is torch's, or diffusers', which holds the linear layer itself."""
    if _plain(linear, nn.Linear) and not gelu._forward_hooks and gelu.approximate == "tanh":
        return ops.linear_gelu(x, linear.weight, linear.bias)
    return gelu(x) if hasattr(gelu, "proj") else gelu(linear(x))


def _plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class, and nothing listens to it or has replaced its forward."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks
                                         or "forward" in module.__dict__)


def _linear_residual(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``x + linear(x)``; a module that LoRA or quantisation has put there is called as it is."""
    if _plain(linear, nn.Linear):
        return ops.linear_residual(x, linear.weight, linear.bias)
    return x + linear(x)


def _finite(x: torch.Tensor) -> torch.Tensor:
    """float16 clipped to its range, as the stock blocks do."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
