"""What a benchmark case is. Each other module here holds the cases of one op (or of closely tied ones).

Such a module offers ``cases(size)``; ``benchmarks/registry.py`` finds it by itself. Shapes come from real models
(sizes in tokens x channels):
  qwen-image 1328x1328: 6889 image + 512 text tokens, 3072 channels, 24 heads x 128
  flux.1 1024x1024: 4096 + 512 tokens, 3072 channels;   sd3.5-large 1024x1024: 4096 tokens, 2432 channels, 38 heads x 64
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.peers import Peer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Work:
    """The least an op can do: every input read once, every output written once, and its arithmetic."""

    bytes: int
    flops: int


def _call(function, args):
    return function(*args)


@dataclass(frozen=True)
class Case:
    """One benchmark. ``make(device)`` draws inputs; ``run``, ``exact``, ``eager`` and every peer take them.

    ``exact`` is the answer in float64; ``eager`` is plain torch in the case's dtype, against whose error the tolerance
    policy measures. ``beyond``: what the portable kernel does by design beyond ``work``, bytes that it asks for again
    (on a GPU a cache has them) and products on the padding of its tiles; tests hold the sums against the simulator's
    counters. None: not modelled. ``call(function, args)`` is how a check runs a provider, where it takes more than a
    plain call, as it does when arguments are updated.
    """

    op: str
    model: str
    shape: str
    dtype: str
    work: Work
    make: Callable[[str], tuple]
    run: Callable
    exact: Callable
    eager: Callable
    peers: tuple[Peer, ...] = ()
    beyond: Work | None = None
    call: Callable = _call

    @property
    def name(self) -> str:
        return f"{self.op}/{self.model}/{self.shape}/{self.dtype}"

    def floor_us(self, limits: dict) -> float | None:
        """The time no version beats: the slower of memory and arithmetic. None unless this run measured both rates."""
        copy, gemm = limits.get("copy_gb_s"), limits.get("gemm_tflop_s")
        if not copy or not gemm:
            return None
        return max(self.work.bytes / copy / 1e3, self.work.flops / gemm / 1e6)
