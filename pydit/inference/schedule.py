"""Modulation as a table over the timesteps of a schedule.

A DiT block turns the time embedding into shifts, scales and gates by one large matrix per stream; in Qwen-Image these
hold 6.8 of 20.4 billion parameters, and for a fixed schedule they only ever see its timesteps; in FLUX.1 and SD3, its
timesteps with the pooled text of the prompts at hand. :func:`bake_schedule` computes the rows once and takes the
matrices out of the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pydit.errors import UserError
from pydit.inference import hooked
from pydit.inference.tables import SHARED, BakedRows, BakedTimesteps, as_embedded, autocast_dtype, refuse, scaled
from pydit.models import get_adapter

_KEY = "_pydit_baked_schedule"
# Methods of a diffusers model that change its weights or its adapters: the table is made anew after each.
_ADAPTER_METHODS = ("load_lora_adapter", "unload_lora", "fuse_lora", "unfuse_lora", "set_adapters", "set_adapter",
                    "add_adapter", "delete_adapters", "disable_adapters", "enable_adapters", "disable_lora",
                    "enable_lora")
_ROUTING_METHODS = ("set_active", "attach_teacher")  # of a pruned model, which change the blocks that run: likewise
# Of pipelines, which look for adapters in the transformer's modules themselves; FLUX.1's read its weights too before
# they call its own methods.
_PIPELINE_METHODS = {"LoraBaseMixin": ("fuse_lora", "unfuse_lora"),
                     "FluxLoraLoaderMixin": ("load_lora_weights", "unload_lora_weights", "unfuse_lora")}


def bake_schedule(transformer: nn.Module, timesteps: Iterable[float] | torch.Tensor, *,
                  pooled_projections: torch.Tensor | None = None,
                  guidance: Iterable[float] | torch.Tensor | None = None, on_miss: str = "raise") -> nn.Module:
    """Replace the modulation of every block by a table over ``timesteps``, in place.

    Rows are computed one by one by the modules they replace, so a forward of batch 1 is equal to the last bit. The
    modules leave ``parameters()`` and the device; :func:`restore` brings them back. Baking again replaces the table.
    The table is recomputed when a LoRA is loaded, scaled, fused or removed, even one on the modulation, when the
    modules' weights or the model's dtype change in another way, and after ``set_active`` of a pruned model.

    Parameters
    ----------
    transformer : a Qwen-Image, FLUX.1 or SD3 transformer, stock or pruned, or a pipeline with one. In a pruned one the
        active blocks are baked; if layers of the teacher are among them, the teacher cannot run until :func:`restore`.
    timesteps : the values that ``forward(timestep=...)`` will receive, looked up exactly, in the dtype in which the
        forward embeds them. Once a pipeline has run with the wanted number of steps and size, they are, of Qwen-Image
        and FLUX.1, ``pipe.scheduler.timesteps.to(pipe.transformer.dtype) / 1000`` (it rounds them before it divides),
        and of SD3 ``pipe.scheduler.timesteps``.
    pooled_projections : FLUX.1 and SD3: the prompts' pooled text, shape (P, C), as the forward will receive it; that of
        the negative prompt too where there is one. Rows are looked up exactly.
    guidance : FLUX.1 with guidance_embeds: the values that ``forward(guidance=...)`` will receive.
    on_miss : what to do about a timestep, prompt or guidance that is not in the table: ``"raise"``, or ``"extend"`` the
        table. It never takes a neighbour's row.

    Returns
    -------
    The argument. On the CPU a miss is found before the forward runs. On a GPU, where finding out would mean to wait,
    its sample becomes NaN and the next forward raises or extends the table. Saving or loading weights of a baked model
    is refused.

    Raises
    ------
    UserError
        Another model, no or wrong timesteps, or conditions that are missing or that the model does not have.
    """
    model = model_of(transformer)
    family = get_adapter(model).family
    if on_miss not in ("raise", "extend"):
        raise UserError(f"on_miss: expected raise or extend, got {on_miss!r}")
    if family == "qwen-image" and model.config.get("guidance_embeds"):
        raise UserError("transformer: expected modulation by the timestep and what Qwen-Image-Layered adds to it, got "
                        "a model with guidance_embeds")
    baked = _Baked(family, on_miss, _numbers("timesteps", timesteps), *_conditions(model, family, pooled_projections,
                                                                                  guidance))
    offloading = hooked.has_offloading(model)
    if any(p.is_meta for p in model.parameters()):
        raise UserError(f"transformer: expected one with its weights at hand, got one that {offloading} has emptied; "
                        "a baked schedule goes with enable_model_cpu_offload, not with a sequential one")
    restore(model)
    baked.autocast = autocast_dtype(model.proj_out.weight)
    model.__dict__[_KEY] = baked
    try:
        _fill(model, baked)
    except BaseException:
        restore(model)
        raise
    baked.hooks.append(model.register_forward_pre_hook(_at_step, with_kwargs=True))
    if hasattr(model, "save_pretrained"):  # which writes config.json before it asks for the weights
        model.__dict__["save_pretrained"] = functools.partial(refuse, model)
    for name in (*_ADAPTER_METHODS, *_ROUTING_METHODS):
        if hasattr(type(model), name):
            method = functools.partial(_then_refreshed, model, name)  # can be pickled
            model.__dict__[name] = functools.update_wrapper(method, getattr(type(model), name).__get__(model))
    _open_for_pipelines()
    return transformer


def restore(transformer: nn.Module) -> nn.Module:
    """Undo :func:`bake_schedule`, bit for bit, on the device where the model is now; returns its argument."""
    model = model_of(transformer)
    baked = model.__dict__.get(_KEY)
    if baked is not None:
        _put_back(baked, *_place(model))
        for hook in baked.hooks:
            hook.remove()
        for name in (*_ADAPTER_METHODS, *_ROUTING_METHODS, "save_pretrained"):
            model.__dict__.pop(name, None)
        del model.__dict__[_KEY]
    return transformer


def is_baked(model: nn.Module) -> bool:
    """Whether :func:`bake_schedule` has been called."""
    return _KEY in model.__dict__


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """The row of ``pydit.report`` about a model's modulation."""
    baked = model.__dict__.get(_KEY)
    if baked is None:
        return [{"path": "stock", "reason": "pydit.bake_schedule was not called", "count": 1}]
    return [{"path": "table", "reason": "", "count": 1, "rows": baked.embedded.count, "made_anew": baked.refreshed}]


