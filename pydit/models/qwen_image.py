"""Qwen-Image: the adapter of the family and the class of its pruned models."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

# diffusers loads a pipeline component only from a module whose namespace holds ModelMixin.
from diffusers import ModelMixin, QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import nn

from pydit.families import BlockSpec
from pydit.models.adapter import BlockIO, ModelAdapter
from pydit.models.caches import know_as
from pydit.models.pruned import AffineBlock, PrunedModel, affine_in_place_of, plan_of, require_depth
from pydit.models.qwen_image_blocks import PrunedQwenImageTransformerBlock
from pydit.plan import PruningPlan

__all__ = ["ModelMixin", "PrunedQwenImageTransformer2DModel", "QwenImageAdapter"]


class QwenImageAdapter(ModelAdapter):
    """Dual-stream blocks in ``transformer_blocks``; a block returns text first."""

    family = "qwen-image"
    needed = ("hidden_states", "encoder_hidden_states", "timestep", "img_shapes")
    multiplied = ("hidden_states",)
    block_io = BlockIO(
        inputs=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "image_rotary_emb",
                "joint_attention_kwargs", "modulate_index"),
        image="hidden_states", text="encoder_hidden_states", text_first=True)
    modulation = ("img_mod", "txt_mod")

    def width(self, transformer: nn.Module) -> int:
        return transformer.inner_dim

    def text_mask(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        mask = kwargs.get("encoder_hidden_states_mask")
        return None if mask is None else mask.bool()

    def last_linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        if isinstance(block, AffineBlock) or block.__dict__.get("spec", BlockSpec((0,))).form == "single":
            return {}
        branches = {"image": getattr(block, "img_mlp", None), "text": getattr(block, "txt_mlp", None)}
        return {stream: mlp.net[2] for stream, mlp in branches.items() if mlp is not None}

    def stock_class(self) -> type[nn.Module]:
        return QwenImageTransformer2DModel

    def stock_block(self, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> nn.Module:
        heads, dim = config["num_attention_heads"], config["attention_head_dim"]
        return QwenImageTransformerBlock(dim=heads * dim, num_attention_heads=heads, attention_head_dim=dim,
                                         zero_cond_t=config["zero_cond_t"])

    def new_block(self, block: nn.Module, spec: BlockSpec) -> nn.Module:
        if spec.is_stock:
            return block
        if spec.form == "affine":
            return affine_in_place_of(block, spec)
        return PrunedQwenImageTransformerBlock.from_stock(block, spec)

    def modulated_text(self, block: nn.Module, text: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        temb = kwargs["temb"].chunk(2, dim=0)[0] if block.zero_cond_t else kwargs["temb"]
        return block._modulate(block.txt_norm1(text), block.txt_mod(temb).chunk(2, dim=-1)[0])[0]

    def pruned_class(self) -> type[nn.Module]:
        return PrunedQwenImageTransformer2DModel


class PrunedQwenImageTransformer2DModel(PrunedModel, QwenImageTransformer2DModel):
    """A Qwen-Image transformer after a plan; see :class:`pydit.models.pruned.PrunedModel`."""

    __module__ = "pydit"  # where diffusers finds the class of a component after `import pydit`
    family = "qwen-image"
    _no_split_modules: ClassVar = ["QwenImageTransformerBlock", "PrunedQwenImageTransformerBlock", "AffineBlock"]
    _repeated_blocks: ClassVar = ["QwenImageTransformerBlock", "PrunedQwenImageTransformerBlock"]

    residual_arguments: ClassVar = {"controlnet_block_samples": ("transformer_blocks", "ceil")}

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
        pydit: dict[str, Any] | None = None,
    ) -> None:
        plan = PruningPlan(self.family, num_layers) if pydit is None else plan_of(pydit, self.family)
        require_depth(plan, num_layers)
        super().__init__(
            patch_size=patch_size, in_channels=in_channels, out_channels=out_channels, num_layers=num_layers,
            attention_head_dim=attention_head_dim, num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim, guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope, zero_cond_t=zero_cond_t, use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope)
        self._adopt(plan)

    @functools.wraps(QwenImageTransformer2DModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(**self._with_residuals(args, kwargs))


for _form in (PrunedQwenImageTransformerBlock, AffineBlock):
    know_as(_form, QwenImageTransformerBlock)
