"""Peers of joint attention: the joint sequence is concatenated before and split after, which is what users run.

Each takes (q_img, k_img, v_img, q_txt, k_txt, v_txt), all [B, S, H, D], and lengths of the text [B] or None, and
returns (out_img, out_txt). Image tokens come first: attention without a causal mask does not depend on the order, and
padding of the text is then a suffix.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers import Peer, always, fresh, installed, needs_gpu, never

_SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


FLASH_3 = ("flash_attn_interface", "fa3_fwd_interface")  # the second is the forward alone


def attention_peers() -> tuple[Peer, ...]:
    """Every attention kernel raced, the ones that torch carries first."""
    return tuple(Peer(name, lambda kernel=kernel: joint(kernel()), available) for name, kernel, available in _kernels())


def joined_peers(alone: Callable | None = None) -> tuple[Peer, ...]:
    """The fastest of these kernels alone (``alone`` of a kernel, else :func:`joined`): on streams that lie joined
    before the clock starts."""
    return tuple(Peer(f"{name} joined", lambda kernel=kernel: (alone or joined)(kernel()), available)
                 for name, kernel, available in _kernels() if name in _FASTEST)


_FASTEST = ("sdpa flash", "sdpa cudnn", "flash-attention 4", "flash-attention 3")


def _kernels() -> tuple[tuple[str, Callable, Callable], ...]:
    """Name, what makes the kernel, and whether it is there."""
    return (
        *((f"sdpa {name}", lambda name=name: sdpa(name), always if name == "math" else needs_gpu()) for name in _SDPA),
        ("flex_attention", lambda: _flex(), needs_gpu("triton")),
        ("flash-attention 4", lambda: _imported("flash_attn_func", "flash_attn.cute.interface"),
         needs_gpu("flash_attn.cute.interface", capability=(9, 0))),
        ("flash-attention 3", lambda: _imported("flash_attn_func", *FLASH_3), needs_gpu(FLASH_3, capability=(9, 0))),
        ("sageattention", lambda: _imported("sageattn", "sageattention", tensor_layout="NHD"),
         needs_gpu("sageattention")),
    )


def masked_attention_peers(lengths: bool = True) -> tuple[Peer, ...]:
    """Those for texts of several lengths: the kernels that take a mask or, if asked for, the lengths, and why the
    others do not run."""
    return (
        *(Peer(f"sdpa {name} masked", lambda name=name: joint(sdpa(name)), always if name == "math" else needs_gpu())
          for name in _SDPA if name != "flash"),
        Peer("flex_attention masked", lambda: joint(_flex(), mask="blocks"), needs_gpu("triton")),
        *((Peer("flash-attention 4 lengths", lambda: joint(_of_lengths("flash_attn_varlen_func", "seqused_k",
                                                                       "flash_attn.cute.interface"), mask="lengths"),
                needs_gpu("flash_attn.cute.interface", capability=(9, 0))),
           Peer("flash-attention 3 lengths", lambda: joint(_of_lengths("flash_attn_with_kvcache", "cache_seqlens",
                                                                       *FLASH_3), mask="lengths"),
                needs_gpu(FLASH_3, capability=(9, 0)))) if lengths else ()),
        never("sdpa flash", "it takes no mask"), never("sageattention", "it takes no mask"),
        never("flash-attention varlen", "packs the batch, which waits for the GPU"),
    )


def joint(attention: Callable, *, mask: str = "bool") -> Callable:
    """``attention(q, k, v, mask)`` over [B, S, H, D], as a function of the two streams and the lengths of the text.

    The mask is None without lengths, else "bool" [B, 1, 1, S], the "lengths" of the joint keys int32 [B], or "blocks":
    flex_attention's block mask, which is made once for a tensor of lengths, as a model makes it once for a prompt.
    """
    made: dict[int, object] = {}

    def block_mask(lens, image, text):
        from torch.nn.attention.flex_attention import create_block_mask

        key = lens.data_ptr()
        if key not in made:
            made[key] = create_block_mask(lambda b, _h, _q, k: k < image + lens[b], len(lens), None, image + text,
                                          image + text, device=lens.device)
        return made[key]

    def run(q_img, k_img, v_img, q_txt, k_txt, v_txt, lens=None):
        q, k, v = (torch.cat(pair, 1) for pair in ((q_img, q_txt), (k_img, k_txt), (v_img, v_txt)))
        image, text = q_img.shape[1], q_txt.shape[1]
        masked = keep = None
        if lens is not None:
            keep = torch.arange(text, device=lens.device) < lens[:, None]
            if mask == "bool":
                masked = torch.cat((keep.new_ones(len(keep), image), keep), 1)[:, None, None]
            else:
                masked = block_mask(lens, image, text) if mask == "blocks" else lens + image
        out_img, out_txt = attention(q, k, v, masked).split((image, text), 1)
        return out_img.contiguous(), out_txt.contiguous() if keep is None else out_txt * keep[:, :, None, None]

    return run


def joined(attention: Callable) -> Callable:
    """``attention(q, k, v)`` as a function of the two streams, which are concatenated at the first call with them, and
    whose outputs are views."""
    made: dict[int, list[torch.Tensor]] = {}

    def run(q_img, k_img, v_img, q_txt, k_txt, v_txt, _lens=None):
        key = q_img.data_ptr()
        if key not in made:
            made[key] = [torch.cat(pair, 1) for pair in ((q_img, q_txt), (k_img, k_txt), (v_img, v_txt))]
        return attention(*made[key]).split((q_img.shape[1], q_txt.shape[1]), 1)

    return run


def compiled_with_flash(block: Callable) -> tuple[Peer, ...]:
    """``block``, by diffusers' operations, through torch.compile with FlashAttention in the place of its attention."""
    return tuple(Peer(f"torch.compile {name}", lambda kernel=kernel, name=name: _dispatching(block, name, kernel()),
                      available) for name, kernel, available in _kernels() if name.startswith("flash-attention"))


