"""Linear layers of both streams with a block's epilogues, bound by the tensor cores: one grouped launch each.

The kernel is raced whatever ``PYDIT_GEMM`` says: on a GPU the ops take the library until a results file speaks for it.
"""

from __future__ import annotations

import torch

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.peers import Peer, cluster_peers, needs_gpu, with_setting
from benchmarks.peers.linear import FORMULAS, linear_peers, of_both
from pydit import ops

SHAPES = {  # model, batch, image tokens, text tokens, channels, head dim, dtype
    "full": (("qwen-image", 1, 6889, 512, 3072, 128, "bf16"), ("qwen-image", 2, 6889, 512, 3072, 128, "bf16"),
             ("qwen-image", 1, 6889, 128, 3072, 128, "bf16"), ("qwen-image", 2, 6889, 128, 3072, 128, "bf16"),
             ("flux.1", 1, 4096, 512, 3072, 128, "bf16"), ("sd3.5-large", 1, 4096, 333, 2432, 64, "fp16")),
    "small": (("tiny", 2, 72, 9, 64, 32, "bf16"),),
}


def cases(size: str) -> list[Case]:
    """Per model: QKV plain and with norm and rotation, FFN up without and with GELU, output and FFN down with gate and
    residual, PPCL's linear FFN. The first has every layer without its epilogue too, and every form of the kernel."""
    found = []
    for i, (model, b, img, txt, c, dim, dtype) in enumerate(SHAPES[size]):
        layers = [("joint_linear", c, 3 * c), ("joint_qkv", c, 3 * c), ("joint_linear", c, 4 * c),
                  ("joint_linear_gelu", c, 4 * c), ("joint_linear_gated_residual", c, c),
                  ("joint_linear_gated_residual", 4 * c, c), ("joint_linear_residual", c, c)]
        if i == 0:
            layers += [("joint_linear", c, c), ("joint_linear", 4 * c, c)]
        found += [case(op, model, b, img, txt, k, n, dim, dtype, forms=i == 0) for op, k, n in layers]
    return found


