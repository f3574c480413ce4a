"""What is known of a model family without building a model: its class, its published sizes, its arithmetic.

The arithmetic (parameters and FLOPs) is exact and needs configuration values alone, so that the size of a plan can be
computed where neither diffusers nor the weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydit.errors import UserError

Config = Mapping[str, Any]
_LARGEST = 1 << 20  # of one number of a configuration; what is built from it is held in memory


@dataclass(frozen=True)
class BlockSpec:
    """One block of a pruned model.

    source : teacher layers the block stands for, in order.
    form : ``"stock"``, a block as the family has it at that depth; ``"single"``, both streams through the image
        branch's weights (Amber-Image); ``"affine"``, one affine map per stream.
    text : what becomes of the text stream. ``"full"``: as in the teacher; ``"linear"``: its keys and values come from
        an affine map of the modulated text of the block ``anchor``, and it has no output (PPCL, Eq. 8); ``"keys"``: it
        gives keys and values and has no output; ``"none"``: the block does not see it.
    ffn : ``"mlp"``; ``"linear"``: ``x + (W x + b)`` in both streams, without norm and modulation (PPCL, Eq. 9);
        ``"linear text"``: the same in the text stream alone.
    anchor : index of the student block whose modulated text a ``"linear"`` block reads.
    hands_on : the block is such an anchor.
    text_output : a ``"linear"`` block that ends its region maps the anchor's text output to its own layer's.
    dead_query : query and output projections of the text are stored although nothing reads them, as published.
    """

    source: tuple[int, ...]
    form: str = "stock"
    text: str = "full"
    ffn: str = "mlp"
    anchor: int | None = None
    hands_on: bool = False
    text_output: bool = False
    dead_query: bool = True

    @property
    def is_stock(self) -> bool:
        """Whether the family's own block class carries it."""
        return (self.form, self.text, self.ffn, self.hands_on) == ("stock", "full", "mlp", False)

    @property
    def has_maps(self) -> bool:
        """Whether it has linear maps, which the teacher does not."""
        return self.form == "affine" or self.text == "linear" or bool(self.linear_ffns)

    @property
    def linear_ffns(self) -> tuple[str, ...]:
        """Streams, ``"image"`` and ``"text"``, whose FFN is a linear map; text without an output has no FFN."""
        streams = {"mlp": (), "linear": ("image", "text"), "linear text": ("text",)}[self.ffn]
        return streams if self.text == "full" else tuple(stream for stream in streams if stream == "image")

    @property
    def kind(self) -> str:
        """In words."""
        words = [{"stock": "", "single": "single stream", "affine": "affine"}[self.form]]
        words.append({"full": "", "none": "no text", "keys": "text keys and values",
                      "linear": f"text linear from block {self.anchor}"}[self.text])
        words += [{"mlp": "", "linear": "linear FFN", "linear text": "linear text FFN"}[self.ffn],
                  "text output" if self.text_output else ""]
        copied = "kept" if len(self.source) == 1 else f"one block for {len(self.source)}"
        return ", ".join(word for word in (copied, *words) if word)


@dataclass(frozen=True)
class Family:
    """A model family.

    published : configurations of the released sizes, the usual one first.
    depth : blocks of a model with this configuration.
    text_used : whether the model reads the text output of its last block.
    text_ends : whether that block has none to begin with.
    block_parameters, block_flops : of one block, from its specification; FLOPs for one image of so many image and
        text tokens (matrix products and attention, a multiply-add is two).
    other_parameters : of everything outside the blocks.
    segments : lengths of the runs of blocks of one class, in order; no interval crosses from one to the next.
    """

    name: str
    class_name: str
    block_lists: tuple[str, ...]
    published: tuple[Config, ...]
    block_parameters: Callable[[Config, BlockSpec], int]
    other_parameters: Callable[[Config], int]
    block_flops: Callable[[Config, BlockSpec, int, int], int]
    segments: Callable[[Config], tuple[int, ...]] = lambda config: (config["num_layers"],)
    text_used: bool = False
    text_ends: bool = False

    def depth(self, config: Config) -> int:
        """Blocks of a model with this configuration."""
        return sum(self.segments(config))

    def require(self, config: Config) -> dict[str, Any]:
        """``config`` as a dict; UserError when an entry that the arithmetic reads is not of its kind or size."""
        for name, usual in self.published[0].items():
            value = config.get(name)
            if isinstance(usual, bool):
                expected, fits = "true or false", isinstance(value, bool)
            elif isinstance(usual, tuple):
                expected, fits = "layers", isinstance(value, (list, tuple)) and all(type(k) is int for k in value)
            elif isinstance(usual, str):
                expected, fits = "a name or nothing", value is None or isinstance(value, str)
            else:
                least = 0 if name in ("num_layers", "num_single_layers") else 1
                expected = f"a whole number from {least} to {_LARGEST}"
                fits = (type(value) is int and least <= value <= _LARGEST) or (name == "out_channels" and value is None)
            if not fits:
                raise UserError(f"config: expected {expected} as {name}, got {value!r}")
        return dict(config)


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _width(config: Config) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def _mlp(width: int) -> int:
    return _linear(width, 4 * width) + _linear(4 * width, width)


