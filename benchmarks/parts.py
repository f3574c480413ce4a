"""What a block's time is made of: matrix products, attention and the rest, each beside the least it can take.

The least is the sum over a part's ops, as :func:`pydit.accelerate` cuts a block up, of what each takes at the ceilings
of the run: it knows no fusion across ops, which a grouped product with its epilogue may beat.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import blocks
from benchmarks.cases import Work
from benchmarks.cases.modulate import ada_layer_norm_work, gated_residual_ada_layer_norm_work, gated_residual_work
from benchmarks.cases.qk_norm_rope import qk_norm_rope_work
from pydit.families import BlockSpec

PARTS = ("products", "attention", "rest")
# By the names of kernels, which on a GPU is all that is known of them, and of ops; attention has products inside.
_ATTENTION = re.compile(r"attention|flash|fmha|sdpa", re.I)
_PRODUCTS = re.compile(r"gemm|gemv|nvjet|xmma|cutlass|splitk|grouped_linear|pydit::(joint_)?(linear|qkv)"
                       r"|aten::(addmm|mm|bmm|linear|_addmm_activation)$", re.I)


def part_of(name: str) -> str | None:
    """The part that a kernel or an op of this name belongs to; None where the name does not say."""
    if _ATTENTION.search(name):
        return "attention"
    return "products" if _PRODUCTS.search(name) else None


def measured(function: Callable, inputs: list[tuple], device: str) -> dict[str, float] | None:
    """Microseconds of one call by part: of kernels on a GPU, of torch's operators on a CPU. None where the profiler
    sees no kernels."""
    function(*inputs[0])
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        for args in inputs:
            function(*args)
        if device == "cuda":
            torch.cuda.synchronize()
    return summed(seen.events(), device, len(inputs))


def summed(events: list[Any], device: str, calls: int) -> dict[str, float] | None:
    """What :func:`measured` gives, from the profiler's events."""
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if device == "cpu":
            found[_outermost(event)] += event.self_cpu_time_total / calls
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found[part_of(event.name) or "rest"] += event.time_range.elapsed_us() / calls
    return found if any(found.values()) else None


def _outermost(event: Any) -> str:
    """The part of the outermost operator around ``event`` that has one: attention may be made of products."""
    part = None
    while event is not None:
        part, event = part_of(event.name) or part, event.cpu_parent
    return part or "rest"


def works(config: Mapping[str, Any], spec: BlockSpec, batch: int, image: int, text: int, size: int,
          family: str = "qwen-image") -> list[tuple[str, Work]]:
    """The ops of a block, with their parts; ``size``: bytes of an element. Of a block without text output, what its
    image needs."""
    heads, dim = config["num_attention_heads"], config["attention_head_dim"]
    c = heads * dim
    single, second = (of(family, config, spec) for of in (blocks.is_single, blocks.has_second))

    def linear(tokens: int, k: int, n: int) -> tuple[str, Work]:
        return "products", Work(size * (batch * tokens * (k + n) + n * k + n), 2 * batch * tokens * n * k)

    def rest(work: Work) -> tuple[str, Work]:
        return "rest", work

    if spec.form == "affine":
        return [linear(tokens, c, c) for tokens in (image, text)]
    whole = spec.text == "full" and not blocks.is_last(family, config, spec)
    chunks, text_chunks = (3 if single or stream in spec.linear_ffns else 6 for stream in ("image", "text"))
    found = [linear(1, c, (chunks + 3 * second) * c), rest(ada_layer_norm_work(batch, image, c, size))]
    if spec.text == "linear":
        found.append(linear(text, c, c))
    else:
        found.append(rest(ada_layer_norm_work(batch, text, c, size)))
        if spec.form != "single" and not single:
            found.append(linear(1, c, (text_chunks if whole else 2) * c))
    turned = [_normed(family, batch, tokens, heads, dim, size) for tokens in (image, text)]
    if not whole:  # keys alone
        turned[1] = Work(turned[1].bytes // 2, turned[1].flops // 2)
    queries = image + (text if whole else 0)
    attention = Work(size * batch * c * 2 * (queries + image + text), 4 * batch * queries * (image + text) * c)
    found += [linear(image, c, 3 * c), linear(text, c, (3 if whole else 2) * c), *map(rest, turned),
              ("attention", attention)]
    if second:
        found += [rest(ada_layer_norm_work(batch, image, c, size)), linear(image, c, 3 * c), rest(turned[0]),
                  ("attention", Work(size * batch * c * 4 * image, 4 * batch * image ** 2 * c)),
                  linear(image, c, c), rest(gated_residual_work(batch, image, c, size))]
    for stream, tokens in [("image", image), ("text", text)][:2 if whole else 1]:
        is_map = stream in spec.linear_ffns
        if single and not is_map:
            found += [linear(tokens, c, 4 * c), linear(tokens, 5 * c, c),
                      rest(gated_residual_work(batch, tokens, c, size))]
            continue
        found.append(linear(tokens, c, c))
        if not is_map:
            found += [rest(gated_residual_ada_layer_norm_work(batch, tokens, c, size)), linear(tokens, c, 4 * c),
                      linear(tokens, 4 * c, c)]
        else:
            found.append(linear(tokens, c, c))
        found.append(rest(gated_residual_work(batch, tokens, c, size)))
    return [*found, *([linear(text, c, c)] if spec.text_output else [])]


def _normed(family: str, batch: int, tokens: int, heads: int, dim: int, size: int) -> Work:
    """Norms of queries and keys, turned where the family turns them."""
    work = qk_norm_rope_work(batch, tokens, heads, dim, size)
    if family != "sd3.5":
        return work
    return Work(work.bytes - 2 * tokens * (dim // 2) * 4, work.flops - 2 * 3 * batch * tokens * heads * dim)


def floors(ops: list[tuple[str, Work]], limits: Mapping[str, Any]) -> dict[str, float] | None:
    """Microseconds by part at the ceilings of a run; None unless both were measured."""
    copy, gemm = limits.get("copy_gb_s"), limits.get("gemm_tflop_s")
    if not copy or not gemm:
        return None
    found = dict.fromkeys(PARTS, 0.0)
    for part, work in ops:
        found[part] += max(work.bytes / copy / 1e3, work.flops / gemm / 1e6)
    return found
