"""The blocks of every family as a benchmark meets them: how one is made, what it is called with, what it costs.

A configuration is one of :data:`CONFIGS`: a published size, or a narrow one for a CPU. A block of it is told by a
:class:`pydit.families.BlockSpec` whose first source layer says which class it is of, where a family has several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Work
from pydit.errors import UserError
from pydit.families import FAMILIES, BlockSpec
from pydit.plan import PruningPlan


@dataclass(frozen=True)
class Size:
    """A configuration and what it is run at: pixels of a side, text tokens."""

    family: str
    config: Mapping[str, Any]
    model: Mapping[str, Any]  # what the transformer's class takes beyond it
    pixels: int = 1024
    text: int = 512
    narrow: bool = False  # of any depth


_TINY = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 24}
CONFIGS = {
    "qwen-image": Size("qwen-image", FAMILIES["qwen-image"].published[0], {}, 1328),
    "flux.1-dev": Size("flux.1", FAMILIES["flux.1"].published[0], {}),
    "sd3.5-large": Size("sd3.5", FAMILIES["sd3.5"].published[0], {"sample_size": 128, "pos_embed_max_size": 192},
                        text=333),
    "sd3.5-medium": Size("sd3.5", FAMILIES["sd3.5"].published[1], {"sample_size": 128, "pos_embed_max_size": 384},
                         text=333),
    "tiny": Size("qwen-image", {**FAMILIES["qwen-image"].published[0], **_TINY, "in_channels": 16, "out_channels": 4},
                 {"axes_dims_rope": (8, 12, 12)}, 1328, narrow=True),
    "tiny-flux.1": Size("flux.1", {**FAMILIES["flux.1"].published[0], **_TINY, "in_channels": 16,
                                   "pooled_projection_dim": 16}, {"axes_dims_rope": (8, 12, 12)}, narrow=True),
    "tiny-sd3.5": Size("sd3.5", {**FAMILIES["sd3.5"].published[0], **_TINY, "in_channels": 4, "out_channels": 4,
                                 "caption_projection_dim": 64, "pooled_projection_dim": 16,
                                 "dual_attention_layers": (0, 1)},
                       {"sample_size": 64, "pos_embed_max_size": 64}, narrow=True),
}


def config_of(name: str, plan: PruningPlan) -> dict[str, Any]:
    """The configuration of the dense model that a plan is for; UserError where they do not belong together."""
    size = CONFIGS[name]
    if plan.family != size.family:
        raise UserError(f"plan: expected one of {size.family} for {name}, got one of {plan.family}")
    config, depth = dict(size.config), FAMILIES[size.family].depth(size.config)
    if size.narrow and plan.num_layers != depth:  # as many of each class as the published model has, in proportion
        dual = max(1, round(plan.num_layers * config["num_layers"] / depth))
        if "num_single_layers" in config:
            config["num_single_layers"] = plan.num_layers - dual
        config["num_layers"] = dual if "num_single_layers" in config else plan.num_layers
    elif plan.num_layers != depth:
        raise UserError(f"plan: expected one of {depth} layers for {name}, got one of {plan.num_layers}")
    return config


def dense_plan(name: str) -> PruningPlan:
    """The plan of a configuration that removes nothing."""
    size = CONFIGS[name]
    return PruningPlan(size.family, 6 if size.narrow else FAMILIES[size.family].depth(size.config))


def is_single(family: str, config: Mapping[str, Any], spec: BlockSpec) -> bool:
    """Whether it is one of FLUX.1's single blocks, with attention and MLP side by side."""
    return family == "flux.1" and spec.source[0] >= config["num_layers"]


def has_second(family: str, config: Mapping[str, Any], spec: BlockSpec) -> bool:
    """Whether it has SD3.5 medium's second attention."""
    return family == "sd3.5" and spec.form != "affine" and spec.source[0] in config["dual_attention_layers"]


def is_last(family: str, config: Mapping[str, Any], spec: BlockSpec) -> bool:
    """Whether it is SD3.5's last, whose text has no output to begin with."""
    return FAMILIES[family].text_ends and spec.form != "affine" and spec.source[-1] == config["num_layers"] - 1