def _affine_parameters(config: Config, spec: BlockSpec) -> int:
    return (1 if spec.text == "none" else 2) * _linear(_width(config), _width(config))


def _affine_flops(config: Config, spec: BlockSpec, image: int, text: int) -> int:
    return 2 * (image + (0 if spec.text == "none" else text)) * _width(config) ** 2


def _dual_block(config: Config, spec: BlockSpec, *, norms: bool = True, twice: bool = False,
                ends: bool = False) -> int:
    """Parameters of a dual-stream block; ``norms`` of queries and keys, ``twice``: a second, image-only attention,
    ``ends``: the teacher's block has no text output already."""
    if spec.form == "affine":
        return _affine_parameters(config, spec)
    head, width = config["attention_head_dim"] if norms else 0, _width(config)
    square = _linear(width, width)
    (chunks, ffn), (text_chunks, text_ffn) = (
        (3, square) if stream in spec.linear_ffns else (6, _mlp(width)) for stream in ("image", "text"))
    attention = 4 * square + 2 * head  # q, k, v, out; norms of q and k
    image = _linear(width, (chunks + 3 * twice) * width) + (1 + twice) * attention + ffn
    if spec.form == "single":
        return image
    if spec.text == "keys":
        return image + _linear(width, 2 * width) + 2 * square + head
    stored = attention - (square if ends else 0)
    if spec.text == "full":
        return image + stored + (_linear(width, 2 * width) if ends else _linear(width, text_chunks * width) + text_ffn)
    return image + square + (stored if spec.dead_query else 2 * square + head) + (square if spec.text_output else 0)


def _dual_flops(config: Config, spec: BlockSpec, image: int, text: int, *, twice: bool = False,
                ends: bool = False) -> int:
    """FLOPs of a dual-stream block; see :func:`_dual_block`."""
    if spec.form == "affine":
        return _affine_flops(config, spec, image, text)
    width = _width(config)
    (chunks, ffn), (text_chunks, text_ffn) = (
        (3, 1) if stream in spec.linear_ffns else (6, 8) for stream in ("image", "text"))
    per_token = 4 + ffn
    # In units of width ** 2: tokens, and the modulation of one row.
    squares, queries = image * (per_token + 4 * twice) + chunks + 3 * twice, image
    if spec.text == "linear":
        squares += text * (3 + spec.text_output)
    elif spec.text == "full" and not ends:
        squares += text * (4 + text_ffn) + (0 if spec.form == "single" else text_chunks)
        queries += text
    elif spec.text == "full" and spec.is_stock:  # diffusers lets the text ask, for an output that nothing reads
        squares += text * 3 + 2
        queries += text
    else:
        squares += text * 2 + (0 if spec.form == "single" else 2)
    second = 4 * image ** 2 * width if twice else 0
    return 2 * squares * width ** 2 + 4 * queries * (image + text) * width + second


def _qwen_image_other(config: Config) -> int:
    width, text = _width(config), config["joint_attention_dim"]
    pixels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    time = _linear(256, width) + _linear(width, width) + (2 * width if config["use_additional_t_cond"] else 0)
    inputs = _linear(config["in_channels"], width) + text + _linear(text, width)  # txt_norm has a weight only
    return time + inputs + _linear(width, 2 * width) + _linear(width, pixels)


def _flux_is_single(config: Config, spec: BlockSpec) -> bool:
    return spec.source[0] >= config["num_layers"]


