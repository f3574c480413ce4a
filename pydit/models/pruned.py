"""What the pruned models of all families share: a plan, plugging of teacher layers, files."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from pydit import files
from pydit.arguments import pairs
from pydit.errors import FormatError, UserError
from pydit.families import BlockSpec
from pydit.models.adapter import get_adapter
from pydit.models.by_source import remap_lora, residuals_by_source, skipped_by_source, warn_of_dropped
from pydit.models.caches import refuse_layer_skip
from pydit.models.routing import RoutedBlocks, TeacherLayers
from pydit.plan import PruningPlan

TEACHER_FILE = "teacher_layers.safetensors"


class Fit(NamedTuple):
    """One linear map of a pruned model and the data it was fitted to.

    name : of the module, below the model. rows : tokens it saw. inputs : its unknowns per output, bias included.
    r2 : share of the variance of its target that it explains there.
    """

    name: str
    rows: int
    inputs: int
    r2: float


class PrunedModel:
    """Mixin of the pruned transformers; the family's diffusers class comes next among the bases.

    The configuration is the stock one of the student's depth, plus ``pydit``, which carries the plan, so
    ``save_pretrained`` and ``from_pretrained`` round-trip exactly. The teacher's layers may be attached; they stay
    outside ``parameters()`` and ``state_dict()`` and are shared, never copied: ``.to()``, ``.train()``, optimisers
    and ``copy.deepcopy`` leave them alone.

    Attributes
    ----------
    plan : PruningPlan
    source : per block, the list of teacher layers it stands for
    replaced : (block, first layer, last layer) of every block that is not the teacher's own
    fits : of the linear maps, if they were fitted in this process
    lora_layers : ``"teacher"``: the LoRAs that are loaded number their blocks as the teacher does and are put where the
        student has those layers; ``"student"``: they were trained on this model.
    """

    plan: PruningPlan
    family: str  # of the class
    lora_layers: str = "teacher"
    residual_arguments: ClassVar[dict[str, tuple[str, str]]]  # of forward -> (list of blocks, rule), see by_source

    def _adopt(self, plan: PruningPlan) -> None:
        """Take a plan after the stock constructor: thinned-out blocks, routed lists."""
        adapter = get_adapter(self.family)
        stock = adapter.blocks(self)
        self.install(plan, [block if spec.is_stock else adapter.new_block(block, spec)
                             for block, spec in zip(stock, plan.blocks, strict=True)])

    def install(self, plan: PruningPlan, blocks: Iterable[nn.Module]) -> None:
        """Become the student of a plan with these blocks, without a teacher attached."""
        self.plan = plan
        self.source = [list(layers) for layers in plan.source]
        self.replaced = list(plan.replaced)
        self.fits: list[Fit] = []
        adapter, blocks = get_adapter(self.family), list(blocks)
        start = 0
        for name, length in zip(adapter.block_lists, adapter.segments_of(plan, self.config), strict=True):
            setattr(self, name, RoutedBlocks(blocks[start:start + length], plan.source[start:start + length]))
            start += length

    @property
    def init(self) -> str:
        """How the blocks of intervals began; see :func:`pydit.prune`."""
        return (self.config.get("pydit") or {}).get("init", "first")

    @property
    def _lists(self) -> list[RoutedBlocks]:
        return [getattr(self, name) for name in get_adapter(self.family).block_lists]

    @property
    def own_blocks(self) -> list[nn.Module]:
        """The student's blocks, whichever of them are active."""
        return [blocks[index] for blocks in self._lists for index in range(len(blocks))]

    @classmethod
    def from_teacher(cls, teacher: nn.Module, plan: PruningPlan, blocks: Iterable[nn.Module],
                     others: Mapping[str, nn.Module], *, init: str = "first") -> Any:
        """Assemble a student from ready modules, with the teacher attached.

        Parameters
        ----------
        teacher : the model that ``plan`` is for; only read.
        blocks : one block per student block; become the student's own.
        others : every other child of the teacher by name; become the student's own.
        init : how the blocks of intervals began, which decides where a LoRA of the teacher goes.
        """
        config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
        config.update(get_adapter(cls.family).student_config(config, plan), pydit=entry_of(plan, init))
        with torch.device("meta"):
            student = cls(**config)
        for name, module in others.items():
            setattr(student, name, module)
        student.install(plan, blocks)
        student.attach_teacher(teacher)
        return student.train(teacher.training)

    @property
    def active(self) -> list[tuple[int, int]]:
        """The intervals that run the student's block."""
        idle = {layer for blocks in self._lists for block in blocks.inactive for layer in blocks.source[block]}
        return [(start, end) for start, end in self.plan.units if start not in idle]

    def set_active(self, intervals: Iterable[Sequence[int]]) -> None:
        """Run the student's blocks on the listed intervals and the teacher's own layers on every other one.

        With ``[]`` and untrained kept blocks the model is the teacher, bit for bit; of a lean plan, whose kept blocks
        lack what no output depends on, within rounding.

        Parameters
        ----------
        intervals : [start, end] pairs out of ``plan.units`` (of a plan with intervals alone, its intervals), in any
            order. A text region and everything in it is one unit; an interval of the plan inside it stands for it.

        Raises
        ------
        UserError
            A pair that the plan does not have, teacher layers that are needed and not attached, or a block cache, which
            sits on the blocks that ran when it was enabled.

        Warns
        -----
        UserWarning
            Layers of the teacher are to run, which do not have this model's LoRA.
        """
        if getattr(self, "is_cache_enabled", False):
            raise UserError("set_active: expected a model without a block cache, which sits on the blocks that run "
                            "now, got one with; disable_cache first and enable it afterwards")
        wanted = {self._unit_of(pair) for pair in pairs("intervals", intervals)}
        unknown = wanted - set(self.plan.units)
        if unknown:
            raise UserError(f"intervals: expected intervals of the plan {list(self.plan.units)}, "
                            f"got {sorted(unknown)}")
        idle = {layer for start, end in self.plan.units if (start, end) not in wanted
                for layer in range(start, end + 1)}
        missing = sorted(idle - set(self._lists[0].teacher.layers))
        if missing:
            raise UserError(f"intervals: the teacher's layers {missing} are not attached; "
                            "call attach_teacher(teacher) or save with with_teacher=True")
        if idle and getattr(self, "peft_config", None):
            warnings.warn("set_active: the teacher's layers run without the adapters of this model; load them into the "
                          "teacher too", UserWarning, stacklevel=2)
        for blocks in self._lists:
            blocks.inactive = frozenset(index for index, layers in enumerate(blocks.source) if layers[0] in idle)
        regions = dict(self.plan.text_linear)
        for block, layers in zip(self.own_blocks, self.source, strict=True):
            if layers[0] in regions:
                block.hand_on(regions[layers[0]] not in idle)
        self._rerouted()

    def _rerouted(self) -> None:
        """Tell whoever swaps the modules that run, :func:`pydit.accelerate`, that others do now."""
        swap = self.__dict__.get("_pydit_on_route")
        if swap is not None:
            swap(self)

    def _unit_of(self, pair: tuple[int, int]) -> tuple[int, int]:
        """The unit that an interval of the plan lies in; any other pair as it is."""
        if pair not in self.plan.intervals:
            return pair
        return next((start, end) for start, end in self.plan.units if start <= pair[0] <= end)

    def attach_teacher(self, teacher: nn.Module) -> None:
        """Share the teacher's layers of the plan's units, for :meth:`set_active`."""
        self.plan.require_match(teacher)
        layers = get_adapter(self.family).blocks(teacher)
        self._attach({k: layers[k] for start, end in self.plan.units for k in range(start, end + 1)})
        self._rerouted()

    def _attach(self, layers: Mapping[int, nn.Module]) -> None:
        shared = TeacherLayers(layers)
        for blocks in self._lists:
            blocks.teacher = shared

    def load_lora_adapter(self, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; block numbers are the teacher's unless ``lora_layers`` says ``"student"``.

        Raises
        ------
        UserError
            A path or a hub name, where only a state dict can be renumbered.

        Warns
        -----
        UserWarning
            Weights that have no place in this model.
        """
        if self.lora_layers != "student":
            if not isinstance(pretrained_model_name_or_path_or_dict, Mapping):
                raise UserError("load_lora_adapter: expected a state dict, because block numbers have to follow the "
                                "plan, got a path; load it by pipeline.load_lora_weights or files.load_safetensors")
            if "average" in self.init and kwargs.get("metadata"):
                raise UserError("load_lora_adapter: expected a LoRA without metadata of its own, because blocks that "
                                "began as averages take the average of their layers' adapters, got some")
            alphas, made = kwargs.get("network_alphas") or {}, {}
            renamed, dropped = self.follow_source(pretrained_model_name_or_path_or_dict, alphas=alphas, made=made)
            warn_of_dropped(dropped)
            if alphas:
                kwargs["network_alphas"] = self.follow_source(alphas)[0] | made
            pretrained_model_name_or_path_or_dict = renamed
        return super().load_lora_adapter(pretrained_model_name_or_path_or_dict, *args, **kwargs)

    def save_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers.

        Warns
        -----
        UserWarning
            The file numbers the student's blocks, where loading takes numbers for the teacher's.
        """
        super().save_lora_adapter(*args, **kwargs)
        if self.source != [[k] for k in range(len(self.source))]:
            warnings.warn("save_lora_adapter: the file numbers the blocks of the pruned model; set lora_layers = "
                          '"student" before loading it', UserWarning, stacklevel=2)

    def _load_ip_adapter_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, which gives the adapter's layers to attention modules in their order."""
        if self.source != [[k] for k in range(len(self.source))]:
            raise UserError("load_ip_adapter: expected a model of as many layers as the adapter, which numbers the "
                            "teacher's, got one with layers merged; load it into the teacher and prune that")
        # The adapter's attention asks with the text too; a block without attention would shift the layers behind it.
        blocks = self._lists[0]
        without = [k for k in range(len(blocks)) if not hasattr(getattr(blocks[k], "attn", None), "add_q_proj")]
        if without or blocks.inactive:
            raise UserError("load_ip_adapter: expected dual-stream blocks of the model with attention and text queries "
                            "of their own, got " + (f"blocks {without} without" if without else
                                                    "layers of the teacher that run in place of some")
                            + "; load it into the teacher" + (" and prune that" if without else ""))
        super()._load_ip_adapter_weights(*args, **kwargs)

    def enable_cache(self, config: Any) -> None:
        """As in diffusers.

        Raises
        ------
        UserError
            A cache that copies what attention gives each stream (TaylorSeer, FasterCache), of a model some of whose
            blocks have no text query;
            that of the first block, where a text region begins or stays open at one end of the model; layers of the
            teacher among those that run, where ``disable_cache`` would leave it; a family without caches in diffusers.
        """
        if not hasattr(super(), "enable_cache"):
            raise UserError("enable_cache: expected a model that diffusers has caches for, got "
                            f"{type(self).__name__}, whose stock class has none")
        if any(blocks.inactive for blocks in self._lists):
            raise UserError("enable_cache: expected the model's own blocks to run, got layers of the teacher among "
                            "them; set_active(model.plan.units) first, or cache the teacher itself")
        kind = type(config).__name__
        if kind == "FasterCacheConfig" or (kind == "TaylorSeerCacheConfig" and not config.use_lite_mode):
            without = [k for k, block in enumerate(self.own_blocks)
                       if getattr(getattr(block, "attn", None), "pydit_text", ("", ""))[1] == "keys"]
            if without:
                raise UserError(f"enable_cache: expected a cache of whole blocks, because attention of the blocks "
                                f"{without} gives no text, got {kind}; "
                                + ("PyramidAttentionBroadcastConfig or MagCacheConfig works" if kind[0] == "F" else
                                   "use_lite_mode=True works"))
        if kind == "FirstBlockCacheConfig":
            # It takes the first block's output from the last one's, and within a region the text is two tensors.
            first, last = self.plan.blocks[0], self.plan.blocks[-1]
            if first.hands_on != (last.hands_on or (last.text == "linear" and not last.text_output)):
                raise UserError("enable_cache: expected a first and a last block of one form of text, because "
                                "FirstBlockCacheConfig subtracts their outputs, got "
                                + ("a region of linear text that begins at the first block" if first.hands_on else
                                   "a region of linear text without an output at the last block")
                                + "; MagCacheConfig works")
        super().enable_cache(config)

    def follow_source(self, state: Mapping[str, Any], **options: Any) -> tuple[dict[str, Any], list[str]]:
        """:func:`pydit.models.by_source.remap_lora` for this model."""
        lists = dict(zip(get_adapter(self.family).block_lists, self._lists, strict=True))
        return remap_lora(lists, state, init=self.init, **options)

    def _with_residuals(self, args: tuple, arguments: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a forward by name, with ControlNet residuals and skipped layers where the teacher's are."""
        refuse_layer_skip(self, args, arguments)
        if args:
            names = list(inspect.signature(super().forward).parameters)
            if len(args) > len(names):
                raise UserError(f"forward: expected up to {len(names)} arguments, got {len(args)}")
            arguments = dict(zip(names, args, strict=False)) | arguments
        for name, (where, rule) in self.residual_arguments.items():
            if not arguments.get(name):
                continue
            blocks = getattr(self, where)
            if name == "controlnet_block_samples" and arguments.get("controlnet_blocks_repeat"):
                rule = "repeat"
            arguments[name] = residuals_by_source(blocks, arguments[name], rule=rule)
        if arguments.get("skip_layers"):  # of SD3's skip-layer guidance
            arguments["skip_layers"] = skipped_by_source(self.transformer_blocks, arguments["skip_layers"])
        return arguments

    def to_stock(self) -> nn.Module:
        """A plain transformer of the family's diffusers class and the student's depth that shares this one's weights.

        What it saves, stock diffusers loads without this package. It always runs the student's blocks.

        Raises
        ------
        UserError
            The plan thins blocks out, which the stock class cannot carry, or a schedule is baked, whose tables it
            could not follow.
        """
        if "_pydit_baked_schedule" in self.__dict__:
            raise UserError("to_stock: expected a model with its modulation weights, got a baked schedule; "
                            "pydit.restore it first")
        if not self.plan.is_stock:
            other = [i for i, spec in enumerate(self.plan.blocks) if not spec.is_stock]
            raise UserError(f"to_stock: expected a plan with intervals alone, got one whose blocks {other} are no "
                            "stock blocks")
        config = {key: value for key, value in self.config.items() if not key.startswith("_") and key != "pydit"}
        with torch.device("meta"):
            stock = get_adapter(self.family).stock_class()(**config)
        for name, module in self.named_children():
            setattr(stock, name, module)
        for name, blocks in zip(get_adapter(self.family).block_lists, self._lists, strict=True):
            setattr(stock, name, nn.ModuleList(blocks[index] for index in range(len(blocks))))
        return stock.train(self.training)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, with_teacher: bool = False,
                        **kwargs: Any) -> None:
        """As in diffusers; ``with_teacher=True`` also writes the attached teacher layers, for :meth:`set_active`."""
        layers = self._lists[0].teacher.layers
        if with_teacher and not layers and self.plan.units:
            raise UserError("with_teacher: no teacher layers are attached; call attach_teacher(teacher) first")
        state = {f"{k}.{name}": tensor for k, layer in layers.items() if with_teacher
                 for name, tensor in layer.state_dict().items()}  # before anything is written: a baked layer refuses
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / TEACHER_FILE
        if with_teacher:
            files.save_safetensors(path, state, {"format": "pydit-teacher-layers", "version": "1"})
        else:
            path.unlink(missing_ok=True)  # left by an earlier save of another model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *, with_teacher: bool = True,
                        **kwargs: Any) -> Any:
        """As in diffusers; teacher layers saved beside the weights are attached, unless ``with_teacher=False``."""
        result = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        path = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "") / TEACHER_FILE
        if with_teacher and path.is_file():
            model._load_teacher_layers(path)
        return result

    def _load_teacher_layers(self, path: Path) -> None:
        tensors, metadata = files.load_safetensors(path, what="teacher layers")
        if (metadata.get("format"), metadata.get("version")) != ("pydit-teacher-layers", "1"):
            raise FormatError(f"teacher layers: expected pydit-teacher-layers version 1 in {path}, got {metadata}")
        adapter = get_adapter(self.family)
        config = {key: value for key, value in self.config.items() if not key.startswith("_") and key != "pydit"}
        layers = {}
        for k in (k for start, end in self.plan.units for k in range(start, end + 1)):
            state = {name.removeprefix(f"{k}."): tensor for name, tensor in tensors.items()
                     if name.startswith(f"{k}.")}
            with torch.device("meta"):
                layer = adapter.stock_block(config, state)
            try:
                layer.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise FormatError(f"teacher layers: layer {k} of {path} does not fit: {error}") from None
            layers[k] = layer.to(self.device, self.dtype).eval().requires_grad_(False)
        self._attach(layers)


