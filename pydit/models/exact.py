"""Blocks and attention that run fewer launches and still equal eager diffusers bit for bit.

What the order of operations allows: a modulation (1 + scale, product, sum) and a gated residual round each element
where eager rounds it, in one launch instead of three or two; the projections of a stream are one product where the
device's matrix product gives the same bits. What it does not allow stays torch's: sums over channels or tokens in
another order (LayerNorm, RMSNorm, softmax) and GELU in a product's epilogue, which rounds less often. Every fused form
is compared with eager's bits the first time a signature of shapes, strides and dtypes is seen; one that differs is not
used again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import attention as diffusers_attention
from diffusers.models import attention_processor as diffusers_processor
from diffusers.models.transformers import transformer_flux, transformer_qwenimage
from torch import nn

from pydit import backend, ops
from pydit.models import projections
from pydit.models.attention import known_to_layer_skip
from pydit.models.flux_blocks import listened, modulation


class ExactOps:
    """The element-wise ops of the blocks of one model, and what the self-check found."""

    def __init__(self) -> None:
        self.checked: dict[tuple, bool] = {}  # (op, signature) -> whether the fused form gave eager's bits
        self.eager: dict[str, str] = {}  # op -> why it ran eager

    def modulate(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """``x * (1 + scale[:, None]) + shift[:, None]`` for x [B, S, C], scale and shift [B, C]."""
        factor = 1 + scale
        return self.run("modulate", (x, factor, shift),
                        lambda: ops.gated_residual(shift[:, None].expand(x.shape), x, factor, exact=True),
                        lambda: x * factor[:, None] + shift[:, None])

    def gated_residual(self, x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """``x + gate[:, None] * y`` for x, y [B, S, C], gate [B, C]."""
        return self.run("gated_residual", (x, y, gate), lambda: ops.gated_residual(x, y, gate, exact=True),
                        lambda: x + gate[:, None] * y)

    def run(self, op: str, tensors: tuple[torch.Tensor | None, ...], fused: Callable[[], Any],
            eager: Callable[[], Any], *, needs_kernels: bool = True) -> Any:
        """``fused()`` where it is known to give the bits of ``eager()``, otherwise ``eager()``; the first time both."""
        if torch.compiler.is_compiling():
            return eager()
        first = tensors[0]
        if len({x.dtype for x in tensors if x is not None}) > 1:
            self.eager[op] = "tensors of several dtypes (torch.autocast)"
            return eager()
        if needs_kernels:
            if any(x.shape[0] != first.shape[0] for x in tensors):
                self.eager[op] = "a batch of one beside larger ones, which eager broadcasts"
                return eager()
            path = backend.choose(op, first)
            if path.kernels is None or first.dtype not in backend.DTYPE_CODES:
                self.eager[op] = path.reason or f"no kernel takes {first.dtype}"
                return eager()
        key = (op, *((x.shape, x.stride(), x.dtype, x.device) for x in tensors if x is not None))
        if key in self.checked:
            return fused() if self.checked[key] else eager()
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return eager()  # comparing waits for the device, which a capture must not
        self.checked[key] = _same_bits(_apart(first, fused), _apart(first, eager))
        return fused() if self.checked[key] else eager()

    def rows(self) -> list[dict[str, Any]]:
        """For ``pydit.report``: per op, how many signatures run fused, and why the others do not."""
        found: list[dict[str, Any]] = []
        for op in sorted({key[0] for key in self.checked} | set(self.eager)):
            results = [same for key, same in self.checked.items() if key[0] == op]
            if any(results):
                found.append({"op": op, "path": "pydit", "reason": "", "count": sum(results)})
            if not all(results):
                found.append({"op": op, "path": "stock", "count": len(results) - sum(results),
                              "reason": "the self-check found other bits than eager's"})
            if op in self.eager:
                found.append({"op": op, "path": "stock", "reason": self.eager[op], "count": 1})
        return found


def _apart(like: torch.Tensor, form: Callable[[], Any]) -> Any:
    """``form()`` without a trace: a checkpointed forward that had compared would have drawn other random numbers, and
    saved other tensors, than when it is computed again. Weights that autocast kept cast would lack their gradients."""
    kind = like.device.type
    with torch.no_grad(), torch.random.fork_rng([like.device] if like.is_cuda else []), torch.autocast(
            kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
        return form()


def _same_bits(found: Any, expected: Any) -> bool:
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return all(a.dtype == b.dtype and torch.equal(a.contiguous().view(width[a.element_size()]),
                                                  b.contiguous().view(width[b.element_size()]))
               for a, b in zip(found, expected, strict=True) if a is not None)


def ops_of(block: nn.Module) -> ExactOps:
    """The exact ops that :func:`pydit.accelerate` has given a block."""
    return block.__dict__["_pydit_exact"]


class QwenImageTransformerBlock(transformer_qwenimage.QwenImageTransformerBlock):
    """Qwen-Image's dual-stream block."""

    def forward(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None,
                joint_attention_kwargs=None, modulate_index=None):
        """As the parent's, which also runs where an image has two modulation rows (``modulate_index``)."""
        if modulate_index is not None or self.zero_cond_t:
            return super().forward(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb,
                                   image_rotary_emb, joint_attention_kwargs, modulate_index)
        exact, image, text = ops_of(self), hidden_states, encoder_hidden_states
        shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2 = self.img_mod(temb).chunk(6, dim=-1)
        shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = self.txt_mod(temb).chunk(6, dim=-1)
        out_image, out_text = self.attn(
            hidden_states=exact.modulate(self.img_norm1(image), scale_i, shift_i),
            encoder_hidden_states=exact.modulate(self.txt_norm1(text), scale_t, shift_t),
            encoder_hidden_states_mask=encoder_hidden_states_mask, image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}))
        image = exact.gated_residual(image, out_image, gate_i)
        text = exact.gated_residual(text, out_text, gate_t)
        out = self.img_mlp(exact.modulate(self.img_norm2(image), scale_i2, shift_i2))
        image = exact.gated_residual(image, out, gate_i2)
        out = self.txt_mlp(exact.modulate(self.txt_norm2(text), scale_t2, shift_t2))
        return _finite(exact.gated_residual(text, out, gate_t2)), _finite(image)


