"""Joint attention, alone and with the norms and rotary embeddings before it: bound by the tensor cores. The peers
concatenate the streams before and split the result after, those called "joined" excepted, which are a kernel alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.cases.qk_norm_rope import joint_qk_norm_rope
from benchmarks.peers import Peer, compiled, eager_peer
from benchmarks.peers.attention import attention_peers, joined_peers, joint, masked_attention_peers, sdpa
from pydit import ops

SHAPES = {  # model, batch, image tokens, text tokens, heads, head dim, dtype, text lengths or None
    "full": (("qwen-image", 1, 6889, 512, 24, 128, "bf16", None), ("qwen-image", 2, 6889, 512, 24, 128, "bf16", None),
             ("qwen-image", 2, 6889, 512, 24, 128, "bf16", (512, 37)),
             ("qwen-image-1024", 1, 4096, 128, 24, 128, "bf16", None),
             ("qwen-image-1024", 2, 4096, 128, 24, 128, "bf16", None),
             ("qwen-image-2048", 1, 16384, 512, 24, 128, "bf16", None),
             ("qwen-image-2048", 2, 16384, 512, 24, 128, "bf16", None),
             ("flux.1", 1, 4096, 512, 24, 128, "bf16", None), ("sd3.5-large", 2, 4096, 333, 38, 64, "fp16", None)),
    "small": (("tiny", 2, 150, 40, 2, 64, "bf16", None), ("tiny", 1, 200, 40, 1, 128, "bf16", None),
              ("tiny", 2, 70, 40, 1, 128, "fp16", (40, 9))),
}


WITH_NORMS = {  # model, batch, image tokens, text tokens, heads, head dim, dtype
    "full": (("qwen-image", 1, 6889, 512, 24, 128, "bf16"), ("qwen-image", 2, 6889, 512, 24, 128, "bf16"),
             ("qwen-image-1024", 1, 4096, 128, 24, 128, "bf16"), ("flux.1", 1, 4096, 512, 24, 128, "bf16")),
    "small": (("tiny", 1, 100, 40, 1, 64, "bf16"),),
}


def cases(size: str) -> list[Case]:
    return [*(joint_attention(*shape) for shape in SHAPES[size]),
            *(normed_attention(*shape) for shape in WITH_NORMS[size])]


def joint_attention_work(s_img: int, s_txt: int, lens: tuple[int, ...], h: int, d: int) -> Work:
    """Two products of 2 d FLOPs per query and key that exist; q, k and v of those tokens in and all outputs written,
    those of padded text as zeros, 16 bits each."""
    pairs = sum((s_img + n) ** 2 for n in lens)
    tokens = sum(3 * (s_img + n) + s_img + s_txt for n in lens)
    return Work(bytes=tokens * h * d * 2, flops=4 * pairs * h * d)


def joint_attention(model, b, s_img, s_txt, h, d, dtype, lens) -> Case:
    torch_dtype = DTYPES[dtype]
    lengths = lens or (s_txt,) * b

    def make(device):
        """Views of a packed projection, as a fused QKV layer gives them."""
        image, text = (torch.randn(b, tokens, 3, h, d, device=device, dtype=torch_dtype) for tokens in (s_img, s_txt))
        limits = None if lens is None else torch.tensor(lens, dtype=torch.int32, device=device)
        return (*image.unbind(2), *text.unbind(2), limits)

    peers = (*attention_peers(), *joined_peers(), eager_peer(eager), compiled(eager)) if lens is None else (
        *masked_attention_peers(), eager_peer(eager), compiled(eager),
        Peer("samples alone", lambda: samples_alone(lens), rival=False))
    shape = f"{b}x{s_img}+{s_txt}x{h}x{d}" + ("" if lens is None else "/" + ",".join(map(str, lens)))
    work = joint_attention_work(s_img, s_txt, lengths, h, d)
    beyond = portable_kernel(work, s_img, s_txt, lengths, lens is not None, h, d)
    return Case("joint_attention", model, shape, dtype, work, make, _run, _exact, eager, peers, beyond,
                _whole)


def samples_alone(lens: tuple[int, ...]):
    """pydit's own op on each sample's real tokens, without padding: what a padded batch should not cost more than."""
    def run(*args):
        return [ops.joint_attention(*(x[b:b + 1] for x in args[:3]), *(x[b:b + 1, :n] for x in args[3:6]))
                for b, n in enumerate(lens)]

    return run


def _whole(function, args):
    """A result as one tensor per stream, where ``samples_alone`` has several."""
    found = function(*args)
    if isinstance(found, list):
        padded = [torch.nn.functional.pad(out, (0, 0, 0, 0, 0, args[3].shape[1] - out.shape[1])) for _, out in found]
        found = torch.cat([out for out, _ in found]), torch.cat(padded)
    return found


def portable_kernel(work: Work, s_img: int, s_txt: int, lens: tuple[int, ...], reads_lens: bool, h: int,
                    d: int) -> Work:
    """What blocks of 128 queries and tiles of 64 or 128 keys add: each block reads its sample's keys and values, each
    of its 256 threads the length; lse is written in fp32; products are of whole tiles."""
    def tiles(tokens, size):
        return -(-tokens // size)

    keys = 64 if d == 128 else 128
    bytes_again, flops = len(lens) * (s_img + s_txt) * h * 4, 0
    for n in lens:
        blocks = tiles(s_img, 128) + tiles(n, 128)
        bytes_again += (blocks - 1) * 2 * (s_img + n) * h * d * 2
        flops += 4 * blocks * 128 * (tiles(s_img, keys) + tiles(n, keys)) * keys * h * d
        if reads_lens:
            bytes_again += (tiles(s_img, 128) + tiles(s_txt, 128)) * h * 256 * 4
    return Work(bytes_again, flops - work.flops)


def normed_attention(model, b, s_img, s_txt, h, d, dtype) -> Case:
    """From the QKV projections to the outputs of attention: what a processor does, two launches of ours."""
    rope = joint_qk_norm_rope(model, b, s_img, s_txt, h, d, dtype)
    attention = joint_attention_work(s_img, s_txt, (s_txt,) * b, h, d)
    small = rope.work.bytes - 4 * b * (s_img + s_txt) * h * d * 2  # weights and angles

    def make(device):
        """Per stream q, k, two weights, cos, sin; then the values."""
        streams = rope.make(device)
        values = (torch.randn(b, tokens, h, d, device=device, dtype=DTYPES[dtype]) for tokens in (s_img, s_txt))
        return (*streams, *values)

    def normed(before, attend):
        def run(*args):
            q_img, k_img, q_txt, k_txt = before(*args[:12])
            return attend(q_img, k_img, args[12], q_txt, k_txt, args[13], None)

        return run

    def after_eager_norms(peer):
        """What users run: the model's own norms and embeddings, then that kernel."""
        return replace(peer, build=lambda: normed(rope.eager, peer.build()))

    def exact(*args):
        return normed(lambda *x: [t.double() for t in rope.exact(*x)], _exact)(*args)

    plain = normed(rope.eager, eager)
    compiler = next(peer for peer in rope.peers if peer.name == "torch.compile")
    peers = (*map(after_eager_norms, attention_peers()), eager_peer(plain),
             replace(compiler, build=lambda: normed(compiler.build(), torch.compile(eager, dynamic=False))))
    again = portable_kernel(attention, s_img, s_txt, (s_txt,) * b, False, h, d)
    passed_on = rope.work.bytes - small  # q and k, in and out of the first launch
    return Case("normed_attention", model, rope.shape, dtype, Work(attention.bytes + small,
                                                                   attention.flops + rope.work.flops),
                make, _run_normed, exact, plain, peers,
                Work(again.bytes + rope.beyond.bytes + passed_on, again.flops - rope.work.flops))


