"""The forward of a dual-stream block, of any family, stock or thinned out, on stock operations or on fused ones.

Formulas, for a stream x with modulation (shift, scale, gate, shift2, scale2, gate2), n(x) the LayerNorm:

    a = attention(n(x) (1 + scale) + shift)                     of both streams together
    h = x + gate a
    y = h + gate2 MLP(n(h) (1 + scale2) + shift2)               ffn "mlp"
    y = h + (W h + b)                                           ffn "linear" (PPCL, Eq. 9)

Text that is ``"linear"`` gives keys and values of ``m + (W m + b)``, m the anchor's modulated text (PPCL, Eq. 8);
text of a ``"single"`` block goes through the image's weights (Amber-Image); text that is ``"keys"`` gives keys and
values and has no output.

Between an anchor and the end of its text region the text stream is two tensors, the anchor's text output and its
modulated text, one after the other along the tokens. Passing both through the model's own forward, rather than beside
it, keeps gradient checkpointing, compilation and offloading hooks working.

Every operation takes one stream or both, so that one launch may serve both; and the last product of attention and MLP
may be left to the residual it is added to, see :class:`Output`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from pydit import backend
from pydit.families import BlockSpec


class Branch(NamedTuple):
    """Names of the modules that a stream runs through in a block, as paths below it.

    modulation : the linear layer that makes shifts, scales and gates. owner : what to remove with it.
    norm1, norm2 : before attention and before the MLP.
    """

    modulation: str
    owner: tuple[str, ...]
    norm1: str
    norm2: str
    mlp: str


class Modulation(NamedTuple):
    """Shifts, scales and gates of one stream, each [B, 1, C], [B, S, C], or [B, 2, C] with ``split``.

    rows : in the order shift, scale, gate, then those of the MLP as far as there are any.
    split : tokens that take row 0 where there are two.
    """

    rows: tuple[torch.Tensor, ...]
    split: int | None = None


class Stream(NamedTuple):
    """One stream on its way through a block.

    x : [B, S, C]. normed : what attention was given. branch : its modules. linear : name of its linear FFN.
    """

    x: torch.Tensor
    normed: torch.Tensor
    mod: Modulation
    branch: Branch
    linear: str


class Output(NamedTuple):
    """What attention or an MLP gives: ``x``, or ``linear(x)`` where the residual's launch is to compute the product."""

    x: torch.Tensor
    linear: nn.Linear | None = None


