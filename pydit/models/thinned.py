"""Blocks that a plan has thinned out, of any dual-stream family: what goes, what comes, and their stock attention.

The formulas are in :mod:`pydit.models.dual_stream`, whose forward they share with whole blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from pydit.families import BlockSpec
from pydit.models.dual_stream import DualStreamBlock
from pydit.models.pruned import residual_map


class ThinnedBlock(DualStreamBlock):
    """Mixin of a dual-stream block of which a plan has left a part; the family's mixin and block class come next.

    Modules that stay keep their names, so LoRA and quantisation find them. New ones: ``img_ffn``, ``txt_ffn`` (linear
    FFN), ``txt_proj`` (the anchor's modulated text to this layer's), ``txt_out_proj`` (the anchor's text output to
    that of the region's last layer); each is the W and b of ``x + (W x + b)``. A linear layer of which only some rows
    or columns stayed says which in ``pydit_kept``.
    """

    processor_class: ClassVar[type]

    @classmethod
    def from_stock(cls, block: nn.Module, spec: BlockSpec) -> Any:
        """Thin out ``block`` in place and return it under this class; ``spec`` is no affine one."""
        block.__class__ = cls
        block._thin_out(spec)
        return block

    def hand_on(self, wanted: bool) -> None:
        """An anchor hands its modulated text on unless the teacher's layers run its region."""
        self.hands_on = wanted

    @property
    def width(self) -> int:
        """Channels C."""
        return self.get_submodule(self.image_branch.modulation).in_features

    def _thin_out(self, spec: BlockSpec) -> None:
        self.spec, self.hands_on = spec, spec.hands_on
        width, image, text = self.width, self.image_branch, self.text_branch
        gone = spec.form == "single" or spec.text != "full" or self.text_ends  # the text has no FFN
        if "image" in spec.linear_ffns:
            self.img_ffn = self._map()
            self._keep_rows(image.modulation, [(0, 3 * width), *self._beyond_the_mlp])
            self._remove((image.mlp, image.norm2))
        if "text" in spec.linear_ffns and not self.text_ends:
            self.txt_ffn = self._map()
            self._keep_rows(text.modulation, [(0, 3 * width)])
        if "text" in spec.linear_ffns or gone:
            self._remove((text.mlp, text.norm2))
        query = ("add_q_proj", "to_add_out", "norm_added_q")
        if spec.form == "single":
            self._remove([f"attn.{name}" for name in (*query, "add_k_proj", "add_v_proj", "norm_added_k")])
        elif spec.text != "full" and not (spec.text == "linear" and spec.dead_query):
            self._remove([f"attn.{name}" for name in query])
        if spec.form == "single" or spec.text == "linear":
            self._remove(text.owner)
        elif spec.text == "keys":
            self._keep_rows(text.modulation, [(0, 2 * width)])
        self._add_text_maps()
        self._choose_processor("keys" if spec.text != "full" or self.text_ends else "query")

    def _add_text_maps(self) -> None:
        if self.spec.text == "linear":
            self.txt_proj = self._map()
            if self.spec.text_output:
                self.txt_out_proj = self._map()

    def _choose_processor(self, kind: str, form: str | None = None) -> None:
        self.attn.pydit_text = (form or self.spec.form, kind)
        self.attn.set_processor(self.processor_class())

    @property
    def _beyond_the_mlp(self) -> list[tuple[int, int]]:
        """Rows of the image's modulation beyond those of attention and MLP."""
        return []

    def _map(self) -> nn.Linear:
        like = self.get_submodule(self.image_branch.modulation).weight
        with torch.device(like.device):
            return residual_map(like.shape[1]).to(like.dtype)

    def _remove(self, paths: Iterable[str]) -> None:
        for path in paths:
            owner, _, name = path.rpartition(".")
            module = self.get_submodule(owner)
            if hasattr(module, name):  # `= None` would let load_state_dict swallow its weights
                delattr(module, name)

    def _keep_rows(self, path: str, kept: list[tuple[int, int]]) -> None:
        """Keep some outputs of a linear layer."""
        linear = self.get_submodule(path)
        for name in ("weight", "bias"):
            tensor = getattr(linear, name).detach()
            setattr(linear, name, nn.Parameter(torch.cat([tensor[start:stop] for start, stop in kept])))
        linear.out_features = len(linear.bias)
        linear.pydit_kept = {"rows": kept}


class TextModules(NamedTuple):
    """Where a block's attention takes its text from.

    projections : names of query (None: there is none), key and value.
    norms : of query and key. output : modules after attention, in order.
    """

    projections: tuple[str | None, str, str]
    norms: tuple[nn.Module | None, nn.Module | None]
    output: tuple[nn.Module, ...]


def text_modules(attn: nn.Module) -> TextModules:
    """Of any attention module of two streams, stock or thinned out."""
    form, kind = attn.__dict__.get("pydit_text", ("stock", "query"))
    if form == "single":
        names, norms, output = ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k), tuple(getattr(attn, "to_out", ()))
    elif kind == "keys" or getattr(attn, "context_pre_only", None):
        return TextModules((None, "add_k_proj", "add_v_proj"), (None, attn.norm_added_k), ())
    else:
        names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), (attn.norm_added_q, attn.norm_added_k)
        output = (attn.to_add_out,)
    return TextModules((None, *names[1:]) if kind == "keys" else names, norms, output)


