"""What to remove from a transformer, as plain data: :class:`PruningPlan`.

A plan names teacher layers. ``[start, end]`` intervals merge layers into one student block each; the other fields
thin blocks out: text streams and FFNs become linear maps, blocks affine maps, deep blocks single-stream. A plan binds
to a model family and a number of layers, nothing else; it is saved as versioned JSON and printed as a table.
:attr:`PruningPlan.blocks` says what becomes of every student block; :mod:`pydit.families`, what a family supports.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pydit import arguments, files
from pydit.errors import FormatError, UserError
from pydit.families import FAMILIES, BlockSpec, Family, in_units
from pydit.presets import PRESETS

FORMAT = "pydit-plan"
VERSIONS = (1, 2, 3)  # 1 has intervals alone, 2 no linear_text_ffn; a plan is written as the first that holds it
MAX_LAYERS = 4096  # a number in a file decides how much is held in memory; published models have up to 60
H200_FLOPS = 989e12  # dense bfloat16, NVIDIA H200 SXM data sheet


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
    """What becomes of every layer of a teacher.

    Parameters
    ----------
    family : str
        A name in :data:`pydit.families.FAMILIES`, such as ``"qwen-image"``.
    num_layers : int
        Blocks of the teacher; FLUX.1 counts dual blocks first, then single ones.
    intervals : sequence of (start, end)
        Teacher layers, both ends included, at least two layers each, in any order; stored sorted. One student block
        takes the input of ``start`` and stands for the output of ``end``. Empty keeps every layer. No interval
        crosses from FLUX.1's dual blocks to its single ones.
    text_linear : sequence of (anchor, last), optional
        Text regions (PPCL, Eq. 8): the block of layer ``anchor`` keeps its text stream whole; every block after it up
        to the one that ends in layer ``last`` takes its text keys and values from an affine map of the anchor's
        modulated text, and the last of them maps the anchor's text output to its own layer's. ``anchor`` is a layer
        that no interval touches.
    linear_ffn : sequence of int, optional
        Blocks, named by the first layer they stand for, whose FFNs become affine maps (PPCL, Eq. 9).
    linear_text_ffn : sequence of int, optional
        Blocks, named likewise, whose text FFN alone becomes an affine map; the image keeps its FFN.
    affine : sequence of int, optional
        Blocks, named likewise, that become one affine map per stream.
    single_stream : int or (first, last), optional
        Every block from the one that begins at this layer on, or up to the one that ends in layer ``last``, runs both
        streams through the image branch's weights (Amber-Image's hybrid stream). Of FLUX.1, whose dual blocks are
        followed by single-stream ones of another kind, it names dual blocks, by both ends.
    dead_tensors : bool
        False leaves out tensors that no output depends on; see :meth:`lean`.
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
    text_linear: tuple[tuple[int, int], ...] = field(default=(), kw_only=True)
    linear_ffn: tuple[int, ...] = field(default=(), kw_only=True)
    linear_text_ffn: tuple[int, ...] = field(default=(), kw_only=True)
    affine: tuple[int, ...] = field(default=(), kw_only=True)
    single_stream: int | tuple[int, int] | None = field(default=None, kw_only=True)
    dead_tensors: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("intervals", "text_linear", "linear_ffn", "linear_text_ffn", "affine"):
            read = arguments.pairs if name in ("intervals", "text_linear") else arguments.layers
            object.__setattr__(self, name, tuple(sorted(read(name, getattr(self, name)))))
        if self.single_stream is not None:
            read = arguments.pairs if isinstance(self.single_stream, (list, tuple)) else arguments.layers
            object.__setattr__(self, "single_stream", read("single_stream", [self.single_stream])[0])
        if (num_layers := arguments.as_integer(self.num_layers)) is not None:
            object.__setattr__(self, "num_layers", num_layers)
        self.validate()

    @classmethod
    def from_intervals(cls, num_layers: int, intervals: Iterable[Sequence[int]], *, family: str = "qwen-image",
                       provenance: dict[str, Any] | None = None) -> PruningPlan:
        """A plan for a teacher of ``num_layers`` from ``[start, end]`` pairs, both ends included, in any order."""
        return cls(family, num_layers, intervals,  # made pairs by the constructor
                   dict(provenance) if isinstance(provenance, Mapping) else {} if provenance is None else provenance)

    @classmethod
    def preset(cls, name: str) -> PruningPlan:
        """A published layout by name, for example ``"ppcl-qwen-image-12b"``, with its dead tensors.

        What is not published and therefore this project's own is said in ``provenance["note"]``.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise UserError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        family, num_layers, fields, note = PRESETS[name]
        return cls(family, num_layers, provenance={"preset": name} | ({"note": note} if note else {}), **fields)

    def validate(self) -> None:
        """Raise UserError when the family, the depth, an interval or a block does not fit."""
        if not isinstance(self.family, str) or self.family not in FAMILIES:
            raise UserError(f"family: expected one of {', '.join(FAMILIES)}, got {self.family!r}")
        if type(self.num_layers) is not int or not 1 <= self.num_layers <= MAX_LAYERS:
            raise UserError(f"num_layers: expected a positive integer up to {MAX_LAYERS}, got {self.num_layers!r}")
        if not isinstance(self.provenance, dict):
            raise UserError(f"provenance: expected a dict, got {type(self.provenance).__name__}")
        if not isinstance(self.dead_tensors, bool):
            raise UserError(f"dead_tensors: expected true or false, got {self.dead_tensors!r}")
        _require_disjoint("intervals", self.intervals, self.num_layers,
                          "which removes nothing; leave it out")
        _require_disjoint("text_linear", self.text_linear, self.num_layers, "which replaces nothing; leave it out")
        family = FAMILIES[self.family]
        if len(family.block_lists) > 1 and isinstance(self.single_stream, int):
            raise UserError(f"single_stream: expected [first, last], because {self.family} has single-stream blocks of "
                            f"another kind after its dual ones, got {self.single_stream}")
        if isinstance(self.single_stream, tuple) and not self._single_layers:
            raise UserError(f"single_stream: expected first <= last, got {list(self.single_stream)}")
        self._require_blocks()
        for config in family.published:
            if family.depth(config) == self.num_layers:
                self._require_segments(config)

    def _require_blocks(self) -> None:
        """The fields beside the intervals name blocks that exist and do not contradict each other."""
        first = {layers[0] for layers in self.source}
        last = {layers[-1] for layers in self.source}
        alone = {layers[0] for layers in self.source if len(layers) == 1}
        single = self._single_layers
        for name, layers in (("linear_ffn", self.linear_ffn), ("linear_text_ffn", self.linear_text_ffn),
                             ("affine", self.affine), ("single_stream", single[:1])):
            for layer in layers:
                if layer not in first:
                    raise UserError(f"{name}: expected the first layer of a block ({_listed(first)}), got {layer}")
        linear = set()
        for anchor, end in self.text_linear:
            if anchor not in alone or anchor in self.affine:
                raise UserError(f"text_linear: expected an anchor that is kept whole, got {anchor} of "
                                f"[{anchor}, {end}], which an interval or an affine map replaces")
            if end not in last:
                raise UserError(f"text_linear: expected the last layer of a block to end a region, got {end} of "
                                f"[{anchor}, {end}], which is inside an interval")
            linear |= set(range(anchor + 1, end + 1))
        taken = {"linear_ffn": set(self.linear_ffn), "linear_text_ffn": set(self.linear_text_ffn),
                 "text_linear": linear, "affine": set(self.affine)}
        for name, other in (("affine", "linear_ffn"), ("affine", "linear_text_ffn"), ("affine", "text_linear"),
                            ("linear_text_ffn", "linear_ffn"), ("linear_text_ffn", "text_linear")):
            if both := taken[name] & taken[other]:
                raise UserError(f"{name}: expected blocks that {other} leaves alone, got {_listed(both)} in both")
        ends = {layers[0] for layers in self.source[-1:] if FAMILIES[self.family].text_ends}
        if ends & taken["linear_text_ffn"]:
            raise UserError(f"linear_text_ffn: expected blocks whose text has an FFN, got {_listed(ends)}, the last of "
                            f"{self.family}, whose text has none")
        if single:
            if single[-1] not in last:
                raise UserError(f"single_stream: expected the last layer of a block to end it, got {single[-1]} of "
                                f"{list(self.single_stream)}, which is inside an interval or past the model")
            late = {*self.linear_ffn, *self.linear_text_ffn, *linear, *(anchor for anchor, _ in self.text_linear)}
            late &= set(single)
            if late:
                where = f"from layer {single[0]} on" if isinstance(self.single_stream, int) else \
                    f"of {list(self.single_stream)}"
                raise UserError(f"single_stream: expected blocks {where} to be thinned out "
                                f"by nothing else, got {_listed(late)} in text_linear, linear_ffn or linear_text_ffn")

    @property
    def _single_layers(self) -> range:
        """Teacher layers of the blocks that become single-stream."""
        if self.single_stream is None:
            return range(0)
        if isinstance(self.single_stream, int):
            return range(self.single_stream, max(self.num_layers, self.single_stream + 1))
        return range(self.single_stream[0], self.single_stream[1] + 1)

    def _require_segments(self, config: Mapping[str, Any]) -> None:
        boundary, lengths = 0, FAMILIES[self.family].segments(config)
        if len(lengths) > 1 and self._single_layers and self._single_layers[-1] >= lengths[0]:
            raise UserError(f"single_stream: expected dual blocks, which are layers 0 to {lengths[0] - 1}, got "
                            f"{list(self.single_stream)}")
        if len(lengths) > 1 and (late := [layer for layer in self.linear_text_ffn if layer >= lengths[0]]):
            raise UserError(f"linear_text_ffn: expected dual blocks, which are layers 0 to {lengths[0] - 1}, got "
                            f"{_listed(late)}, whose text shares the image's FFN")
        for length in lengths:
            boundary += length
            for start, end in self.intervals:
                if start < boundary <= end:
                    raise UserError(f"intervals: expected intervals on one side of layer {boundary}, where the dual "
                                    f"blocks end, got [{start}, {end}]")

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

    @cached_property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """Per student block, what it is."""
        source = self.source
        block_of = {layer: block for block, layers in enumerate(source) for layer in layers}
        anchors = {block_of[anchor]: block_of[last] for anchor, last in self.text_linear}
        region = {block: anchor for anchor, last in anchors.items() for block in range(anchor + 1, last + 1)}
        specs, family = [], FAMILIES[self.family]
        for block, layers in enumerate(source):
            ends = family.text_ends and layers[-1] == self.num_layers - 1  # no text output in the teacher already
            spec = BlockSpec(layers, hands_on=block in anchors,
                             ffn="linear" if layers[0] in self.linear_ffn else
                             "linear text" if layers[0] in self.linear_text_ffn else "mlp")
            if layers[0] in self.affine:
                spec = dataclasses.replace(spec, form="affine")
            elif layers[0] in self._single_layers:
                spec = dataclasses.replace(spec, form="single", text="keys" if ends else "full")
            elif block in region:
                spec = dataclasses.replace(spec, text="linear", anchor=region[block],
                                           text_output=block in anchors.values() and not ends)
            specs.append(spec)
        return tuple(specs) if self.dead_tensors else _without_dead(specs, family.text_used)

    @property
    def replaced(self) -> tuple[tuple[int, int, int], ...]:
        """Per block that is not the teacher's own layer, (student block, start, end) with its first and last layer."""
        return tuple((block, spec.source[0], spec.source[-1]) for block, spec in enumerate(self.blocks)
                     if len(spec.source) > 1 or (spec.form, spec.ffn) != ("stock", "mlp") or spec.text == "linear")

    @property
    def units(self) -> tuple[tuple[int, int], ...]:
        """The (start, end) runs of teacher layers that :meth:`set_active` of a student can switch, one by one.

        An interval, a thinned-out block, or a text region with everything in it (and with its anchor, where that is not
        the teacher's own layer). With intervals alone, these are they.
        """
        units: list[tuple[int, int]] = []
        replaced = {block for block, _, _ in self.replaced}
        joins = False  # the block before lacks something that the teacher's layers would need, or hands its text on
        for block, spec in enumerate(self.blocks):
            start, end = spec.source[0], spec.source[-1]
            short = not self.dead_tensors and spec.text in ("keys", "none") and end < self.num_layers - 1
            changed = short or block in replaced
            inside = spec.text == "linear" and block > spec.anchor + 1
            if changed and (joins or inside):
                units[-1] = (units[-1][0], end)
            elif changed:
                units.append((start, end))
            joins = changed and (short or spec.hands_on or (spec.text == "linear" and not spec.text_output))
        return tuple(units)

    @property
    def removed(self) -> int:
        """Layers that disappear."""
        return sum(end - start for start, end in self.intervals)

    @property
    def num_student_layers(self) -> int:
        """Blocks of the student."""
        return self.num_layers - self.removed

    @property
    def is_stock(self) -> bool:
        """Whether the family's own class, shorter, carries the student."""
        return all(spec.is_stock for spec in self.blocks)

    def lean(self) -> PruningPlan:
        """This plan without the tensors that no output of the model depends on; the outputs stay the same.

        What goes: the text's output path in blocks whose text output nothing reads (that of the last block, and of an
        anchor before it when all that follows is linear), the query and output projections of the text in text-linear
        blocks, and the text map at the end of a region that ends the model.
        Where both streams share their weights (FLUX.1's single blocks) nothing is stored for the text alone, and what
        goes is work.
        """
        return dataclasses.replace(self, dead_tensors=False)

    def matches(self, transformer: object) -> bool:
        """Whether the plan is for this transformer's family and depth."""
        return self._mismatch(*_family_and_depth(transformer)) is None

    def require_match(self, transformer: object) -> None:
        """Raise UserError when the plan is for another family or depth than ``transformer``."""
        self.require_teacher(*_family_and_depth(transformer))
        self._require_segments(transformer.config)

    def require_teacher(self, family: str, num_layers: int) -> None:
        """The same for a teacher of which no more than its family and depth is known."""
        reason = self._mismatch(family, num_layers)
        if reason:
            raise UserError(reason)

    def _mismatch(self, family: str, num_layers: int) -> str | None:
        if family != self.family:
            return f"plan: expected a plan for {family}, got one for {self.family}"
        if num_layers != self.num_layers:
            return f"plan: expected a plan for the model's {num_layers} layers, got one for {self.num_layers}"
        return None

    def num_parameters(self, config: Mapping[str, Any] | None = None) -> int:
        """Exact number of parameters of the pruned transformer.

        Parameters
        ----------
        config : dict or diffusers config, optional
            The teacher's. Missing entries take the family's defaults; None means the published size.
        """
        family, full = FAMILIES[self.family], self.full_config(config)
        return family.other_parameters(full) + sum(self.block_parameters(full))

    def block_parameters(self, config: Mapping[str, Any] | None = None) -> list[int]:
        """Those of every student block; ``config`` as for :meth:`num_parameters`."""
        family, full = FAMILIES[self.family], self.full_config(config)
        return [family.block_parameters(full, spec) for spec in self.blocks]

    def num_flops(self, config: Mapping[str, Any] | None = None, *, image_tokens: int = 6889,
                  text_tokens: int = 512) -> int:
        """FLOPs of the blocks of the pruned transformer for one image: matrix products and attention.

        Parameters
        ----------
        config : as for :meth:`num_parameters`.
        image_tokens, text_tokens : of one image; the defaults are 1328 x 1328 pixels and a full prompt.
        """
        family, full = FAMILIES[self.family], self.full_config(config)
        image, text = (arguments.integer(name, value, 0) for name, value in (("image_tokens", image_tokens),
                                                                             ("text_tokens", text_tokens)))
        return sum(family.block_flops(full, spec, image, text) for spec in self.blocks)

    def full_config(self, config: Mapping[str, Any] | None) -> dict[str, Any]:
        """``config`` with the published values where it has none; UserError when it does not fit the plan."""
        family = FAMILIES[self.family]
        if config is not None and not isinstance(config, Mapping):
            raise UserError(f"config: expected a dict or a diffusers config, got {type(config).__name__}")
        published = next((c for c in family.published if family.depth(c) == self.num_layers), family.published[0])
        full = family.require({**published, **(config or {})})
        if family.depth(full) != self.num_layers:
            raise UserError(f"config: expected num_layers {self.num_layers} as in the plan, got {family.depth(full)}"
                            + ("" if config else f" (the published {family.name}); pass the teacher's config"))
        self._require_segments(full)
        return full

    def describe(self, config: Mapping[str, Any] | None = None) -> str:
        """A table: what the whole costs, then one line per student block with the teacher layers it stands for.

        ``config`` (the teacher's) adds parameters, bytes in bfloat16, FLOPs and the least time these can take on an
        H200 (989 TFLOP/s; a bound, not a measurement); without it they are given at the published depths only.
        """
        family = FAMILIES[self.family]
        head = (f"{self.family}: {self.num_layers} layers -> {self.num_student_layers} "
                f"({self.removed} removed, {100 * self.removed / self.num_layers:.1f} %)")
        priced = config is not None or any(family.depth(c) == self.num_layers for c in family.published)
        rows = [head]
        if priced:
            teacher = PruningPlan(self.family, self.num_layers)
            before, after = teacher.num_parameters(config), self.num_parameters(config)
            rows[0] += f", {before:,} parameters -> {after:,}"
            work = [plan.num_flops(config) for plan in (teacher, self)]
            rows.append(f"{in_units(2 * before, 2 * after, 'B')} in bfloat16; a forward at 6889 image and 512 text "
                        f"tokens: {in_units(*work, 'FLOP')} ({100 * work[1] / work[0]:.1f} %), no less than "
                        f"{in_units(work[0] / H200_FLOPS, work[1] / H200_FLOPS, 's')} on an H200 (predicted, not "
                        "measured)")
        if note := self.provenance.get("note"):
            rows.append(str(note))
        sizes = self.block_parameters(config) if priced else []
        rows.append(f"{'block':>5}  {'teacher layers':<14}  " + (f"{'parameters':>13}  " if priced else "") + "kind")
        for block, spec in enumerate(self.blocks):
            span = str(spec.source[0]) if len(spec.source) == 1 else f"{spec.source[0]}-{spec.source[-1]}"
            size = f"{sizes[block]:>13,}  " if priced else ""
            rows.append(f"{block:>5}  {span:<14}  {size}{spec.kind}")
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, with format and version."""
        data = {"format": FORMAT, "version": 1, "family": self.family, "num_layers": self.num_layers,
                "intervals": [list(pair) for pair in self.intervals], "provenance": self.provenance}
        more = {"text_linear": [list(pair) for pair in self.text_linear], "linear_ffn": list(self.linear_ffn),
                "affine": list(self.affine), "single_stream": self.single_stream, "dead_tensors": self.dead_tensors}
        if isinstance(self.single_stream, tuple):
            more["single_stream"] = list(self.single_stream)
        if self.linear_text_ffn:
            return data | {"version": 3, **more, "linear_text_ffn": list(self.linear_text_ffn)}
        stock = self.dead_tensors and self.single_stream is None and not (
            self.text_linear or self.linear_ffn or self.affine)
        return data if stock else data | {"version": 2, **more}

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
        version = data.get("version")
        if type(version) is not int or version not in VERSIONS:  # 3.0 == 3, and True == 1
            raise FormatError(f"{what}: expected version 1, 2 or 3, got {version!r}")
        needed = {"format", "version", "family", "num_layers", "intervals"}
        more = () if version == 1 else (
            "text_linear", "linear_ffn", "affine", "single_stream", "dead_tensors", "linear_text_ffn")[:version + 3]
        known = needed | {"provenance", *more}
        # Entries of a later version change what is pruned; dropping them quietly would prune something else.
        wrong = sorted(map(str, set(data) - known)) + sorted((needed | set(more)) - set(data))
        if wrong:
            raise FormatError(f"{what}: expected the entries {', '.join(sorted(known))}, "
                              f"got unknown or missing {', '.join(wrong)}")
        try:
            provenance = data.get("provenance", {})
            return cls(data["family"], data["num_layers"], data["intervals"],
                       dict(provenance) if isinstance(provenance, Mapping) else provenance,
                       **{name: data[name] for name in more})
        except UserError as error:
            raise FormatError(f"{what}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON, atomically."""
        files.write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> PruningPlan:
        """Read a plan written by :meth:`save`. Raises FormatError naming the file."""
        return cls.from_dict(files.read_json(path, what="plan", strict=True), what=f"plan {os.fspath(path)}")


