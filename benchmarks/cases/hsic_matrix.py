"""HSIC of all pairs of L layers: bound by the tensor cores, then by how often the Gram matrices move.

Peers: all Gram matrices in one ``bmm`` with float32 sums, U-centred, and one product V V^T of L rows (eager and
compiled), which stack the layers first, those called "stacked" excepted, whose layers lie stacked before the clock
starts; and one pair of layers after another, as torch_cka and its relatives do.

Goals on an H200 with 60 layers of 512 x 3072: 130 us, 2.5 times as fast as eager and 20 times as fast as pairwise; of
256 rows 60 us, of 1024 430 us, of 2048 1.6 ms.

Of the model "...-offset" every channel has a mean that pydit subtracts: the Hopper kernel does more for those.
"""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.peers import Peer, compiled, eager_peer, fresh
from pydit import ops
from pydit.ops import reference

SHAPES = {  # model, rows, layers, channels, dtype
    "full": (("qwen-image", 256, 60, 3072, "bf16"), ("qwen-image", 512, 60, 3072, "bf16"),
             ("qwen-image", 1024, 60, 3072, "bf16"), ("qwen-image", 2048, 60, 3072, "bf16"),
             ("qwen-image-offset", 512, 60, 3072, "bf16"), ("sd3.5-large", 512, 38, 2432, "fp16")),
    "small": (("tiny", 40, 3, 72, "bf16"), ("tiny-offset", 140, 2, 72, "bf16")),
}


def cases(size: str) -> list[Case]:
    return [hsic_matrix(*shape) for shape in SHAPES[size]]


def hsic_matrix_work(n: int, layers: int, d: int) -> Work:
    """Features in, [L, L] float64 out; the triangle of every Gram matrix, and of it the triangle of all pairs."""
    return Work(bytes=layers * n * d * 2 + layers * layers * 8,
                flops=n * (n + 1) * layers * d + n * (n + 1) * layers * (layers + 1) // 2)


def gram_work(n: int, layers: int, d: int, hopper: bool) -> Work:
    """What a gram kernel asks of memory, mostly of L2, and multiplies, the padding of its tiles included.

    Rows of features as often as a tile or a job reads them, and the shifts; Gram matrices, and for each block of 64
    columns fp64 sums of the rows.
    """
    tiles, steps = -(-n // 128), -(-d // 64)
    rows = [min(128, n - tile * 128) for tile in range(tiles)]
    read = products = stored = shifts = 0
    for row in range(tiles):
        for column in range(row, tiles):
            if not hopper:
                read += rows[row] + (rows[column] if row < column else 0)
                products += 128 * 128
                shifts += steps * 256 * 32  # eight words of each thread
            blocks = 3 if hopper and row == column else 4
            stored += blocks * 64 * 64 * 4 + 64 * 8 * (4 if row == column else 8)
    for row in range(0, tiles, 2) if hopper else ():
        for column in range(row, tiles, 2):
            below, right = sum(rows[row:row + 2]), sum(rows[column:column + 2])
            read += below if row == column else below + 2 * right
            jobs = 1 if row == column else 2
            products += jobs * (10 if row == column else 8) * 64 * 64
            shifts += jobs * steps * 96 * 16  # a vector of each thread that subtracts
    return Work(bytes=layers * (read * d * 2 + shifts + stored), flops=layers * products * steps * 64 * 2)


def contract_bytes(n: int, layers: int, together: int = 64) -> int:
    """What the contraction loads, mostly of L2: each element of K above its diagonal and in the diagonal's blocks of
    64 x 64, with the two centres that make it one of U in fp64, of both sets of layers for each pair of sets of so
    many."""
    blocks = [min(64, n - first) for first in range(0, n, 64)]
    elements = sum(size * sum(blocks[i:]) for i, size in enumerate(blocks)) - n
    return (4 + 2 * 8) * elements * layers * -(-layers // together)


def hsic_matrix(model, n, layers, d, dtype) -> Case:
    offset = 64.0 if model.endswith("-offset") else 0.0

    def make(device):
        """Layers that share directions, as those of one model do."""
        common = torch.randn(n, 16, device=device)
        return tuple((torch.randn(n, d, device=device) + common @ torch.randn(16, d, device=device)
                      + offset).to(DTYPES[dtype]) for _ in range(layers))

    slow = (Peer("pairwise", lambda: pairwise),) if n <= 512 and not offset else ()
    return Case("hsic_matrix", model, f"{layers}x{n}x{d}", dtype, hsic_matrix_work(n, layers, d), make,
                lambda *x: ops.hsic_matrix(x), _exact, composed,
                (eager_peer(composed), compiled(composed), Peer("eager stacked", lambda: stacked(of_stack)),
                 Peer("torch.compile stacked", lambda: stacked(fresh(of_stack, fullgraph=True))), *slow), call=_call)


def _exact(*features):
    return reference.hsic_matrix(features)


def _call(function, args):
    """The result in the peers' dtype."""
    return function(*args) if function is _exact else function(*args).float()


def composed(*features):
    """Layers in one tensor, then :func:`of_stack`."""
    return of_stack(torch.stack(features))


def stacked(function):
    """``function`` of the layers in one tensor, which is made at the first call with them."""
    made: dict[int, torch.Tensor] = {}

    def run(*features):
        key = features[0].data_ptr()
        if key not in made:
            made[key] = torch.stack(features)
        return function(made[key])

    return run


def of_stack(features):
    """U-centred Gram matrices of all layers, then V V^T; float32 sums of 16-bit products."""
    grams = _centred(_grams(features))
    n = grams.shape[1]
    return grams.flatten(1) @ grams.flatten(1).T / (n * (n - 3))


def pairwise(*features):
    """A pair of layers at a time, Gram matrices made anew for each."""
    n, layers = len(features[0]), len(features)
    out = features[0].new_zeros((layers, layers), dtype=torch.float32)
    for i in range(layers):
        for j in range(i, layers):
            a, b = (_centred(_grams(x[None]))[0] for x in (features[i], features[j]))
            out[i, j] = out[j, i] = (a * b).sum() / (n * (n - 3))
    return out


def _grams(x):
    return torch.bmm(x, x.mT, out_dtype=torch.float32) if x.is_cuda else x.float() @ x.float().mT


def _centred(grams):
    n = grams.shape[1]
    grams.diagonal(dim1=1, dim2=2).zero_()
    rows = grams.sum(2) / (n - 2)
    rows = rows - rows.sum(1, keepdim=True) / (2 * (n - 1))
    grams = grams - rows[:, :, None] - rows[:, None]
    grams.diagonal(dim1=1, dim2=2).zero_()
    return grams
