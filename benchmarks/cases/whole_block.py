"""Whole Qwen-Image blocks: dense, and every kind that a plan leaves of one. What a pruned layer costs.

Weights are random: latency, never quality. ``run`` is the block as :func:`pydit.accelerate` makes it, eager and the
compiler run the same weights through diffusers' operations.
"""

from __future__ import annotations

import copy

import torch

from benchmarks import blocks
from benchmarks.cases import DTYPES, Case
from benchmarks.cases.linear import own_kernel
from benchmarks.peers import Peer, compiled, eager_peer, needs_gpu
from benchmarks.peers.attention import compiled_with_flash
from pydit.families import BlockSpec

SHAPES = {  # model, images, image tokens, text tokens, heads, head dim, dtype
    "full": (("qwen-image", 1, 6889, 512, 24, 128, "bf16"),),
    "small": (("tiny", 2, 24, 7, 2, 32, "bf16"),),
}
KINDS = {
    "dense": BlockSpec((0,)),
    "linear_ffn": BlockSpec((0,), ffn="linear"),
    "text_keys": BlockSpec((0,), text="keys", dead_query=False),
    "text_linear": BlockSpec((0,), text="linear", anchor=0, dead_query=False),
    "single_stream": BlockSpec((0,), form="single"),
    "affine": BlockSpec((0,), form="affine"),
}
# Further kinds that plans have, for benchmarks.layers: a linear FFN in the text alone; text that is linear with a
# linear FFN, or at its region's end.
MORE_KINDS = {
    "text_ffn": BlockSpec((0,), ffn="linear text"),
    "text_linear_ffn": BlockSpec((0,), text="linear", ffn="linear", anchor=0, dead_query=False),
    "text_end": BlockSpec((0,), text="linear", anchor=0, text_output=True, dead_query=False),
    "text_end_ffn": BlockSpec((0,), text="linear", ffn="linear", anchor=0, text_output=True, dead_query=False),
    "text_keys_ffn": BlockSpec((0,), text="keys", ffn="linear", dead_query=False),
}


_PROCESSORS = {"qwen-image": "QwenImageAttnProcessor", "flux.1": "FluxAttnProcessor", "sd3.5": "SD3AttnProcessor"}
_MODULATION = ("mod.1.bias", "norm1.linear.bias", "norm1_context.linear.bias", "norm.linear.bias")


def cases(size: str) -> list[Case]:
    return [block(*shape, kind) for shape in SHAPES[size] for kind in KINDS]


def block(model, batch, image, text, heads, dim, dtype, kind) -> Case:
    """Of Qwen-Image, by the name of its kind."""
    return block_of("qwen-image", {"num_attention_heads": heads, "attention_head_dim": dim}, (KINDS | MORE_KINDS)[kind],
                    kind, model, batch, image, text, dtype)


def block_of(family, config, spec, kind, model, batch, image, text, dtype) -> Case:
    """Of any family; ``spec`` says which block, and ``kind`` is its name."""
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    weights_at = 2 + len(blocks.others(family, config, spec, 1, 1, 1, "cpu", DTYPES[dtype]))

    def make(device):
        """image, text, what :func:`benchmarks.blocks.others` gives, then the weights."""
        from pydit.models import attention, fused_blocks, get_adapter, projections

        with torch.device(device):
            stock = blocks.stock_block(family, config, spec)
        stock = get_adapter(family).new_block(stock, spec).to(DTYPES[dtype]).requires_grad_(False)
        for name, p in stock.named_parameters():
            if name.endswith(_MODULATION):
                p.normal_(std=0.5)  # so that gates let something through
            elif "norm" not in name and p.ndim == 2:
                p.normal_(std=0.7 * p.shape[1] ** -0.5)
        fused = _twin(stock)
        fused.__class__ = fused_blocks.FUSED[type(stock)]
        for name in ("attn", "attn2"):
            inner = getattr(stock, name, None)
            if inner is not None:
                twin = _twin(inner)
                setattr(fused, name, twin)
                twin.processor = getattr(attention, _PROCESSORS[family])()
                projections.pack_projections(twin)
        streams = [torch.randn(batch, n, heads * dim, device=device, dtype=DTYPES[dtype])
                   for n in (image, text * (2 if spec.text == "linear" else 1))]
        more = blocks.others(family, config, spec, batch, image, text, device, DTYPES[dtype])
        parameters = list(stock.parameters())
        parameters[0].blocks = stock, fused  # which live as long as the inputs do
        return (*streams, *more, *parameters)

    def through(which):
        def call(*args):
            return blocks.call(family, args[weights_at].blocks[which], spec, args)
        return call

    def exact(*args):
        wide = copy.deepcopy(args[weights_at].blocks[0]).double()
        return blocks.call(family, wide, spec,
                           tuple(a.to(torch.complex128) if a.is_complex() else a.double() for a in args))

    eager = through(0)
    attends = family == "qwen-image" and spec.form != "affine"
    return Case(f"block_{kind}", model, f"{batch}x{image}+{text}x{heads}x{dim}", dtype,
                blocks.block_work(family, config, spec, batch, image, text, DTYPES[dtype].itemsize), make, through(1),
                exact, eager, (eager_peer(eager), compiled(eager), *(compiled_with_flash(eager) if attends else ()),
                               Peer("pydit grouped linears", lambda: own_kernel(through(1)), needs_gpu(), rival=False)))


def _twin(module: torch.nn.Module) -> torch.nn.Module:
    """Another module on the same parameters and children."""
    twin = copy.copy(module)
    twin.__dict__ = {**module.__dict__, "_modules": dict(module._modules)}
    return twin