class FluxTransformerBlock(transformer_flux.FluxTransformerBlock):
    """FLUX.1's dual-stream block."""

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        """As the parent's."""
        if listened(self.norm1, self.norm1_context):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        exact, image, text = ops_of(self), hidden_states, encoder_hidden_states
        shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2 = modulation(self.norm1, temb).chunk(6, dim=1)
        shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = modulation(self.norm1_context, temb).chunk(6, dim=1)
        out_image, out_text, *adapted = self.attn(
            hidden_states=exact.modulate(self.norm1.norm(image), scale_i, shift_i),
            encoder_hidden_states=exact.modulate(self.norm1_context.norm(text), scale_t, shift_t),
            image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        image = exact.gated_residual(image, out_image, gate_i)
        out = self.ff(exact.modulate(self.norm2(image), scale_i2, shift_i2))
        image = exact.gated_residual(image, out, gate_i2)
        if adapted:  # an IP-adapter's third output
            image = image + adapted[0]
        text = exact.gated_residual(text, out_text, gate_t)
        out = self.ff_context(exact.modulate(self.norm2_context(text), scale_t2, shift_t2))
        return _finite(exact.gated_residual(text, out, gate_t2)), image


class FluxSingleTransformerBlock(transformer_flux.FluxSingleTransformerBlock):
    """FLUX.1's single-stream block."""

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None):
        """As the parent's."""
        if listened(self.norm):
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, joint_attention_kwargs)
        exact, tokens = ops_of(self), encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        shift, scale, gate = modulation(self.norm, temb).chunk(3, dim=1)
        normed = exact.modulate(self.norm.norm(both), scale, shift)
        hidden = self.act_mlp(self.proj_mlp(normed))
        attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
        both = _finite(exact.gated_residual(both, self.proj_out(torch.cat([attended, hidden], dim=2)), gate))
        return both[:, :tokens], both[:, tokens:]


