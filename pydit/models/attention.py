"""Attention processors for diffusers' dual-stream models, on :mod:`pydit.ops`.

    transformer.set_attn_processor(QwenImageAttnProcessor())      # FluxAttnProcessor(), SD3AttnProcessor()

QK-RMSNorm and rotary embedding of both streams are one launch, and the streams are not concatenated. Projections stay
the modules they are, so LoRA on them keeps working. Results equal the stock processors' up to rounding: norm and
rotation round once instead of two or three times.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from pydit import backend, ops
from pydit.models import context_parallel
from pydit.models.thinned import text_modules

_NO_NORM = "attn: expected RMSNorm on queries and keys of both streams, got a module without"


class _Replacing:
    """A processor in the place of a stock one, which runs again where ``set_attention_backend`` chooses a backend."""

    _attention_backend = None  # diffusers sets both on every processor that has them
    _parallel_config = None
    stock = None

    @property
    def _context(self):
        """diffusers' ContextParallelConfig where this process has a part of the tokens only; None where it has all."""
        return context_parallel.config_of(self._parallel_config)

    def why_stock(self):
        """Why the stock processor is to run; "" where this one does."""
        if self.stock is not None and self._attention_backend is not None:
            return f"set_attention_backend chose {getattr(self._attention_backend, 'value', self._attention_backend)}"
        return "" if self._context is None else context_parallel.unsupported(self._context)

    def _chosen(self):
        """The stock processor with what the user has chosen; None where this one runs."""
        reason = self.why_stock()
        if not reason:
            return None
        if self._context is not None and not hasattr(self.stock, "_parallel_config"):
            name = "no stock processor" if self.stock is None else type(self.stock).__name__
            raise ValueError(f"{reason}; expected that the stock processor takes part in context parallelism, got "
                             f"{name}, which would attend to this process's tokens alone")
        chosen = copy.copy(self.stock)
        chosen._attention_backend, chosen._parallel_config = self._attention_backend, self._parallel_config
        return chosen


class QwenImageAttnProcessor(_Replacing):
    """Drop-in for ``QwenDoubleStreamAttnProcessor2_0`` of Qwen-Image (diffusers 0.39 and later).

    Text tokens that the mask leaves out, which need not be at the end, are moved there on the device. Their rows of the
    text output are 0 before the output projection; the stock processor lets them attend, but nothing reads the result.
    Blocks that a plan has thinned out (see :mod:`pydit.models.thinned`) are served too: without a text query
    the text output is None, and a single stream's text goes through the image's projections.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None,
                 attention_mask=None, image_rotary_emb=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C], mask [B, S_txt] (true or 1 is kept),
        image_rotary_emb (complex [S_img, D/2], complex [S_txt, D/2]) -> (image [B, S_img, C], text [B, S_txt, C]).

        Raises
        ------
        ValueError
            No text stream, an attention_mask (the text's mask is what this model takes), or no QK norm.
        """
        if (stock := self._chosen()) is not None:
            return stock(attn, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, attention_mask,
                         image_rotary_emb)
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states: expected the text stream, got None")
        if attention_mask is not None:
            raise ValueError("attention_mask: expected None, because Qwen-Image masks text by "
                             f"encoder_hidden_states_mask, got a mask of shape {list(attention_mask.shape)}")
        modules = text_modules(attn)
        if any(norm is None for norm in (attn.norm_q, attn.norm_k, modules.norms[1])):
            raise ValueError(_NO_NORM)
        image = _project(attn, hidden_states, "to_q", "to_k", "to_v")
        text = _project(attn, encoder_hidden_states, *modules.projections)
        tables = (None, None) if image_rotary_emb is None else [_cosine_and_sine(t) for t in image_rotary_emb]
        return _attend_both(attn, modules, image, text, tables, self._context, encoder_hidden_states_mask)