class Stock:
    """The operations of a block, rounding where diffusers' blocks round."""

    @classmethod
    def suited(cls, *streams: torch.Tensor) -> type[Stock]:
        """These operations, in the form that suits the tensors."""
        return cls

    @staticmethod
    def modulate(norm: nn.Module, x: torch.Tensor, mod: Modulation) -> torch.Tensor:
        return norm(x) * (1 + mod.rows[1]) + mod.rows[0]

    @staticmethod
    def attend(attn: nn.Module, image: torch.Tensor, text: torch.Tensor | None, options: dict[str, Any]) -> list[Any]:
        """Per output of attention an :class:`Output`, or None; more than two come from adapters."""
        if text is None:
            return [Output(attn(hidden_states=image, **options))]
        found = attn(hidden_states=image, encoder_hidden_states=text, **options)
        return [None if x is None else Output(x) for x in found]

    @staticmethod
    def project(linear: nn.Module, x: torch.Tensor) -> Output:
        return Output(linear(x))

    @staticmethod
    def add(streams: list[Stream], outputs: list[Output], gates: Iterable[torch.Tensor]) -> list[Stream]:
        """``x + gate * output`` of each stream."""
        return [stream._replace(x=stream.x + gate * out.x)
                for stream, out, gate in zip(streams, outputs, gates, strict=True)]

    @classmethod
    def add_modulate(cls, norms: list[nn.Module | None], streams: list[Stream], outputs: list[Output]
                     ) -> tuple[list[Stream], list[torch.Tensor | None]]:
        """The residual of attention, and the input of the MLP where there is one, and so a norm before it."""
        streams = cls.add(streams, outputs, [stream.mod.rows[2] for stream in streams])
        return streams, [None if norm is None else
                         cls.modulate(norm, stream.x, Modulation(stream.mod.rows[3:5], stream.mod.split))
                         for norm, stream in zip(norms, streams, strict=True)]

    @staticmethod
    def feed_forward(mlps: list[nn.Module], xs: list[torch.Tensor]) -> list[Output]:
        return [Output(mlp(x)) for mlp, x in zip(mlps, xs, strict=True)]

    @staticmethod
    def linear_gelu(linear: nn.Module, gelu: nn.Module, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        """One linear layer and GELU on each of ``xs``."""
        return [gelu(linear(x)) for x in xs]

    @staticmethod
    def linear_residual(linears: list[nn.Module], xs: list[torch.Tensor]) -> list[torch.Tensor]:
        """``x + linear(x)``."""
        return [x + linear(x) for linear, x in zip(linears, xs, strict=True)]


class DualStreamBlock:
    """Mixin with the forward of both streams; a family's has :meth:`forward`, which makes the modulations.

    ``spec`` says what a plan has left of the block; a stock one has all. ``clips``: whether the family's blocks clip
    float16 to its range, in text and in image.
    """

    image_branch: ClassVar[Branch]
    text_branch: ClassVar[Branch]
    operations: ClassVar[type] = Stock
    clips: ClassVar[tuple[bool, bool]] = (True, True)
    spec: BlockSpec = BlockSpec(source=())
    hands_on: bool = False

    @property
    def text_ends(self) -> bool:
        """Whether the block has no text output in the teacher already."""
        return False

    def _operations_on(self, x: torch.Tensor) -> type:
        """The class's, but where torch.autocast has tensors of several dtypes meet."""
        return Stock if self.operations is not Stock and is_recast(self.attn.to_q, x) else self.operations

    def _run(self, image: torch.Tensor, text: torch.Tensor, image_mod: Modulation, text_mod: Modulation | None,
             options: dict[str, Any], do: type | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(text, image) after the block.

        ``text_mod`` is None where the text is linear; ``options`` are attention's; ``do``: the operations, if they are
        chosen already.
        """
        spec, do = self.spec, (do or self._operations_on(image)).suited(image, text)
        if do is not Stock:
            (image, text), (image_mod, text_mod) = of_one_batch([image, text], [image_mod, text_mod])
        own, other = self.image_branch, self.image_branch if spec.form == "single" else self.text_branch
        image_in = do.modulate(_below(self, own.norm1), image, image_mod)
        if spec.text == "linear":
            text, told = text.chunk(2, dim=1)
            text_in, = do.linear_residual([self.txt_proj], [told])
        else:
            text_in = do.modulate(_below(self, other.norm1), text, text_mod)
        out_image, out_text, *adapted = do.attend(self.attn, image_in, text_in, options)
        streams, outputs = [Stream(image, image_in, image_mod, own, "img_ffn")], [out_image]
        # Stock attention gives an output for text that ends here all the same.
        if spec.text != "linear" and out_text is not None and not self.text_ends:
            streams.append(Stream(text, text_in, text_mod, other, "txt_ffn"))
            outputs.append(out_text)
        image, *rest = self._after_attention(do, streams, outputs, options)
        if rest:
            text, = rest
        elif spec.text == "linear" and spec.text_output:
            text, = do.linear_residual([self.txt_out_proj], [text])
        elif spec.text == "linear":
            text = torch.cat((text, told), dim=1)
        for more in adapted:  # an IP-adapter's third output
            image = image + more.x
        if self.hands_on:
            text = torch.cat((text, text_in), dim=1)
        return _finite(text, self.clips[0]), _finite(image, self.clips[1])

    def _after_attention(self, do: type, streams: list[Stream], outputs: list[Output], options: dict[str, Any]
                         ) -> list[torch.Tensor]:
        """The streams after attention's output and the FFN."""
        maps = [kind in self.spec.linear_ffns for kind in ("image", "text")[:len(streams)]]
        norms = [None if is_map else _below(self, stream.branch.norm2)
                 for is_map, stream in zip(maps, streams, strict=True)]
        streams, normed = do.add_modulate(norms, streams, outputs)
        xs = [stream.x for stream in streams]
        mapped, whole = ([i for i, is_map in enumerate(maps) if is_map == kind] for kind in (True, False))
        if mapped:
            found = do.linear_residual([getattr(self, streams[i].linear) for i in mapped], [xs[i] for i in mapped])
            for i, x in zip(mapped, found, strict=True):
                xs[i] = x
        if whole:
            outputs = do.feed_forward([_below(self, streams[i].branch.mlp) for i in whole], [normed[i] for i in whole])
            added = do.add([streams[i] for i in whole], outputs, [streams[i].mod.rows[5] for i in whole])
            for i, stream in zip(whole, added, strict=True):
                xs[i] = stream.x
        return xs


def is_recast(linear: nn.Module, x: torch.Tensor) -> bool:
    """Whether torch.autocast gives the product of a linear layer and ``x`` another dtype than the weight has.

    Then tensors of several dtypes meet in a block, which torch's operations take and fused ones do not.
    """
    kind = x.device.type  # a weight that is offloaded is elsewhere
    found = (kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
             and torch.get_autocast_dtype(kind) != linear.weight.dtype)
    if found:
        backend.record("ada_layer_norm", "torch", "torch.autocast computes in another dtype than the weights have: the "
                                                  "block's stock operations run")
    return found


def of_one_batch(streams: list[torch.Tensor], mods: list[Modulation | None]
                 ) -> tuple[list[torch.Tensor], list[Modulation | None]]:
    """The same, a batch of one repeated where others have more: one negative prompt, or one timestep, for all images.
    Torch's operations broadcast it, fused ones do not."""
    sizes = [x.shape[0] for x in (*streams, *(mod.rows[0] for mod in mods if mod is not None))]
    if all(size == sizes[0] for size in sizes):
        return streams, mods

    def repeated(x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] == max(sizes) else x.expand(max(sizes), *x.shape[1:]).contiguous()

    return [repeated(x) for x in streams], [mod and mod._replace(rows=tuple(map(repeated, mod.rows))) for mod in mods]


def rows_of(modulation: torch.Tensor, width: int) -> tuple[torch.Tensor, ...]:
    """[B, n C] -> n of [B, 1, C]."""
    return modulation.unsqueeze(1).split(width, dim=-1)


def _below(block: nn.Module, path: str) -> nn.Module:
    """``block.get_submodule(path)``, in a third of its time."""
    for name in path.split("."):
        block = getattr(block, name)
    return block


def _finite(x: torch.Tensor, clips: bool) -> torch.Tensor:
    return x.clip(-65504, 65504) if clips and x.dtype == torch.float16 else x