def _family_and_depth(transformer: object) -> tuple[str, int]:
    family = family_of(transformer)
    return family.name, sum(len(getattr(transformer, name)) for name in family.block_lists)


def _without_dead(specs: Sequence[BlockSpec], used: bool) -> tuple[BlockSpec, ...]:
    """The same blocks without what no output depends on; ``used``: the text output of the last is read."""
    lean = []
    for spec in reversed(specs):  # whether anything reads this block's text output is known from behind
        if spec.text == "linear":
            spec = dataclasses.replace(spec, dead_query=False, text_output=spec.text_output and used)
        elif not used:
            spec = dataclasses.replace(spec, text="none" if spec.form == "affine" else "keys",
                                       ffn="mlp" if spec.ffn == "linear text" else spec.ffn)
        lean.append(spec)
        # A linear block passes its text on, and an affine one maps it; others take keys and values from it.
        used = used if spec.text == "linear" or spec.form == "affine" else True
    return tuple(reversed(lean))


def _require_disjoint(name: str, pairs: Sequence[tuple[int, int]], num_layers: int, useless: str) -> None:
    previous = None
    for start, end in pairs:
        if start > end:
            raise UserError(f"{name}: expected start <= end, got the reversed interval [{start}, {end}]")
        if start < 0 or end >= num_layers:
            raise UserError(f"{name}: expected layers 0 to {num_layers - 1}, got [{start}, {end}], "
                            "which is out of range")
        if start == end:
            raise UserError(f"{name}: expected at least two layers each, got [{start}, {end}], {useless}")
        if previous is not None and start <= previous[1]:
            raise UserError(f"{name}: expected disjoint intervals, got [{previous[0]}, {previous[1]}] and "
                            f"[{start}, {end}], which overlap")
        previous = (start, end)


def _listed(layers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
