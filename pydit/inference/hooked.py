"""What sits on a model: another class for a module that hooks may already sit on, and what its weights are now.

Hooks of diffusers (block caches, group offloading, layerwise casting) and of accelerate (CPU offloading, device maps)
replace a module's ``forward`` and keep the bound method they found. Changing the class alone would leave them with the
old one, so that reference is changed too.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn


def change_class(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Give a module another class and every hook on it the new ``forward``.

    Returns
    -------
    bool : False, and nothing has changed, where something has replaced ``forward`` and keeps the old one out of reach.
    """
    old = type(module)
    found = [(holder, name) for holder, name in places(module) if _is_forward(holder[name], module, old)]
    if "forward" in module.__dict__ and not found:
        return False
    module.__class__ = cls
    for holder, name in found:
        holder[name] = MethodType(cls.forward, module)
    return True


def derived(cls: type[nn.Module], old: type[nn.Module], new: type[nn.Module]) -> type[nn.Module]:
    """``new``, where ``cls`` is ``old``; where ``fully_shard`` has made it of ``old`` and its own, one of ``new``."""
    if cls is old or old not in cls.__bases__:
        return new
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(new if base is old else base for base in cls.__bases__), body)


def has_offloading(model: nn.Module) -> str:
    """What moves weights of a model between devices or dtypes around its forward; "" where nothing does."""
    for module in model.modules():
        if "_hf_hook" in module.__dict__:
            return f"accelerate's {type(module.__dict__['_hf_hook']).__name__}"
        registry = module.__dict__.get("_diffusers_hook")
        for hook in getattr(registry, "hooks", {}).values():
            return f"diffusers' {type(hook).__name__}"
    return ""


def is_parallel(model: nn.Module) -> str:
    """What diffusers' ``enable_parallelism`` has done to a model: "context", "tensor", or "" for nothing."""
    config = getattr(model, "_parallel_config", None)
    for name in ("context", "tensor"):
        if getattr(config, f"{name}_parallel_config", None) is not None:
            return name
    return ""


def places(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where hooks keep what they call: attributes of the module, and of the references of its diffusers hooks."""
    found = [(module.__dict__, name) for name in ("forward", "_old_forward") if name in module.__dict__]
    registry = module.__dict__.get("_diffusers_hook")
    for reference in getattr(registry, "_fn_refs", ()):
        found += [(reference.__dict__, name) for name in ("forward", "original_forward") if name in reference.__dict__]
    return found


def _is_forward(method: Any, module: nn.Module, cls: type[nn.Module]) -> bool:
    return isinstance(method, MethodType) and method.__self__ is module and method.__func__ is cls.forward


def fingerprint(model: nn.Module) -> tuple:
    """Where every weight and buffer lies and how often it was written, which modules and processors there are, and the
    adapters' scales: what a recording, or anything else made from the weights, stands for."""
    found: list[Any] = []
    for module in modules_of(model):
        found.append(id(module))
        for tensors in (module._parameters, module._buffers):
            found += [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors.values() if x is not None]
        own = module.__dict__
        if own.get("processor") is not None:
            found += (id(own["processor"]), getattr(own["processor"], "_attention_backend", None))
        if "scaling" in own:  # a layer of peft
            found.append((tuple(own["scaling"].items()), repr(own.get("_active_adapter")),
                          tuple(own.get("merged_adapters", ())), own.get("_disable_adapters")))
    return tuple(found)


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """All modules that run, some perhaps twice (``modules()`` looks for doubles), the teacher's where they stand in."""
    stack = [model]
    while stack:
        module = stack.pop()
        yield module
        route = module.route() if getattr(module, "inactive", None) else module._modules.values()
        stack += [child for child in route if child is not None]
