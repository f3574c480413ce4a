"""Qwen-Image: the adapter of the family and the class of its depth-pruned models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# diffusers loads a pipeline component only from a module whose namespace holds ModelMixin.
from diffusers import ModelMixin, QwenImageTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from pydit import files
from pydit.errors import FormatError, UserError
from pydit.models.adapter import BlockIO, ModelAdapter
from pydit.models.routing import RoutedBlocks, TeacherLayers
from pydit.plan import PruningPlan

__all__ = ["ModelMixin", "PrunedQwenImageTransformer2DModel", "QwenImageAdapter"]

TEACHER_FILE = "teacher_layers.safetensors"


class QwenImageAdapter(ModelAdapter):
    """Dual-stream blocks in ``transformer_blocks``; a block returns text first."""

    family = "qwen-image"
    block_io = BlockIO(
        inputs=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "image_rotary_emb",
                "joint_attention_kwargs", "modulate_index"),
        image="hidden_states", text="encoder_hidden_states", text_first=True)
    last_text_used = False
    modulation = ("img_mod", "txt_mod")

    def width(self, transformer: nn.Module) -> int:
        return transformer.inner_dim

    def text_mask(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        mask = kwargs.get("encoder_hidden_states_mask")
        return None if mask is None else mask.bool()

    def last_linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        return {"image": block.img_mlp.net[2], "text": block.txt_mlp.net[2]}

    def pruned_class(self) -> type[nn.Module]:
        return PrunedQwenImageTransformer2DModel


class PrunedQwenImageTransformer2DModel(QwenImageTransformer2DModel):
    """A Qwen-Image transformer in which one block stands for each interval of a plan.

    The configuration is the stock one with ``num_layers`` of the student, plus ``pydit``, which carries the plan, so
    ``save_pretrained`` and ``from_pretrained`` round-trip exactly. The teacher's layers of the intervals may be
    attached; they stay outside ``parameters()`` and ``state_dict()`` and are shared, never copied: ``.to()``,
    ``.train()``, optimisers and ``copy.deepcopy`` leave them alone.

    Attributes
    ----------
    plan : PruningPlan
    source : per block, the list of teacher layers it stands for
    replaced : (block, start, end) for every interval of the plan
    """

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
        plan = PruningPlan("qwen-image", num_layers) if pydit is None else _plan_of(pydit)
        if plan.family != "qwen-image" or plan.num_student_layers != num_layers:
            raise FormatError(f"config: expected num_layers {plan.num_student_layers} and family qwen-image as in the "
                              f"plan, got {num_layers} and {plan.family}")
        super().__init__(
            patch_size=patch_size, in_channels=in_channels, out_channels=out_channels, num_layers=num_layers,
            attention_head_dim=attention_head_dim, num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim, guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope, zero_cond_t=zero_cond_t, use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope)
        self.plan = plan
        self.source = [list(layers) for layers in plan.source]
        self.replaced = list(plan.replaced)
        self.transformer_blocks = RoutedBlocks(list(self.transformer_blocks), plan.source)

    @classmethod
    def from_teacher(cls, teacher: QwenImageTransformer2DModel, plan: PruningPlan, blocks: Iterable[nn.Module],
                     others: Mapping[str, nn.Module]) -> PrunedQwenImageTransformer2DModel:
        """Assemble a student from ready modules, with the teacher attached.

        Parameters
        ----------
        teacher : the model that ``plan`` is for; only read.
        blocks : one block per student block; become the student's own.
        others : every other child of the teacher by name; become the student's own.
        """
        config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
        config.update(num_layers=plan.num_student_layers, pydit={"plan": plan.to_dict()})
        with torch.device("meta"):
            student = cls(**config)
        for name, module in others.items():
            setattr(student, name, module)
        student.transformer_blocks = RoutedBlocks(blocks, plan.source)
        student.attach_teacher(teacher)
        return student.train(teacher.training)

    @property
    def active(self) -> list[tuple[int, int]]:
        """The intervals that run the student's block."""
        return [(start, end) for block, start, end in self.replaced if block not in self.transformer_blocks.inactive]

    def set_active(self, intervals: Iterable[Sequence[int]]) -> None:
        """Run the student's block on the listed intervals and the teacher's own layers on every other one.

        With ``[]`` and untrained kept blocks the model is the teacher, bit for bit.

        Parameters
        ----------
        intervals : [start, end] pairs out of the plan's, in any order.

        Raises
        ------
        UserError
            A pair that is no interval of the plan, or teacher layers that are needed and not attached.
        """
        try:
            wanted = {(int(start), int(end)) for start, end in intervals}
        except (TypeError, ValueError):
            raise UserError(f"intervals: expected [start, end] pairs, got {intervals!r}") from None
        unknown = wanted - set(self.plan.intervals)
        if unknown:
            raise UserError(f"intervals: expected intervals of the plan {list(self.plan.intervals)}, "
                            f"got {sorted(unknown)}")
        inactive = {block: range(start, end + 1) for block, start, end in self.replaced if (start, end) not in wanted}
        missing = sorted({k for layers in inactive.values() for k in layers}
                         - set(self.transformer_blocks.teacher.layers))
        if missing:
            raise UserError(f"intervals: the teacher's layers {missing} are not attached; "
                            "call attach_teacher(teacher) or save with with_teacher=True")
        self.transformer_blocks.inactive = frozenset(inactive)

    def attach_teacher(self, teacher: QwenImageTransformer2DModel) -> None:
        """Share the teacher's layers of the plan's intervals, for :meth:`set_active`."""
        self.plan.require_match(teacher)
        layers = list(teacher.transformer_blocks)
        self.transformer_blocks.teacher = TeacherLayers(
            {k: layers[k] for start, end in self.plan.intervals for k in range(start, end + 1)})

    def to_stock(self) -> QwenImageTransformer2DModel:
        """A plain ``QwenImageTransformer2DModel`` of the student's depth that shares this model's weights.

        What it saves, stock diffusers loads without this package. It always runs the student's blocks.
        """
        config = {key: value for key, value in self.config.items() if not key.startswith("_") and key != "pydit"}
        with torch.device("meta"):
            stock = QwenImageTransformer2DModel(**config)
        for name, module in self.named_children():
            setattr(stock, name, module)
        blocks = self.transformer_blocks
        stock.transformer_blocks = nn.ModuleList(blocks[index] for index in range(len(blocks)))
        return stock.train(self.training)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, with_teacher: bool = False,
                        **kwargs: Any) -> None:
        """As in diffusers; ``with_teacher=True`` also writes the attached teacher layers, for :meth:`set_active`."""
        layers = self.transformer_blocks.teacher.layers
        if with_teacher and not layers and self.replaced:
            raise UserError("with_teacher: no teacher layers are attached; call attach_teacher(teacher) first")
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / TEACHER_FILE
        if with_teacher:
            files.save_safetensors(path, {f"{k}.{name}": tensor for k, layer in layers.items()
                                          for name, tensor in layer.state_dict().items()},
                                   {"format": "pydit-teacher-layers", "version": "1"})
        else:
            path.unlink(missing_ok=True)  # left by an earlier save of another model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in diffusers; teacher layers saved beside the weights are attached."""
        result = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        path = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "") / TEACHER_FILE
        if path.is_file():
            model._load_teacher_layers(path)
        return result

    def _load_teacher_layers(self, path: Path) -> None:
        tensors, metadata = files.load_safetensors(path, what="teacher layers")
        if (metadata.get("format"), metadata.get("version")) != ("pydit-teacher-layers", "1"):
            raise FormatError(f"teacher layers: expected pydit-teacher-layers version 1 in {path}, got {metadata}")
        block = self.transformer_blocks[0]
        layers = {}
        for k in (k for start, end in self.plan.intervals for k in range(start, end + 1)):
            with torch.device("meta"):
                layer = type(block)(dim=block.dim, num_attention_heads=block.num_attention_heads,
                                    attention_head_dim=block.attention_head_dim, zero_cond_t=block.zero_cond_t)
            state = {name.removeprefix(f"{k}."): tensor for name, tensor in tensors.items()
                     if name.startswith(f"{k}.")}
            try:
                layer.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise FormatError(f"teacher layers: layer {k} of {path} does not fit: {error}") from None
            layers[k] = layer.to(self.device, self.dtype).eval().requires_grad_(False)
        self.transformer_blocks.teacher = TeacherLayers(layers)


def _plan_of(entry: Any) -> PruningPlan:
    if not isinstance(entry, Mapping) or set(entry) != {"plan"}:
        raise FormatError(f"config: expected \"pydit\": {{\"plan\": ...}}, got {entry!r}")
    return PruningPlan.from_dict(entry["plan"], what="config")
