"""The backward of joint attention alone: bound by the tensor cores. Peers keep the graph of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.cases.attention import eager
from benchmarks.peers import Peer, compiled, never
from benchmarks.peers.attention import attention_peers, joined_peers, masked_attention_peers

SHAPES = {  # model, batch, image tokens, text tokens, heads, head dim, dtype, text lengths or None
    "full": (("qwen-image", 1, 6889, 512, 24, 128, "bf16", None),
             ("qwen-image", 2, 6889, 512, 24, 128, "bf16", (512, 37)),
             ("qwen-image-1024", 1, 4096, 128, 24, 128, "bf16", None),
             ("qwen-image-2048", 1, 16384, 512, 24, 128, "bf16", None),
             ("sd3.5-large", 1, 4096, 333, 38, 64, "bf16", None)),
    "small": (("tiny", 1, 100, 40, 1, 64, "bf16", None), ("tiny", 2, 70, 40, 1, 128, "fp16", (40, 9))),
}


def cases(size: str) -> list[Case]:
    return [joint_attention_backward(*shape) for shape in SHAPES[size]]


def joint_attention_backward_work(s_img: int, s_txt: int, lens: tuple[int, ...], h: int, d: int) -> Work:
    """Five products of 2 d FLOPs per query and key that exist. q, k, v, out and its gradient of those tokens in, with
    the fp32 log-sum-exp of each query; three gradients out, those of padded text as zeros."""
    pairs = sum((s_img + n) ** 2 for n in lens)
    tokens = sum(5 * (s_img + n) + 3 * (s_img + s_txt) for n in lens)
    return Work(bytes=tokens * h * d * 2 + sum(s_img + n for n in lens) * h * 4, flops=10 * pairs * h * d)


def joint_attention_backward(model, b, s_img, s_txt, h, d, dtype, lens) -> Case:
    torch_dtype = DTYPES[dtype]

    def make(device):
        """Six inputs, lengths, then outputs, log-sum-exps and the gradients of the outputs."""
        inputs = [torch.randn(b, tokens, h, d, device=device, dtype=torch_dtype)
                  for tokens in (s_img, s_img, s_img, s_txt, s_txt, s_txt)]
        limits = None if lens is None else torch.tensor(lens, dtype=torch.int32, device=device)
        outs, lses = _outputs(inputs, lens)
        return (*inputs, limits, *outs, *lses, *(torch.randn_like(out) for out in outs))

    kernels = attention_peers() if lens is None else masked_attention_peers(lengths=False)
    peers = (*(never(peer.name, "it has no backward") if peer.name == "sageattention" else _differentiated(peer)
               for peer in kernels),
             *(joined_peers(joined_gradients) if lens is None else ()),
             Peer("eager", lambda: gradients(eager)), _differentiated(compiled(eager)),  # which keep graphs for a case
             Peer("deterministic", lambda: _in_order, rival=False))
    shape = f"{b}x{s_img}+{s_txt}x{h}x{d}" + ("" if lens is None else "/" + ",".join(map(str, lens)))
    lengths = lens or (s_txt,) * b
    work = joint_attention_backward_work(s_img, s_txt, lengths, h, d)
    own = portable_kernels(s_img, s_txt, lengths, lens is not None, h, d)
    return Case("joint_attention_backward", model, shape, dtype, work, make, _run, _exact, gradients(eager), peers,
                Work(own.bytes - work.bytes, own.flops - work.flops))


def _tiles(tokens: int, size: int) -> int:
    return -(-tokens // size)


def _delta_bytes(s_img: int, s_txt: int, samples: int, h: int, d: int) -> int:
    """Of out and its gradient, every row; the gradient of the log-sum-exp in, delta out, in fp32."""
    return samples * (s_img + s_txt) * h * (2 * 2 * d + 2 * 4)


def portable_kernels(s_img: int, s_txt: int, lens: tuple[int, ...], reads_lens: bool, h: int, d: int) -> Work:
    """What the three portable kernels ask of memory, mostly of L2, and multiply. Blocks of 64 queries read all keys and
    values in tiles of 64 for three products; blocks of 64 keys read all queries, with the gradient of their outputs,
    log-sum-exp and delta, in tiles of 64 (32 at D = 128) for four; all 128 threads read the length."""
    size, flops = _delta_bytes(s_img, s_txt, len(lens), h, d), 0
    for n in lens:
        tokens, stored, blocks = s_img + n, s_img + s_txt, _tiles(s_img, 64) + _tiles(n, 64)
        of_rows = 2 * 2 * d * (tokens + blocks * tokens)  # two tensors: the blocks' own rows, then the other side's
        size += h * (of_rows + 2 * d * stored + 4 * tokens * 8)  # four lanes read a query's two numbers
        size += h * (of_rows + 2 * 2 * d * stored + blocks * tokens * 8)
        size += h * 2 * (_tiles(s_img, 64) + _tiles(s_txt, 64)) * 128 * 4 if reads_lens else 0
        for products, other in ((3, 64), (4, 32 if d == 128 else 64)):
            flops += products * 2 * d * h * blocks * 64 * other * (_tiles(s_img, other) + _tiles(n, other))
    return Work(size, flops)


def hopper_kernels(s_img: int, s_txt: int, lens: tuple[int, ...], reads_lens: bool, h: int, d: int) -> Work:
    """The same of the three kernels on a Hopper. Blocks of 128 keys read all queries with what belongs to them, in
    tiles of 64 for five products, and add a tile of d_q in fp32 each time, which a last kernel reads. Copies of boxes
    bring the rows past a length as well, as far as the tensor goes."""
    def rows(tokens, length, tile):
        return min(tokens, _tiles(length, tile) * tile)

    size, flops = _delta_bytes(s_img, s_txt, len(lens), h, d), 0
    for n in lens:
        blocks, steps = (_tiles(s_img, tile) + _tiles(n, tile) for tile in (128, 64))
        stored = s_img + s_txt
        size += h * 2 * 2 * d * (s_img + rows(s_txt, n, 128))  # keys and values
        size += h * blocks * (2 * 2 * d * (s_img + rows(s_txt, n, 64)) + 8 * (s_img + n) + steps * 64 * d * 4)
        size += h * 2 * 2 * d * stored  # their gradients
        size += h * ((_tiles(s_img, 64) + _tiles(s_txt, 64)) * 64 * d * 4 + 2 * d * stored)  # d_q
        size += h * (_tiles(s_img, 128) + _tiles(s_txt, 128)) * 384 * 4 if reads_lens else 0
        flops += 5 * 2 * d * h * blocks * 128 * steps * 64
    return Work(size, flops)


def gradients(forward: Callable) -> Callable:
    """The backward of ``forward(six tensors, lens)``, which runs once per set of inputs and keeps its graph."""
    graphs = {}

    def run(*args):
        key = args[0].data_ptr()
        if key not in graphs:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in args[:6]]
                graphs[key] = forward(*leaves, args[6]), leaves
        outs, leaves = graphs[key]
        return torch.autograd.grad(outs, leaves, args[-2:], retain_graph=True)

    return run


def joined_gradients(attention: Callable) -> Callable:
    """The backward of ``attention(q, k, v)`` alone: what goes in lies joined before the clock starts, what comes out is
    views."""
    graphs = {}

    def run(*args):
        key = args[0].data_ptr()
        if key not in graphs:
            with torch.enable_grad():
                leaves = [torch.cat(pair, 1).requires_grad_() for pair in zip(args[:3], args[3:6], strict=True)]
                graphs[key] = attention(*leaves), leaves, torch.cat(args[-2:], 1)
        out, leaves, d_out = graphs[key]
        image, text = args[0].shape[1], args[3].shape[1]
        parts = [grad.split((image, text), 1) for grad in torch.autograd.grad(out, leaves, d_out, retain_graph=True)]
        return tuple(part[stream] for stream in range(2) for part in parts)

    return run


def _differentiated(peer):
    def build():
        import torch._functorch.config as functorch

        functorch.donated_buffer = False  # a kept graph runs its backward more than once, flex_attention's too
        return gradients(peer.build())

    return replace(peer, build=build)


def _run(*args):
    lse = args[9:11]
    return tuple(torch.ops.pydit.joint_attention_backward(*args[:11], *args[11:], *map(torch.zeros_like, lse),
                                                          args[0].shape[3] ** -0.5))


def _in_order(*args):
    """pydit's own, with its sums in a fixed order. Memory of outputs is not filled first, which is torch's doing."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        return _run(*args)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _outputs(inputs, lens):
    """(out_img, out_txt), (lse_img, lse_txt) by torch in fp32, one sample and head at a time."""
    (b, s_img, h, d), s_txt, device = inputs[0].shape, inputs[3].shape[1], inputs[0].device
    outs = [torch.zeros_like(inputs[0]), torch.zeros_like(inputs[3])]
    lses = [torch.full((b, h, tokens), -torch.inf, device=device) for tokens in (s_img, s_txt)]
    for sample in range(b):
        n = s_txt if lens is None else lens[sample]
        for head in range(h):
            q, k, v = (torch.cat((i[sample, :, head], t[sample, :n, head])).float()
                       for i, t in zip(inputs[:3], inputs[3:], strict=True))
            scores = q @ k.T * d ** -0.5
            out, lse = torch.softmax(scores, -1) @ v, scores.logsumexp(-1)
            outs[0][sample, :, head], outs[1][sample, :n, head] = out[:s_img], out[s_img:]
            lses[0][sample, head], lses[1][sample, head, :n] = lse[:s_img], lse[s_img:]
    return outs, lses


def _exact(*args):
    """float64, one sample and head at a time: the scores of all would not fit."""
    inputs, lens, d_outs = args[:6], args[6], args[-2:]
    found = [torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in inputs]
    for b in range(inputs[0].shape[0]):
        n = inputs[3].shape[1] if lens is None else int(lens[b])
        for h in range(inputs[0].shape[2]):
            with torch.enable_grad():
                q, k, v = (torch.cat((i[b, :, h], t[b, :n, h])).double().requires_grad_()
                           for i, t in zip(inputs[:3], inputs[3:], strict=True))
                out = torch.softmax(q @ k.T * q.shape[1] ** -0.5, -1) @ v
            d_out = torch.cat((d_outs[0][b, :, h], d_outs[1][b, :n, h])).double()
            for i, grad in enumerate(torch.autograd.grad(out, (q, k, v), d_out)):
                found[i][b, :, h], found[3 + i][b, :n, h] = grad.split((inputs[0].shape[1], n))
    return tuple(found)