@dataclass
class _Baked:
    """What the table is made from, and what was taken out. Not a module: nothing of it is a parameter of the model."""

    family: str
    on_miss: str
    timesteps: torch.Tensor  # [T], as given
    pooled: torch.Tensor | None  # [P, C]
    guidance: torch.Tensor | None  # [G], as given
    originals: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    refusals: list[Any] = field(default_factory=list)  # hooks against saving and loading
    hooks: list[Any] = field(default_factory=list)
    version: tuple = ()  # of the weights that the table was made from
    dtype: torch.dtype | None = None  # of the model then
    autocast: torch.dtype | None = None  # of the forwards that it is for
    refreshed: int = 0
    embedded: BakedTimesteps | None = None
    # Whether forwards missed, on its way to the host, in their order: a host runs ahead by more than a step.
    pending: deque[tuple[torch.Tensor, Any, dict[str, Any]]] = field(default_factory=deque)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Baked:
        if any(id(owner) not in memo for owner, _, _ in self.originals):  # a model copies its modules before this
            raise UserError("copy.deepcopy: expected a baked model that runs its own blocks, got one that runs the "
                            "teacher's, which its copies share; pydit.restore it first")
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


# Making the table. ------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # weights that move and tables stay fit for a forward with gradients
def _fill(model: nn.Module, baked: _Baked) -> None:
    """Compute every row by the modules in place, one module on the device at a time, and put tables there instead."""
    device, dtype = _place(model)
    baked.dtype, family, adapter = dtype, baked.family, get_adapter(model)
    if any(isinstance(module, BakedRows) for block in adapter.blocks(model) for module in block.modules()):
        raise UserError(SHARED)
    computed = baked.autocast or dtype
    wide = torch.float64 if computed == torch.float64 else torch.float32  # no narrower than what a forward is given
    keys = as_embedded(family, baked.timesteps.to(device, wide), computed)
    pairs = bool(model.config.get("zero_cond_t"))  # the image is modulated by two rows, that of the timestep and of 0
    keys = (torch.cat((keys, keys[:1] * 0)) if pairs else keys).unique()
    guidance = None if baked.guidance is None else scaled(baked.guidance.to(device, wide), computed).unique()
    pooled = None if baked.pooled is None else baked.pooled.to(device, dtype)
    layered = family == "qwen-image" and bool(model.config.get("use_additional_t_cond"))
    conditions = 2 if layered else 1 if pooled is None else len(pooled)
    embedded = BakedTimesteps(family, keys, guidance, pooled, conditions, baked.autocast)
    with torch.no_grad():
        embed = model.time_text_embed.to(device)
        nothing = torch.empty(0, device=device, dtype=computed)
        rows = []
        for key in keys:
            # As many rows at a time as a forward of batch 1 has: a product of two is not that of one to the last bit.
            times = torch.stack((key, key * 0)) if pairs else key[None]
            if family == "qwen-image":
                rows += [embed(times, nothing, *([torch.full_like(times, c, dtype=torch.long)] if layered else []))
                         for c in range(conditions)]
            else:
                rows += [embed(times, *strength, text[None]) for strength in ([(g[None],) for g in guidance]
                                                                              if guidance is not None else [()])
                         for text in pooled]
        _swap(baked, model, "time_text_embed", embedded)
        baked.embedded = embedded
        for block in adapter.blocks(model):
            for name in (name for name in adapter.modulation if hasattr(block, name)):
                both = pairs and name == "img_mod"
                if family == "qwen-image":
                    module = getattr(block, name).to(device)
                    _swap(baked, block, name, BakedRows([module(row if both else row[:1])[:1] for row in rows]))
                else:
                    _swap_norm(baked, getattr(block, name), rows, device)
        _swap(baked, model.norm_out, "silu", BakedRows([model.norm_out.silu(row[:1]) for row in rows]))
    for hook in (model.register_state_dict_pre_hook, model.register_load_state_dict_pre_hook):
        baked.refusals.append(hook(refuse))
    baked.version = _version(baked)


