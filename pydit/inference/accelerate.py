"""Fused kernels for an existing model, switched on and off by one call each.

Attention processors and the forward of blocks are swapped: those of Qwen-Image, FLUX.1, SD3 and SD3.5, whole or pruned,
and of their ControlNets. Weights, modules and their names stay; query, key and value projections move next to each
other in memory, so that one product computes them where no gradient is needed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor as _is_wrapped

from pydit import env
from pydit.backend import KERNEL_DTYPES, KERNEL_HEAD_DIMS
from pydit.errors import UserError
from pydit.inference import graphs, hooked, schedule, traps
from pydit.inference.hooked import change_class, derived, has_offloading
from pydit.models import caches
from pydit.models.projections import PLAIN_TENSORS, is_stock, pack_projections

_KEY = "_pydit_accelerated"
_PROCESSORS = {  # stock class -> ours
    "QwenDoubleStreamAttnProcessor2_0": "QwenImageAttnProcessor", "FluxAttnProcessor": "FluxAttnProcessor",
    "JointAttnProcessor2_0": "SD3AttnProcessor",
    # of thinned-out blocks; stock operations
    "PrunedQwenImageAttnProcessor": "QwenImageAttnProcessor", "PrunedFluxAttnProcessor": "FluxAttnProcessor",
    "PrunedSD3AttnProcessor": "SD3AttnProcessor",
}
_MODELS = ("QwenImageTransformer2DModel", "FluxTransformer2DModel", "SD3Transformer2DModel")
_CONTROLNETS = ("QwenImageControlNetModel", "FluxControlNetModel", "SD3ControlNetModel")
_BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")
_SHARED = "shared with another accelerated model"
_EXACT = "exact=True: sums over channels and tokens keep eager's order"


def accelerate(pipe_or_model: Any, *, exact: bool = False, cuda_graphs: bool = False) -> Any:
    """Make a diffusers transformer run on this package's kernels, in place; :func:`restore` undoes it.

    Parameters
    ----------
    pipe_or_model : a Qwen-Image, FLUX.1 or SD3 transformer, stock or pruned, a ControlNet of one of these families, or
        a pipeline with one, whose ControlNets are accelerated too.
    exact : equal eager diffusers to the last bit, with fewer launches: element-wise ops are fused with eager's
        roundings, and projections become one product where that gives the same bits; whatever would sum in another
        order stays torch's. Every fused form is compared with eager the first time it meets a signature of shapes, and
        dropped where a bit differs (:mod:`pydit.models.exact`). ``pydit.report(model)`` says which.
    cuda_graphs : record the transformer's whole forward as a CUDA graph per shape
        (:func:`pydit.inference.graphs.enable`).

    Returns
    -------
    The argument.

    Raises
    ------
    UserError
        Another model, graphs of a model whose weights are offloaded, or ``exact`` with blocks that another accelerated
        model runs.

    Notes
    -----
    Call it on the device where the model will run and in its dtype: the attention kernels take 16 bits. The kernels
    round once where eager rounds two or three times, so without ``exact`` results differ by rounding. Under
    torch.autocast to a dtype other than the weights' the blocks run stock operations, and ``pydit.report()`` says so.

    An attention backend chosen with ``set_attention_backend``, or temporarily with diffusers' ``attention_backend``,
    stays in force, unless it is ``"native"``, diffusers' default. Hooks of diffusers and of accelerate may come before
    or after, and so may ``enable_parallelism``: context parallelism (Ulysses, ring) over the fused attention, or tensor
    parallelism.

    A pruned model shares the teacher layers that it runs: while it does, they are accelerated in the teacher too.
    Training SD3.5 under DistributedDataParallel needs ``find_unused_parameters=True``, because the last block's text
    query, whose output stock SD3.5 drops, does not run.
    """
    models = _models_of(pipe_or_model)
    for name, value in (("exact", exact), ("cuda_graphs", cuda_graphs)):
        if not isinstance(value, bool):
            raise UserError(f"{name}: expected True or False, got {value!r}")
    if cuda_graphs:
        graphs.check(models[0])
    if exact:
        for model in models:
            _require_unshared(model)
    for model in models:
        _undo(model)
        state = model.__dict__[_KEY] = _Accelerated(exact_only=exact)
        _swap(model)
        state.guards = traps.guard(model)
        for hook in (caches.refuse_layer_skip, traps.refuse_local_attention, _adopt):
            state.hooks.append(model.register_forward_pre_hook(hook, with_kwargs=True))
        if hasattr(model, "set_active"):
            model.__dict__["_pydit_on_route"] = _swap
    if cuda_graphs:
        graphs.enable(models[0])
    return pipe_or_model


def _require_unshared(model: nn.Module) -> None:
    """UserError where another accelerated model runs blocks of this one fused: it would not be exact."""
    from pydit.models.fused_blocks import FUSED

    mine = [entry[0] for entry in model.__dict__[_KEY].blocks] if _KEY in model.__dict__ else []
    shared = [block for block in _blocks_of(model)
              if type(block) in FUSED.values() and not any(block is one for one in mine)]
    if shared:
        raise UserError("exact: expected blocks that no other accelerated model runs, got "
                        f"{len(shared)} that one does; pydit.restore it, or set_active it to its own blocks, first")


def _swap(model: nn.Module) -> None:
    """Swap what runs and has not been swapped yet; again for a pruned model whose route has changed.

    What no longer runs is put back: it may be a layer of the teacher, which runs by itself too.
    """
    state = model.__dict__[_KEY]
    running = {id(module) for module in (*_modules_of(model), *_blocks_of(model))}
    _put_back(state, lambda module: id(module) not in running)
    _swap_processors(model, state, state.exact_only)
    _swap_blocks(model, state, state.exact_only)
    state.places = _places(state)


def _adopt(model: nn.Module, _args: tuple, _kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: give processors of ours that were re-created, as by an IP-adapter, their stock one to fall
    back on, and pack projections again after ``to``, copying or loading has moved them."""
    if torch.compiler.is_compiling():
        return
    state = model.__dict__[_KEY]
    for module, processor, ours in state.processors:
        if module.processor is not ours and type(module.processor) is type(ours) and hasattr(ours, "stock"):
            module.processor.stock = processor
        elif module.processor is not ours and type(module.processor) is type(ours) and hasattr(ours, "exact"):
            module.processor.exact = ours.exact
    if _places(state) != state.places and not has_offloading(model):
        with torch.no_grad():
            for module, _, _ in state.processors:
                pack_projections(module)
        state.places = _places(state)