def _dispatching(block: Callable, name: str, kernel: Callable) -> Callable:
    """What diffusers' processors and those of thinned blocks call for attention is the kernel while ``block`` runs. It
    is an op of its own, which the compiler does not look into."""
    from diffusers.models.transformers import transformer_qwenimage

    from pydit.models import thinned

    name = f"pydit_benchmarks::{re.sub(r'[^a-z0-9]', '_', name)}"
    op = torch.library.custom_op(name, _typed(kernel), mutates_args=())
    op.register_fake(lambda q, k, v: torch.empty_like(q, memory_format=torch.contiguous_format))
    run = fresh(block, fullgraph=True)

    def dispatch(query, key, value, **_options):
        return op(query, key, value)

    def call(*args):
        before = [(module, module.dispatch_attention_fn) for module in (transformer_qwenimage, thinned)]
        try:
            for module, _ in before:
                module.dispatch_attention_fn = dispatch
            return run(*args)
        finally:
            for module, function in before:
                module.dispatch_attention_fn = function

    return call


def _typed(kernel: Callable) -> Callable:
    """With the annotations that an op's schema is made of."""
    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return kernel(q, k, v).contiguous()

    run.__annotations__ = dict.fromkeys(("q", "k", "v", "return"), torch.Tensor)
    return run


def sdpa(name: str | None = None) -> Callable:
    """torch's scaled_dot_product_attention, held to one back end if named; it raises where that back end cannot run."""

    def run(q, k, v, mask=None):
        with sdpa_kernel(_SDPA[name]) if name else contextlib.nullcontext():
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
        return out.transpose(1, 2)

    return run


def _flex(compiler: Callable = fresh) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    kernel = compiler(flex_attention)
    return lambda q, k, v, mask=None: kernel(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def _imported(name: str, *modules: str, **options) -> Callable:
    """``name`` of the first of these modules that is there, with the output alone where it also returns the
    log-sum-exp."""
    function = getattr(importlib.import_module(installed(*modules)), name)

    def run(q, k, v, _mask=None, **more):
        out = function(q, k, v, **options, **more)
        return out[0] if isinstance(out, tuple) else out

    return run


def _of_lengths(name: str, argument: str, *modules: str) -> Callable:
    """The same for a function that takes the length of each sample's keys."""
    function = _imported(name, *modules)
    return lambda q, k, v, lengths: function(q, k, v, **{argument: lengths})