def _swap_norm(baked: _Baked, norm: nn.Module, rows: list[torch.Tensor], device: torch.device) -> None:
    """The tables of an AdaLayerNorm. One that casts what its activation returns keeps its (small) linear layer."""
    if type(norm).__name__ == "AdaLayerNormContinuous":
        _swap(baked, norm, "silu", BakedRows([norm.silu(row) for row in rows]))
        return
    linear = norm.linear.to(device)
    table = BakedRows([linear(norm.silu(row)) for row in rows])
    _swap(baked, norm, "silu", nn.Identity())
    _swap(baked, norm, "linear", table)


def _swap(baked: _Baked, owner: nn.Module, name: str, table: nn.Module) -> None:
    module = getattr(owner, name)
    setattr(owner, name, table)
    baked.originals.append((owner, name, module.to("cpu")))


@torch.inference_mode(False)
def _put_back(baked: _Baked, device: torch.device | None, dtype: torch.dtype) -> None:
    """The modules as they were, in the dtype of the model as it is now; without a device they stay on the CPU."""
    for hook in baked.refusals:
        hook.remove()
    for owner, name, module in reversed(baked.originals):
        if dtype != baked.dtype:
            module.to(dtype)
        setattr(owner, name, module if device is None else module.to(device))
    baked.refusals, baked.originals = [], []


@contextlib.contextmanager
def _opened(model: nn.Module, baked: _Baked, *, on_device: bool = False) -> Iterator[None]:
    """The model with its modulation modules, on the CPU or the model's device; afterwards the table is made anew."""
    device, dtype = _place(model)
    _put_back(baked, device if on_device else None, dtype)
    try:
        yield
    finally:
        _fill(model, baked)
        baked.refreshed += 1


def _then_refreshed(model: nn.Module, name: str, /, *args: Any, **kwargs: Any) -> Any:
    """The method of the model's class, called on the opened model."""
    method = getattr(type(model), name)
    if not model.__dict__[_KEY].originals:  # one such method called by another
        return method(model, *args, **kwargs)
    # Blocks that do not run after a change of the route stay as they are then: on the model's device.
    with _opened(model, model.__dict__[_KEY], on_device=name in _ROUTING_METHODS):
        return method(model, *args, **kwargs)


