"""Fused kernels for a model as it is, by one call, and back.

What is swapped: attention processors and the forward of the blocks, of Qwen-Image, FLUX.1, SD3 and SD3.5, whole or
pruned. Weights, modules and their names stay; query, key and value projections move next to each other in memory, so
that one product serves them where no gradient is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pydit import env
from pydit.errors import UserError
from pydit.inference import schedule

_KEY = "_pydit_accelerated"
_PROCESSORS = {  # stock class -> ours
    "QwenDoubleStreamAttnProcessor2_0": "QwenImageAttnProcessor", "FluxAttnProcessor": "FluxAttnProcessor",
    "JointAttnProcessor2_0": "SD3AttnProcessor",
    # of thinned-out blocks; stock operations
    "PrunedQwenImageAttnProcessor": "QwenImageAttnProcessor", "PrunedFluxAttnProcessor": "FluxAttnProcessor",
    "PrunedSD3AttnProcessor": "SD3AttnProcessor",
}
_HEAD_DIMS = (32, 64, 128)
_MODELS = ("QwenImageTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")


def accelerate(pipe_or_model: Any, *, exact: bool = False) -> Any:
    """Let a diffusers transformer run on this package's kernels, in place; :func:`restore` undoes it.

    Parameters
    ----------
    pipe_or_model : a Qwen-Image, FLUX.1 or SD3 transformer, stock or pruned, or a pipeline with one.
    exact : keep every operation whose fused form differs from eager by rounding, which so far is every one: the model
        stays as it is, and :func:`report` says so.

    Returns
    -------
    The argument. Call it where the model will run, in its dtype: the attention kernels take 16 bits. What the kernels
    round once eager rounds two or three times; results differ by rounding. An attention backend chosen with
    ``set_attention_backend`` stays, and a block whose forward a hook has replaced keeps its own.

    Raises
    ------
    UserError
        Another model.
    """
    model = schedule.model_of(pipe_or_model)
    names = {cls.__name__ for cls in type(model).__mro__}
    if not names & set(_MODELS):
        raise UserError(f"transformer: expected {', '.join(_MODELS[:-1])} or {_MODELS[-1]}, "
                        f"got {type(model).__name__}")
    _undo(model)
    state = model.__dict__[_KEY] = _Accelerated()
    if exact:
        state.note("attention", "stock", "exact=True: the fused ops round less often than eager")
        state.note("blocks", "stock", "exact=True: the fused ops round less often than eager")
        return pipe_or_model
    from pydit.models import attention

    refused = _refused(model)
    for module in model.modules():
        processor = getattr(module, "processor", None)
        kind = type(processor).__name__
        if processor is None or isinstance(processor, nn.Module):
            continue
        if kind not in _PROCESSORS or type(processor).__module__ == attention.__name__:
            state.note("attention", "stock", f"no fused form of {kind}")
        elif getattr(processor, "_attention_backend", None) is not None:
            state.note("attention", "stock", f"set_attention_backend chose {processor._attention_backend}")
        elif refused:
            state.note("attention", "stock", refused)
        elif module.inner_dim // module.heads not in _HEAD_DIMS:
            state.note("attention", "stock", f"heads of {module.inner_dim // module.heads} channels; the kernels take "
                                             "32, 64 and 128")
        else:
            state.processors.append((module, processor))
            module.processor = getattr(attention, _PROCESSORS[kind])()
            state.note("attention", "pydit", "")
            with torch.no_grad():
                attention.pack_projections(module)
    from pydit.models import fused_blocks, get_adapter

    target = None
    for block in get_adapter(model).blocks(model):
        if "forward" in block.__dict__:
            state.note("blocks", "stock", "a hook has replaced the block's forward; accelerate before adding hooks")
        elif type(block) not in fused_blocks.FUSED:
            state.note("blocks", "stock", f"no fused form of {type(block).__name__}")
        else:
            state.blocks.append((block, type(block)))
            block.__class__ = fused_blocks.FUSED[type(block)]
            reason = ""
            if getattr(block, "zero_cond_t", False):
                reason = "two modulation rows; batches whose target images differ in size run stock operations"
                target = target or fused_blocks.TargetTokens()
                block.__dict__["_pydit_target"] = target
            state.note("blocks", "pydit", reason)
    if target is not None:
        state.hooks.append(model.register_forward_pre_hook(target, with_kwargs=True))
    return pipe_or_model


def restore(pipe_or_model: Any) -> Any:
    """Undo :func:`accelerate` and :func:`bake_schedule`, bit for bit; returns its argument."""
    _undo(schedule.model_of(pipe_or_model))
    return schedule.restore(pipe_or_model)


def describe(pipe_or_model: Any) -> dict[str, list[dict[str, Any]]]:
    """What :func:`accelerate` has done to a model, and why not more.

    Returns
    -------
    dict
        ``attention`` and ``blocks``: rows of ``path`` (``"pydit"`` or ``"stock"``), ``reason`` ("" for pydit) and
        ``count``; ``modulation``: the same, ``path`` ``"table"`` where :func:`bake_schedule` was called.
    """
    model = schedule.model_of(pipe_or_model)
    state = model.__dict__.get(_KEY)
    rows = {kind: [{"path": "stock", "reason": "pydit.accelerate was not called", "count": 1}]
            for kind in ("attention", "blocks")}
    if state is not None:
        rows |= {kind: [{"path": path, "reason": reason, "count": count}
                        for (where, path, reason), count in state.notes.items() if where == kind] for kind in rows}
    baked = schedule.is_baked(model)
    rows["modulation"] = [{"path": "table" if baked else "stock",
                           "reason": "" if baked else "pydit.bake_schedule was not called", "count": 1}]
    return rows


def _refused(model: nn.Module) -> str:
    """Why the attention kernels cannot take this model's activations; "" if they can."""
    parameter = next(model.parameters())
    kernels = parameter.is_cuda or env.get("PYDIT_BACKEND") == "sim"
    if kernels and parameter.dtype not in (torch.float16, torch.bfloat16):
        return f"{parameter.dtype}: the attention kernels take float16 and bfloat16"
    return ""


@dataclass
class _Accelerated:
    """What was there before."""

    processors: list[tuple[nn.Module, Any]] = field(default_factory=list)
    blocks: list[tuple[nn.Module, type]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    notes: dict[tuple[str, str, str], int] = field(default_factory=dict)

    def note(self, kind: str, path: str, reason: str) -> None:
        self.notes[kind, path, reason] = self.notes.get((kind, path, reason), 0) + 1


def _undo(model: nn.Module) -> None:
    state = model.__dict__.pop(_KEY, None)
    if state is not None:
        for module, processor in state.processors:
            module.processor = processor
        for block, cls in state.blocks:
            block.__class__ = cls
            block.__dict__.pop("_pydit_target", None)
        for hook in state.hooks:
            hook.remove()