def _places(state: _Accelerated) -> list[int]:
    """Where the first projection of every attention module lies."""
    # Not the attribute: a parametrization computes it anew (spectral_norm moves on), a quantized layer unpacks it.
    weights = (getattr(getattr(module, "to_q", None), "_parameters", {}).get("weight")
               for module, _, _ in state.processors)
    return [weight.data_ptr() if type(weight) in PLAIN_TENSORS and not _is_wrapped(weight) else 0
            for weight in weights]


def _swap_processors(model: nn.Module, state: _Accelerated, exact: bool) -> None:
    from pydit.models import attention
    from pydit.models import exact as exact_forms

    refused = "" if exact else _refused(model)
    for module in _modules_of(model):
        processor = getattr(module, "processor", None)
        if processor is None or state.knows("attention", module):
            continue
        if isinstance(processor, attention.Replacing) and not exact:  # the user's choice, or a shared layer's
            state.note("attention", module, "pydit", "")
            continue
        if exact and type(processor) in exact_forms.PROCESSORS:
            ours = exact_forms.PROCESSORS[type(processor)].__new__(exact_forms.PROCESSORS[type(processor)])
            ours.__dict__.update(processor.__dict__, exact=state.exact_ops())
            state.note("attention", module, "stock", f"{_EXACT}; its projections are one product where that is "
                                                     "bit-equal")
        elif reason := _stays_stock(module, processor, exact, refused):
            state.note("attention", module, "stock", reason)
            continue
        else:
            ours = getattr(attention, _PROCESSORS[type(processor).__name__])()
            ours.stock = processor
            # A stock processor that knows of no parallelism has not been told of it either.
            ours._parallel_config = getattr(processor, "_parallel_config", getattr(model, "_parallel_config", None))
            state.note("attention", module, "pydit", "")
        state.processors.append((module, processor, ours))
        module.processor = ours
        with torch.no_grad():
            pack_projections(module)