class AffineBlock(nn.Module):
    """In place of a block: ``x + (W x + b)`` in both streams, or in the image alone when nothing reads the text.

    It takes the arguments of any family's block and returns the streams in that family's order.
    """

    def __init__(self, width: int, spec: BlockSpec, *, text_first: bool) -> None:
        super().__init__()
        self.img_map = residual_map(width)
        self.txt_map = None if spec.text == "none" else residual_map(width)
        self.text_first, self.spec = text_first, spec

    def forward(self, hidden_states, encoder_hidden_states, *_args: Any, **_kwargs: Any):
        image = hidden_states + self.img_map(hidden_states)
        text = encoder_hidden_states
        if self.txt_map is not None:
            text = text + self.txt_map(text)
        return (text, image) if self.text_first else (image, text)


def affine_in_place_of(block: nn.Module, spec: BlockSpec) -> AffineBlock:
    """The affine block for ``block``, on its device and in its dtype."""
    like = block.attn.to_q.weight
    with torch.device(like.device):
        made = AffineBlock(like.shape[1], spec, text_first=True).to(like.dtype)
    made.context_pre_only = getattr(block, "context_pre_only", False)  # SD3's forward asks every block
    return made


def residual_map(width: int) -> nn.Linear:
    """The W and b of ``x + (W x + b)``, zero: the identity until it is fitted or trained."""
    linear = nn.Linear(width, width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def entry_of(plan: PruningPlan, init: str) -> dict[str, Any]:
    """The ``pydit`` entry of a configuration. ``"first"`` is what an entry without ``init`` means."""
    return {"plan": plan.to_dict()} | ({} if init == "first" else {"init": init})


def plan_of(entry: Any, family: str) -> PruningPlan:
    """The plan in a configuration's ``pydit`` entry; FormatError when it is none or for another family."""
    if not isinstance(entry, Mapping) or not {"plan"} <= set(entry) <= {"plan", "init"}:
        raise FormatError(f"config: expected \"pydit\": {{\"plan\": ...}}, got {entry!r}")
    plan = PruningPlan.from_dict(entry["plan"], what="config")
    if plan.family != family:
        raise FormatError(f"config: expected a plan for {family}, got one for {plan.family}")
    return plan


def require_depth(plan: PruningPlan, found: int) -> None:
    """FormatError when a configuration's depth is not the plan's."""
    if plan.num_student_layers != found:
        raise FormatError(f"config: expected num_layers {plan.num_student_layers} and family {plan.family} as in the "
                          f"plan, got {found}")
