"""The backward of joint attention alone: bound by the tensor cores. Peers keep the graph of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.cases import DTYPES, Case, Work
from benchmarks.cases.attention import eager
from benchmarks.peers import Peer, compiled, eager_peer, never
from benchmarks.peers.attention import attention_peers, masked_attention_peers

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
             eager_peer(gradients(eager)), _differentiated(compiled(eager)),
             Peer("deterministic", lambda: _in_order, rival=False))
    shape = f"{b}x{s_img}+{s_txt}x{h}x{d}" + ("" if lens is None else "/" + ",".join(map(str, lens)))
    return Case("joint_attention_backward", model, shape, dtype,
                joint_attention_backward_work(s_img, s_txt, lens or (s_txt,) * b, h, d), make, _run, _exact,
                gradients(eager), peers)


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