class FluxAttnProcessor(_Replacing):
    """Drop-in for diffusers' ``FluxAttnProcessor``, in dual and in single blocks.

    A single block's sequence is one stream already, text first; it is attended as an image stream without text.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        """hidden_states [B, S, C], encoder_hidden_states [B, S_txt, C] or None, image_rotary_emb (cos, sin) fp32
        [S_txt + S_img, D] with every angle twice -> (image, text) or the one stream.

        Raises
        ------
        ValueError
            An attention_mask: FLUX.1 has none.
        """
        if (stock := self._chosen()) is not None:
            return stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise ValueError(f"attention_mask: expected None, got a mask of shape {list(attention_mask.shape)}")
        fused = attn.fused_projections
        image = _project(attn, hidden_states, *(["to_qkv"] if fused else ["to_q", "to_k", "to_v"]))
        table = None if image_rotary_emb is None else [_every_second(t) for t in image_rotary_emb]
        if encoder_hidden_states is None:
            q, k = _norm_and_rotate_one((attn.norm_q, attn.norm_k), image[:2], table)
            return _output(attn, _alone(q, k, image[2], self._context))
        modules = text_modules(attn)
        text = _project(attn, encoder_hidden_states, *(["to_added_qkv"] if fused else modules.projections))
        tokens = encoder_hidden_states.shape[1]
        tables = (None, None) if table is None else ([t[tokens:] for t in table], [t[:tokens] for t in table])
        return _attend_both(attn, modules, image, text, tables, self._context)


class SD3AttnProcessor(_Replacing):
    """Drop-in for ``JointAttnProcessor2_0`` of SD3 and SD3.5, the image-only second attention of SD3.5 included.

    In the last block, whose text output nothing reads, the text gives keys and values only, and None is returned for
    it. Models without QK norm (SD3 medium) are attended as they are.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        """hidden_states [B, S_img, C], encoder_hidden_states [B, S_txt, C] or None -> (image, text) or the image alone.

        Raises
        ------
        ValueError
            An attention_mask, which these models do not have, or QK norm in some streams only.
        """
        if (stock := self._chosen()) is not None:
            return stock(attn, hidden_states, encoder_hidden_states, attention_mask)
        if attention_mask is not None:
            raise ValueError(f"attention_mask: expected None, got a mask of shape {list(attention_mask.shape)}")
        q_img, k_img, v_img = _project(attn, hidden_states, "to_q", "to_k", "to_v")
        if encoder_hidden_states is None:
            if attn.norm_q is not None:
                q_img, k_img = _norm_and_rotate_one((attn.norm_q, attn.norm_k), (q_img, k_img), None)
            return _output(attn, _alone(q_img, k_img, v_img, self._context))
        modules = text_modules(attn)
        text = _project(attn, encoder_hidden_states, *modules.projections)
        return _attend_both(attn, modules, (q_img, k_img, v_img), text, (None, None), self._context)


def _project(attn, x, *names):
    """Query, key and value [B, S, H, D] from one projection each or from one for all."""
    modules = [getattr(attn, name) for name in names if name is not None]
    packed = _adjacent(modules, x)
    if not torch.compiler.is_compiling():
        backend.record("projections", "torch", "torch's matrix product, one per stream" if packed is not None or
                       len(modules) == 1 else "torch's matrix product, one per projection: gradients are needed, or "
                       "something has replaced or moved a projection")
    if packed is None:
        found = iter([module(x) for module in modules])
    else:
        weight, bias, sizes = packed
        found = iter(F.linear(x, weight, bias).split(sizes, -1))
    projected = [None if name is None else next(found) for name in names]
    if len(projected) == 1:
        projected = projected[0].chunk(3, -1)
    dim = attn.inner_dim // attn.heads
    return [None if part is None else part.unflatten(-1, (-1, dim)) for part in projected]