def linear_work(op: str, b: int, streams: tuple[int, int], k: int, n: int, dim: int, itemsize: int) -> Work:
    """x, a weight and a bias per stream in, out written. Gated: the residual and a row per sample in; QKV: two norms
    per stream and fp32 tables. Of the arithmetic only the product counts."""
    tokens = sum(streams)
    size = b * tokens * (k + n) + 2 * (n * k + n)
    if op == "joint_linear_gated_residual":
        size += b * tokens * n + 2 * b * n
    tables = 0
    if op == "joint_qkv":
        size += 2 * 2 * dim
        tables = 2 * tokens * (dim // 2) * 4
    return Work(bytes=size * itemsize + tables, flops=2 * b * tokens * n * k)


def portable_kernel(op: str, work: Work, b: int, streams: tuple[int, int], k: int, n: int, dim: int,
                    itemsize: int) -> Work:
    """What tiles of 128 x 128 add: x is read once per column of tiles and the weight once per row of them; eight lanes
    read the bias for every 32 rows, and four times as often the gate; products are of whole tiles and steps of 32.
    QKV are three layers; in the tiles of queries and keys each thread reads norms and angles for two times 16 rows."""
    def tiles(length, size=128):
        return -(-length // size)

    gated, adds = op == "joint_linear_gated_residual", op.endswith("residual")
    layers = 3 if op == "joint_qkv" else 1
    n //= layers
    again = flops = small = 0
    for tokens in streams:
        rows = b * tiles(tokens)
        again += b * tokens * k * tiles(n) + rows * n * (k + 32 + (128 if gated else 0)) + b * tokens * n * (1 + adds)
        flops += 2 * rows * tiles(n) * 128 * 128 * tiles(k, 32) * 32
        if op == "joint_qkv":  # per group of 8 columns a pair of weights, and of each of two rows a cosine and a sine
            small += 2 * rows * tiles(n) * 128 * 2 * dim // 8 * (2 * itemsize + 2 * 2 * 4)
    return Work(layers * again * itemsize + small - work.bytes, layers * flops - work.flops)


def hopper_bytes(b: int, streams: tuple[int, int], k: int, n: int, cluster: int, itemsize: int, parts: int = 1,
                 processors: int = 132) -> int:
    """What the Hopper kernel asks of memory, mostly of L2, for a product in clusters of so many blocks: x once per
    column of tiles, the weight once per row of clusters, and out. In parts: also the sums, in and out, of each run of
    parts that another cluster finishes, in fp32 and of tiles whose rows all exist."""
    def tiles(length, size):
        return -(-length // size)

    rows = [b * tiles(s, 128 * cluster) for s in streams]
    places = processors // cluster
    units = sum(rows) * tiles(n, 256) % places * parts
    sharers = min(units, places)
    left = sum(units * (i + 1) // sharers % parts != 0 for i in range(sharers)) if parts > 1 else 0
    operands = sum(b * s * k * tiles(n, 256) + row * n * k + b * s * n for s, row in zip(streams, rows, strict=True))
    return itemsize * operands + 2 * left * cluster * 128 * 256 * 4


def case(op, model, b, img, txt, k, n, dim, dtype, forms=False) -> Case:
    kind = DTYPES[dtype]

    def make(device):
        """Pairs of image and text, see :mod:`benchmarks.peers.linear`."""
        def draw(*shape, scale=1.0, mean=0.0):
            return (mean + scale * torch.randn(shape, device=device)).to(kind)

        pairs = [[draw(b, s, k) for s in (img, txt)], [draw(n, k, scale=k ** -0.5) for _ in "it"],
                 [draw(n) for _ in "it"]]
        if op == "joint_linear_gated_residual":
            pairs += [[draw(b, s, n) for s in (img, txt)], [draw(b, 1, n) for _ in "it"]]
        if op == "joint_qkv":
            pairs += [[draw(dim, scale=0.1, mean=1) for _ in "it"] for _ in "qk"]
            angles = [6.28 * torch.rand(s, dim // 2, device=device) for s in (img, txt)]
            pairs += [[a.cos() for a in angles], [a.sin() for a in angles]]
        return tuple(x for pair in pairs for x in pair)

    both = of_both(FORMULAS[op])
    peers = linear_peers(op)
    if op == "joint_qkv":
        peers += (Peer("products then norm and rotation", lambda: _qkv_by_two),)
    else:
        peers += (Peer("two launches", lambda: own_kernel(of_both(_single(op))), rival=False),)
    work = linear_work(op, b, (img, txt), k, n, dim, kind.itemsize)
    run = own_kernel(RUN.get(op, getattr(ops, op)))
    if forms:  # those of the Hopper kernel, whichever it would take
        peers += (*cluster_peers(run), Peer("last wave whole", lambda: with_setting(run, "PYDIT_PARTS", "1"),
                                            needs_gpu(capability=(9, 0)), rival=False))
    return Case(op, model, f"{b}x{img}+{txt}x{k}x{n}", dtype, work, make, run,
                lambda *args: both(*(a.double() for a in args)), both, peers,
                portable_kernel(op, work, b, (img, txt), k, n, dim, kind.itemsize))


def own_kernel(function):
    """``function`` with ``PYDIT_GEMM=pydit``."""
    return with_setting(function, "PYDIT_GEMM", "pydit")


def _qkv(x_img, x_txt, w_img, w_txt, b_img, b_txt, nq_img, nq_txt, nk_img, nk_txt, cos_img, cos_txt, sin_img, sin_txt):
    return ops.joint_qkv(x_img, x_txt, w_img.chunk(3), w_txt.chunk(3), b_img.chunk(3), b_txt.chunk(3),
                         (nq_img, nk_img), (nq_txt, nk_txt), (cos_img, sin_img), (cos_txt, sin_txt),
                         head_dim=nq_img.shape[0])


def _qkv_by_two(*args):
    """What ``accelerate`` runs on the library's products: one per stream, and one launch for norm and rotation."""
    parts = []
    for x, weight, bias, norm, *_ in (args[::2], args[1::2]):
        product = torch.nn.functional.linear(x, weight, bias)
        parts.append([part.unflatten(-1, (-1, norm.shape[0])) for part in product.chunk(3, -1)])
    (q_img, k_img, v_img), (q_txt, k_txt, v_txt) = parts
    nq_img, nq_txt, nk_img, nk_txt, cos_img, cos_txt, sin_img, sin_txt = args[6:]
    q_img, k_img, q_txt, k_txt = ops.joint_qk_norm_rope(q_img, k_img, q_txt, k_txt, (nq_img, nk_img, nq_txt, nk_txt),
                                                        (cos_img, sin_img), (cos_txt, sin_txt))
    return q_img, k_img, v_img, q_txt, k_txt, v_txt


RUN = {"joint_qkv": _qkv}


def _single(op):
    """One call per stream of the same op."""
    if op == "joint_linear":
        return lambda x, w, b: ops.joint_linear(x, x[:, :0], w, w, b, None)[0]
    return getattr(ops, op.removeprefix("joint_"))
