"""What the rest of the package needs to know about a model family: its blocks, how one is called, what flows between.

A transformer has blocks 0..L-1 and boundaries 0..L: boundary k is the input of block k, boundary L the output of the
last block. At each boundary two streams flow, image ``[B, S_img, C]`` and text ``[B, S_txt, C]``.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from pydit.errors import UserError
from pydit.families import FAMILIES, BlockSpec
from pydit.plan import PruningPlan, family_of

STREAMS = ("image", "text")
_ADAPTERS = {
    "qwen-image": ("pydit.models.qwen_image", "QwenImageAdapter"),
    "flux.1": ("pydit.models.flux", "FluxAdapter"),
    "sd3.5": ("pydit.models.sd3", "SD3Adapter"),
}


def require_plan(plan: Any) -> None:
    """UserError unless ``plan`` is one."""
    if not isinstance(plan, PruningPlan):
        raise UserError(f"plan: expected a PruningPlan, got {type(plan).__name__}")


def require_batch(batch: Any) -> None:
    """UserError unless ``batch`` may hold arguments of a forward by name."""
    if not isinstance(batch, Mapping):
        raise UserError(f"batch: expected a dict of forward arguments, got {type(batch).__name__}")


def require_batches(batches: Any) -> None:
    """UserError unless ``batches`` may be gone through."""
    if not isinstance(batches, Iterable):
        raise UserError(f"batches: expected an iterable of dicts of forward arguments, got {type(batches).__name__}")


@dataclass(frozen=True)
class BlockIO:
    """How a block is called and what it returns.

    inputs : names of the block's arguments in positional order (gradient checkpointing passes them so).
    image, text : the two of them that carry the streams.
    text_first : the block returns (text, image) rather than (image, text).
    """

    inputs: tuple[str, ...]
    image: str
    text: str
    text_first: bool


class Capture(NamedTuple):
    """What :meth:`ModelAdapter.capture` saw.

    states : boundary -> (image [B, S_img, C], text [B, S_txt, C]); where the last block has no text output (SD3), its
        text input stands for it
    kwargs : every other argument of a block, the same for all blocks
    """

    states: dict[int, tuple[torch.Tensor, torch.Tensor]]
    kwargs: dict[str, Any]


Visit = Callable[[int, tuple[torch.Tensor, torch.Tensor], dict[str, Any]], None]


class _Stop(Exception):
    """Ends a forward once everything asked for has been seen."""


class ModelAdapter(ABC):
    """The block contract of one family. Stateless; get one from :func:`get_adapter`."""

    family: str
    block_io: BlockIO
    needed: tuple[str, ...]  # arguments without which no forward runs, though diffusers gives some of them a default
    multiplied: tuple[str, ...]  # those of them that meet a matrix first, and so have the weights' dtype
    modulation: tuple[str, ...]  # children of a block that turn the time embedding into shifts, scales and gates

    @property
    def last_text_used(self) -> bool:
        """Whether the model reads the text output of its last block."""
        return FAMILIES[self.family].text_used

    @property
    def block_lists(self) -> tuple[str, ...]:
        """Names of the model's lists of blocks, in the order in which a forward runs them."""
        return FAMILIES[self.family].block_lists

    def require_inputs(self, transformer: nn.Module, batch: Mapping[Any, Any], what: str) -> None:
        """UserError that names ``what`` unless a forward of ``transformer`` takes ``batch``: names, rows and dtypes."""
        known = _arguments(self.stock_class())
        for name in batch:
            if name not in known:
                raise UserError(f"batches: expected forward arguments of {self.stock_class().__name__}, got {name!r} "
                                f"in {what}")
        for name in self.needed:
            if batch.get(name) is None:
                raise UserError(f"batches: expected {', '.join(self.needed)}, got no {name} in {what}")
        streams = {name: batch[name] for name in ("hidden_states", "encoder_hidden_states")}
        for name, tensor in {**streams, "timestep": batch["timestep"]}.items():
            if not isinstance(tensor, torch.Tensor) or not tensor.ndim:
                got = "a number" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise UserError(f"batches: expected a tensor with a row for each sample as {name}, got {got} in {what}")
        rows = {len(tensor) for tensor in streams.values()}
        if len(rows) > 1 or 0 in rows or len(batch["timestep"]) not in (1, *rows):
            found = ", ".join(f"{len(batch[name])} of {name}" for name in (*streams, "timestep"))
            raise UserError(f"batches: expected the same number of rows, at least one, got {found} in {what}")
        dtype = next(transformer.parameters()).dtype
        if torch.is_autocast_enabled(batch["hidden_states"].device.type):
            return
        for name in self.multiplied:
            if batch[name].dtype != dtype:
                raise UserError(f"batches: expected {name} in the dtype of the models, {dtype}, got "
                                f"{batch[name].dtype} in {what}")

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The blocks that a forward runs, in depth order."""
        return [block for name in self.block_lists for block in getattr(transformer, name)]

    def put_blocks(self, transformer: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
        """Let ``transformer`` run these blocks and no others; returns it. All of them go to the first list."""
        for name in self.block_lists[1:]:
            setattr(transformer, name, nn.ModuleList())
        setattr(transformer, self.block_lists[0], nn.ModuleList(blocks))
        return transformer

    def segments_of(self, plan: PruningPlan, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Student blocks in each list of a student with this configuration."""
        return (plan.num_student_layers,)

    def student_config(self, config: Mapping[str, Any], plan: PruningPlan) -> dict[str, Any]:
        """What a plan changes in a teacher's configuration."""
        return {"num_layers": plan.num_student_layers}

    def teacher_config(self, student: nn.Module) -> dict[str, Any]:
        """The teacher's configuration, from a pruned model's."""
        config = {key: value for key, value in student.config.items() if not key.startswith("_") and key != "pydit"}
        return config | {"num_layers": student.plan.num_layers}

    def num_layers(self, transformer: nn.Module) -> int:
        """How many blocks a forward runs."""
        return len(self.blocks(transformer))

    def starts(self, transformer: nn.Module) -> tuple[int, ...]:
        """First blocks of the runs of blocks of one class, of an unpruned model: 0, and where another class begins."""
        lengths = FAMILIES[self.family].segments(transformer.config)
        starts = itertools.accumulate(lengths[:-1], initial=0)
        return tuple(dict.fromkeys(start for start in starts if start < max(sum(lengths), 1)))  # no run is empty

    @abstractmethod
    def width(self, transformer: nn.Module) -> int:
        """Channels C of both streams."""

    @abstractmethod
    def text_mask(self, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """From the arguments of a block or of the model: which text tokens are real, bool [B, S_txt]; None: all."""

    @abstractmethod
    def last_linears(self, block: nn.Module) -> dict[str, nn.Linear]:
        """Per stream, the last linear layer of a block: the one whose output, gated, is added to the stream.

        A stream whose last layer is not gated is left out; a linear layer that serves both is not listed either.
        """

    @abstractmethod
    def stock_class(self) -> type[nn.Module]:
        """The family's diffusers class."""

    @abstractmethod
    def stock_block(self, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> nn.Module:
        """A block of the family that this state dict fits, with weights still to be loaded."""

    @abstractmethod
    def new_block(self, block: nn.Module, spec: BlockSpec) -> nn.Module:
        """The block of a specification, in the place of ``block`` and with as much of its weights as it has.

        ``block`` is a stock block; it is taken apart. What the specification adds is the identity.
        """

    def conform(self, block: nn.Module, layer: nn.Module) -> nn.Module:
        """``block``, a copy, made to fit where ``layer`` is; only the last block of a family may differ in form."""
        return block

    @abstractmethod
    def modulated_text(self, block: nn.Module, text: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The text [B, S_txt, C] as the projections of a stock block see it: normed, shifted and scaled."""

    def student_streams(self, plan: PruningPlan, index: int, teacher: list[nn.Module], capture: Capture
                        ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher's activations feed to a student block: (image, text), as the block expects them.

        Parameters
        ----------
        index : of the student block.
        teacher : the teacher's blocks.
        capture : at :meth:`feeding_boundaries` of the block, at least.
        """
        spec = plan.blocks[index]
        image, text = capture.states[spec.source[0]]
        if spec.text == "linear":
            anchor = plan.blocks[spec.anchor].source[0]
            told = self.modulated_text(teacher[anchor], capture.states[anchor][1], capture.kwargs)
            text = torch.cat((capture.states[anchor + 1][1], told), dim=1)
        return image, text

    def feeding_boundaries(self, plan: PruningPlan, index: int) -> set[int]:
        """The boundaries of the teacher that :meth:`student_streams` reads."""
        spec = plan.blocks[index]
        found = {spec.source[0]}
        if spec.text == "linear":
            anchor = plan.blocks[spec.anchor].source[0]
            found |= {anchor, anchor + 1}
        return found

    def hidden_matrices(self, transformer: nn.Module) -> dict[str, nn.Parameter]:
        """By name, the weight matrices of all blocks that map tokens to tokens: attention and MLP, no modulation."""
        found = {}
        for name, parameter in transformer.named_parameters():
            parts = name.split(".")
            if parts[0] in self.block_lists and parameter.ndim == 2 and not set(parts) & set(self.modulation):
                found[name] = parameter
        return found

    @abstractmethod
    def pruned_class(self) -> type[nn.Module]:
        """The class of a pruned model of this family."""

    def call_block(self, block: nn.Module, image: torch.Tensor, text: torch.Tensor,
                   kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one block on image [B, S_img, C] and text [B, S_txt, C]; returns (image, text).

        A block without a text output returns the text it was given.
        """
        return self._streams(block(**{self.block_io.image: image, self.block_io.text: text}, **kwargs), text)

    def capture(self, transformer: nn.Module, batch: Mapping[str, Any], boundaries: Iterable[int],
                visit: Visit | None = None) -> Capture:
        """Run ``transformer`` on a batch under no_grad and return its streams at the requested boundaries.

        Parameters
        ----------
        transformer : the model; its weights, mode and hooks are left as they are.
        batch : keyword arguments of ``transformer.forward``.
        boundaries : numbers in 0..L. The forward ends after the last of them.
        visit : called with each boundary, its (image, text) and the other arguments of a block as the forward gets
            there, instead of keeping all of them until its end; the result then has no states.

        Returns
        -------
        Capture
            The streams as the model computes them (no copy), and the arguments needed to run any block.

        Raises
        ------
        UserError
            A boundary outside 0..L, none at all, or a batch that is not a mapping.
        """
        blocks = self.blocks(transformer)
        wanted = sorted({int(k) for k in boundaries})
        if not wanted or wanted[0] < 0 or wanted[-1] > len(blocks):
            raise UserError(f"boundaries: expected numbers in 0..{len(blocks)}, got {wanted}")
        require_batch(batch)
        states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        kwargs: dict[str, Any] = {}

        def see(k: int, image: torch.Tensor, text: torch.Tensor) -> None:
            if visit is None:
                states[k] = image, text
            else:
                visit(k, (image, text), kwargs)

        def enter(k: int, args: tuple, given: dict[str, Any]) -> None:
            named = {**dict(zip(self.block_io.inputs, args, strict=False)), **given}
            streams = named.pop(self.block_io.image), named.pop(self.block_io.text)
            if not kwargs:
                kwargs.update(named)
            if k in wanted:
                see(k, *streams)
            if k == wanted[-1]:
                raise _Stop

        def leave(args: tuple, given: dict[str, Any], outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
            named = {**dict(zip(self.block_io.inputs, args, strict=False)), **given}
            see(len(blocks), *self._streams(outputs, named[self.block_io.text]))
            raise _Stop

        handles = []
        try:
            # Boundary L is seen on leaving the last block, but the arguments only on entering one.
            entered = [k for k in wanted if k < len(blocks)] or [len(blocks) - 1]
            for k in entered:
                handles.append(blocks[k].register_forward_pre_hook(
                    lambda module, args, given, k=k: enter(k, args, given), with_kwargs=True,
                    prepend=True))  # a block that is only looked at is not fetched or gathered
            if wanted[-1] == len(blocks):
                handles.append(blocks[-1].register_forward_hook(
                    lambda module, args, given, outputs: leave(args, given, outputs), with_kwargs=True))
            with torch.no_grad():
                transformer(**batch)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return Capture(states, kwargs)

    def _streams(self, outputs: tuple[torch.Tensor, torch.Tensor | None], text: torch.Tensor
                 ) -> tuple[torch.Tensor, torch.Tensor]:
        """(image, text) of what a block returned for this text."""
        image, found = outputs[::-1] if self.block_io.text_first else outputs
        return image, text if found is None else found


def get_adapter(transformer_or_family: nn.Module | str) -> ModelAdapter:
    """The adapter of a model (by its class, subclasses included) or of a family name.

    Raises
    ------
    UserError
        Unknown family or class, or diffusers is not installed.
    """
    if isinstance(transformer_or_family, str):
        family = transformer_or_family
        if family not in _ADAPTERS:
            raise UserError(f"family: expected one of {', '.join(_ADAPTERS)}, got {family!r}")
    else:
        family = family_of(transformer_or_family).name
    module, name = _ADAPTERS[family]
    try:
        return getattr(importlib.import_module(module), name)()
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "diffusers":
            raise UserError(f"{family}: this needs diffusers, which is not installed (pip install diffusers)") from None
        raise


@cache
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    """Of its forward."""
    return frozenset(inspect.signature(kind.forward).parameters) - {"self"}
