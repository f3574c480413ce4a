"""SD3 and SD3.5: the adapter of the family and the class of its pruned models.

The last block of these models has no text output (``context_pre_only``), and some blocks of SD3.5 medium have a second,
image-only attention. A block that stands for an interval has it when the interval's first layer does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

# diffusers loads a pipeline component only from a module whose namespace holds ModelMixin.
from diffusers import ModelMixin, SD3Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn

from pydit.families import BlockSpec
from pydit.models.adapter import BlockIO, ModelAdapter
from pydit.models.pruned import AffineBlock, PrunedModel, affine_in_place_of, plan_of, require_depth
from pydit.models.sd3_blocks import PrunedJointTransformerBlock
from pydit.plan import PruningPlan

__all__ = ["ModelMixin", "PrunedSD3Transformer2DModel", "SD3Adapter"]


class SD3Adapter(ModelAdapter):
    """Joint blocks in ``transformer_blocks``; a block returns text first, the last one None for it."""

    family = "sd3.5"
    needed = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    multiplied = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    block_io = BlockIO(inputs=("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs"),
                       image="hidden_states", text="encoder_hidden_states", text_first=True)
    modulation = ("norm1", "norm1_context")

    def width(self, transformer: nn.Module) -> int:
        return transformer.inner_dim

    def text_mask(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        return None  # these models have no text mask

    def last_linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        if isinstance(block, AffineBlock) or block.__dict__.get("spec", BlockSpec((0,))).form == "single":
            return {}
        branches = {"image": getattr(block, "ff", None), "text": getattr(block, "ff_context", None)}
        return {stream: mlp.net[2] for stream, mlp in branches.items() if mlp is not None}

    def student_config(self, config: Mapping[str, Any], plan: PruningPlan) -> dict[str, Any]:
        twice = tuple(block for block, layers in enumerate(plan.source) if layers[0] in config["dual_attention_layers"])
        return {"num_layers": plan.num_student_layers, "dual_attention_layers": twice}

    def teacher_config(self, student: nn.Module) -> dict[str, Any]:
        blocks = student.transformer_blocks  # a layer that is not attached is the student's own
        layers = dict(zip((layers[0] for layers in blocks.source), student.own_blocks, strict=True))
        layers |= blocks.teacher.layers
        twice = [k for k, block in layers.items() if getattr(block, "attn2", None) is not None]
        return super().teacher_config(student) | {"dual_attention_layers": tuple(sorted(twice))}

    def pruned_class(self) -> type[nn.Module]:
        return PrunedSD3Transformer2DModel

    def stock_class(self) -> type[nn.Module]:
        return SD3Transformer2DModel

    def stock_block(self, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> nn.Module:
        heads, dim = config["num_attention_heads"], config["attention_head_dim"]
        return JointTransformerBlock(
            dim=heads * dim, num_attention_heads=heads, attention_head_dim=dim, qk_norm=config["qk_norm"],
            context_pre_only="attn.to_add_out.weight" not in state,
            use_dual_attention=any(name.startswith("attn2.") for name in state))

    def new_block(self, block: nn.Module, spec: BlockSpec) -> nn.Module:
        if spec.is_stock:
            return block
        return affine_in_place_of(block, spec) if spec.form == "affine" else \
            PrunedJointTransformerBlock.from_stock(block, spec)

    def modulated_text(self, block: nn.Module, text: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        if block.context_pre_only:
            return block.norm1_context(text, kwargs["temb"])
        return block.norm1_context(text, emb=kwargs["temb"])[0]

    def conform(self, block: nn.Module, layer: nn.Module) -> nn.Module:
        if layer.context_pre_only and not block.context_pre_only:
            _drop_text_output(block)
        return block


def _drop_text_output(block: JointTransformerBlock) -> None:
    """Make a block one that can be the last, in place: its text gives queries, keys and values only."""
    old, width = block.norm1_context.linear, block.norm2.normalized_shape[0]
    with torch.device("meta"):
        norm = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6, bias=True,
                                      norm_type="layer_norm")
    # AdaLayerNormZero has shift, then scale, of six chunks; AdaLayerNormContinuous has scale, then shift.
    for name in ("weight", "bias"):
        shift, scale = getattr(old, name).detach().chunk(6)[:2]
        setattr(norm.linear, name, nn.Parameter(torch.cat((scale, shift))))
    block.norm1_context, block.context_pre_only = norm, True
    block.attn.context_pre_only = True
    for name in ("norm2_context", "ff_context"):
        delattr(block, name)  # a child set to None would let a strict load pass over its weights
        setattr(block, name, None)
    del block.attn.to_add_out


class PrunedSD3Transformer2DModel(PrunedModel, SD3Transformer2DModel):
    """An SD3 or SD3.5 transformer after a plan; see :class:`pydit.models.pruned.PrunedModel`."""

    __module__ = "pydit"  # where diffusers finds the class of a component after `import pydit`
    family = "sd3.5"
    _no_split_modules: ClassVar = ["JointTransformerBlock", "PrunedJointTransformerBlock", "AffineBlock"]

    residual_arguments: ClassVar = {"block_controlnet_hidden_states": ("transformer_blocks", "share")}

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        pydit: dict[str, Any] | None = None,
    ) -> None:
        plan = PruningPlan(self.family, num_layers) if pydit is None else plan_of(pydit, self.family)
        require_depth(plan, num_layers)
        super().__init__(
            sample_size=sample_size, patch_size=patch_size, in_channels=in_channels, num_layers=num_layers,
            attention_head_dim=attention_head_dim, num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim, caption_projection_dim=caption_projection_dim,
            pooled_projection_dim=pooled_projection_dim, out_channels=out_channels,
            pos_embed_max_size=pos_embed_max_size, dual_attention_layers=dual_attention_layers, qk_norm=qk_norm)
        self._adopt(plan)

    @functools.wraps(SD3Transformer2DModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(**self._with_residuals(args, kwargs))