def kind_of(family: str, config: Mapping[str, Any], spec: BlockSpec) -> str:
    """Blocks of one kind cost the same. Of Qwen-Image as :mod:`benchmarks.cases.whole_block` names them."""
    if spec.form == "affine":
        return "affine"
    if spec.form == "single":  # which no plan thins out further
        name = "single_stream"
    else:
        ffn = "_ffn" if spec.ffn == "linear" else ""
        name = {"full": {"mlp": "dense", "linear": "linear_ffn", "linear text": "text_ffn"}[spec.ffn],
                "keys": f"text_keys{ffn}",
                "linear": f"{'text_end' if spec.text_output else 'text_linear'}{ffn}"}[spec.text]
    single, last = is_single(family, config, spec), is_last(family, config, spec)
    return ("single_" if single else "") + name + ("_attn2" if has_second(family, config, spec) else "") + (
        "_last" if last else "")


def representative(family: str, config: Mapping[str, Any], spec: BlockSpec) -> BlockSpec:
    """A block of the same kind without what its plan has around it: other layers, weights that nothing reads."""
    layer = spec.source[-1] if is_last(family, config, spec) else spec.source[0]
    return replace(spec, source=(layer,), dead_query=False, hands_on=False, anchor=None if spec.anchor is None else 0)


def stock_block(family: str, config: Mapping[str, Any], spec: BlockSpec) -> nn.Module:
    """diffusers' block that a plan makes this one of."""
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    sizes = {"dim": heads * dim, "num_attention_heads": heads, "attention_head_dim": dim}
    if family == "sd3.5":
        from diffusers.models.attention import JointTransformerBlock

        return JointTransformerBlock(**sizes, qk_norm=config["qk_norm"], context_pre_only=is_last(family, config, spec),
                                     use_dual_attention=has_second(family, config, spec))
    if family == "flux.1":
        from diffusers.models.transformers import transformer_flux

        if is_single(family, config, spec):
            return transformer_flux.FluxSingleTransformerBlock(**sizes)
        return transformer_flux.FluxTransformerBlock(**sizes)
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    return QwenImageTransformerBlock(**sizes)


def others(family: str, config: Mapping[str, Any], spec: BlockSpec, batch: int, image: int, text: int, device: str,
           dtype: torch.dtype) -> list[torch.Tensor]:
    """What a block takes beside its streams: the time embedding, and two rotary tables where the family has them."""
    if spec.form == "affine":
        return []
    width, dim = config["num_attention_heads"] * config["attention_head_dim"], config["attention_head_dim"]
    found = [torch.randn(batch, width, device=device, dtype=dtype)]
    if family == "qwen-image":
        found += [torch.polar(torch.ones(n, dim // 2, device=device), torch.randn(n, dim // 2, device=device))
                  for n in (image, text)]
    if family == "flux.1":  # cosines and sines of both streams, text first, every angle twice
        angles = torch.randn(text + image, dim // 2, device=device).repeat_interleave(2, 1)
        found += [angles.cos(), angles.sin()]
    return found


def call(family: str, block: nn.Module, spec: BlockSpec, args: tuple[torch.Tensor, ...]) -> Any:
    """(image, text) of a block, or the image alone where it writes no text."""
    image, text, *rest = args
    if spec.form == "affine":
        text, image = block(image, text)
    elif family == "qwen-image":
        text, image = block(image, text, None, rest[0], (rest[1], rest[2]))
    elif family == "flux.1":
        text, image = block(image, text, rest[0], (rest[1], rest[2]))
    else:
        text, image = block(image, text, rest[0])
    return image if spec.text == "keys" or text is None else (image, text)


def block_work(family: str, config: Mapping[str, Any], spec: BlockSpec, batch: int, image: int, text: int,
               element_bytes: int) -> Work:
    """Weights, both streams in and what is written of them out, the time embedding and the rotary tables; products of
    :mod:`pydit.families`, those of a last block without the text queries that nothing reads."""
    width, dim = config["num_attention_heads"] * config["attention_head_dim"], config["attention_head_dim"]
    last = is_last(family, config, spec) and spec.text == "full"
    parameters = FAMILIES[family].block_parameters(config, spec)
    texts = 1 if last else {"linear": 2 * 2, "keys": 1}.get(spec.text, 2)  # in and out; a text-linear block passes two
    texts -= spec.text_output  # tensors on, unless it ends its region
    streams = batch * width * (2 * image + texts * text)
    affine = spec.form == "affine"
    tables = 0 if affine else {"qwen-image": 8 * (dim // 2), "flux.1": 8 * dim, "sd3.5": 0}[family] * (image + text)
    counted = replace(spec, text="keys") if last else spec
    return Work(bytes=element_bytes * (parameters + streams + (0 if affine else batch * width)) + tables,
                flops=batch * FAMILIES[family].block_flops(config, counted, image, text))