def _flux_block(config: Config, spec: BlockSpec) -> int:
    if spec.form == "affine" or not _flux_is_single(config, spec):
        return _dual_block(config, spec)
    width = _width(config)
    square = _linear(width, width)
    found = _linear(width, 3 * width) + 3 * square + 2 * config["attention_head_dim"]
    if spec.ffn == "mlp":
        found += _linear(width, 4 * width) + _linear(5 * width, width)
    else:
        found += square + (2 if spec.text == "full" else 1) * square
    return found + ((1 + spec.text_output) * square if spec.text == "linear" else 0)


def _flux_flops(config: Config, spec: BlockSpec, image: int, text: int) -> int:
    if spec.form == "affine" or not _flux_is_single(config, spec):
        return _dual_flops(config, spec, image, text)
    width, per_token = _width(config), 12 if spec.ffn == "mlp" else 5
    full = spec.text == "full"
    squares = image * per_token + 3 + text * (per_token if full else 2)
    if spec.text == "linear":
        squares += text * (1 + spec.text_output)
    return 2 * squares * width ** 2 + 4 * (image + (text if full else 0)) * (image + text) * width


def _flux_other(config: Config) -> int:
    width = _width(config)
    time = _linear(256, width) + _linear(width, width)
    embeds = time * (2 if config["guidance_embeds"] else 1)
    embeds += _linear(config["pooled_projection_dim"], width) + _linear(width, width)
    pixels = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
    return (embeds + _linear(config["in_channels"], width) + _linear(config["joint_attention_dim"], width)
            + _linear(width, 2 * width) + _linear(width, pixels))


def _sd3_block(config: Config, spec: BlockSpec) -> int:
    return _dual_block(config, spec, norms=bool(config["qk_norm"]), twice=_sd3_twice(config, spec),
                       ends=_sd3_last(config, spec))


def _sd3_twice(config: Config, spec: BlockSpec) -> bool:
    """Whether the block has the second, image-only attention: the first layer it stands for decides."""
    return spec.source[0] in config["dual_attention_layers"]


def _sd3_last(config: Config, spec: BlockSpec) -> bool:
    """Whether the block is the last, whose text has no output."""
    return spec.source[-1] == config["num_layers"] - 1


def _sd3_flops(config: Config, spec: BlockSpec, image: int, text: int) -> int:
    return _dual_flops(config, spec, image, text, twice=_sd3_twice(config, spec), ends=_sd3_last(config, spec))


def _sd3_other(config: Config) -> int:
    width, patch = _width(config), config["patch_size"] ** 2
    time = _linear(256, width) + _linear(config["pooled_projection_dim"], width) + 2 * _linear(width, width)
    return (time + _linear(config["in_channels"] * patch, width)
            + _linear(config["joint_attention_dim"], config["caption_projection_dim"])
            + _linear(width, 2 * width) + _linear(width, patch * (config["out_channels"] or config["in_channels"])))


_SD3 = {"patch_size": 2, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048, "qk_norm": "rms_norm"}

FAMILIES = {
    "qwen-image": Family(
        name="qwen-image", class_name="QwenImageTransformer2DModel", block_lists=("transformer_blocks",),
        published=({"patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60,
                    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584,
                    "use_additional_t_cond": False},),
        block_parameters=_dual_block, other_parameters=_qwen_image_other, block_flops=_dual_flops),
    "flux.1": Family(
        name="flux.1", class_name="FluxTransformer2DModel",
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        published=({"patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 19,
                    "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
                    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True},),
        block_parameters=_flux_block, other_parameters=_flux_other, block_flops=_flux_flops,
        segments=lambda config: (config["num_layers"], config["num_single_layers"])),
    "sd3.5": Family(
        name="sd3.5", class_name="SD3Transformer2DModel", block_lists=("transformer_blocks",),
        published=({**_SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
                    "dual_attention_layers": ()},
                   {**_SD3, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
                    "dual_attention_layers": tuple(range(13))}),
        text_ends=True, block_parameters=_sd3_block, other_parameters=_sd3_other, block_flops=_sd3_flops),
}


def in_units(before: float, after: float, unit: str) -> str:
    """Two numbers as ``41 GB -> 20.9``, in the multiple of the unit that suits the first."""
    factor, prefix = next(((f, p) for f, p in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"))
                           if before >= f), (1e-6, "u"))
    return f"{before / factor:.3g} {prefix}{unit} -> {after / factor:.3g}"