def _stays_stock(module: nn.Module, processor: Any, exact: bool, refused: str) -> str:
    """Why an attention module keeps its processor; "" where the fused one may take its place."""
    from pydit.models import attention

    kind, chosen = type(processor).__name__, getattr(processor, "_attention_backend", None)
    if kind not in _PROCESSORS or type(processor).__module__ == attention.__name__ or not is_stock(processor):
        return f"no {'exact' if exact else 'fused'} form of {kind}"
    if chosen is not None:
        return f"set_attention_backend chose {getattr(chosen, 'value', chosen)}"
    if exact or refused:
        return refused or f"no exact form of {kind}"
    dim = module.inner_dim // module.heads
    if dim not in KERNEL_HEAD_DIMS:
        return f"heads of {dim} channels; the kernels take 32, 64 and 128"
    return ""


def _swap_blocks(model: nn.Module, state: _Accelerated, exact: bool) -> None:
    from pydit.models import exact as exact_forms
    from pydit.models import fused_blocks, qwen_image_blocks

    forms, word = (exact_forms.BLOCKS, "exact") if exact else (fused_blocks.FUSED, "fused")
    for block in _blocks_of(model):
        stock = type(block)
        if state.knows("blocks", block):
            continue
        if stock not in forms:
            shared = stock in forms.values()  # with a model that is accelerated too
            state.note("blocks", block, *(("pydit", _SHARED) if shared else
                                          ("stock", f"no {word} form of {stock.__name__}")))
            continue
        caches.know_as(forms[stock], stock)
        if not change_class(block, forms[stock]):
            state.note("blocks", block, "stock", "something other than a hook of diffusers or accelerate has replaced "
                                                 "the block's forward")
            continue
        state.blocks.append((block, stock, forms[stock]))
        two_rows = getattr(block, "zero_cond_t", False)
        if exact:
            block.__dict__["_pydit_exact"] = state.exact_ops()
            state.note("blocks", block, *(("stock", f"{_EXACT}; no exact form of two modulation rows") if two_rows else
                                          ("pydit", _EXACT)))
        elif two_rows:
            if state.target is None:
                state.target = qwen_image_blocks.TargetTokens()
                state.hooks += [model.register_forward_pre_hook(state.target, with_kwargs=True),
                                model.register_forward_hook(state.target.forget)]
            block.__dict__["_pydit_target"] = state.target
            state.note("blocks", block, "pydit", "two modulation rows; batches whose target images differ in size run "
                                                 "stock operations")
        else:
            state.note("blocks", block, "pydit", "")


def restore(pipe_or_model: Any) -> Any:
    """Undo :func:`accelerate` and :func:`bake_schedule`, bit for bit; returns its argument."""
    for model in _models_of(pipe_or_model):
        _undo(model)
        schedule.restore(model)
    return pipe_or_model


def describe(pipe_or_model: Any) -> dict[str, Any]:
    """What :func:`accelerate` has done to a model, and why not more.

    Returns
    -------
    dict
        ``attention`` and ``blocks``: rows of ``path`` (``"pydit"`` or ``"stock"``), ``reason`` ("" where nothing faster
        exists) and ``count``; ``modulation``: the same, with ``path`` ``"table"`` after :func:`bake_schedule`;
        ``exact``: per op of ``exact=True``, what ran fused so far; ``parallel``: after ``enable_parallelism``, which
        attention runs over the processes; ``graphs``: with ``cuda_graphs=True``, what was recorded and replayed;
        ``controlnets``: the same for a pipeline's ControlNets.
    """
    models = _models_of(pipe_or_model)
    found = _describe(models[0])
    if len(models) > 1:
        found["controlnets"] = [_describe(model) for model in models[1:]]
    return found


