"""A transformer's whole forward as a CUDA graph, one per shape of its inputs.

    pydit.accelerate(pipe, cuda_graphs=True)

A step of a short schedule, a small image or a pruned model can spend more time launching kernels than running them; a
graph launches all of them at once. What a recording depends on is looked at before every replay: the shapes and every
other argument, where the weights lie and how often they were written (``_version``), adapters and their scales, the
modules themselves. A weight that moved or changed, a LoRA that came, went or got another scale drops the recordings.
Threads and streams take turns. Not measured yet: no GPU has run this.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from pydit import backend
from pydit.arguments import integer
from pydit.errors import UserError
from pydit.inference import hooked
from pydit.inference.capture import clean_up_after_capture
from pydit.models.attention import active_backend

_KEY = "_pydit_graphs"
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


def enable(model: nn.Module, *, max_entries: int = 8, recorder: Recorder | None = None) -> nn.Module:
    """Record and replay ``model.forward``, in place; returns the model. :func:`disable` and ``pydit.restore`` undo it.

    Parameters
    ----------
    model : whose outputs depend on its arguments and weights alone.
    max_entries : shapes kept; the one not used for longest goes. All recordings share one memory pool.
    recorder : what records, for tests; None is CUDA's graphs.

    Raises
    ------
    UserError
        Something moves the model's weights around its forward, or ``max_entries`` is not a positive number.
    """
    check(model)
    max_entries = integer("max_entries", max_entries, expected="a number of 1 or more")
    disable(model)
    model.__dict__[_KEY] = GraphCache(recorder or CudaRecorder(), max_entries)
    original = type(model).forward

    @functools.wraps(original)  # whoever asks for the signature gets the model's
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_KEY].call(self, original, args, kwargs)

    forward.of_pydit_graphs = True
    model.__dict__["forward"] = MethodType(forward, model)
    return model


def disable(model: nn.Module) -> None:
    """Forget all recordings and put the model's own forward back, under whatever hooks have come since."""
    if model.__dict__.pop(_KEY, None) is None:
        return
    for holder, name in hooked.places(model):
        if getattr(holder[name], "of_pydit_graphs", False):
            if holder is model.__dict__ and name == "forward":
                del holder[name]
            else:
                holder[name] = MethodType(type(model).forward, model)


def check(model: nn.Module) -> None:
    """UserError where a recording would read weights that are somewhere else by the time it is replayed, or where
    processes share the work."""
    if hooked.is_parallel(model):
        raise UserError("cuda_graphs: expected a model that one process runs, got one with "
                        f"{hooked.is_parallel(model)} parallelism, whose exchanges are not recorded; leave out "
                        "cuda_graphs")
    reason = hooked.has_offloading(model)
    if reason:
        raise UserError(f"cuda_graphs: expected a model whose weights stay where they are, got one with {reason}; "
                        "remove it, or leave out cuda_graphs")


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """Rows of ``path`` ("graph" or "stock"), ``reason`` and ``count`` of forwards; "recorded" of recordings."""
    cache = model.__dict__.get(_KEY)
    if cache is None:
        return [{"path": "stock", "reason": "accelerate(cuda_graphs=True) was not called", "count": 1}]
    if not any(getattr(holder[name], "of_pydit_graphs", False) for holder, name in hooked.places(model)):
        return [{"path": "stock", "reason": "a pickled copy records nothing; accelerate it again", "count": 1}]
    rows = [{"path": path, "reason": reason, "count": count} for (path, reason), count in cache.notes.items()]
    return rows or [{"path": "stock", "reason": "no forward has run yet", "count": 0}]


class Recorder(Protocol):
    """What turns a function without arguments into something to replay."""

    def refuses(self, tensors: list[torch.Tensor]) -> str:
        """Why it cannot record a forward of these inputs; "" if it can."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Run it as a recording needs it to have run before."""

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """(what ``run`` returns, a function that computes it anew in the same memory)."""

    def in_turn(self) -> contextlib.AbstractContextManager:
        """A context whose work on the device begins after that of the contexts before, whichever streams they had."""