class JointTransformerBlock(diffusers_attention.JointTransformerBlock):
    """The block of SD3 and SD3.5."""

    def forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs=None):
        """As the parent's; chunked feed-forward takes the parent's path."""
        if self._chunk_size is not None or listened(self.norm1, self.norm1_context):
            return super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        exact, text, options = ops_of(self), encoder_hidden_states, joint_attention_kwargs or {}
        image = hidden_states.contiguous()  # a ControlNet's patches come with tokens innermost
        shift_i, scale_i, gate_i, shift_i2, scale_i2, gate_i2, *twice = modulation(self.norm1, temb).chunk(
            9 if self.use_dual_attention else 6, dim=1)
        normed = self.norm1.norm(image)
        if self.context_pre_only:  # this norm has scale before shift
            scale_t, shift_t = modulation(self.norm1_context, temb).chunk(2, dim=1)
        else:
            mod = modulation(self.norm1_context, temb)
            shift_t, scale_t, gate_t, shift_t2, scale_t2, gate_t2 = mod.chunk(6, dim=1)
        out_image, out_text = self.attn(
            hidden_states=exact.modulate(normed, scale_i, shift_i),
            encoder_hidden_states=exact.modulate(self.norm1_context.norm(text), scale_t, shift_t), **options)
        image = exact.gated_residual(image, out_image, gate_i)
        if twice:
            shift, scale, gate = twice
            image = exact.gated_residual(
                image, self.attn2(hidden_states=exact.modulate(normed, scale, shift), **options), gate)
        out = self.ff(exact.modulate(self.norm2(image), scale_i2, shift_i2))
        image = exact.gated_residual(image, out, gate_i2)
        if self.context_pre_only:
            return None, image
        text = exact.gated_residual(text, out_text, gate_t)
        out = self.ff_context(exact.modulate(self.norm2_context(text), scale_t2, shift_t2))
        return exact.gated_residual(text, out, gate_t2), image


BLOCKS: dict[type[nn.Module], type[nn.Module]] = {exact.__mro__[1]: exact for exact in (
    QwenImageTransformerBlock, FluxTransformerBlock, FluxSingleTransformerBlock, JointTransformerBlock)}


def _finite(x: torch.Tensor) -> torch.Tensor:
    """float16 clipped to its range, as the stock blocks do."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


# Attention: the stock processor, its projections taken from one product. ------------------------------------------

_PROJECTIONS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))


class _Together:
    """An attention module whose projections come from one product per stream, where their weights allow."""

    def __init__(self, attn: nn.Module, streams: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        self._attn = attn
        self._packed = []
        for names, x in zip(_PROJECTIONS, streams, strict=True):
            modules = [getattr(attn, name, None) for name in names]
            packed = None if x is None or None in modules else projections.adjacent(attn, modules, x)
            if packed is not None:
                self._packed.append((names, x, *packed))

    def project(self) -> _Together:
        """Run the products; the module's projections then return their part of them."""
        for names, x, weight, bias, sizes in self._packed:
            for name, part in zip(names, F.linear(x, weight, bias).split(sizes, -1), strict=True):
                self.__dict__[name] = lambda _x, part=part: part
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


def _packing(stock: type) -> type:
    """A stock processor's class -> one that projects each stream by one product where that gives the same bits."""

    class Processor(stock):
        @functools.wraps(stock.__call__)  # diffusers reads the signature to choose what it passes
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
            def call(module):
                return stock.__call__(self, module, hidden_states, encoder_hidden_states, *args, **kwargs)

            streams = (hidden_states, encoder_hidden_states)
            together = _Together(attn, streams)
            # Comparing runs attention twice, and processes of context parallelism must agree on how often they meet.
            if not together._packed or getattr(self, "_parallel_config", None) is not None:
                return call(attn)
            return self.exact.run("projections", streams, lambda: call(together.project()), lambda: call(attn),
                                  needs_kernels=False)

    Processor.__name__ = Processor.__qualname__ = f"Exact{stock.__name__}"
    return Processor


PROCESSORS: dict[type, type] = {stock: _packing(stock) for stock in (
    transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0, transformer_flux.FluxAttnProcessor,
    diffusers_processor.JointAttnProcessor2_0)}
globals().update({processor.__name__: processor for processor in PROCESSORS.values()})  # where pickle looks for them
known_to_layer_skip(PROCESSORS[transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0])
