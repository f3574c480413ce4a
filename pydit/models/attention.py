"""Attention processors for diffusers' dual-stream models, on :mod:`pydit.ops`.

    transformer.set_attn_processor(QwenImageAttnProcessor())      # FluxAttnProcessor(), SD3AttnProcessor()

QK-RMSNorm and rotary embedding of both streams are one launch, and the streams are not concatenated. Projections stay
the modules they are, so LoRA on them keeps working. Results equal the stock processors' up to rounding: norm and
rotation round once instead of two or three times.
"""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from pydit import backend, ops
from pydit.models import context_parallel
from pydit.models.projections import adjacent, alike, is_watched
from pydit.models.thinned import text_modules
from pydit.ops import direct
from pydit.ops.direct import ops_for

try:
    from diffusers.models import attention_dispatch, normalization
    _RMS_NORMS = (torch.nn.RMSNorm, normalization.RMSNorm)
except ImportError:  # without diffusers nothing chooses a backend
    attention_dispatch = None
    _RMS_NORMS = (torch.nn.RMSNorm,)

_ONE_PRODUCT = "torch's matrix product, one per stream"
_NO_NORM = "attn: expected RMSNorm on queries and keys of both streams, got a module without"


def active_backend():
    """The backend that diffusers gives processors without one of their own, chosen by ``with attention_backend(...)``,
    DIFFUSERS_ATTN_BACKEND or another model's ``set_attention_backend``; "" for "native", the default."""
    active = None if attention_dispatch is None else attention_dispatch._AttentionBackendRegistry._active_backend
    return "" if active is None or active == "native" else active.value


def scores_are_left_out():
    """Whether diffusers' layer skip (``skip_attention_scores``) is at work, which watches torch's attention for it."""
    return not torch.compiler.is_compiling() and any(
        type(mode).__name__ == "AttentionScoreSkipFunctionMode"
        for mode in torch.overrides._get_current_function_mode_stack())


def known_to_layer_skip(*processors):
    """Enter processors of Qwen-Image where diffusers' layer skip looks up what an attention without scores returns."""
    try:
        from diffusers.hooks import _helpers
        made = _helpers.AttentionProcessorMetadata(
            skip_processor_output_fn=_helpers._skip_proc_output_fn_Attention_QwenDoubleStreamAttnProcessor2_0)
    except (ImportError, AttributeError):  # without diffusers, or one that does not know Qwen-Image there
        return
    for processor in processors:  # not by register(), which imports a dozen other models first
        _helpers.AttentionProcessorRegistry._registry[processor] = made


class Replacing:
    """A processor that replaces a stock one, which still runs where ``set_attention_backend`` or
    ``with attention_backend(...)`` has chosen a backend."""

    _attention_backend = None  # diffusers sets both on every processor that has them
    _parallel_config = None
    stock = None
    dispatched = True  # whether the stock processor lets diffusers choose a backend
    options: frozenset[str] = frozenset()  # what attend takes beside the streams and kit, the ops to run on

    @property
    def context(self):
        """diffusers' ContextParallelConfig where this process has a part of the tokens only; None where it has all."""
        return context_parallel.config_of(self._parallel_config)

    def why_stock(self):
        """Why the stock processor is to run; "" where this one does."""
        if self.stock is not None and self._attention_backend is not None:
            return f"set_attention_backend chose {getattr(self._attention_backend, 'value', self._attention_backend)}"
        if self.stock is not None and self.dispatched and (name := active_backend()):
            return f"diffusers' attention_backend chose {name}"
        if self.stock is not None and scores_are_left_out():
            return "diffusers' perturbed attention guidance leaves out the scores"
        return "" if self.context is None else context_parallel.unsupported(self.context)

    def masked(self, args, kwargs):
        """Whether a call has a mask that the stock processor takes and this one does not."""
        return False

    def chosen(self, masked=False, listened=False):
        """The stock processor with what the user has chosen; None where this one runs. ``listened``: something is
        handed attention's outputs, of which this one would leave one out."""
        reason = self.why_stock()
        if not reason and masked and self.stock is not None:
            reason = "the stock processor runs where an attention_mask comes"
        if not reason and listened and self.stock is not None and self.context is None:
            reason = "something listens to attention whose text output is not read: the stock processor computes it too"
        if not reason:
            return None
        backend.record("joint_attention", "torch", reason)
        if self.context is not None and not hasattr(self.stock, "_parallel_config"):
            name = "no stock processor" if self.stock is None else type(self.stock).__name__
            raise ValueError(f"{reason}; expected that the stock processor takes part in context parallelism, got "
                             f"{name}, which would attend to this process's tokens alone")
        chosen = copy.copy(self.stock)
        chosen._attention_backend, chosen._parallel_config = self._attention_backend, self._parallel_config
        return chosen