class CudaRecorder:
    """CUDA graphs of torch, all in one memory pool; of the current GPU."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._streams: dict[int, torch.cuda.Stream] = {}  # GPU -> what captures there
        self._last: Any = None  # the event that ended the last turn

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        if self._last is not None:
            torch.cuda.current_stream().wait_event(self._last)
        try:
            yield
        finally:
            self._last = torch.cuda.current_stream().record_event()

    def refuses(self, tensors: list[torch.Tensor]) -> str:
        if not tensors or any(not x.is_cuda or x.device != tensors[0].device for x in tensors):
            return "the inputs are not all on one GPU"
        return "another capture is running" if torch.cuda.is_current_stream_capturing() else ""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            out = run()
        torch.cuda.current_stream().wait_stream(side)
        return out

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream()):
                out = run()
        except BaseException:
            clean_up_after_capture(stream, self._pool)
            self._pool = None  # one that no recording is left in cannot be captured into again
            raise
        return out, graph.replay

    def _stream(self) -> torch.cuda.Stream:
        """Torch's own for captures is of the GPU that captured first in this process; on another it records nothing."""
        device = torch.cuda.current_device()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream()
        return self._streams[device]


@dataclass
class _Recording:
    inputs: list[torch.Tensor]  # which a replay reads
    outputs: Any  # which a replay writes
    replay: Callable[[], None]
    kept: list[Any]  # what it reads beside inputs and weights, and nothing else might keep alive
    streams: set[int] = field(default_factory=set)  # that the allocator knows to use this memory


