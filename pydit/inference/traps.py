"""Calls of diffusers that do nothing, or the wrong thing, on these models, answered by a sentence.

What is guarded, in diffusers 0.42, beside layer skip (:mod:`pydit.models.caches`): ``fuse_qkv_projections`` does
nothing to Qwen-Image and leaves SD3.5 without its norms, and says nothing; ``compile_repeated_blocks`` gives up in
the middle of a run when blocks have more shapes than torch keeps graphs for; attention processors that know of no
context parallelism attend to their own process's tokens and say nothing; ``reset_attention_backend`` leaves the
backend chosen for every model.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pydit.errors import UserError
from pydit.inference import hooked
from pydit.models.attention import attention_dispatch


def guard(model: nn.Module) -> list[str]:
    """Put guards on an accelerated model; returns the names of the attributes that hold them."""
    guards = {"fuse_qkv_projections": _fuse_qkv_projections, "compile_repeated_blocks": _compile_repeated_blocks,
              "set_attention_backend": _set_attention_backend, "reset_attention_backend": _reset_attention_backend}
    names = [name for name in guards if hasattr(type(model), name)]
    for name in names:
        guarded = functools.partial(guards[name], model)  # can be pickled, as a method in its place cannot
        model.__dict__[name] = functools.update_wrapper(guarded, getattr(type(model), name).__get__(model))
    return [*names, _BEFORE]


_BEFORE = "_pydit_backend_before"


def _set_attention_backend(model: nn.Module, backend: str) -> None:
    """``set_attention_backend`` of the model's class, which diffusers makes the choice for every other model too."""
    before = attention_dispatch._AttentionBackendRegistry._active_backend
    type(model).set_attention_backend(model, backend)
    model.__dict__.setdefault(_BEFORE, before)


def _reset_attention_backend(model: nn.Module) -> None:
    """``reset_attention_backend`` of the model's class, and an end to the choice that it leaves for all models."""
    type(model).reset_attention_backend(model)
    if _BEFORE in model.__dict__:
        attention_dispatch._AttentionBackendRegistry.set_active_backend(model.__dict__.pop(_BEFORE))


def refuse_local_attention(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: UserError where context parallelism would leave attention to each process's tokens alone."""
    if hooked.is_parallel(model) != "context" or torch.compiler.is_compiling():
        return
    for module in hooked.modules_of(model):
        processor = getattr(module, "processor", None)
        if processor is not None and getattr(processor, "_parallel_config", None) is None:
            raise UserError(f"enable_parallelism: expected attention processors that take part in context parallelism, "
                            f"got {type(processor).__name__}, which attends to this process's tokens alone; "
                            "pydit.accelerate(model) without exact=True replaces it")


def _fuse_qkv_projections(model: nn.Module) -> None:
    """``fuse_qkv_projections`` of the model's class, with a warning where it fuses nothing.

    The processor that diffusers puts there for SD3 leaves QK norm out, and fails on the second attention of SD3.5
    medium.
    """
    if "SD3Transformer2DModel" in {cls.__name__ for cls in type(model).__mro__} and model.config.get("qk_norm"):
        raise UserError("fuse_qkv_projections: expected a model without QK norm, which diffusers' fused attention "
                        f"leaves out, got qk_norm {model.config.qk_norm!r}; an accelerated model computes query, key "
                        "and value by one product anyway")
    type(model).fuse_qkv_projections(model)
    if not any(getattr(module, "fused_projections", False) for module in model.modules()):
        warnings.warn(f"fuse_qkv_projections: diffusers has no fused projections for {type(model).__name__}, so "
                      "nothing was fused; an accelerated model computes query, key and value by one product anyway",
                      UserWarning, stacklevel=2)


def _compile_repeated_blocks(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``compile_repeated_blocks`` of the model's class, after a look at how many graphs it will take."""
    names = getattr(model, "_repeated_blocks", None) or ()
    kinds: dict[str, list[dict[str, torch.Size]]] = {}
    for module in model.modules():
        if type(module).__name__ in names:
            kinds.setdefault(type(module).__name__, []).append({name: p.shape for name, p in module.named_parameters()})
    limit = torch._dynamo.config.recompile_limit
    for kind, blocks in kinds.items():
        found = len({tuple(shapes.items()) for shapes in blocks})
        if found > limit:
            raise UserError(f"compile_repeated_blocks: expected at most {limit} different shapes of {kind}, for each "
                            f"of which torch compiles a graph, got {found}: give blocks the same widths in "
                            f"groups{_suggestion(blocks, limit)}, or set torch._dynamo.config.recompile_limit to "
                            f"{found} or more")
    return type(model).compile_repeated_blocks(model, *args, **kwargs)


def _suggestion(blocks: list[dict[str, torch.Size]], limit: int) -> str:
    """The widths that would do, of the first layer whose width differs from block to block; "" if none does."""
    for name in blocks[0]:
        shapes = [shapes.get(name) for shapes in blocks]
        if None not in shapes and len({shape[:1] for shape in shapes}) > limit:
            widths = sorted(set(bucketed([shape[0] for shape in shapes], limit)))
            return f" (of {name}, for example, {', '.join(map(str, widths))})"
    return ""


def bucketed(widths: Sequence[int], count: int) -> list[int]:
    """Widths rounded up to at most ``count`` different ones, for blocks that a compiler is to see: as few as possible
    added in all.

    Parameters
    ----------
    widths : of each block, as pruning would leave them. count : of different shapes, 1 or more.

    Returns
    -------
    list of int : for each block, a width from among ``widths`` and no smaller than its own.
    """
    if count < 1:
        raise UserError(f"count: expected 1 or more, got {count}")
    distinct = sorted(set(widths))
    number = {width: widths.count(width) for width in distinct}

    @functools.cache
    def best(start: int, left: int) -> tuple[int, tuple[int, ...]]:
        """(what is added, the last of each bucket) for the widths from ``start`` on."""
        if start == len(distinct):
            return 0, ()
        if left == 0:
            return sum(widths) * len(distinct) * max(distinct), ()  # more than any choice
        options = []
        for end in range(start, len(distinct)):
            added = sum((distinct[end] - width) * number[width] for width in distinct[start:end])
            rest, ends = best(end + 1, left - 1)
            options.append((added + rest, (end, *ends)))
        return min(options)

    ends = [distinct[end] for end in best(0, count)[1]]
    return [next(end for end in ends if end >= width) for width in widths]