def _projected(attend):
    """The ``__call__`` for an ``attend``, with its signature, which diffusers inspects: returns the streams after
    attention and its output projections, or the image alone if it came alone."""
    @functools.wraps(attend)
    def call(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        # Caches of diffusers copy both outputs, also where a block does not read the second.
        listened = getattr(attn, "context_pre_only", None) and is_watched(attn)
        if (stock := self.chosen(self.masked(args, kwargs), listened)) is not None:
            return stock(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        image, text = attend(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        for module in getattr(attn, "to_out", ()):  # a single block of FLUX.1 projects by itself
            image = module(image)
        if text is not None:
            for module in text_modules(attn).output:
                text = module(text)
        return image if encoder_hidden_states is None else (image, text)
    return call


class QwenImageAttnProcessor(Replacing):
    """Drop-in for ``QwenDoubleStreamAttnProcessor2_0`` of Qwen-Image (diffusers 0.39 and later).

    Text tokens that the mask leaves out, which need not be at the end, are moved there on the device. Their rows of the
    text output are 0 before the output projection; the stock processor lets them attend, but nothing reads the result.
    Blocks that a plan has thinned out (see :mod:`pydit.models.thinned`) are served too: without a text query
    the text output is None, and a single stream's text goes through the image's projections.
    """

    options = frozenset({"encoder_hidden_states_mask", "attention_mask", "image_rotary_emb"})

    def attend(self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None,
               attention_mask=None, image_rotary_emb=None, kit=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C], mask [B, S_txt] (true or 1 is kept),
        image_rotary_emb (complex [S_img, D/2], complex [S_txt, D/2]) -> what goes into the output projections, (image
        [B, S_img, H D], text [B, S_txt, H D] or None).

        Raises
        ------
        ValueError
            No text stream, an attention_mask (the text's mask is what this model takes), or no QK norm.
        """
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states: expected the text stream, got None")
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, because Qwen-Image masks text by "
                             f"encoder_hidden_states_mask, got a mask of shape {list(attention_mask.shape)}")
        if any(norm is None for norm in (attn.norm_q, attn.norm_k, text_modules(attn).norms[1])):
            raise ValueError(_NO_NORM)
        kit = kit or ops_for(hidden_states, encoder_hidden_states)
        form = _rotation if kit is direct else _cosine_and_sine
        tables = (None, None) if image_rotary_emb is None else [form(t) for t in image_rotary_emb]
        return _attend(kit, attn, hidden_states, encoder_hidden_states, tables, self.context,
                       encoder_hidden_states_mask)

    __call__ = _projected(attend)


known_to_layer_skip(QwenImageAttnProcessor)


class FluxAttnProcessor(Replacing):
    """Drop-in for diffusers' ``FluxAttnProcessor``, in dual and in single blocks.

    A single block's sequence is one stream already, text first; it is attended as an image stream without text. Where
    an attention_mask comes, by joint_attention_kwargs, the stock processor that this one has replaced runs.
    """

    options = frozenset({"attention_mask", "image_rotary_emb"})

    def masked(self, args, kwargs):
        return (args[0] if args else kwargs.get("attention_mask")) is not None

    def attend(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None,
               kit=None):
        """hidden_states [B, S, C], encoder_hidden_states [B, S_txt, C] or None, image_rotary_emb (cos, sin) fp32
        [S_txt + S_img, D] with every angle twice -> what goes into the output projections, (image, text or None).

        Raises
        ------
        ValueError
            An attention_mask, where this processor has not replaced a stock one.
        """
        if attention_mask is not None:
            raise ValueError(f"attention_mask: expected None, got a mask of shape {list(attention_mask.shape)}")
        kit = kit or ops_for(hidden_states, encoder_hidden_states)
        tokens = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        tables = (None, None)
        if image_rotary_emb is not None and kit is direct:
            table = _rotation_of_every_second(*image_rotary_emb)
            tables = (table[tokens:], table[:tokens]) if tokens else (table, None)
        elif image_rotary_emb is not None:
            table = [_every_second(t) for t in image_rotary_emb]
            tables = [t[tokens:] for t in table], [t[:tokens] for t in table]
        return _attend(kit, attn, hidden_states, encoder_hidden_states, tables, self.context)

    __call__ = _projected(attend)


class SD3AttnProcessor(Replacing):
    """Drop-in for ``JointAttnProcessor2_0`` of SD3 and SD3.5, the image-only second attention of SD3.5 included.

    In the last block, whose text output nothing reads, the text gives keys and values only, and None is returned for
    it; its query's weights get no gradient, where the stock processor gives them zeros. Models without QK norm (SD3
    medium) are attended as they are.
    """

    options = frozenset({"attention_mask"})
    dispatched = False  # by torch's scaled_dot_product_attention itself

    def attend(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, kit=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C] or None -> what goes into the output
        projections, (image, text or None).

        Raises
        ------
        ValueError
            An attention_mask, which these models do not have, or QK norm in some streams only.
        """
        if attention_mask is not None:
            raise ValueError(f"attention_mask: expected None, got a mask of shape {list(attention_mask.shape)}")
        kit = kit or ops_for(hidden_states, encoder_hidden_states)
        return _attend(kit, attn, hidden_states, encoder_hidden_states, (None, None), self.context)

    __call__ = _projected(attend)


def _attend(kit, attn, image, text, tables, context, mask=None):
    """Both streams after attention, [B, S, H D]: text where the mask is true, None without a text or its query.

    kit : :mod:`pydit.ops` or :mod:`pydit.ops.direct`, with tables in the form that its ops take.
    context : diffusers' ContextParallelConfig, or None where this process has all tokens.
    """
    streams = [_Stream(image, ("to_q", "to_k", "to_v"), (attn.norm_q, attn.norm_k), tables[0])]
    if getattr(attn, "fused_projections", False):
        streams[0] = streams[0]._replace(names=("to_qkv",))
    if text is not None:
        modules = text_modules(attn)
        # Without a text query the layers one by one: diffusers leaves fused_projections set after unfusing.
        names, fused = modules.projections, getattr(attn, "fused_projections", False)
        if fused and names[0] is not None:  # a thinned block may take the text through the image's projections
            names = ("to_qkv",) if names[0] == "to_q" else ("to_added_qkv",)
        streams.append(_Stream(text, names, modules.norms, tables[1]))
    if kit is direct and context is None and (out := _packed(attn, streams, mask)) is not None:
        return (out, None) if text is None else (out[:, :image.shape[1]], out[:, image.shape[1]:])
    found = _in_one_launch(kit, attn, streams) or _one_by_one(kit, attn, streams)
    q_img, k_img, v_img = found[:3]
    q_txt, k_txt, v_txt = found[3:] if text is not None else (None, k_img[:, :0], v_img[:, :0])
    arguments = (q_img, k_img, v_img, q_txt, k_txt, v_txt, None if mask is None else mask.bool())
    if context is not None:
        out_img, out_txt = context_parallel.joint_attention(*arguments, context)
    elif mask is not None:
        out_img, out_txt = context_parallel.masked_attention(*arguments)
    else:
        out_img, out_txt = kit.joint_attention(*arguments[:6])
    return out_img.flatten(2), None if q_txt is None else out_txt.flatten(2)


class _Stream(NamedTuple):
    """x [B, S, C]; names of its projections, of query (None: there is none), key and value, or of all in one; norms of
    query and key; (cos, sin) or None, and for :mod:`pydit.ops.direct` one complex table in their place."""

    x: torch.Tensor
    names: tuple[str | None, ...]
    norms: tuple[torch.nn.Module | None, torch.nn.Module | None]
    table: list[torch.Tensor] | torch.Tensor | None


def _packed(attn, streams, mask):
    """All streams behind one another after attention, by :func:`pydit.ops.direct.packed_attention`; None where
    something other than one product per stream makes queries, keys and values, or where a norm is missing."""
    products, weights, dim = [], [], attn.inner_dim // attn.heads
    for x, names, norms, _ in streams:
        if len(names) != 3 or None in names or None in norms:
            return None
        product = adjacent(attn, [getattr(attn, name) for name in names], x)
        if product is None or len({*product[2]}) != 1 or not direct.attends(x):
            return None
        products.append(product)
        weights += [norm.weight for norm in norms]
    if not _fuse([norm for stream in streams for norm in stream.norms]) or any(weight is None for weight in weights):
        return None
    packed = []
    for (x, *_), (weight, bias, sizes) in zip(streams, products, strict=True):
        backend.record("projections", "torch", _ONE_PRODUCT)
        packed.append(F.linear(x, weight, bias).view(*x.shape[:2], 3, sizes[0] // dim, dim))
    tables = [stream.table for stream in streams]
    keep = None if mask is None else mask.bool()[:, :, None, None]
    return direct.packed_attention(packed, weights, None if tables[0] is None else tables,
                                   eps=streams[0].norms[0].eps, keep=keep).flatten(2)


def _in_one_launch(kit, attn, streams):
    """Query, key and value of each stream, normed and rotated, by one launch for all; None where that is impossible."""
    dim = attn.inner_dim // attn.heads
    if not kit.in_one_launch(streams[0].x) or dim not in backend.KERNEL_HEAD_DIMS:
        return None
    arguments, found_norms = [], []
    for x, names, norms, table in streams:
        linears = [getattr(attn, name) for name in names if name is not None]
        norms = norms[1:] if names[0] is None else norms
        if not alike(linears) or linears[0].weight.dtype != x.dtype:
            return None
        parts = [(linear.weight, linear.bias) for linear in linears]
        if len(names) == 1:
            (weight, bias), = parts
            parts = zip(weight.chunk(3), [None] * 3 if bias is None else bias.chunk(3), strict=True)
        weights, biases = zip(*([(None, None)] if names[0] is None else []), *parts, strict=True)
        found_norms += norms
        arguments.append((x, weights, biases, [None, *(n and n.weight for n in norms)][-2:], table))
    if not _fuse(found_norms, arguments[0][0].dtype):
        return None
    if len(streams) == 1:
        arguments.append((streams[0].x[:, :0], *arguments[0][1:4], None))
    found = kit.joint_qkv(*(part for pair in zip(*arguments, strict=True) for part in pair), head_dim=dim,
                          eps=found_norms[0].eps)
    return found[:3 * len(streams)]


def _one_by_one(kit, attn, streams):
    """The same by a product per stream or per projection, then norm and rotation of both streams in one launch."""
    parts = [_project(attn, stream.x, *stream.names) for stream in streams]
    # Without a text query the keys stand in for it: one launch, and what it makes of them is not used.
    turned = [(k if q is None else q, k) for q, k, _ in parts]
    norms = [stream.norms[1:] * 2 if part[0] is None else stream.norms
             for stream, part in zip(streams, parts, strict=True)]
    tables = [stream.table for stream in streams]
    if any(norm is not None for pair in norms for norm in pair):
        turned = _norm_and_rotate(kit, norms, turned, tables)
    return [x for (q, k), (asks, _, v) in zip(turned, parts, strict=True)
            for x in (None if asks is None else q, k, v)]


def _project(attn, x, *names):
    """Query, key and value [B, S, H, D] from one projection each or from one for all."""
    modules = [getattr(attn, name) for name in names if name is not None]
    packed = adjacent(attn, modules, x)
    if not torch.compiler.is_compiling():
        backend.record("projections", "torch", _ONE_PRODUCT if packed is not None or len(modules) == 1 else
                       "torch's matrix product, one per projection: gradients are needed, or something has replaced "
                       "or moved a projection")
    dim = attn.inner_dim // attn.heads
    if packed is None:
        found = [module(x).unflatten(-1, (-1, dim)) for module in modules]
        found = found[0].chunk(3, 2) if len(names) == 1 else found
    else:
        weight, bias, sizes = packed
        heads = F.linear(x, weight, bias).unflatten(-1, (-1, dim))
        found = heads.split_with_sizes([size // dim for size in sizes], 2)
    return [None, *found] if names[0] is None else found


def _norm_and_rotate(kit, norms, streams, tables):
    """(q, k) of one stream or two after RMSNorm and rotation."""
    flat = [norm for pair in norms for norm in pair]
    if any(norm is None for norm in flat):
        raise ValueError(_NO_NORM)
    if not _fuse(flat, streams[0][0].dtype):
        return [tuple(_called(norm, x, table) for norm, x in zip(pair, stream, strict=True))
                for pair, stream, table in zip(norms, streams, tables, strict=True)]
    if len(streams) == 1:
        return [kit.qk_norm_rope(*streams[0], *(norm.weight for norm in flat), tables[0], eps=flat[0].eps)]
    q_img, k_img, q_txt, k_txt = kit.joint_qk_norm_rope(*streams[0], *streams[1], [norm.weight for norm in flat],
                                                        *tables, eps=flat[0].eps)
    return [(q_img, k_img), (q_txt, k_txt)]


def _fuse(norms, dtype=None):
    """Whether norms are the RMSNorm that the ops compute, alike, and nothing listens to them or has replaced their
    forward, as offloading layer by layer does, which brings the weight only then. dtype : that weights must have."""
    return all(norm is not None and type(norm) in _RMS_NORMS and getattr(norm, "bias", None) is None
               and not is_watched(norm) and norm.eps is not None and norm.eps == norms[0].eps
               and (dtype is None or norm.weight is None or norm.weight.dtype == dtype) for norm in norms)


def _called(norm, x, table):
    """A norm called as it is, then the rotation."""
    backend.record("qk_norm_rope", "torch", "something listens to a norm, has replaced its forward, or stands in the "
                                            "place of RMSNorm: it is called as it is; or its weight has another dtype "
                                            "(torch.autocast)")
    dtype, x = x.dtype, norm(x)
    if table is None:
        return x.to(dtype)
    cos, sin = (table.real, table.imag) if isinstance(table, torch.Tensor) else table
    return ops.reference.rotate(ops.reference.wide(x), cos, sin).to(dtype)


def _cosine_and_sine(rotation):
    """(cos, sin) fp32 [S, D/2], contiguous, of unit complex numbers."""
    def make():
        parts = torch.view_as_real(rotation).float()
        return parts[..., 0].contiguous(), parts[..., 1].contiguous()
    return _once(make, rotation)


def _rotation(rotation):
    """The same as :mod:`pydit.ops.direct` takes it."""
    return rotation.to(torch.complex64)


def _every_second(table):
    """fp32 [S, D/2], contiguous, of a table that has every angle twice."""
    return _once(lambda: table[:, ::2].float().contiguous(), table)


def _rotation_of_every_second(cos, sin):
    """complex64 [S, D/2] of two tables that have every angle twice."""
    return _once(lambda: torch.complex(cos[:, ::2].float(), sin[:, ::2].float()), cos, sin)


# A table as the model has it -> stream -> (its version, what goes with it, what ops read).
_MADE = WeakTensorKeyDictionary()


def _once(make, key, *others):
    """What ``make`` makes of tables that all blocks share, made once and kept for as long as the first one lives.

    Once for each stream: another would read it before it is written, and its memory would be free before it is read.
    """
    if torch.compiler.is_compiling():
        return make()  # one graph finds the common expression by itself
    versions = [None if table.is_inference() else table._version for table in (key, *others)]
    capturing = key.is_cuda and torch.cuda.is_current_stream_capturing()
    stream, kept = backend.stream_of(key), _MADE.get(key) or {}
    # A capture begins with a synchronisation: what any stream has made is there.
    for found in tuple(kept.values()) if capturing else filter(None, (kept.get(stream),)):
        if found[0] == versions and all(a is b for a, b in zip(found[1], others, strict=True)):
            return found[2]
    made = make()
    # Memory of a CUDA graph's pool is written again with every replay; and a leaf must not keep a graph alive.
    if not key.requires_grad and not capturing:
        _MADE[key] = {**kept, stream: (versions, others, made)}
    return made