def pack_projections(attn):
    """Lay the projections of each stream behind one another in memory, in place, so that one product serves them all.

    Weights, modules and names stay what they are; only where the numbers lie changes. Whatever moves a weight later
    (``to``, offloading, an adapter) just separates them again: :func:`_adjacent` looks at every call.

    Returns
    -------
    bool : whether there was anything to pack.
    """
    done = False
    for names in (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")):
        linears = [getattr(attn, name) for name in names if getattr(attn, name, None) is not None]
        if len(linears) < 2 or not _alike(linears) or any(p.requires_grad and p.grad is not None
                                                          for linear in linears for p in linear.parameters()):
            continue
        for name in ("weight", "bias"):
            parts = [getattr(linear, name) for linear in linears]
            if parts[0] is not None:
                whole = torch.cat([part.detach() for part in parts])
                for part, place in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                    part.data = place
        done = True
    return done


def _alike(linears):
    """Plain linear layers of one input width, dtype and device, all with a bias or none, that nothing listens to."""
    first = linears[0]
    return all(type(linear) is torch.nn.Linear and not linear._forward_hooks and not linear._forward_pre_hooks
               and "forward" not in linear.__dict__ and linear.in_features == first.in_features
               and linear.weight.dtype == first.weight.dtype and linear.weight.device == first.weight.device
               and linear.weight.is_contiguous() and (linear.bias is None) == (first.bias is None)
               for linear in linears)


def _adjacent(linears, x):
    """(weight, bias, sizes) of one layer in place of several whose numbers lie behind one another; None if they do not.

    Not where a gradient is needed, which would reach the first alone, nor in a graph that is being compiled.
    """
    if len(linears) < 2 or torch.compiler.is_compiling() or not _alike(linears):
        return None
    needs = torch.is_grad_enabled() and (x.requires_grad or any(linear.weight.requires_grad for linear in linears))
    if needs:
        return None
    sizes = [linear.out_features for linear in linears]
    found = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            found.append(None)
            continue
        end = parts[0].data_ptr()
        storage = parts[0].untyped_storage().data_ptr()
        for part in parts:
            if part.data_ptr() != end or part.untyped_storage().data_ptr() != storage:
                return None
            end += part.numel() * part.element_size()
        shape = (sum(sizes), *parts[0].shape[1:])
        found.append(torch.as_strided(parts[0].detach(), shape, parts[0].stride()))
    return (*found, sizes)


def _attend_both(attn, modules, image, text, tables, context, mask=None):
    """(image, text) after attention, of text where the mask is true; None for text that does not ask.

    context : diffusers' ContextParallelConfig, or None where this process has all tokens.
    """
    asks = text[0] is not None
    # Without a text query the keys stand in for it: one launch, and what it makes of them is not used.
    q_txt, k_txt, v_txt = text if asks else (text[1], *text[1:])
    q_img, k_img, v_img = image
    norms = (attn.norm_q, attn.norm_k, *(modules.norms if asks else (modules.norms[1],) * 2))
    if any(norm is not None for norm in norms):
        q_img, k_img, q_txt, k_txt = _norm_and_rotate(norms, image, (q_txt, k_txt), tables)
    arguments = (q_img, k_img, v_img, q_txt if asks else None, k_txt, v_txt, None if mask is None else mask.bool())
    out_img, out_txt = (context_parallel.masked_attention(*arguments) if context is None else
                        context_parallel.joint_attention(*arguments, context))
    if not asks:
        return _output(attn, out_img), None
    out_txt = out_txt.flatten(2)
    for module in modules.output:
        out_txt = module(out_txt)
    return _output(attn, out_img), out_txt


def _norm_and_rotate(norms, image, text, tables):
    """q_img, k_img, q_txt, k_txt after RMSNorm and rotation by the tables of (image, text)."""
    if any(norm is None for norm in norms):
        raise ValueError(_NO_NORM)
    tensors = (*image[:2], *text[:2])
    if any(map(_elsewhere, norms)):
        return tuple(_called(norm, x, table) for norm, x, table in
                     zip(norms, tensors, (tables[0], tables[0], tables[1], tables[1]), strict=True))
    return ops.joint_qk_norm_rope(*tensors, [norm.weight for norm in norms], *tables, eps=norms[0].eps)


def _norm_and_rotate_one(norms, tensors, table):
    """q, k of one stream after RMSNorm and rotation."""
    if any(map(_elsewhere, norms)):
        return tuple(_called(norm, x, table) for norm, x in zip(norms, tensors, strict=True))
    return ops.qk_norm_rope(*tensors, norms[0].weight, norms[1].weight, table, eps=norms[0].eps)


def _elsewhere(norm):
    """Whether a norm's weight only comes when the norm is called, as offloading layer by layer leaves it."""
    return "forward" in norm.__dict__


def _called(norm, x, table):
    """A norm called as it is, then the rotation."""
    backend.record("qk_norm_rope", "torch", "a hook brings the norm's weight when the norm is called")
    x = norm(x)
    return x if table is None else ops.reference.rotate(ops.reference.wide(x), *table).to(x.dtype)


def _alone(q, k, v, context):
    """Attention of one stream."""
    arguments = (q, k, v, None, k[:, :0], v[:, :0])
    return (ops.joint_attention(*arguments) if context is None else
            context_parallel.joint_attention(*arguments, None, context))[0]


def _output(attn, x):
    """The output projection and, where there is one, its dropout; a single block of FLUX.1 projects by itself."""
    x = x.flatten(2)
    for module in getattr(attn, "to_out", ()):
        x = module(x)
    return x


def _cosine_and_sine(rotation):
    """(cos, sin) fp32 [S, D/2], contiguous, of unit complex numbers."""
    def make():
        parts = torch.view_as_real(rotation).float()
        return parts[..., 0].contiguous(), parts[..., 1].contiguous()
    return _once(rotation, make)


def _every_second(table):
    """fp32 [S, D/2], contiguous, of a table that has every angle twice."""
    return _once(table, lambda: table[:, ::2].float().contiguous())


_MADE = WeakTensorKeyDictionary()  # a table as the model has it -> (its version, what the kernels read)


def _once(key, make):
    """What ``make`` makes of a table that all blocks share, made once and kept for as long as the table lives."""
    if torch.compiler.is_compiling():
        return make()  # one graph finds the common expression by itself
    version = None if key.is_inference() else key._version
    found = _MADE.get(key)
    if found is not None and found[0] == version:
        return found[1]
    made = make()
    # Memory of a CUDA graph's pool is written again with every replay; and a leaf must not keep a graph alive.
    if not key.requires_grad and not (key.is_cuda and torch.cuda.is_current_stream_capturing()):
        _MADE[key] = (version, made)
    return made
