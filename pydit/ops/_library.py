"""Registration of ops with torch.library, and the argument checks they share.

An op is defined once by its schema and gets four things: an implementation (one function for CPU and CUDA; the
backend is chosen inside), a fake for tracing, and a backward. A backward in Python makes every call through the
dispatcher cost tens of microseconds, so :func:`call` bypasses the dispatcher where it would only run the
implementation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet, _dispatch_keys, _dispatch_tls_local_include_set
from torch._C._functorch import is_gradtrackingtensor
from torch.autograd import forward_ad

_library = torch.library.Library("pydit", "DEF")
_implementations: dict[str, Callable] = {}


def define(schema: str, implementation: Callable, fake: Callable) -> None:
    """Register ``pydit::<schema>`` with one implementation for CPU and CUDA and its fake."""
    name = schema.split("(", 1)[0]
    arguments = torch._C.parse_schema(f"pydit::{schema}").arguments
    written = [i for i, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write]
    if written:
        implementation = _bumping_versions(implementation, written)
    implementation = _outside_autocast(implementation)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _implementations[name] = implementation
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"pydit::{name}", fake, lib=_library)


def _outside_autocast(implementation: Callable) -> Callable:
    """``implementation`` with torch.autocast off, which would cast the arguments of torch's own ops inside: an op of
    this package computes in its arguments' dtype."""
    def run(*args: Any) -> Any:
        if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
            return implementation(*args)
        with without_autocast():
            return implementation(*args)

    return run


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, torch's ops keep the dtype of their arguments."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


def _bumping_versions(implementation: Callable, written: list[int]) -> Callable:
    """``implementation``, and after it the version counters of the arguments it writes go up.

    A kernel writes through a pointer, which autograd does not see: a backward that saved the old values would silently
    use the new ones.
    """
    def run(*args: Any) -> Any:
        found = implementation(*args)
        for i in written:
            if args[i] is not None and not args[i].is_inference():
                torch.autograd.graph.increment_version(args[i])
        return found

    return run


def define_backward(name: str, backward: Callable, setup_context: Callable) -> None:
    """Register the backward of ``pydit::<name>``."""
    torch.library.register_autograd(f"pydit::{name}", backward, setup_context=setup_context, lib=_library)


# Dispatch keys of an ordinary tensor in an ordinary thread. Subclasses, fake and functional tensors, modes, transforms
# and tracers each add another one.
_PLAIN = 0
for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView",
             "BackendSelect"):
    _PLAIN |= DispatchKeySet(getattr(DispatchKey, _key)).raw_repr()
_SPECIAL = ~_PLAIN
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def call(name: str, *args: Any) -> Any:
    """``torch.ops.pydit.<name>(*args)``, without the dispatcher where it would only run the implementation.

    NotImplementedError for forward-mode derivatives, which an op would drop without a word.
    """
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0 and any(
            isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(f"{name}: expected no forward-mode derivatives (torch.func.jvp, forward_ad), got a "
                                  "dual tensor; the ops have backward ones, and a model after pydit.restore both")
    if runs_straight(args):
        return _implementations[name](*args)
    if not torch.compiler.is_compiling() and any(
            isinstance(x, torch.Tensor) and is_gradtrackingtensor(x) for x in args):
        raise NotImplementedError(f"{name}: expected tensors outside torch.func.grad, vjp and jacrev, got one that "
                                  "they track; torch.autograd.grad takes the ops, and a model after pydit.restore both")
    return getattr(torch.ops.pydit, name)(*args)


def runs_straight(args: tuple) -> bool:
    """Whether nothing listens to an op, traces it, transforms it or wants its gradient."""
    if torch.compiler.is_compiling():
        return False
    if (torch._C._is_torch_function_mode_enabled() or torch.autograd._profiler_enabled()
            or _dispatch_tls_local_include_set().raw_repr() & _SPECIAL):
        return False
    grad = torch.is_grad_enabled()
    for x in args:
        if isinstance(x, torch.Tensor) and (_dispatch_keys(x).raw_repr() & _SPECIAL or (grad and x.requires_grad)):
            return False
    return True


def check_tokens(op: str, name: str, x: torch.Tensor, like: torch.Tensor | None = None) -> None:
    """x must be a floating [B, S, C] tensor with a contiguous last dimension (shape, dtype, device of ``like``)."""
    check_tensor(op, name, x, like)
    shape = x.shape
    if len(shape) != 3:
        raise ValueError(f"{op}: {name}: expected shape [B, S, C], got {list(shape)}")
    if not 1 <= shape[2] <= 8192:
        raise ValueError(f"{op}: {name}: expected 1 to 8192 channels, got {shape[2]}")
    if like is not None and shape != like.shape:
        raise ValueError(f"{op}: {name}: expected shape {list(like.shape)} like x, got {list(shape)}")
    check_last_dim(op, name, x)


def modulation_rows(op: str, name: str, row: torch.Tensor, x: torch.Tensor, split: int | None) -> torch.Tensor:
    """Check a modulation vector against x [B, S, C] and return it as [B, R, C]."""
    check_tensor(op, name, row, x)
    batch, _, channels = x.shape
    if split is None:
        if row.shape == (batch, channels):
            row = row[:, None]
        elif row.shape != (batch, 1, channels):
            raise ValueError(f"{op}: {name}: expected shape [{batch}, {channels}] or [{batch}, 1, {channels}], "
                             f"got {list(row.shape)}")
    elif row.shape != (batch, 2, channels):
        raise ValueError(f"{op}: {name}: expected shape [{batch}, 2, {channels}] with split={split}, "
                         f"got {list(row.shape)}")
    check_last_dim(op, name, row)
    return row


def check_list(op: str, name: str, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """A sequence of tensors as a list."""
    try:
        return list(tensors)
    except TypeError:
        raise TypeError(f"{op}: {name}: expected a sequence of tensors, got {type(tensors).__name__}") from None


def check_split(op: str, split: int | None) -> None:
    """split is None or a token index >= 0."""
    if split is None or torch.compiler.is_compiling():
        return
    if not isinstance(split, int) or isinstance(split, bool):
        raise TypeError(f"{op}: split: expected an int or None, got {type(split).__name__}")
    if split < 0:
        raise ValueError(f"{op}: split: expected 0 or more, got {split}")


def check_eps(op: str, eps: float) -> None:
    """eps is a finite number >= 0."""
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"{op}: eps: expected a float, got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps: expected a finite number of 0 or more, got {eps}")


def check_out(op: str, outs: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor | None],
              own: dict[str, str]) -> None:
    """Outputs are written in any order: each in memory of its own, or exactly in that of the input it is made of.

    Parameters
    ----------
    outs, inputs : by the names that errors give them. own : name of an output -> name of that input.
    """
    if torch.compiler.is_compiling():
        return
    for number, (name, out) in enumerate(outs.items()):
        reach = 0  # of what lies inside one step of a dimension
        for stride, size in sorted((s, n) for s, n in zip(out.stride(), out.shape, strict=True) if n > 1):
            if stride <= reach and out.numel():
                raise ValueError(f"{op}: {name}: expected a place for every element, got strides {list(out.stride())} "
                                 f"for shape {list(out.shape)}")
            reach += stride * (size - 1)
        for other, x in (*list(outs.items())[:number], *inputs.items()):
            if x is None or not _share_memory(out, x):
                continue
            same = _distance(out, x) == 0 and out.shape == x.shape and all(
                s == t for s, t, n in zip(out.stride(), x.stride(), x.shape, strict=True) if n > 1)
            if other != own[name] or not same:
                raise ValueError(f"{op}: {name}: expected memory of its own or exactly that of {own[name]}, got some "
                                 f"that {other} lies in")


