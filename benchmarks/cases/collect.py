"""What collecting statistics adds to a forward: a stock Qwen-Image block, and second moments of what goes in and out.

A whole model is 60 such blocks, so that the share is the model's. pydit adds X^T X of both streams' inputs, and in
``collect_xx_xy`` X^T Y to their outputs, which linear probes need. The peer "forward" collects nothing: with its ratio
r, collecting adds 1 / r - 1 to a forward. Goal: 4 % for X^T X, 12 % with X^T Y. A whole ``pydit.analysis.collect`` adds
half of it, as only every second batch feeds the probes; the others keep a few tokens each.
"""

from __future__ import annotations

import torch

from benchmarks.cases import Case, Work, whole_block
from benchmarks.peers import Peer, compiled, eager_peer
from pydit.ops.second_moments import add_second_moments, zeros

_STREAMS, _SUMS = 2, 5  # five sums of each stream, at the end of the inputs


def cases(size: str) -> list[Case]:
    return [collect(*shape, probes=probes) for shape in whole_block.SHAPES[size] for probes in (False, True)]


def moments_work(n: int, d: int, *, probes: bool) -> Work:
    """Beyond reading x and y, which the block has just written: the sums in and out, products and column sums."""
    sums = d * (d + 1) // 2 + d + (d * d + 2 * d if probes else 0)
    return Work(bytes=2 * 8 * sums, flops=n * d * (d + 1) + n * d + (2 * n * d * d + 3 * n * d if probes else 0))


def collect(model, batch, image, text, heads, dim, dtype, *, probes) -> Case:
    block, width = whole_block.block(model, batch, image, text, heads, dim, dtype, "dense"), heads * dim
    more = [moments_work(batch * n, width, probes=probes) for n in (image, text)]

    def make(device):
        """Those of the block, then xx, xy, sum_x, sum_y, sum_yy of the image and of the text."""
        sums = [zeros(width, width if probes else 0, device) for _ in range(_STREAMS)]
        return (*block.make(device), *(t for stream in sums for t in stream))

    def forward(*args):
        return block.eager(*args[:-_STREAMS * _SUMS])

    def collecting(add, forward=forward):
        def call(*args):
            outputs, sums = forward(*args), args[-_STREAMS * _SUMS:]
            for stream, (x, y) in enumerate(zip(args[:_STREAMS], outputs, strict=True)):
                add(x.flatten(0, 1), y.flatten(0, 1) if probes else None, sums[_SUMS * stream:_SUMS * (stream + 1)])
            return outputs
        return call

    def check(function, args):
        """The block's outputs, then the sums, of each xx its triangle. They hold something before, as a kernel must add
        to it; of ``forward``, which makes none, they are torch's."""
        sums = [t.new_full(t.shape, batch * image) for t in args[-_STREAMS * _SUMS:]]
        outputs = (eager if function is forward else function)(*args[:-_STREAMS * _SUMS], *sums)
        sums = [t.triu() if i % _SUMS == 0 else t for i, t in enumerate(sums)]
        return (*outputs, *(sums if function is exact else (t.float() for t in sums)))

    exact = collecting(_add_exact, lambda *args: block.exact(*args[:-_STREAMS * _SUMS]))
    eager = collecting(_add_eager)
    return Case("collect_xx_xy" if probes else "collect_xx", model, block.shape, dtype,
                Work(bytes=block.work.bytes + sum(w.bytes for w in more),
                     flops=block.work.flops + sum(w.flops for w in more)),
                make, collecting(add_second_moments), exact, eager,
                (Peer("forward", lambda: forward, rival=False), eager_peer(eager), compiled(eager)), call=check)


def _add_eager(x, y, sums):
    """By torch: float32 sums of 16-bit products, then float64; on a CPU, which lacks that product, in float32."""
    for target, other in ((sums[0], x), (sums[1], y)):
        if other is not None:
            target += torch.mm(x.T, other, out_dtype=torch.float32) if x.is_cuda else x.float().T @ other.float()
    sums[2].add_(x.sum(0))
    if y is not None:
        sums[3].add_(y.sum(0))
        sums[4].add_(y.float().square().sum(0))


def _add_exact(x, y, sums):
    x = x.double()
    sums[0].add_(x.T @ x)
    sums[2].add_(x.sum(0))
    if y is not None:
        sums[1].add_(x.T @ y)
        sums[3].add_(y.sum(0))
        sums[4].add_(y.square().sum(0))
