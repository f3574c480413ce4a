"""Whole Qwen-Image blocks: dense, and every kind that a plan leaves of one. What a pruned layer costs.

Weights are random: latency, never quality. ``run`` is the block as :func:`pydit.accelerate` makes it, eager and the
compiler run the same weights through diffusers' operations.
"""

from __future__ import annotations

import copy

import torch

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.cases.linear import own_kernel
from benchmarks.peers import Peer, compiled, eager_peer, needs_gpu
from pydit.families import FAMILIES, BlockSpec

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
# Further kinds that plans have, for benchmarks.layers: text that is linear with a linear FFN, or at its region's end.
MORE_KINDS = {
    "text_linear_ffn": BlockSpec((0,), text="linear", ffn="linear", anchor=0, dead_query=False),
    "text_end": BlockSpec((0,), text="linear", anchor=0, text_output=True, dead_query=False),
    "text_end_ffn": BlockSpec((0,), text="linear", ffn="linear", anchor=0, text_output=True, dead_query=False),
    "text_keys_ffn": BlockSpec((0,), text="keys", ffn="linear", dead_query=False),
}


def cases(size: str) -> list[Case]:
    return [block(*shape, kind) for shape in SHAPES[size] for kind in KINDS]


def block_work(config: dict, spec: BlockSpec, batch: int, image: int, text: int, element_bytes: int) -> Work:
    """Weights, both streams in and what is written of them out, the time embedding and the rotary tables; products of
    :mod:`pydit.families`."""
    family, width = FAMILIES["qwen-image"], config["num_attention_heads"] * config["attention_head_dim"]
    parameters = family.block_parameters(config, spec)
    texts = {"linear": 2 * 2, "keys": 1}.get(spec.text, 2)  # in and out; a text-linear block passes two tensors on,
    texts -= spec.text_output  # unless it ends its region
    streams = batch * width * (2 * image + texts * text)
    tables = 0 if spec.form == "affine" else 8 * config["attention_head_dim"] // 2 * (image + text)
    embedding = 0 if spec.form == "affine" else batch * width
    return Work(bytes=element_bytes * (parameters + streams + embedding) + tables,
                flops=batch * family.block_flops(config, spec, image, text))


def block(model, batch, image, text, heads, dim, dtype, kind) -> Case:
    spec, width = (KINDS | MORE_KINDS)[kind], heads * dim
    config = {"num_attention_heads": heads, "attention_head_dim": dim}

    def make(device):
        """image, text, then but for an affine block the time embedding and both rotary tables, then the weights."""
        from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

        from pydit.models import attention, fused_blocks, get_adapter

        with torch.device(device):
            stock = QwenImageTransformerBlock(dim=width, num_attention_heads=heads, attention_head_dim=dim)
        stock = get_adapter("qwen-image").new_block(stock, spec).to(DTYPES[dtype]).requires_grad_(False)
        for name, p in stock.named_parameters():
            if name.endswith("mod.1.bias"):
                p.normal_(std=0.5)  # so that gates let something through
            elif "norm" not in name and p.ndim == 2:
                p.normal_(std=0.7 * p.shape[1] ** -0.5)
        fused = copy.copy(stock)
        fused.__dict__ = {**stock.__dict__, "_modules": dict(stock._modules)}
        fused.__class__ = fused_blocks.FUSED[type(stock)]
        if spec.form != "affine":
            fused.attn = copy.copy(stock.attn)
            fused.attn.__dict__ = {**stock.attn.__dict__, "_modules": dict(stock.attn._modules)}
            fused.attn.processor = attention.QwenImageAttnProcessor()
            attention.pack_projections(stock.attn)
        streams = [torch.randn(batch, n, width, device=device, dtype=DTYPES[dtype])
                   for n in (image, text * (2 if spec.text == "linear" else 1))]
        others = []
        if spec.form != "affine":
            others = [torch.randn(batch, width, device=device, dtype=DTYPES[dtype])]
            others += [torch.polar(torch.ones(n, dim // 2, device=device), torch.randn(n, dim // 2, device=device))
                       for n in (image, text)]
        parameters = list(stock.parameters())
        parameters[0].blocks = stock, fused  # which live as long as the inputs do
        return (*streams, *others, *parameters)

    def through(which):
        def call(*args):
            first = args[2 if spec.form == "affine" else 5]
            return _call(first.blocks[which], spec, args)
        return call

    def exact(*args):
        first = args[2 if spec.form == "affine" else 5]
        wide = copy.deepcopy(first.blocks[0]).double()
        return _call(wide, spec, [a.to(torch.complex128) if a.is_complex() else a.double() for a in args])

    eager = through(0)
    return Case(f"block_{kind}", model, f"{batch}x{image}+{text}x{heads}x{dim}", dtype,
                block_work(config, spec, batch, image, text, DTYPES[dtype].itemsize), make, through(1), exact, eager,
                (eager_peer(eager), compiled(eager),
                 Peer("pydit grouped linears", lambda: own_kernel(through(1)), needs_gpu(), rival=False)))


def _call(module, spec: BlockSpec, args):
    """(image, text) of a block, or the image alone where it writes no text."""
    if spec.form == "affine":
        text, image = module(args[0], args[1])
    else:
        image, text, temb, rotation_image, rotation_text = args[:5]
        text, image = module(image, text, None, temb, (rotation_image, rotation_text))
    return image if spec.text == "keys" else (image, text)
