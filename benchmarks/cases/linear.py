"""Linear layers of both streams with a block's epilogues, bound by the tensor cores: one grouped launch each.

The kernel is raced whatever ``PYDIT_GEMM`` says: on a GPU the ops take the library until a results file speaks for it.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.peers import Peer, compiled, eager_peer
from benchmarks.peers.linear import addmm_gelu
from pydit import ops

SHAPES = {  # model, batch, image tokens, text tokens, channels, dtype
    "full": (("qwen-image", 1, 6889, 512, 3072, "bf16"), ("qwen-image", 2, 6889, 512, 3072, "bf16"),
             ("qwen-image", 1, 6889, 128, 3072, "bf16"), ("qwen-image", 2, 6889, 128, 3072, "bf16"),
             ("flux.1", 1, 4096, 512, 3072, "bf16"), ("sd3.5-large", 1, 4096, 333, 2432, "fp16")),
    "small": (("tiny", 2, 72, 9, 64, "bf16"),),
}


def cases(size: str) -> list[Case]:
    """Per model: QKV and FFN up without and with GELU, output and FFN down with gate and residual."""
    found = []
    for model, b, img, txt, c, dtype in SHAPES[size]:
        for op, k, n in (("joint_linear", c, 3 * c), ("joint_linear", c, 4 * c), ("joint_linear_gelu", c, 4 * c),
                         ("joint_linear_gated_residual", c, c), ("joint_linear_gated_residual", 4 * c, c)):
            found.append(case(op, model, b, img, txt, k, n, dtype))
    return found


def linear_work(b: int, tokens: int, streams: int, k: int, n: int, itemsize: int, gated: bool) -> Work:
    """x, a weight and a bias per stream in, out written, and with a gate the residual and a row per sample in; of the
    arithmetic only the product counts."""
    size = b * tokens * (k + n) + streams * (n * k + n) + (b * tokens * n + streams * b * n if gated else 0)
    return Work(bytes=size * itemsize, flops=2 * b * tokens * n * k)


def portable_kernel(work: Work, b: int, streams: tuple[int, ...], k: int, n: int, itemsize: int, gated: bool) -> Work:
    """What tiles of 128 x 128 add: x is read once per column of tiles and the weight once per row of them; eight lanes
    read the bias of every 16 rows, and twice as often the gate; products are of whole tiles and steps of 32."""
    def tiles(length, size=128):
        return -(-length // size)

    again = flops = 0
    for tokens in streams:
        rows = b * tiles(tokens)
        again += b * tokens * k * tiles(n) + rows * n * (k + 64 + (128 if gated else 0)) + b * tokens * n * (1 + gated)
        flops += 2 * rows * tiles(n) * 128 * 128 * tiles(k, 32) * 32
    return Work(again * itemsize - work.bytes, flops - work.flops)


def case(op, model, b, img, txt, k, n, dtype) -> Case:
    kind = DTYPES[dtype]
    gated = op == "joint_linear_gated_residual"

    def make(device):
        """Pairs of image and text: x, weight, bias, and for the gated residual also residual and gate [b, 1, n]."""
        def draw(*shape, scale=1.0):
            return (scale * torch.randn(shape, device=device)).to(kind)

        pairs = [[draw(b, s, k) for s in (img, txt)], [draw(n, k, scale=k ** -0.5) for _ in "it"],
                 [draw(n) for _ in "it"]]
        if gated:
            pairs += [[draw(b, s, n) for s in (img, txt)], [draw(b, 1, n) for _ in "it"]]
        return tuple(x for pair in pairs for x in pair)

    one = {"joint_linear": F.linear, "joint_linear_gelu": _gelu, "joint_linear_gated_residual": _gated}[op]

    def both(function):
        return lambda *args: (function(*args[::2]), function(*args[1::2]))

    peers = [eager_peer(both(one)), compiled(both(one)), Peer("two launches", lambda: own_kernel(both(_single(op))))]
    if op == "joint_linear_gelu":
        peers.append(Peer("cublaslt gelu", lambda: both(addmm_gelu),
                          lambda: (torch.cuda.is_available(), "" if torch.cuda.is_available() else "no GPU")))
    work = linear_work(b, img + txt, 2, k, n, kind.itemsize, gated)
    return Case(op, model, f"{b}x{img}+{txt}x{k}x{n}", dtype, work, make, own_kernel(getattr(ops, op)),
                lambda *args: both(one)(*(a.double() for a in args)), both(one), tuple(peers),
                portable_kernel(work, b, (img, txt), k, n, kind.itemsize, gated))


def own_kernel(function):
    """``function`` with ``PYDIT_GEMM=pydit``."""
    def run(*args):
        before = os.environ.get("PYDIT_GEMM")
        os.environ["PYDIT_GEMM"] = "pydit"
        try:
            return function(*args)
        finally:
            del os.environ["PYDIT_GEMM"]
            if before is not None:
                os.environ["PYDIT_GEMM"] = before

    return run


def _single(op):
    """One call per stream of the same op."""
    if op == "joint_linear":
        return lambda x, w, b: ops.joint_linear(x, x[:, :0], w, w, b, None)[0]
    return getattr(ops, op.removeprefix("joint_"))


def _gelu(x, weight, bias):
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def _gated(x, weight, bias, residual, gate):
    return residual + gate * F.linear(x, weight, bias)
