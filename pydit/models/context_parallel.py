"""Joint attention over tokens that diffusers' context parallelism has split over processes.

``enable_parallelism(config=ContextParallelConfig(...))`` gives every process a part of both streams and tells the
attention processors. Queries must still meet the keys of all processes. Two ways, which combine as in diffusers:

    Ulysses (Jacobs et al. 2023)   an exchange before attention, from a part of the tokens to a part of the heads, and
                                   one after it, back
    ring (Liu et al. 2023)         own queries against the keys of one process after another, merged by their
                                   log-sum-exp; keys are gathered while the own ones are attended to

Differentiable: gradients of keys and values that several processes have read are added up where the keys came from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from pydit import backend, ops


def config_of(parallel_config: Any) -> Any:
    """diffusers' ContextParallelConfig in what ``enable_parallelism`` left on a processor or a model; None without."""
    return getattr(parallel_config, "context_parallel_config", None)


def unsupported(config: Any) -> str:
    """Why this module cannot take a configuration; "" if it can."""
    for name in ("ulysses_anything", "ring_anything"):
        if getattr(config, name, False):
            return f"{name}: parts of unequal length"
    return ""


def describe(config: Any) -> str:
    """As "Ulysses over 2 processes"."""
    ways = [f"{name} over {degree} processes" for name, degree in
            (("Ulysses", config.ulysses_degree), ("ring", config.ring_degree)) if degree > 1]
    return "context parallelism, " + " and ".join(ways)


def joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, mask, config):
    """Attention of this process's queries over the keys of all.

    Parameters
    ----------
    q_img, k_img, v_img, q_txt, k_txt, v_txt : as in :func:`pydit.ops.joint_attention`: this process's tokens, as many
        on every process. mask : bool [B, S_txt] of this process's text tokens, True is kept, or None.
    config : diffusers' ContextParallelConfig, set up.

    Returns
    -------
    (out_img, out_txt) as the op, out_txt in the order of the tokens and 0 where the mask is False.

    Raises
    ------
    ValueError
        Ulysses' processes do not divide the heads, or a mask of another length.
    """
    backend.record("context_parallel", "pydit", describe(config))
    if mask is not None and mask.shape[1] != k_txt.shape[1]:
        raise ValueError(f"encoder_hidden_states_mask: expected a mask of this process's {k_txt.shape[1]} text tokens, "
                         f"got {mask.shape[1]}: the model's cp_plan must split the mask as it splits the text")
    ulysses = config._ulysses_mesh.get_group() if config.ulysses_degree > 1 else None
    if ulysses is not None:
        heads = q_img.shape[2]
        if heads % config.ulysses_degree:
            raise ValueError(f"ulysses_degree: expected a divisor of the block's {heads} heads, "
                             f"got {config.ulysses_degree}")
        q_img, k_img, v_img = _to_heads((q_img, k_img, v_img), ulysses)
        text = _to_heads((k_txt, v_txt) if q_txt is None else (k_txt, v_txt, q_txt), ulysses)
        k_txt, v_txt, q_txt = (*text, None) if q_txt is None else text
        mask = None if mask is None else torch.cat(_gathered(mask, ulysses).unbind(0), 1)
    tensors = (q_img, k_img, v_img, q_txt, k_txt, v_txt)
    if config.ring_degree > 1:
        out_img, out_txt = _ring(*tensors, mask, config._ring_mesh.get_group())
    else:
        out_img, out_txt = masked_attention(*tensors, mask)
    if ulysses is not None:
        out_img = _to_tokens(out_img, ulysses)
        out_txt = None if out_txt is None else _to_tokens(out_txt, ulysses)
    return out_img, out_txt


def masked_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt, mask):
    """:func:`pydit.ops.joint_attention` with a mask bool [B, S_txt], or None, that may have holes."""
    if mask is None:
        return ops.joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt)
    queries = () if q_txt is None else (q_txt,)
    lens, order, k_txt, v_txt, *queries = ops.pack_text(mask, k_txt, v_txt, *queries)
    out_img, out_txt = ops.joint_attention(q_img, k_img, v_img, queries[0] if queries else None, k_txt, v_txt,
                                           txt_lens=lens)
    return out_img, ops.unpack_text(order, out_txt) if queries else None