class GraphCache:
    """The recordings of one model, the one used last at the end."""

    def __init__(self, recorder: Recorder, max_entries: int) -> None:
        self.recorder, self.max_entries = recorder, max_entries
        self.entries: OrderedDict[Any, _Recording] = OrderedDict()
        self.failed: dict[Any, str] = {}  # shapes that could not be recorded -> why
        self.notes: dict[tuple[str, str], int] = {}
        self._weights: tuple = ()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict) -> GraphCache:
        return GraphCache(type(self.recorder)(), self.max_entries)  # a copy has weights of its own

    def __reduce__(self) -> tuple:
        return GraphCache, (type(self.recorder)(), self.max_entries)

    def call(self, model: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The output of ``forward(model, *args, **kwargs)``, in memory of its own."""
        if torch.compiler.is_compiling():
            return forward(model, *args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        reason = self.recorder.refuses(tensors) or _unfit(model, leaves)
        if reason:
            return self._stock(reason, model, forward, args, kwargs)
        # One call at a time: they share the memory of the inputs, of the outputs and of what lies between. With the
        # inputs' GPU current: a capture on another records nothing, without an error, and replays return old outputs.
        with self._lock, backend.device_of(tensors[0]), self.recorder.in_turn():
            return self._replay(model, forward, leaves, spec, tensors, args, kwargs)

    def _replay(self, model: nn.Module, forward: Callable, leaves: list[Any], spec: pytree.TreeSpec,
                tensors: list[torch.Tensor], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Record what is not recorded yet, and replay."""
        weights = hooked.fingerprint(model)
        if weights != self._weights:
            self.entries.clear()
            self.failed.clear()
            self._weights = weights
        kind = tensors[0].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # What inference_mode has made, nothing outside may write to.
        key = (repr(spec), autocast, model.training, active_backend(), torch.is_inference_mode_enabled(),
               *((x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else (type(x), x) for x in leaves))
        if key in self.failed:
            return self._stock(self.failed[key], model, forward, args, kwargs)
        entry = self.entries.get(key)
        if entry is None:
            try:
                entry = self._record(model, forward, leaves, spec)
            except Exception as error:  # whatever a forward does that a capture must not
                words = " ".join(str(error).split())[:200]
                self.failed[key] = f"could not be recorded: {type(error).__name__}: {words}"
                return self._stock(self.failed[key], model, forward, args, kwargs)
            self.entries[key] = entry
            self._note("recorded", "")
            while len(self.entries) > self.max_entries:
                self.entries.popitem(last=False)
        self.entries.move_to_end(key)
        if (stream := backend.stream_of(tensors[0])) not in entry.streams:  # it may be another than all was made on
            entry.streams.add(stream)
            for x in pytree.tree_leaves([entry.inputs, entry.kept]):
                if x.is_cuda:
                    x.record_stream(torch.cuda.current_stream())
        for to, x in zip(entry.inputs, tensors, strict=True):
            to.copy_(x, non_blocking=True)
        entry.replay()
        self._note("graph", "")
        # The next replay writes into the same memory, and a pipeline keeps one output while it computes the next.
        return pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, entry.outputs)

    def _record(self, model: nn.Module, forward: Callable, leaves: list[Any], spec: pytree.TreeSpec) -> _Recording:
        static = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]

        def run() -> Any:
            args, kwargs = pytree.tree_unflatten(list(static), spec)
            return forward(model, *args, **kwargs)

        constants, reads = _Constants(), _Reads(model, static)
        self.recorder.warm_up(run)
        with constants:
            self.recorder.warm_up(run)
        constants.replay()
        with constants, reads:
            outputs, replay = self.recorder.capture(run)
        return _Recording([x for x in static if isinstance(x, torch.Tensor)], outputs, replay,
                          [constants.made, *reads.outside.values()])

    def _stock(self, reason: str, model: nn.Module, forward: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        self._note("stock", reason)
        return forward(model, *args, **kwargs)

    def _note(self, path: str, reason: str) -> None:
        self.notes[path, reason] = self.notes.get((path, reason), 0) + 1


def _unfit(model: nn.Module, leaves: list[Any]) -> str:
    """Why this call must run as it is; "" if a replay would do the same."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return "gradients are enabled"
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves):
        return "an input needs a gradient"
    other = next((x for x in leaves if not isinstance(x, (torch.Tensor, *_PLAIN))), None)
    if other is not None:
        return f"an argument is a {type(other).__name__}"
    moved = hooked.has_offloading(model)
    if moved:
        return f"{moved} acts around a forward"
    for module in hooked.modules_of(model):
        if module is not model and (module._forward_hooks or module._forward_pre_hooks):
            return f"something listens to a {type(module).__name__}"
    return ""


class _Constants(TorchFunctionMode):
    """Tensors made from Python numbers, which a capture cannot copy to the device: made once, then handed out again.

    They follow from arguments that are part of a recording's key.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []
        self._next: Iterator[torch.Tensor] | None = None

    def replay(self) -> None:
        """From here on, hand out what was made, in the same sequence."""
        self._next = iter(self.made)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.tensor, torch.as_tensor) or isinstance((*args, None)[0], torch.Tensor):
            return func(*args, **kwargs)
        if self._next is not None:
            return next(self._next)
        self.made.append(func(*args, **kwargs))
        return self.made[-1]


class _Reads(TorchDispatchMode):
    """Collects memory that operations read and none of them made: tables that a model keeps in a cache of its own."""

    def __init__(self, model: nn.Module, inputs: list[Any]) -> None:
        super().__init__()
        self.outside: dict[int, torch.Tensor] = {}
        self._known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self._known |= {x.untyped_storage()._cdata for x in inputs if isinstance(x, torch.Tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in pytree.arg_tree_leaves(*args, **kwargs):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self._known:
                self.outside.setdefault(x.untyped_storage()._cdata, x)
        out = func(*args, **kwargs)
        self._known |= {x.untyped_storage()._cdata for x in pytree.tree_leaves(out)
                        if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.outside}
        return out