def _describe(model: nn.Module) -> dict[str, Any]:
    state = model.__dict__.get(_KEY)
    rows: dict[str, Any] = {kind: [{"path": "stock", "reason": "pydit.accelerate was not called", "count": 1}]
                            for kind in ("attention", "blocks")}
    if state is not None:
        rows["attention"] = _counted(_attention_path(state, module) for module in _modules_of(model)
                                     if getattr(module, "processor", None) is not None)
        rows["blocks"] = _counted(_block_path(state, block) for block in _blocks_of(model))
        if state.exact is not None:
            rows["exact"] = state.exact.rows()
        if hooked.is_parallel(model):
            rows["parallel"] = _parallel(model, state)
    rows["modulation"] = schedule.describe(model)
    rows["graphs"] = graphs.describe(model)
    return rows


def _attention_path(state: _Accelerated, module: nn.Module) -> tuple[str, str]:
    """(path, reason) of an attention module as it is now."""
    processor, ours = module.processor, state.ours_of(module)
    if not (_is(processor, ours) or processor is state.found_in(module)):
        return "stock", f"{type(processor).__name__} was set after pydit.accelerate"
    if hasattr(processor, "why_stock") and (reason := processor.why_stock()):
        return "stock", reason + (" after pydit.accelerate" if processor._attention_backend is not None else "")
    return state.noted("attention", module)


def _block_path(state: _Accelerated, block: nn.Module) -> tuple[str, str]:
    """(path, reason) of a block as it is now."""
    path, reason = state.noted("blocks", block)
    if path == "pydit" and not any(cls.__module__.startswith("pydit.") for cls in type(block).__mro__):  # FSDP2 derives
        return "stock", "a model that shares the block was restored"
    return path, reason


def _counted(found: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"path": path, "reason": reason, "count": count} for (path, reason), count in Counter(found).items()]


def _is(processor: Any, ours: Any) -> bool:
    """Whether a processor is what was swapped in, or made anew of its class, as loading an IP-adapter does."""
    return processor is ours or (ours is not None and type(processor) is type(ours))


def _parallel(model: nn.Module, state: _Accelerated) -> list[dict[str, Any]]:
    """Rows of what processes that share a model's work run as attention."""
    from pydit.models import context_parallel

    context = context_parallel.config_of(model._parallel_config)
    what = "tensor parallelism, each process its heads" if context is None else context_parallel.describe(context)
    ours = sum(module.processor is processor and hasattr(processor, "why_stock") and not processor.why_stock()
               for module, _, processor in state.processors)
    every = sum(getattr(module, "processor", None) is not None for module in _modules_of(model))
    return [{"path": path, "reason": what, "count": count} for path, count in (("pydit", ours), ("stock", every - ours))
            if count]


def _models_of(pipe_or_model: Any) -> list[nn.Module]:
    """The model, or a pipeline's transformer and ControlNets; UserError for anything else."""
    def is_a(model: Any, names: tuple[str, ...]) -> bool:
        return bool({cls.__name__ for cls in type(model).__mro__} & set(names))

    models = [schedule.model_of(pipe_or_model)]
    if not is_a(models[0], (*_MODELS, *_CONTROLNETS)):
        raise UserError(f"transformer: expected {', '.join((*_MODELS, *_CONTROLNETS)[:-1])} or {_CONTROLNETS[-1]}, "
                        f"got {type(models[0]).__name__}")
    if models[0] is not pipe_or_model:
        controlnet = getattr(pipe_or_model, "controlnet", None)
        several = controlnet if isinstance(controlnet, (list, tuple)) else getattr(controlnet, "nets", [controlnet])
        several = [getattr(net, "_orig_mod", net) for net in several]  # of torch.compile
        models += [net for net in several if is_a(net, _CONTROLNETS)]
    return models


def _blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a forward runs; of a pruned model the teacher's where they run instead."""
    return [block for name in _BLOCK_LISTS for block in getattr(model, name, ())]


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """All modules that a forward runs, each once."""
    return list({id(module): module for module in hooked.modules_of(model)}.values())