def _ring(q_img, k_img, v_img, q_txt, k_txt, v_txt, mask, group):
    tokens, processes, rank = k_img.shape[1], dist.get_world_size(group), dist.get_rank(group)
    own = torch.stack([torch.cat(pair, 1) for pair in ((k_img, k_txt), (v_img, v_txt))])
    buffer, work = _start_gather(own.detach(), group)
    masks = [None] * processes if mask is None else _gathered(mask, group).unbind(0)

    def attend(pair, keep):
        """((out_img, lse_img), (out_txt, lse_txt)) over the keys of one process."""
        (k_img, k_txt), (v_img, v_txt) = ((x[:, :tokens], x[:, tokens:]) for x in pair)
        if keep is None:
            out_img, out_txt, lse_img, lse_txt = ops.joint_attention(q_img, k_img, v_img, q_txt, k_txt, v_txt,
                                                                     return_lse=True)
            return (out_img, lse_img), (out_txt, lse_txt)
        lens, _, k_txt, v_txt = ops.pack_text(keep, k_txt, v_txt)
        keys = (k_img, v_img, k_txt, v_txt, lens)
        return _ask(q_img, *keys), (None, None) if q_txt is None else _ask(q_txt, *keys)

    parts = [attend(own, masks[rank])]
    work.wait()
    pairs = _Gather.apply(own, buffer, group)
    for step in range(1, processes):  # each begins at its neighbour, so that not all read one part at a time
        other = (rank + step) % processes
        parts.append(attend(pairs[other], masks[other]))
    images, texts = zip(*parts, strict=True)
    out_img = ops.merge_attention(*zip(*images, strict=True))[0]
    if q_txt is None:
        return out_img, None
    out_txt = ops.merge_attention(*zip(*texts, strict=True))[0]
    return out_img, out_txt if mask is None else torch.where(mask[:, :, None, None], out_txt, 0)


def _ask(queries, k_img, v_img, k_txt, v_txt, lens):
    """(out, lse) of any number of queries over the keys of both streams, text's as far as its length.

    A length bounds text queries as well as keys, and the text of one process may be longer than that of another. So
    text asks as an image stream, whose keys are as many of the image's as there are queries; the others go before the
    text's.
    """
    found = []
    for part in queries.split(max(1, k_img.shape[1]), 1):
        n = part.shape[1]
        rest = k_img.shape[1] - n
        after = [torch.cat((image[:, n:], text), 1) if rest else text
                 for image, text in ((k_img, k_txt), (v_img, v_txt))]
        out, _, lse, _ = ops.joint_attention(part, k_img[:, :n], v_img[:, :n], None, *after, txt_lens=lens + rest,
                                             return_lse=True)
        found.append((out, lse))
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _to_heads(tensors, group):
    """n of [B, S, H, D], of a part of the tokens -> n of [B, P S, H / P, D], of a part of the heads."""
    processes = dist.get_world_size(group)
    x = torch.stack(tensors).unflatten(3, (processes, -1)).movedim(3, 0)  # [P, n, B, S, H / P, D]
    return _Exchange.apply(x, group).permute(1, 2, 0, 3, 4, 5).flatten(2, 3).unbind(0)


def _to_tokens(x, group):
    """The way back for one tensor: [B, P S, H / P, D] -> [B, S, H, D]."""
    x = x.unflatten(1, (dist.get_world_size(group), -1)).movedim(1, 0)  # [P, B, S, H / P, D]
    return _Exchange.apply(x, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _start_gather(x, group):
    """A buffer [P, *x.shape] that x of every process is on its way to, and what to wait for."""
    x = x.contiguous()
    buffer = x.new_empty((dist.get_world_size(group), *x.shape))
    return buffer, dist.all_gather_into_tensor(buffer.flatten(0, 1), x, group, async_op=True)


def _gathered(mask, group):
    """A mask of every process, bool [P, *mask.shape]."""
    buffer, work = _start_gather(mask.to(torch.uint8), group)
    work.wait()
    return buffer.bool()


def _all_to_all(x, group):
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Exchange(torch.autograd.Function):
    """Row p of x [P, ...] to process p; row p of the result came from there."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_to_all(x.contiguous(), group)

    @staticmethod
    def backward(ctx, grad):
        return _all_to_all(grad.contiguous(), ctx.group), None


class _Gather(torch.autograd.Function):
    """A gathered buffer as a function of this process's part of it."""

    @staticmethod
    def forward(ctx, own, buffer, group):
        ctx.group = group
        return buffer

    @staticmethod
    def backward(ctx, grad):
        return _all_to_all(grad.contiguous(), ctx.group).float().sum(0).to(grad.dtype), None, None
