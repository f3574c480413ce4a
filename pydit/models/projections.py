"""Packing the projections of an attention module so that one product computes them; whether a module is hooked.

A weight keeps its name, its module and its place in a checkpoint; only its memory moves.
"""

from __future__ import annotations

import torch
from torch._C._functorch import is_functorch_wrapped_tensor as _is_wrapped
from torch.nn.modules import module as nn_module

PLAIN_TENSORS = (torch.nn.Parameter, torch.Tensor)  # others compute their product by themselves: quantized, for example


def is_watched(module):
    """Whether a module has hooks, its own or global ones, or a replaced forward: then only calling it does what it
    should."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
                or module._backward_hooks or module._backward_pre_hooks or _global_hooks())


def _global_hooks():
    """Hooks on all modules, such as those of a profiler or a FLOP counter."""
    return (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks or nn_module._global_backward_hooks
            or nn_module._global_backward_pre_hooks)


def is_stock(thing):
    """Whether the class of a module or processor is diffusers' or ours; one of the same name may be somebody's."""
    return type(thing).__module__.startswith(("diffusers.", "pydit."))


def pack_projections(attn):
    """Move the projections of each stream next to each other in memory, so that one product computes them all.

    Weights, modules and names stay; only their memory moves. Each weight keeps a storage of its own, because weights
    that share one are saved as one. Weights that are views of other memory, such as an optimizer's, are left alone.
    Whatever moves a weight later (``to``, offloading, an adapter) just separates them again: :func:`adjacent` checks at
    every call.

    Returns
    -------
    bool : whether there was anything to pack.
    """
    done = False
    for names in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")):
        linears = [getattr(attn, name) for name in names if getattr(attn, name, None) is not None]
        parameters = [p for linear in linears for p in linear.parameters()]
        if len(linears) < 2 or not alike(linears) or any(_is_lent(p) or (p.requires_grad and p.grad is not None)
                                                          for p in parameters):
            continue
        for name in ("weight", "bias"):
            parts = [getattr(linear, name) for linear in linears]
            if parts[0] is not None:
                with torch.inference_mode(parts[0].is_inference()):  # weights stay fit to be trained
                    whole = torch.cat([part.detach() for part in parts])
                    known, start = attn.__dict__.setdefault("_pydit_packed", Packed()), 0
                    for linear, part in zip(linears, parts, strict=True):
                        part.data = torch.from_dlpack(whole[start:start + len(part)])
                        known[linear, name], start = whole[start:], start + len(part)
        done = True
    return done


def _is_lent(parameter):
    """Whether a weight cannot be moved: it has no memory, other processes see it, or it is a part of a larger one that
    was not read from a file."""
    if not parameter.is_leaf or parameter.device.type not in ("cpu", "cuda") or (
            parameter.is_cpu and parameter.is_shared()):
        return True
    storage = parameter.untyped_storage()
    if getattr(storage, "filename", None) is not None:
        return False
    # Two are the parameter and ``storage``. Who else holds it writes there: FSDP2, which gathers weights in it, or a
    # second model.
    return storage.nbytes() > parameter.nbytes or torch._C._storage_Use_Count(storage._cdata) > 2


class Packed(dict):
    """(linear layer, "weight" or "bias") -> a tensor of its values and those of all layers behind it; not copied along
    with the module."""

    def __reduce__(self):
        return Packed, ()

    def __deepcopy__(self, memo):
        return Packed()


def alike(linears):
    """Plain linear layers of one input width, dtype and device, all with a bias or none, that nothing listens to."""
    like = None
    for linear in linears:
        if type(linear) is not torch.nn.Linear or is_watched(linear):
            return False
        weight, bias = map(linear._parameters.get, ("weight", "bias"))
        if type(weight) not in PLAIN_TENSORS or _is_wrapped(weight) or not weight.is_contiguous():
            return False
        kind = (linear.in_features, weight.dtype, weight.device, bias is None)
        like = like or kind
        if kind != like:
            return False
    return True


def adjacent(attn, linears, x):
    """(weight, bias, sizes) of one layer in place of several that are adjacent in memory; None if they are not.

    None also where a gradient is needed, which would reach the first layer only, and in a graph that is being compiled.
    """
    if len(linears) < 2 or torch.compiler.is_compiling() or not alike(linears):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for linear in linears
                                                           for p in linear._parameters.values() if p is not None)):
        return None
    known = attn.__dict__.get("_pydit_packed")
    if not known:
        return None
    sizes = [linear.out_features for linear in linears]
    found = []
    for name in ("weight", "bias"):
        parts = [linear._parameters[name] for linear in linears]
        if parts[0] is None:
            found.append(None)
            continue
        whole = known.get((linears[0], name))
        end = -1 if whole is None or len(whole) < sum(sizes) else whole.data_ptr()
        for part in parts:
            if part.data_ptr() != end:
                return None
            end += part.nbytes
        found.append(whole if len(whole) == sum(sizes) else whole[:sum(sizes)])
    return (*found, sizes)