def _distance(a: torch.Tensor, b: torch.Tensor) -> int | None:
    """Bytes from the first element of ``a`` to that of ``b``; None where they cannot lie in the same memory."""
    if a.untyped_storage()._cdata == b.untyped_storage()._cdata:
        return b.storage_offset() * b.element_size() - a.storage_offset() * a.element_size()
    if a.device != b.device or a.device.type == "meta":
        return None
    try:  # two storages can be made of one memory, by torch.from_numpy or DLPack
        return b.data_ptr() - a.data_ptr()
    except RuntimeError:  # a tensor without memory, of FakeTensorMode say
        return None


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have an element in common; views of one tensor that alternate in memory have none."""
    distance = _distance(a, b) if a.numel() and b.numel() else None
    if distance is None:
        return False
    size = a.element_size()
    if size != b.element_size() or distance % size or a.ndim != b.ndim or any(
            s != t and max(n, m) > 1 for s, t, n, m in zip(a.stride(), b.stride(), a.shape, b.shape, strict=True)):
        length, other = ((1 + sum(s * (n - 1) for s, n in zip(x.stride(), x.shape, strict=True))) * x.element_size()
                         for x in (a, b))
        return -other < distance < length
    # An element of a and one of b are the same where the differences d of their indices make up that of the offsets.
    steps = sorted(((s, m - 1, n - 1) for s, n, m in zip(a.stride(), a.shape, b.shape, strict=True)
                    if max(n, m) > 1 and s), reverse=True)

    def reachable(distance: int, place: int) -> bool:
        if place == len(steps):
            return distance == 0
        stride, below, above = steps[place]
        low = -sum(s * n for s, n, _ in steps[place + 1:])
        high = sum(s * n for s, _, n in steps[place + 1:])
        first, last = max(-below, -((high - distance) // stride)), min(above, (distance - low) // stride)
        return any(reachable(distance - d * stride, place + 1) for d in range(first, last + 1))

    return reachable(distance // size, 0)


def check_tensor(op: str, name: str, x: torch.Tensor, like: torch.Tensor | None) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: {name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:  # is_floating_point() is true of 8 bits too, which nothing here computes with
        raise TypeError(f"{op}: {name}: expected a floating-point tensor of 16, 32 or 64 bits, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        raise ValueError(f"{op}: {name}: expected a dense tensor, got "
                         + ("a nested one" if x.is_nested else f"one of layout {x.layout}"))
    if like is not None and x.dtype != like.dtype:
        raise TypeError(f"{op}: {name}: expected {like.dtype} like the first argument, got {x.dtype}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{op}: {name}: expected device {like.device} like the first argument, got {x.device}")


def check_last_dim(op: str, name: str, x: torch.Tensor) -> None:
    if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        raise ValueError(f"{op}: {name}: expected a contiguous last dimension, got stride {x.stride(-1)}")
