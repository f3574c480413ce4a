"""Blocks of diffusers models on :mod:`pydit.ops`: the same modules and weights, another forward.

A block's class is replaced by one of these (``block.__class__ = ...``), so hooks, adapters, checkpointing and whatever
looks a block up by name or type keep working. Each class keeps the name of its parent, by which diffusers finds
repeated blocks. Where this package's matrix product runs, a layer of both streams is one launch together with what
follows it: norm and rotation, GELU, or gate and residual. Where the library's runs, LayerNorm and modulation are one
launch, and a gated residual with the next LayerNorm another.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any, ClassVar

import torch
from diffusers.models import activations as diffusers_activations
from diffusers.models import attention as diffusers_attention
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import transformer_flux, transformer_qwenimage
from torch import nn

from pydit import backend, ops
from pydit.models import attention, flux_blocks, projections, pruned, qwen_image_blocks, sd3_blocks
from pydit.models.dual_stream import Modulation, Output, Stock, Stream, is_recast, of_one_batch
from pydit.models.thinned import text_modules
from pydit.ops import direct

_ATTENTION = (Attention, transformer_flux.FluxAttention)
_LISTENED = "something listens to a norm, has replaced its forward, or stands in its place: it is called as it is"


class Fused(Stock):
    """:class:`pydit.models.dual_stream.Stock`'s operations on this package's kernels."""

    ops: ClassVar[ModuleType] = ops

    @classmethod
    def suited(cls, *streams: torch.Tensor) -> type[Stock]:
        return FusedDirect if direct.ops_for(*streams) is direct else Fused

    @classmethod
    def modulate(cls, norm: nn.Module, x: torch.Tensor, mod: Modulation) -> torch.Tensor:
        if not _normalizes(norm):
            backend.record("ada_layer_norm", "torch", _LISTENED)
            shift, scale = (ops.reference.per_token(row, x, mod.split) for row in mod.rows[:2])
            return norm(x) * (1 + scale) + shift
        return cls.ops.ada_layer_norm(x, mod.rows[1], mod.rows[0], eps=norm.eps, split=mod.split)

    @classmethod
    def attend(cls, attn: nn.Module, image: torch.Tensor, text: torch.Tensor | None, options: dict[str, Any]
               ) -> list[Output | None]:
        processor = attn.processor
        ours = isinstance(processor, attention.Replacing) and not processor.why_stock() and _plain(attn, *_ATTENTION)
        if not (ours and options.keys() <= processor.options and options.get("attention_mask") is None):
            return super().attend(attn, image, text, options)
        out_image, out_text = processor.attend(attn, image, text, **options, kit=cls.ops)
        found = [cls._through(attn._modules.get("to_out", ()), out_image)]
        if text is not None:
            found.append(None if out_text is None else cls._through(text_modules(attn).output, out_text))
        return found

    @classmethod
    def _through(cls, modules: Iterable[nn.Module], x: torch.Tensor) -> Output:
        """``x`` through a linear layer and what drops out behind it."""
        first, *rest = [*modules] or [None]
        if first is None:
            return Output(x)
        out = cls.project(first, x)
        if out.linear is None or not all(map(_idle, rest)):
            x = first(x) if out.linear is not None else out.x
            for module in rest:
                x = x if _idle(module) else module(x)
            out = Output(x)
        return out

    @classmethod
    def project(cls, linear: nn.Module, x: torch.Tensor) -> Output:
        if cls.ops.in_one_launch(x) and _multiplies(linear):
            return Output(x, linear)
        return Output(linear(x))

    @classmethod
    def add(cls, streams: list[Stream], outputs: list[Output], gates: Iterable[torch.Tensor]) -> list[Stream]:
        gates = list(gates)
        if len(streams) == 2 and all(out.linear is not None for out in outputs) and streams[1].mod.split is None:
            xs = cls.ops.joint_linear_gated_residual(
                *(out.x for out in outputs), *(out.linear.weight for out in outputs),
                *(out.linear.bias for out in outputs), *(stream.x for stream in streams), *gates,
                split=streams[0].mod.split)
        else:
            xs = [cls.ops.gated_residual(stream.x, out.x, gate, split=stream.mod.split) if out.linear is None else
                  cls.ops.linear_gated_residual(out.x, out.linear.weight, out.linear.bias, stream.x, gate,
                                                split=stream.mod.split)
                  for stream, out, gate in zip(streams, outputs, gates, strict=True)]
        return [stream._replace(x=x) for stream, x in zip(streams, xs, strict=True)]

    @classmethod
    def add_modulate(cls, norms: list[nn.Module | None], streams: list[Stream], outputs: list[Output]
                     ) -> tuple[list[Stream], list[torch.Tensor | None]]:
        if any(out.linear is not None for out in outputs) or not all(n is None or _normalizes(n) for n in norms):
            return super().add_modulate(norms, streams, outputs)
        pairs = [(cls.ops.gated_residual(stream.x, out.x, stream.mod.rows[2], split=stream.mod.split), None)
                 if norm is None else
                 cls.ops.gated_residual_ada_layer_norm(stream.x, out.x, stream.mod.rows[2], stream.mod.rows[4],
                                                       stream.mod.rows[3], eps=norm.eps, split=stream.mod.split)
                 for norm, stream, out in zip(norms, streams, outputs, strict=True)]
        return ([stream._replace(x=x) for stream, (x, _) in zip(streams, pairs, strict=True)],
                [normed for _, normed in pairs])

    @classmethod
    def feed_forward(cls, mlps: list[nn.Module], xs: list[torch.Tensor]) -> list[Output]:
        """diffusers' FeedForward, with its first product and GELU as one op where it is as it was made."""
        nets = [[*mlp.net] if _plain(mlp, diffusers_attention.FeedForward) else [None] for mlp in mlps]
        firsts = [net[0] if _plain(net[0], diffusers_activations.GELU) else None for net in nets]
        if len(xs) == 2 and cls.ops.in_one_launch(xs[0]) and all(
                first and _fuses(first.proj, first) for first in firsts):
            hidden = _joint(cls.ops.joint_linear_gelu, [first.proj for first in firsts], xs)
        else:
            hidden = [None if first is None else cls._linear_gelu(first.proj, first, x)
                      for first, x in zip(firsts, xs, strict=True)]
        return [Output(mlp(x)) if h is None else cls._after_gelu(net[1:], h)
                for mlp, net, x, h in zip(mlps, nets, xs, hidden, strict=True)]

    @classmethod
    def _after_gelu(cls, modules: Iterable[nn.Module], x: torch.Tensor) -> Output:
        drop, *rest = modules
        return cls._through(rest, x if _idle(drop) else drop(x))

    @classmethod
    def linear_gelu(cls, linear: nn.Module, gelu: nn.Module, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        if len(xs) == 2 and cls.ops.in_one_launch(xs[0]) and _fuses(linear, gelu):
            return _joint(cls.ops.joint_linear_gelu, [linear, linear], xs)
        return [cls._linear_gelu(linear, gelu, x) for x in xs]

    @classmethod
    def _linear_gelu(cls, linear: nn.Module, gelu: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """``gelu(linear(x))``; ``gelu`` is torch's, or diffusers', which holds the linear layer itself."""
        if _fuses(linear, gelu):
            return cls.ops.linear_gelu(x, linear.weight, linear.bias)
        return gelu(x) if hasattr(gelu, "proj") else gelu(linear(x))

    @classmethod
    def linear_residual(cls, linears: list[nn.Module], xs: list[torch.Tensor]) -> list[torch.Tensor]:
        """``x + linear(x)``; a module that LoRA or quantisation has put there is called as it is."""
        plain = [_multiplies(linear) for linear in linears]
        if len(xs) == 2 and all(plain) and cls.ops.in_one_launch(xs[0]):
            return _joint(cls.ops.joint_linear_residual, linears, xs)
        return [cls.ops.linear_residual(x, linear.weight, linear.bias) if fuses else x + linear(x)
                for linear, x, fuses in zip(linears, xs, plain, strict=True)]


class FusedDirect(Fused):
    """The same by torch's own kernels, without what lies around an op; see :mod:`pydit.ops.direct`."""

    ops = direct


def _joint(op: Any, linears: list[nn.Module], xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """An op of both streams."""
    return list(op(*xs, *(linear.weight for linear in linears), *(linear.bias for linear in linears)))


def _fuses(linear: nn.Module, gelu: nn.Module) -> bool:
    """Whether a linear layer and its GELU are what :func:`pydit.ops.linear_gelu` computes."""
    return _multiplies(linear) and _plain(gelu, nn.GELU, diffusers_activations.GELU) and gelu.approximate == "tanh"


def _multiplies(linear: nn.Module) -> bool:
    """Whether a module is a linear layer of plain weights and nothing more."""
    return _plain(linear, nn.Linear) and type(linear.weight) in projections.PLAIN_TENSORS


def _normalizes(norm: nn.Module) -> bool:
    """Whether a module is a LayerNorm without weights and nothing more."""
    return _plain(norm, nn.LayerNorm) and norm.weight is None


def _plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of exactly one of these classes, and nothing listens to it or has replaced its forward."""
    return type(module) in kinds and not projections.is_watched(module)


def _idle(module: nn.Module) -> bool:
    """A dropout that drops nothing and that nothing listens to."""
    return _plain(module, nn.Dropout) and (module.p == 0 or not module.training)


class QwenImageTransformerBlock(qwen_image_blocks.QwenImageForward, transformer_qwenimage.QwenImageTransformerBlock):
    """Qwen-Image's dual-stream block."""

    operations = Fused


class PrunedQwenImageTransformerBlock(qwen_image_blocks.PrunedQwenImageTransformerBlock):
    """What a plan left of such a block."""

    operations = Fused


class AffineBlock(pruned.AffineBlock):
    """One affine map per stream: a product with its residual."""

    def forward(self, hidden_states, encoder_hidden_states, *_args: Any, **_kwargs: Any):
        """As the parent's."""
        if is_recast(self.img_map, hidden_states) or len(hidden_states) != len(encoder_hidden_states):
            return super().forward(hidden_states, encoder_hidden_states)
        do = Fused.suited(hidden_states, encoder_hidden_states)
        if self.txt_map is None:
            (image,), text = do.linear_residual([self.img_map], [hidden_states]), encoder_hidden_states
        else:
            image, text = do.linear_residual([self.img_map, self.txt_map], [hidden_states, encoder_hidden_states])
        return (text, image) if self.text_first else (image, text)


class FluxTransformerBlock(flux_blocks.FluxForward, transformer_flux.FluxTransformerBlock):
    """FLUX.1's dual-stream block."""

    operations = Fused

    def forward(self, *args: Any, **kwargs: Any):
        """As the parent's."""
        if flux_blocks.listened(self.norm1, self.norm1_context):
            return transformer_flux.FluxTransformerBlock.forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """FLUX.1's single-stream block: attention and MLP side by side, one output projection, one stream."""

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        """As the parent's."""
        if flux_blocks.listened(self.norm) or is_recast(self.proj_mlp, hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        do, tokens = Fused.suited(hidden_states, encoder_hidden_states), encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        mod = Modulation(flux_blocks.modulation(self.norm, temb).chunk(3, dim=-1))
        (both,), (mod,) = of_one_batch([both], [mod])
        normed = do.modulate(self.norm.norm, both, mod)
        attended, = do.attend(self.attn, normed, None, {"image_rotary_emb": image_rotary_emb,
                                                        **(joint_attention_kwargs or {})})
        hidden, = do.linear_gelu(self.proj_mlp, self.act_mlp, [normed])
        out = do.project(self.proj_out, torch.cat([attended.x, hidden], dim=2))
        stream, = do.add([Stream(both, normed, mod, None, "")], [out], mod.rows[2:])
        both = stream.x.clip(-65504, 65504) if both.dtype == torch.float16 else stream.x
        return both[:, :tokens], both[:, tokens:]


class JointTransformerBlock(sd3_blocks.JointForward, diffusers_attention.JointTransformerBlock):
    """The block of SD3 and SD3.5, with or without the second, image-only attention; the last one has no text output."""

    operations = Fused

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        """As the parent's, whose path chunked feed-forward takes, and a norm that something listens to."""
        if self._chunk_size is not None or flux_blocks.listened(self.norm1, self.norm1_context):
            return diffusers_attention.JointTransformerBlock.forward(self, hidden_states, encoder_hidden_states, temb,
                                                                     joint_attention_kwargs)
        # A ControlNet's patches come with tokens innermost.
        text, image = super().forward(hidden_states.contiguous(), encoder_hidden_states, temb, joint_attention_kwargs)
        return None if self.context_pre_only else text, image


class PrunedFluxTransformerBlock(flux_blocks.PrunedFluxTransformerBlock):
    """What a plan left of a dual block of FLUX.1."""

    operations = Fused


class PrunedFluxSingleTransformerBlock(flux_blocks.PrunedFluxSingleTransformerBlock):
    """What a plan left of a single one."""

    operations = Fused


class PrunedJointTransformerBlock(sd3_blocks.PrunedJointTransformerBlock):
    """What a plan left of a block of SD3 or SD3.5."""

    operations = Fused


FUSED: dict[type[nn.Module], type[nn.Module]] = {fused.__bases__[-1]: fused for fused in (
    QwenImageTransformerBlock, PrunedQwenImageTransformerBlock, AffineBlock, FluxTransformerBlock,
    FluxSingleTransformerBlock, JointTransformerBlock, PrunedFluxTransformerBlock, PrunedFluxSingleTransformerBlock,
    PrunedJointTransformerBlock)}