def _refused(model: nn.Module) -> str:
    """Why the attention kernels cannot take this model's activations; "" if they can."""
    parameter, dtype = next(model.parameters()), model.dtype
    kernels = (parameter.is_cuda or env.get("PYDIT_BACKEND") == "sim"
               or (torch.cuda.is_available() and has_offloading(model) != ""))
    if kernels and dtype not in KERNEL_DTYPES:
        return f"{dtype}: the attention kernels take float16 and bfloat16"
    return ""


@dataclass
class _Accelerated:
    """What was there before."""

    exact_only: bool = False
    processors: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)
    blocks: list[tuple[nn.Module, type, type]] = field(default_factory=list)  # (block, its stock class, ours)
    places: list[int] = field(default_factory=list)  # of projections, when they were laid next to each other
    hooks: list[Any] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)  # names of the model's attributes that refuse what does not work
    # kind of module, the module, the processor it had, path, reason
    notes: list[tuple[str, nn.Module, Any, str, str]] = field(default_factory=list)
    target: Any = None  # counts the tokens of the target image for blocks with two modulation rows
    exact: Any = None

    def note(self, kind: str, module: nn.Module, path: str, reason: str) -> None:
        self.notes.append((kind, module, getattr(module, "processor", None), path, reason))

    def knows(self, kind: str, module: nn.Module) -> bool:
        return any(where == kind and of is module for where, of, *_ in self.notes)

    def noted(self, kind: str, module: nn.Module) -> tuple[str, str]:
        """(path, reason) of a module that runs."""
        return next(((path, reason) for where, of, _, path, reason in self.notes if where == kind and of is module),
                    ("stock", "it came after pydit.accelerate"))

    def found_in(self, module: nn.Module) -> Any:
        """The processor that a module had before."""
        return next((old for where, of, old, *_ in self.notes if where == "attention" and of is module), None)

    def ours_of(self, module: nn.Module) -> Any:
        return next((ours for of, _, ours in self.processors if of is module), None)

    def __deepcopy__(self, memo: dict) -> _Accelerated:
        """For a copy of the model, by whose modules this comes; layers of a teacher stay shared, as they are there."""
        copied = type(self)(self.exact_only)
        for name, value in vars(self).items():
            if name in ("processors", "blocks", "notes"):
                value = [tuple(memo.get(id(part), part) if isinstance(part, (nn.Module, type)) else
                               copy.deepcopy(part, memo) for part in entry) for entry in value]
            else:
                value = copy.deepcopy(value, memo)
            setattr(copied, name, value)
        return copied

    def exact_ops(self) -> Any:
        from pydit.models.exact import ExactOps

        self.exact = self.exact or ExactOps()
        return self.exact


def _put_back(state: _Accelerated, chosen: Callable[[nn.Module], bool]) -> None:
    """Undo what was done to the modules that are ``chosen``, and forget them."""
    for module, processor, ours in state.processors:
        if chosen(module) and _is(module.processor, ours):  # what somebody has put there since stays
            for name in ("_attention_backend", "_parallel_config"):  # and what was chosen since
                if hasattr(processor, name):
                    setattr(processor, name, getattr(module.processor, name))
            module.processor = processor
            module.__dict__.pop("_pydit_packed", None)
    for block, stock, ours in state.blocks:
        if chosen(block):
            change_class(block, derived(type(block), ours, stock))
            block.__dict__.pop("_pydit_target", None)
            block.__dict__.pop("_pydit_exact", None)
    state.processors = [entry for entry in state.processors if not chosen(entry[0])]
    state.blocks = [entry for entry in state.blocks if not chosen(entry[0])]
    state.notes = [entry for entry in state.notes if not chosen(entry[1])]


def _undo(model: nn.Module) -> None:
    graphs.disable(model)
    state = model.__dict__.pop(_KEY, None)
    model.__dict__.pop("_pydit_on_route", None)
    if state is not None:
        kept = model.__dict__.get("original_attn_processors") or {}  # of fuse_qkv_projections, for unfusing
        for name, kept_one in kept.items():
            kept[name] = next((stock for _, stock, ours in state.processors if ours is kept_one), kept_one)
        _put_back(state, lambda module: True)
        for hook in state.hooks:
            hook.remove()
        for name in state.guards:
            model.__dict__.pop(name, None)
