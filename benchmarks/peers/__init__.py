"""What a case is raced against. A peer that cannot run here is listed with the reason, never dropped."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch


def always() -> tuple[bool, str]:
    """Available everywhere."""
    return True, ""


@dataclass(frozen=True)
class Peer:
    """``build()`` returns a function of the case's inputs; it is called only where ``available()`` says (True, "").

    An absent peer gives (False, why). A peer that raises or computes a wrong result is reported by the runner. Commas
    separate names on the command line, so that a name has none. ``rival``: False for another form of pydit's own, or
    for less work than the case's, which are timed beside the others and never called the fastest peer.
    """

    name: str
    build: Callable[[], Callable]
    available: Callable[[], tuple[bool, str]] = always
    rival: bool = True


def eager_peer(function: Callable) -> Peer:
    """The op as eager torch or diffusers runs it."""
    return Peer("eager", lambda: function)


def compiled(function: Callable, name: str = "torch.compile", mode: str | None = None) -> Peer:
    """``function`` through torch.compile, specialised to the shape."""
    return Peer(name, lambda: fresh(function, fullgraph=True, mode=mode))


def fresh(function: Callable, **options) -> Callable:
    """torch.compile specialised to a shape, with nothing left of the shapes before: all cases share one code object,
    and beyond a number of shapes the compiler runs it uncompiled."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, **options)


def with_setting(function: Callable, variable: str, value: str) -> Callable:
    """``function`` with an environment variable set while it runs."""

    def run(*args):
        before = os.environ.get(variable)
        os.environ[variable] = value
        try:
            return function(*args)
        finally:
            del os.environ[variable]
            if before is not None:
                os.environ[variable] = before

    return run


def never(name: str, reason: str) -> Peer:
    """A peer worth naming that cannot take part, such as one that exists only inside a server."""

    def build():
        raise RuntimeError(f"{name}: not available: {reason}")

    return Peer(name, build, lambda: (False, reason))


def installed(*modules: str) -> str | None:
    """The first of these modules that can be found; None when none can. A broken parent package counts as missing."""
    for module in modules:
        with contextlib.suppress(Exception):  # importing the parent may raise anything
            if importlib.util.find_spec(module) is not None:
                return module
    return None


def needs_gpu(*modules: str | tuple[str, ...], capability: tuple[int, int] = (8, 0)) -> Callable[[], tuple[bool, str]]:
    """Availability of a peer that needs importable modules (of a tuple any) and a GPU of at least a compute
    capability."""

    def available():
        for module in modules:
            names = (module,) if isinstance(module, str) else module
            if installed(*names) is None:
                return False, f"{' or '.join(names)} is not installed"
        if not torch.cuda.is_available():
            return False, "no GPU"
        got = torch.cuda.get_device_capability()
        if got < capability:
            return False, f"needs compute capability {capability[0]}.{capability[1]}, got {got[0]}.{got[1]}"
        return True, ""

    return available


def cluster_peers(run: Callable) -> tuple[Peer, ...]:
    """``run`` on a Hopper kernel with its blocks alone and in clusters of two, whatever the kernel would take."""
    return tuple(Peer(name, lambda size=size: with_setting(run, "PYDIT_CLUSTER", size), needs_gpu(capability=(9, 0)),
                      rival=False)
                 for name, size in (("blocks alone", "1"), ("clusters of two", "2")))