def _run_normed(*args):
    img, txt = args[:6], args[6:12]
    q_img, k_img, q_txt, k_txt = ops.joint_qk_norm_rope(
        *img[:2], *txt[:2], (*img[2:4], *txt[2:4]), img[4:6], txt[4:6])
    return ops.joint_attention(q_img, k_img, args[12], q_txt, k_txt, args[13])


def _run(*args):
    return ops.joint_attention(*args[:6], txt_lens=args[6])


# As diffusers runs it: concatenation, torch's attention with a mask where lengths differ, split.
eager = joint(sdpa())


def _exact(*args):
    """float64, one sample and head at a time: the scores of all would not fit."""
    q_img, k_img, v_img, q_txt, k_txt, v_txt, lens = args
    outs = [torch.zeros(q.shape, dtype=torch.float64, device=q.device) for q in (q_img, q_txt)]
    for b in range(q_img.shape[0]):
        n = k_txt.shape[1] if lens is None else int(lens[b])
        for h in range(q_img.shape[2]):
            q, k, v = (torch.cat((i[b, :, h], t[b, :n, h])).double()
                       for i, t in ((q_img, q_txt), (k_img, k_txt), (v_img, v_txt)))
            out = torch.softmax(q @ k.T * q.shape[1] ** -0.5, -1) @ v
            outs[0][b, :, h], outs[1][b, :n, h] = out[:q_img.shape[1]], out[q_img.shape[1]:]
    return tuple(outs)