@functools.cache
def _open_for_pipelines() -> None:
    """Once for the process: see :data:`_PIPELINE_METHODS`. Transformers without a table go the stock way."""
    from diffusers.loaders import lora_base, lora_pipeline

    def opening(stock: Any) -> Any:
        @functools.wraps(stock)
        def method(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            model = getattr(pipe, "transformer", None)
            model = getattr(model, "_orig_mod", model)
            baked = getattr(model, "__dict__", {}).get(_KEY)
            with _opened(model, baked) if baked is not None and baked.originals else contextlib.nullcontext():
                return stock(pipe, *args, **kwargs)
        return method

    for kind, names in _PIPELINE_METHODS.items():
        mixin = getattr(lora_base if kind == "LoraBaseMixin" else lora_pipeline, kind)
        for name in names:
            setattr(mixin, name, opening(getattr(mixin, name)))


def _version(baked: _Baked) -> tuple:
    return tuple(hooked.fingerprint(module) for _, _, module in baked.originals)


# At every step. ---------------------------------------------------------------------------------------------------


def _at_step(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A forward pre-hook: what the last step missed, weights that changed, what this step will miss."""
    if torch.compiler.is_compiling():
        return
    baked = model.__dict__[_KEY]
    _settle(model, baked)
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    autocast = baked.autocast
    if isinstance(given.get("hidden_states"), torch.Tensor):
        baked.autocast = autocast_dtype(given["hidden_states"])
    if _version(baked) != baked.version or _place(model)[1] != baked.dtype or baked.autocast != autocast:
        with _opened(model, baked):
            pass
    _refuse_scale(baked, given.get("attention_kwargs") or given.get("joint_attention_kwargs"))
    missed = _missed(model, baked, given)
    if missed is None:
        return
    if not missed.is_cuda:
        _handle(model, baked, missed, given)
    elif not torch.cuda.is_current_stream_capturing():
        flag = torch.empty(len(missed), dtype=torch.bool, pin_memory=True)
        flag.copy_(missed, non_blocking=True)
        event = torch.cuda.current_stream(missed.device).record_event()  # of the copy's GPU, current or not
        baked.pending.append(
            (flag, event, {name: given.get(name) for name in ("timestep", "pooled_projections", "guidance")}))


def _missed(model: nn.Module, baked: _Baked, given: dict[str, Any]) -> torch.Tensor | None:
    """Which samples have no row, bool [B], on the device."""
    timestep = given.get("timestep")
    if timestep is None:
        return None
    dtype, others = _computed_in(model, given), []
    if baked.family == "qwen-image":
        condition = given.get("additional_t_cond")
        others = [None] + ([condition] if condition is not None else [])
    else:
        if given.get("guidance") is not None:
            others.append(scaled(given["guidance"], dtype))
        others.append(given["pooled_projections"])
    rows = baked.embedded(as_embedded(baked.family, timestep, dtype), *others)
    return rows[:, 0] == baked.embedded.count


def _computed_in(model: nn.Module, given: dict[str, Any]) -> torch.dtype:
    """The dtype in which a forward embeds its timestep: that of its latents."""
    latents = given.get("hidden_states")
    if not isinstance(latents, torch.Tensor):
        return _place(model)[1]
    return autocast_dtype(latents) or latents.dtype


def _settle(model: nn.Module, baked: _Baked) -> None:
    """Raise or extend for earlier steps on a GPU, once their answers have come."""
    while baked.pending and baked.pending[0][1].query():
        flag, _, given = baked.pending.popleft()
        if bool(flag.any()) and baked.on_miss == "extend":
            warnings.warn("timestep: an earlier step had no row in the baked schedule and its output is NaN; the table "
                          "now has one", UserWarning, stacklevel=4)
        try:
            _handle(model, baked, flag, given)
        except UserError:
            baked.pending.clear()  # of the run that ends with this
            raise


def _handle(model: nn.Module, baked: _Baked, missed: torch.Tensor, given: dict[str, Any]) -> None:
    if not bool(missed.any()):
        return
    if baked.on_miss == "raise":
        what = "timestep" if baked.pooled is None else "timestep, prompt and guidance"
        raise UserError(f"{what}: expected one of the {baked.embedded.count} of the baked schedule, got another; "
                        "pydit.bake_schedule with those in use or on_miss='extend', or pydit.restore")
    where = missed.nonzero()[:, 0]
    timestep = given["timestep"]
    if baked.family != "sd3.5":  # what the forward makes of it is what will be asked for
        timestep = timestep.to(_computed_in(model, given))
    _append(baked, "timesteps", timestep, where)
    _append(baked, "guidance", given.get("guidance"), where)
    _append(baked, "pooled", given.get("pooled_projections"), where)
    with _opened(model, baked):
        pass


def _append(baked: _Baked, name: str, values: torch.Tensor | None, where: torch.Tensor) -> None:
    known = getattr(baked, name)
    if known is None or values is None:
        return
    values = values.detach()[where.to(values.device)].to(known.device)
    dtype = torch.promote_types(known.dtype, values.dtype)
    setattr(baked, name, torch.cat((known.to(dtype), values.to(dtype))).unique(dim=0))


def _refuse_scale(baked: _Baked, options: Any) -> None:
    scale = options.get("scale", 1.0) if isinstance(options, dict) else 1.0
    parts = (part for _, _, module in baked.originals for part in module.modules())
    if scale != 1.0 and any("scaling" in part.__dict__ for part in parts):
        raise UserError(f"attention_kwargs: expected a scale of 1, because a LoRA on the modulation is in the baked "
                        f"schedule's table, got {scale:g}; give it by set_adapters")


# Small parts. -----------------------------------------------------------------------------------------------------


def _place(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight = model.proj_out.weight  # of 8 bits only in storage, by layerwise casting
    return weight.device, weight.dtype if weight.element_size() > 1 else model.dtype


def model_of(transformer: Any) -> nn.Module:
    """The transformer of a pipeline, or the model itself; UserError for anything else."""
    model = getattr(transformer, "transformer", transformer)
    model = getattr(model, "_orig_mod", model)  # of torch.compile, which looks at the model again after a change
    if not isinstance(model, nn.Module):
        raise UserError("transformer: expected a diffusers transformer or a pipeline, "
                        f"got {type(transformer).__name__}")
    return model


def _conditions(model: nn.Module, family: str, pooled: Any, guidance: Any) -> tuple[torch.Tensor | None, ...]:
    """The prompts and guidance values of a table, checked against what the model has."""
    needs_guidance = family == "flux.1" and bool(model.config.get("guidance_embeds"))
    if family == "qwen-image":
        if pooled is not None or guidance is not None:
            raise UserError("pooled_projections, guidance: expected None, because Qwen-Image's modulation depends on "
                            "the timestep alone, got a value")
        return None, None
    width = model.config.pooled_projection_dim
    if not isinstance(pooled, torch.Tensor) or pooled.ndim != 2 or pooled.shape[1] != width or not len(pooled):
        got = list(pooled.shape) if isinstance(pooled, torch.Tensor) else type(pooled).__name__
        raise UserError(f"pooled_projections: expected a tensor [prompts, {width}], because this model's modulation "
                        f"depends on the prompt, got {got}")
    if needs_guidance != (guidance is not None):
        raise UserError(f"guidance: expected {'the values in use' if needs_guidance else 'None'}, because this model "
                        f"has {'' if needs_guidance else 'no '}guidance_embeds, got {guidance!r}")
    return pooled.detach().unique(dim=0), None if guidance is None else _numbers("guidance", guidance)


def _numbers(name: str, given: Iterable[float] | torch.Tensor) -> torch.Tensor:
    try:
        values = torch.as_tensor(given if isinstance(given, torch.Tensor) else list(given)).detach()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"{name}: expected numbers, got {given!r}") from None
    if values.ndim != 1 or not len(values) or values.is_complex() or not bool(torch.isfinite(values.double()).all()):
        raise UserError(f"{name}: expected one or more finite numbers, got {values.tolist()}")
    return values
