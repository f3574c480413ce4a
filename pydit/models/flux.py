"""FLUX.1: the adapter of the family and the class of its pruned models.

Dual blocks come first, then single blocks, which take and return both streams like the others.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

# diffusers loads a pipeline component only from a module whose namespace holds ModelMixin.
from diffusers import FluxTransformer2DModel, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

from pydit.errors import UserError
from pydit.families import BlockSpec
from pydit.models import flux_lora
from pydit.models.adapter import BlockIO, ModelAdapter
from pydit.models.caches import know_as
from pydit.models.flux_blocks import PrunedFluxSingleTransformerBlock, PrunedFluxTransformerBlock
from pydit.models.pruned import AffineBlock, PrunedModel, affine_in_place_of, plan_of, require_depth
from pydit.plan import PruningPlan

flux_lora.install()

__all__ = ["FluxAdapter", "ModelMixin", "PrunedFluxTransformer2DModel"]


class FluxAdapter(ModelAdapter):
    """Dual blocks in ``transformer_blocks``, single ones in ``single_transformer_blocks``; both return text first."""

    family = "flux.1"
    needed = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids")
    multiplied = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    block_io = BlockIO(
        inputs=("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs"),
        image="hidden_states", text="encoder_hidden_states", text_first=True)
    modulation = ("norm1", "norm1_context", "norm")

    def require_inputs(self, transformer: nn.Module, batch: Mapping[Any, Any], what: str) -> None:
        super().require_inputs(transformer, batch, what)
        embedded, given = transformer.config["guidance_embeds"], batch.get("guidance") is not None
        if embedded != given:  # diffusers calls it a NoneType without a dtype, or one argument too many
            wanted, got = ("a", "none") if embedded else ("no", "one")
            raise UserError(f"batches: expected {wanted} guidance, because guidance_embeds is {embedded}, got "
                            f"{got} in {what}")

    def width(self, transformer: nn.Module) -> int:
        return transformer.inner_dim

    def text_mask(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        return None  # FLUX.1 attends to the padding of its prompts

    def last_linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        if not isinstance(block, FluxTransformerBlock) or block.__dict__.get("spec", BlockSpec((0,))).form == "single":
            return {}  # the one output projection of a single block serves both streams
        branches = {"image": getattr(block, "ff", None), "text": getattr(block, "ff_context", None)}
        return {stream: mlp.net[2] for stream, mlp in branches.items() if mlp is not None}

    def segments_of(self, plan: PruningPlan, config: Mapping[str, Any]) -> tuple[int, ...]:
        return config["num_layers"], config["num_single_layers"]

    def student_config(self, config: Mapping[str, Any], plan: PruningPlan) -> dict[str, Any]:
        dual = sum(layers[0] < config["num_layers"] for layers in plan.source)
        return {"num_layers": dual, "num_single_layers": plan.num_student_layers - dual}

    def teacher_config(self, student: nn.Module) -> dict[str, Any]:
        config = super().teacher_config(student)
        dual = sum(map(len, student.transformer_blocks.source))
        return config | {"num_layers": dual, "num_single_layers": student.plan.num_layers - dual}

    def pruned_class(self) -> type[nn.Module]:
        return PrunedFluxTransformer2DModel

    def stock_class(self) -> type[nn.Module]:
        return FluxTransformer2DModel

    def stock_block(self, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> nn.Module:
        heads, dim = config["num_attention_heads"], config["attention_head_dim"]
        kind = FluxSingleTransformerBlock if "proj_mlp.weight" in state else FluxTransformerBlock
        return kind(dim=heads * dim, num_attention_heads=heads, attention_head_dim=dim)

    def new_block(self, block: nn.Module, spec: BlockSpec) -> nn.Module:
        if spec.is_stock:
            return block
        if spec.form == "affine":
            return affine_in_place_of(block, spec)
        single = isinstance(block, FluxSingleTransformerBlock)
        return (PrunedFluxSingleTransformerBlock if single else PrunedFluxTransformerBlock).from_stock(block, spec)

    def modulated_text(self, block: nn.Module, text: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        norm = block.norm if isinstance(block, FluxSingleTransformerBlock) else block.norm1_context
        return norm(text, emb=kwargs["temb"])[0]


class PrunedFluxTransformer2DModel(PrunedModel, FluxTransformer2DModel):
    """A FLUX.1 transformer after a plan; see :class:`pydit.models.pruned.PrunedModel`."""

    __module__ = "pydit"  # where diffusers finds the class of a component after `import pydit`
    family = "flux.1"
    _no_split_modules: ClassVar = ["FluxTransformerBlock", "FluxSingleTransformerBlock", "PrunedFluxTransformerBlock",
                                   "PrunedFluxSingleTransformerBlock", "AffineBlock"]
    _repeated_blocks: ClassVar = ["FluxTransformerBlock", "FluxSingleTransformerBlock", "PrunedFluxTransformerBlock",
                                  "PrunedFluxSingleTransformerBlock"]

    residual_arguments: ClassVar = {
        "controlnet_block_samples": ("transformer_blocks", "ceil"),
        "controlnet_single_block_samples": ("single_transformer_blocks", "ceil")}

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        pydit: dict[str, Any] | None = None,
    ) -> None:
        depth = num_layers + num_single_layers
        plan = PruningPlan(self.family, depth) if pydit is None else plan_of(pydit, self.family)
        require_depth(plan, depth)
        super().__init__(
            patch_size=patch_size, in_channels=in_channels, out_channels=out_channels, num_layers=num_layers,
            num_single_layers=num_single_layers, attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads, joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim, guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope)
        self._adopt(plan)

    @functools.wraps(FluxTransformer2DModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(**self._with_residuals(args, kwargs))


for _form, _stock in ((PrunedFluxTransformerBlock, FluxTransformerBlock), (AffineBlock, FluxTransformerBlock),
                      (PrunedFluxSingleTransformerBlock, FluxSingleTransformerBlock)):
    know_as(_form, _stock)