class ThinnedAttnProcessor:
    """Stock attention for what a plan leaves of a block's text: keys and values alone, or the image's projections.

    Everything else as the stock processors: masking, the backend chosen with ``set_attention_backend``.
    ``attn.pydit_text`` says which; see :func:`text_modules`.
    """

    _attention_backend = None
    _parallel_config = None
    text_first = True  # of the tokens, as in the family's stock processor: the order decides the last bits

    def attend(self, attn: nn.Module, image: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor | None,
               rotate_image: Any, rotate_text: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """image [B, S_img, C], text [B, S_txt, C], text_mask [B, S_txt] or None -> (image, text or None).

        The rotations take and return [B, S, H, D].
        """
        names = text_modules(attn)
        image_parts = _projected(attn, image, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k), rotate_image)
        text_parts = _projected(attn, text, names.projections, names.norms, rotate_text)
        mask = None
        if text_mask is not None:
            ones = text_mask.new_ones(image.shape[:2], dtype=torch.bool)
            mask = torch.cat((text_mask.bool(), ones), dim=1)[:, None, None]
        asks, order = text_parts[0] is not None, 1 if self.text_first else -1

        def joined(text, image):
            return torch.cat((text, image)[::order], dim=1)

        queries = joined(text_parts[0], image_parts[0]) if asks else image_parts[0]
        keys, values = map(joined, text_parts[1:], image_parts[1:])
        out = dispatch_attention_fn(queries, keys, values, attn_mask=mask, dropout_p=0.0, is_causal=False,
                                    backend=self._attention_backend, parallel_config=self._parallel_config)
        out = out.flatten(2, 3).to(queries.dtype)
        sizes = (text.shape[1] if asks else 0, image.shape[1])
        text_out, image_out = out.split(sizes[::order], dim=1)[::order]
        image_out = _through(image_out.contiguous(), getattr(attn, "to_out", ()))
        return image_out, _through(text_out.contiguous(), names.output) if asks else None


def _projected(attn, x, names, norms, rotate):
    """Query, key and value [B, S, H, D], normed and rotated; None for a projection without a name."""
    dim = attn.inner_dim // attn.heads
    q, k, v = [None if name is None else getattr(attn, name)(x).unflatten(-1, (-1, dim)) for name in names]
    turned = [part if part is None or norm is None else norm(part) for part, norm in zip((q, k), norms, strict=True)]
    return [*(part if part is None else rotate(part) for part in turned), v]


def _through(x, modules):
    for module in modules:
        x = module(x)
    return x
