"""Second moments of a layer's activations, added to what earlier tokens left: bound by the tensor cores.

pydit adds to float64 sums and makes the column sums on the way; the peers add x^T x to float32 sums and nothing else.
On a Hopper both forms of its kernel are raced, whichever it would take: blocks alone, and in clusters of two.

Goals on an H200 at 7401 x 3072: 1.45 times as fast as eager, 1.75 times where four or more layers follow one another,
1.15 times as fast as quack. Layers are launched one by one (second_moments_sm90.cu says why), so that one case
stands for both.
"""

from __future__ import annotations

import importlib

import torch

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.peers import Peer, cluster_peers, compiled, eager_peer, needs_gpu
from pydit.ops.second_moments import add_second_moments

SHAPES = {  # model, tokens, channels, dtype
    "full": (("qwen-image", 7401, 3072, "bf16"), ("flux.1", 4608, 3072, "bf16"), ("sd3.5-large", 4429, 2432, "fp16")),
    "small": (("tiny", 300, 136, "bf16"),),
}
# Earlier addmm adds 16-bit products to 16-bit matrices alone (pytorch/pytorch#167931, of November 2025).
_ADDS_IN_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def cases(size: str) -> list[Case]:
    return [second_moments(*shape) for shape in SHAPES[size]]


def second_moments_work(n: int, d: int) -> Work:
    """x in; the float64 triangle and the column sums in and out; a multiplication and an addition per token and element
    of the triangle, an addition per element of x."""
    return Work(bytes=n * d * 2 + 2 * 8 * (d * (d + 1) // 2 + d), flops=n * d * (d + 1) + n * d)


def portable_work(n: int, d: int, d_y: int, processors: int) -> Work:
    """What the portable kernel asks of memory, mostly of L2, and multiplies, for x^T x and, with so many channels of y,
    x^T y: both operands of each tile of 128 x 128, the diagonal's once; the sums of a tile in and out for each block
    that adds to it, once in 32 chunks of its run, and with those its column sums; whole chunks of 256 tokens."""
    chunks, rows = -(-n // 256), -(-d // 128)
    tiles = [(row, column, False) for row in range(rows) for column in range(row, rows)]
    tiles += [(row, column, True) for row in range(rows) for column in range(-(-d_y // 128))]
    units = len(tiles) * chunks
    blocks, size = min(units, processors), 0
    for block in range(blocks):
        first, last = units * block // blocks, units * (block + 1) // blocks
        for index in range(first // chunks, -(-last // chunks)):
            (row, column, cross), begin = tiles[index], max(first - index * chunks, 0)
            end = min(last - index * chunks, chunks)
            height, width = min(128, d - row * 128), min(128, (d_y if cross else d) - column * 128)
            square = not cross and row == column
            size += 2 * (min(n, end * 256) - begin * 256) * (width if square else height + width)
            size += 16 * height * width * -(-(end - begin) // 32)
            size += 16 * width * (square + 2 * (cross and row == 0))
    return Work(size, 2 * 128 * 128 * 256 * units)


def hopper_bytes(n: int, d: int, cluster: int, processors: int) -> int:
    """What the Hopper kernel asks of memory, mostly of L2, in clusters of so many blocks, on so many multiprocessors.

    x for each of its tiles; the sums of a tile in and out for each cluster that adds to it, once in 32 chunks of its
    run.
    """
    height, chunks = 128 * cluster, -(-n // 256)
    tiles = [(row, column) for row in range(-(-d // height)) for column in range(row * height // 192, -(-d // 192))]
    units = len(tiles) * chunks
    clusters = min(units, max(processors // cluster, 1))
    size = 0
    for row, column in tiles:
        size += 2 * n * (min(height, d - row * height) + min(192, d - column * 192))
    for i in range(clusters):
        first, last = units * i // clusters, units * (i + 1) // clusters
        for tile in range(first // chunks, -(-last // chunks)):
            row, column = tiles[tile]
            wide = min(192, d - column * 192)
            added = -(-(min(last, (tile + 1) * chunks) - max(first, tile * chunks)) // 32)
            size += 16 * wide * (added * min(height, d - row * height) + (row == 0))
    return size


def second_moments(model, n, d, dtype) -> Case:
    def make(device):
        """x, pydit's sums (xx, sum_x) and the peers' (xx)."""
        x = torch.randn(n, d, device=device, dtype=DTYPES[dtype])
        return (x, *(torch.zeros(shape, device=device, dtype=torch.float64) for shape in ((d, d), (d,))),
                torch.zeros(d, d, device=device))

    return Case("second_moments", model, f"{n}x{d}", dtype, second_moments_work(n, d), make, _run, _exact, eager,
                (eager_peer(eager), compiled(eager), QUACK, *cluster_peers(_run)), call=_call)


def eager(x, _xx, _sum_x, narrow):
    """``narrow`` += x^T x by cuBLAS with float32 sums; on a CPU, which has no such product, in float32 throughout."""
    if x.is_cuda:
        if not _ADDS_IN_FLOAT32:
            return narrow.add_(torch.mm(x.T, x, out_dtype=torch.float32))
        return torch.addmm(narrow, x.T, x, out_dtype=torch.float32, out=narrow)
    return narrow.addmm_(x.T.float(), x.float())


def _quack():
    """Its product for symmetric results, which computes a triangle too and writes both."""
    symmetric = importlib.import_module("quack.gemm_interface").gemm_symmetric
    return lambda x, _xx, _sum_x, narrow: symmetric(x.T, x, C=narrow, out_dtype=torch.float32)


QUACK = Peer("quack symmetric", _quack, needs_gpu("quack.gemm_interface", capability=(9, 0)))


def _run(x, xx, sum_x, _narrow):
    nothing = sum_x[:0]
    add_second_moments(x, None, (xx, xx[:, :0], sum_x, nothing, nothing))
    return xx, sum_x


def _exact(x, xx, sum_x, _narrow):
    return xx + x.double().T @ x.double(), sum_x + x.double().sum(0)


def _call(function, args):
    """With sums that are 1 before, as a kernel must add to them; of the result the triangle and the column sums, in the
    peers' dtype. Peers make no column sums: theirs are torch's."""
    x, *sums = args
    found = function(x, *map(torch.ones_like, sums))
    xx, columns = found if isinstance(found, tuple) else (found, 1 + x.float().sum(0))
    return (xx.triu(), columns) if function is _exact else (xx.triu().float(), columns.float())
