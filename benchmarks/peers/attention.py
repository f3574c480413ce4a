"""Peers of joint attention: the joint sequence is concatenated before and split after, which is what users run.

Each takes (q_img, k_img, v_img, q_txt, k_txt, v_txt), all [B, S, H, D], and returns (out_img, out_txt). Image tokens
come first: attention without a causal mask does not depend on the order, and padding of the text is then a suffix.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers import Peer, always, needs_gpu

_SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def attention_peers() -> tuple[Peer, ...]:
    """Every attention kernel raced, the ones that torch carries first."""
    return (
        *(Peer(f"sdpa {name}", lambda name=name: joint(sdpa(name)), always if name == "math" else needs_gpu())
          for name in _SDPA),
        Peer("flex_attention", lambda: joint(_flex()), needs_gpu("triton")),
        Peer("flash-attention 4", lambda: joint(_imported("flash_attn.cute.interface", "flash_attn_func")),
             needs_gpu("flash_attn.cute.interface", capability=(9, 0))),
        Peer("flash-attention 3", lambda: joint(_imported("flash_attn_interface", "flash_attn_func")),
             needs_gpu("flash_attn_interface", capability=(9, 0))),
        Peer("sageattention", lambda: joint(_imported("sageattention", "sageattn", tensor_layout="NHD")),
             needs_gpu("sageattention")),
    )


def joint(attention: Callable) -> Callable:
    """``attention(q, k, v)`` over [B, S, H, D], as a function of the two streams."""

    def run(q_img, k_img, v_img, q_txt, k_txt, v_txt):
        q, k, v = (torch.cat(pair, 1) for pair in ((q_img, q_txt), (k_img, k_txt), (v_img, v_txt)))
        out = attention(q, k, v)
        return tuple(part.contiguous() for part in out.split((q_img.shape[1], q_txt.shape[1]), 1))

    return run


def sdpa(name: str) -> Callable:
    """torch's scaled_dot_product_attention held to one back end; it raises where that back end cannot run."""

    def run(q, k, v):
        with sdpa_kernel(_SDPA[name]):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return run


def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    kernel = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: kernel(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _imported(module: str, name: str, **options) -> Callable:
    """``module.name``, with the output alone where it also returns the log-sum-exp."""
    function = getattr(importlib.import_module(module), name)

    def run(q, k, v):
        out = function(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out

    return run
