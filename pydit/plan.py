"""What to remove from a transformer, as plain data: :class:`PruningPlan`.

A plan holds intervals ``[start, end]`` of teacher layers, both ends included. One student block takes the input of
layer ``start`` and stands for the output of layer ``end``, so ``end - start`` layers disappear. A plan binds to a
model family and a number of layers, nothing else; it is written as versioned JSON and printed as a table.

This file also knows, per family, the class that carries it and the exact number of parameters, from configuration
values alone (no model is built and diffusers is not imported).
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydit import files
from pydit.errors import FormatError, UserError

FORMAT = "pydit-plan"
VERSION = 1


@dataclass(frozen=True)
class Family:
    """A model family: the diffusers class that carries it, its published configuration, its parameter arithmetic.

    ``block_parameters`` and ``other_parameters`` take a full configuration and return the parameters of one block
    and of everything outside the blocks; ``block_flops`` takes it with the tokens of image and text and returns the
    FLOPs of one block for one image.
    """

    name: str
    class_name: str
    block_list: str
    published: Mapping[str, Any]
    block_parameters: Callable[[Mapping[str, Any]], int]
    other_parameters: Callable[[Mapping[str, Any]], int]
    block_flops: Callable[[Mapping[str, Any], int, int], int]


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _qwen_image_block(config: Mapping[str, Any]) -> int:
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    modulation = _linear(width, 6 * width)
    attention = 8 * _linear(width, width) + 4 * head  # q, k, v, out of both streams; q and k norms of both
    mlp = _linear(width, 4 * width) + _linear(4 * width, width)
    return 2 * modulation + attention + 2 * mlp


def _qwen_image_flops(config: Mapping[str, Any], image: int, text: int) -> int:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    linears = (image + text) * (4 + 2 * 4) * width ** 2 + 2 * 6 * width ** 2  # tokens; modulation of both streams
    return 2 * linears + 4 * (image + text) ** 2 * width


def _qwen_image_other(config: Mapping[str, Any]) -> int:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text = config["joint_attention_dim"]
    pixels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    time = _linear(256, width) + _linear(width, width) + (2 * width if config["use_additional_t_cond"] else 0)
    inputs = _linear(config["in_channels"], width) + text + _linear(text, width)  # txt_norm has a weight only
    return time + inputs + _linear(width, 2 * width) + _linear(width, pixels)


FAMILIES = {
    "qwen-image": Family(
        name="qwen-image", class_name="QwenImageTransformer2DModel", block_list="transformer_blocks",
        published={"patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60,
                   "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584,
                   "use_additional_t_cond": False},
        block_parameters=_qwen_image_block, other_parameters=_qwen_image_other, block_flops=_qwen_image_flops),
}

# The two depth lists of the PPCL authors' repository: its default (25 layers removed) and the commented
# alternative (18 removed).
_PRESETS = {
    "ppcl-qwen-image-14b": ("qwen-image", 60, (
        (5, 7), (8, 9), (11, 12), (16, 18), (19, 20), (22, 24), (25, 27), (42, 43), (45, 47), (48, 49), (52, 53),
        (54, 55), (56, 57))),
    "ppcl-qwen-image-12b": ("qwen-image", 60, (
        (3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47), (48, 49), (52, 53),
        (54, 55), (56, 57))),
}


def family_of(transformer: object) -> Family:
    """The family of a transformer, found by class name along its bases, so subclasses count.

    Raises
    ------
    UserError
        No family is known for the class.
    """
    names = {cls.__name__ for cls in type(transformer).__mro__}
    for family in FAMILIES.values():
        if family.class_name in names:
            return family
    known = ", ".join(family.class_name for family in FAMILIES.values())
    raise UserError(f"transformer: expected {known} or a subclass, got {type(transformer).__name__}")


@dataclass(frozen=True)
class PruningPlan:
    """Which layers of a teacher are merged into one student block each.

    Parameters
    ----------
    family : str
        A name in :data:`FAMILIES`, such as ``"qwen-image"``.
    num_layers : int
        Blocks of the teacher.
    intervals : sequence of (start, end)
        Teacher layers, both ends included, at least two layers each, in any order; stored sorted. Empty keeps
        every layer.
    provenance : dict, optional
        Where the plan came from (method, options, scores), JSON-able. Not part of equality.

    Raises
    ------
    UserError
        From the constructor, when the plan is not valid; see :meth:`validate`.
    """

    family: str
    num_layers: int
    intervals: tuple[tuple[int, int], ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", tuple(sorted(_pairs(self.intervals))))
        self.validate()

    @classmethod
    def from_intervals(cls, num_layers: int, intervals: Iterable[Sequence[int]], *, family: str = "qwen-image",
                       provenance: dict[str, Any] | None = None) -> PruningPlan:
        """A plan for a teacher of ``num_layers`` from ``[start, end]`` pairs, both ends included, in any order."""
        return cls(family, num_layers, intervals, dict(provenance or {}))  # made pairs by the constructor

    @classmethod
    def preset(cls, name: str) -> PruningPlan:
        """A published layout by name, for example ``"ppcl-qwen-image-12b"``."""
        if name not in _PRESETS:
            raise UserError(f"preset: expected one of {', '.join(_PRESETS)}, got {name!r}")
        family, num_layers, intervals = _PRESETS[name]
        return cls(family, num_layers, intervals, {"preset": name})

    def validate(self) -> None:
        """Raise UserError when the family, the depth or an interval does not fit."""
        if self.family not in FAMILIES:
            raise UserError(f"family: expected one of {', '.join(FAMILIES)}, got {self.family!r}")
        if type(self.num_layers) is not int or self.num_layers < 1:
            raise UserError(f"num_layers: expected a positive integer, got {self.num_layers!r}")
        if not isinstance(self.provenance, dict):
            raise UserError(f"provenance: expected a dict, got {type(self.provenance).__name__}")
        previous = None
        for start, end in self.intervals:
            if start > end:
                raise UserError(f"intervals: expected start <= end, got the reversed interval [{start}, {end}]")
            if start < 0 or end >= self.num_layers:
                raise UserError(f"intervals: expected layers 0 to {self.num_layers - 1}, got [{start}, {end}], "
                                "which is out of range")
            if start == end:
                raise UserError(f"intervals: expected at least two layers each, got [{start}, {end}], which removes "
                                "nothing; leave it out")
            if previous is not None and start <= previous[1]:
                raise UserError(f"intervals: expected disjoint intervals, got [{previous[0]}, {previous[1]}] and "
                                f"[{start}, {end}], which overlap")
            previous = (start, end)

    @property
    def source(self) -> tuple[tuple[int, ...], ...]:
        """Per student block, the teacher layers it stands for."""
        ends = dict(self.intervals)
        blocks, layer = [], 0
        while layer < self.num_layers:
            end = ends.get(layer, layer)
            blocks.append(tuple(range(layer, end + 1)))
            layer = end + 1
        return tuple(blocks)

    @property
    def replaced(self) -> tuple[tuple[int, int, int], ...]:
        """Per interval, (student block, start, end)."""
        return tuple((block, layers[0], layers[-1]) for block, layers in enumerate(self.source) if len(layers) > 1)

    @property
    def removed(self) -> int:
        """Layers that disappear."""
        return sum(end - start for start, end in self.intervals)

    @property
    def num_student_layers(self) -> int:
        """Blocks of the student."""
        return self.num_layers - self.removed

    def matches(self, transformer: object) -> bool:
        """Whether the plan is for this transformer's family and depth."""
        return self._mismatch(transformer) is None

    def require_match(self, transformer: object) -> None:
        """Raise UserError when the plan is for another family or depth than ``transformer``."""
        reason = self._mismatch(transformer)
        if reason:
            raise UserError(reason)

    def _mismatch(self, transformer: object) -> str | None:
        family = family_of(transformer)
        if family.name != self.family:
            return f"plan: expected a plan for {family.name}, got one for {self.family}"
        layers = len(getattr(transformer, family.block_list))
        if layers != self.num_layers:
            return f"plan: the plan is for {self.num_layers} layers, the model has {layers}"
        return None

    def num_parameters(self, config: Mapping[str, Any] | None = None) -> int:
        """Exact number of parameters of the pruned transformer.

        Parameters
        ----------
        config : dict or diffusers config, optional
            The teacher's. Missing entries take the family's defaults; None means the published size.
        """
        family, full = FAMILIES[self.family], self._full(config)
        return family.other_parameters(full) + self.num_student_layers * family.block_parameters(full)

    def num_flops(self, config: Mapping[str, Any] | None = None, *, image_tokens: int = 6889,
                  text_tokens: int = 512) -> int:
        """FLOPs of the blocks of the pruned transformer for one image: matrix products and attention.

        Parameters
        ----------
        config : as for :meth:`num_parameters`.
        image_tokens, text_tokens : of one image; the defaults are 1328 x 1328 pixels and a full prompt.
        """
        return self.num_student_layers * FAMILIES[self.family].block_flops(self._full(config), image_tokens,
                                                                           text_tokens)

    def _full(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        family = FAMILIES[self.family]
        if config is not None and not isinstance(config, Mapping):
            raise UserError(f"config: expected a dict or a diffusers config, got {type(config).__name__}")
        full = {**family.published, **(config or {})}
        if full["num_layers"] != self.num_layers:
            raise UserError(f"config: expected num_layers {self.num_layers} as in the plan, got {full['num_layers']}"
                            + ("" if config else f" (the published {family.name}); pass the teacher's config"))
        return full

    def describe(self, config: Mapping[str, Any] | None = None) -> str:
        """A table: one line per student block with the teacher layers it stands for.

        ``config`` (the teacher's) adds parameter counts; without it they are given at the published depth only.
        """
        published = FAMILIES[self.family].published["num_layers"] == self.num_layers
        head = (f"{self.family}: {self.num_layers} layers -> {self.num_student_layers} "
                f"({self.removed} removed, {100 * self.removed / self.num_layers:.1f} %)")
        if config is not None or published:
            teacher = PruningPlan(self.family, self.num_layers).num_parameters(config)
            head += f", {teacher:,} parameters -> {self.num_parameters(config):,}"
        rows = [head, f"{'block':>5}  {'teacher layers':<14}  kind"]
        for block, layers in enumerate(self.source):
            span = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
            kind = "kept" if len(layers) == 1 else f"one block for {len(layers)}"
            rows.append(f"{block:>5}  {span:<14}  {kind}")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with format and version."""
        return {"format": FORMAT, "version": VERSION, "family": self.family, "num_layers": self.num_layers,
                "intervals": [list(pair) for pair in self.intervals], "provenance": self.provenance}

    @classmethod
    def from_dict(cls, data: Any, *, what: str = "plan") -> PruningPlan:
        """Inverse of :meth:`to_dict`; ``what`` names the argument in errors.

        Raises
        ------
        FormatError
            Another format or version, unknown or missing entries, or intervals that do not fit.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            got = repr(data.get("format")) if isinstance(data, Mapping) else type(data).__name__
            raise FormatError(f"{what}: expected an object with \"format\": \"{FORMAT}\", got {got}")
        if data.get("version") != VERSION:
            raise FormatError(f"{what}: expected version {VERSION}, got {data.get('version')!r}")
        known = {"format", "version", "family", "num_layers", "intervals", "provenance"}
        # Entries of a later version change what is pruned; dropping them quietly would prune something else.
        wrong = sorted(set(data) - known) + sorted({"family", "num_layers", "intervals"} - set(data))
        if wrong:
            raise FormatError(f"{what}: expected the entries {', '.join(sorted(known))}, "
                              f"got unknown or missing {', '.join(map(str, wrong))}")
        try:
            provenance = data.get("provenance", {})
            return cls(data["family"], data["num_layers"], data["intervals"],
                       dict(provenance) if isinstance(provenance, Mapping) else provenance)
        except UserError as error:
            raise FormatError(f"{what}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON, atomically."""
        files.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> PruningPlan:
        """Read a plan written by :meth:`save`. Raises FormatError naming the file."""
        return cls.from_dict(files.read_json(path, what="plan"), what=f"plan {os.fspath(path)}")


def _pairs(intervals: Any) -> list[tuple[int, int]]:
    """``intervals`` as pairs of plain ints, or UserError."""
    if isinstance(intervals, (str, bytes)) or not isinstance(intervals, Iterable):
        raise UserError(f"intervals: expected [start, end] pairs, got {intervals!r}")
    pairs = []
    for item in intervals:
        try:
            start, end = item
            if isinstance(start, bool) or isinstance(end, bool):
                raise TypeError
            pairs.append((operator.index(start), operator.index(end)))
        except (TypeError, ValueError):
            raise UserError(f"intervals: expected [start, end] pairs of integers, got {item!r}") from None
    return pairs
